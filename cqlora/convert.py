"""`python -m cqlora.convert`: Meta's raw weights to a Hugging Face folder, extended where asked for."""

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.cli import run_program
from cqlora.config.checks import check_fields
from cqlora.vocab.config import VocabConfig, accept_path_in_command_line, refuse_distilled
from cqlora.weights.sizes import parse_size


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Raw weights and where the converted model goes."""

    input_dir: str = MISSING
    """Folder with params.json and consolidated.NN.pth, or its parent together with model_size."""
    output_dir: str = MISSING
    """Folder that the converted model is written to."""
    model_size: str = ""
    """7B, 13B, 30B (33B), 65B, 70B, 8B, 1B, 3B: checked against the files; empty takes what is there."""
    llama_version: str = "auto"
    """1, 2, 3 or 3.1; no file says it, so auto tells by norm_eps, layers, heads and tokenizer."""
    max_shard_size: str = "4GB"
    """Largest file of weights, such as 4GB or 500MiB."""
    vocab: VocabConfig = MISSING

    def __post_init__(self) -> None:
        check_fields(self, paths=("input_dir", "output_dir"), filled=("input_dir", "output_dir"))
        parse_size("max_shard_size", self.max_shard_size)
        refuse_distilled(self.vocab, f"input_dir={self.input_dir}")


def convert(config: ConvertConfig) -> None:
    """Convert and say what came out."""
    from cqlora.weights.convert import convert as convert_weights

    done = convert_weights(
        Path(config.input_dir),
        Path(config.output_dir),
        config.model_size,
        config.llama_version,
        parse_size("max_shard_size", config.max_shard_size),
        config.vocab,
    )
    if done.extension:
        print(done.extension.report.table())
    print(
        f"{config.output_dir}: {done.checkpoint.parameters:,} parameters converted, taken as Llama "
        f"{done.llama_version}; say llama_version=… if it is another."
    )


def main() -> None:
    """The verb `convert`."""
    accept_path_in_command_line()
    ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)
    run_program("convert", ConvertConfig, convert)


if __name__ == "__main__":
    main()
