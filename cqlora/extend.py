"""`python -m cqlora.extend`: adds a Chinese vocabulary to a Hugging Face folder or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.cli import run_program
from cqlora.config.checks import check_fields, require_used
from cqlora.errors import ConfigError
from cqlora.vocab.config import VocabConfig, accept_path_in_command_line, refuse_distilled
from cqlora.weights.sizes import parse_size


@dataclass(kw_only=True, slots=True)
class ExtendConfig:
    """A base, what to add, and where the extended base goes."""

    base: str = MISSING
    """Hugging Face folder or GGUF file."""
    output_dir: str = MISSING
    """Folder that the extended base is written to."""
    vocab: VocabConfig = MISSING
    copy: bool = False
    """Copy the shards that do not change instead of hard-linking them."""
    max_shard_size: str = "4GB"
    """Largest shard written from a GGUF file; a folder keeps its shards."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("base", "output_dir"), filled=("base", "output_dir"))
        parse_size("max_shard_size", self.max_shard_size)
        if not Path(self.base).exists():
            raise ConfigError(f"base={self.base} does not exist; give a Hugging Face folder or a GGUF file.")
        is_folder = Path(self.base).is_dir()
        if not is_folder:
            refuse_distilled(self.vocab, f"base={self.base}")
        require_used(self, "copy", is_folder, "a folder as base")
        require_used(self, "max_shard_size", not is_folder, "a GGUF file as base")


def extend(config: ExtendConfig) -> None:
    """Extend the base and print what the vocabulary bought."""
    from cqlora.weights.extend import extend as extend_base

    max_shard_size = parse_size("max_shard_size", config.max_shard_size)
    extension = extend_base(Path(config.base), Path(config.output_dir), config.vocab, max_shard_size, config.copy)
    print(extension.report.table())
    print(f"{config.output_dir}: {extension.matrix_rows:,} rows, new ones from {extension.first_row:,} on.")


def main() -> None:
    """The verb `extend`."""
    accept_path_in_command_line()
    ConfigStore.instance().store(name="extend_schema", node=ExtendConfig)
    run_program("extend", ExtendConfig, extend)


if __name__ == "__main__":
    main()
