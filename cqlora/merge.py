"""`python -m cqlora.merge`: adapters into their base, as safetensors, a GGUF file or an NF4 folder."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.cli import run_program
from cqlora.config.checks import check_fields, check_path, require_positive, require_range, require_used
from cqlora.config.choices import Device, GgufType, MergeOnto, MergeRows, ModelFormat, Precision
from cqlora.config.differences import parse_differences
from cqlora.errors import ConfigError
from cqlora.launch.settle import choose_precision
from cqlora.system.companions import ACCEPT, check_accepted
from cqlora.system.machine import probe_machine
from cqlora.weights.sizes import parse_size

if TYPE_CHECKING:
    from cqlora.weights.merge import Merge


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """A base, what to merge into it, and what comes out."""

    base: str = MISSING
    """Hugging Face folder of the 16-bit base."""
    adapter: Any = field(default_factory=list)
    """Adapter folder, or several in the order in which they were trained: [pretrained,tuned]; a run's checkpoint is
    one too. None only rewrites the base in another format, or adds differences to it."""
    adapter_average: list[str] = field(default_factory=list)
    """Adapters or checkpoints of which the mean is merged: of what they add, not of their factors (2507.17634)."""
    run: str = ""
    """Folder of a finished run, whose last checkpoints are averaged."""
    last: int = 4
    """How many of the run's checkpoints to average."""
    adapter_weight: float = 1.0
    """By what is multiplied what the adapters add (2109.01903); rows of tokens that an extension added stay as
    trained, since what they were before means nothing."""
    add: list[Any] = field(default_factory=list)
    """Differences of two models to add (2310.04799): [CHAT-BASE], [0.5*CHAT-BASE] or
    [{model:CHAT,minus:BASE,weight:0.5}]."""
    output_dir: str = MISSING
    """Folder that the merged model is written to."""
    accept_changed: list[str] = field(default_factory=list)
    """Files beside the base's weights that may be others than when it was written or the adapter trained, such as
    [generation_config.json]; they go along as they are now."""
    onto: MergeOnto = MergeOnto["16bit"]
    """What the adapter is added to: the base's own weights, or what their NF4 form stood for in training."""
    rows: MergeRows = MergeRows.along
    """`only` merges trained rows and what was trained whole, and leaves the low-rank matrices beside it as plain LoRA,
    as vLLM serves it: output_dir/base and output_dir/adapter."""
    format: ModelFormat = ModelFormat.safetensors
    """Hugging Face safetensors in 16 bits, a GGUF file, or safetensors in NF4."""
    gguf_type: GgufType = GgufType.f16
    """How a GGUF file holds its matrices."""
    double_quantization: bool = True
    """Of the NF4 form, where the adapter's card does not say it, and of format=nf4."""
    precision: Precision = Precision.auto
    """Type that NF4 weights come back in, where the adapter's card does not say it (auto: float32), and of
    format=nf4 (auto: what this machine computes best in)."""
    max_shard_size: str = "4GB"
    """Largest file of weights, such as 4GB or 500MiB."""
    measure: str = ""
    """Text file on which the merged model is compared with the one that was trained; empty measures nothing."""
    measure_tokens: int = 2048
    """Tokens of it to compare."""

    def __post_init__(self) -> None:
        paths = ("base", "output_dir", "measure", "run", "adapter_average")
        check_fields(self, paths=paths, filled=("base", "output_dir"))
        parse_size("max_shard_size", self.max_shard_size)
        require_positive(self, "last")
        require_range("adapter_weight", self.adapter_weight, 0.01, 2.0)
        check_accepted("accept_changed", self.accept_changed)
        self.add = parse_differences(self.add)
        self._check_adapters()
        if self.measure and not Path(self.measure).is_file():
            raise ConfigError(f"measure={self.measure} does not exist; give a file of text.")
        if self.measure and (len(self.adapter) != 1 or self.adapter_weight != 1 or self.add):
            raise ConfigError("measure compares with one adapter's training; use adapter=FOLDER alone.")
        self._check_effects()
        self._check_rows()
        if self.measure_tokens < 2:
            raise ConfigError(f"measure_tokens={self.measure_tokens} is too few; use at least 2.")

    def _check_adapters(self) -> None:
        """Bring `adapter` into the form of a list; raise ConfigError for what names no adapters, or in two ways."""
        self.adapter = [self.adapter] if isinstance(self.adapter, str) else self.adapter
        if not isinstance(self.adapter, list) or not all(isinstance(folder, str) for folder in self.adapter):
            raise ConfigError(f"adapter={self.adapter} is no folder; use adapter=FOLDER or adapter=[FIRST,SECOND].")
        self.adapter = [os.path.expanduser(folder) for folder in self.adapter]
        given = [key for key in ("adapter", "adapter_average", "run") if getattr(self, key)]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}= and {given[1]}= both say what to merge; use one of them.")
        if len(self.adapter_average) == 1:
            raise ConfigError("adapter_average= names one adapter, which is its own mean; use adapter=FOLDER.")
        for key in ("adapter", "adapter_average"):
            folders = getattr(self, key)
            if len(set(folders)) < len(folders):
                raise ConfigError(f"{key}={folders} names a folder twice; merge each adapter once.")
            if not all(folders):
                raise ConfigError(f"{key}= names an empty folder; use {key}=[FIRST,SECOND].")
            for folder in folders:
                check_path(key, folder)

    def _check_rows(self) -> None:
        """Raise ConfigError for what rows=only cannot leave beside the base as one plain adapter."""
        if self.rows is not MergeRows.only:
            return
        if len(self.adapter) != 1:
            raise ConfigError("rows=only parts one adapter, which adapter=FOLDER names; give one alone.")
        if self.format is ModelFormat.gguf:
            raise ConfigError(
                "rows=only leaves an adapter in PEFT's form, which no GGUF file takes; leave out format=."
            )
        whole = {"adapter_weight": self.adapter_weight != 1, "add": bool(self.add), "measure": bool(self.measure)}
        for key in (key for key, given in whole.items() if given):
            raise ConfigError(f"{key}= is of adapters that are merged whole; leave it out, or rows=only.")

    def _check_effects(self) -> None:
        """Raise ConfigError for an option that this merge does not read."""
        merges = bool(self.adapter or self.adapter_average or self.run)
        if not merges and not self.add and self.format is ModelFormat.safetensors:
            raise ConfigError(
                "neither adapter= nor add= is given, which merges nothing; give one, or format=gguf or nf4 to rewrite "
                "the base."
            )
        require_used(self, "adapter_weight", merges, "an adapter")
        require_used(self, "last", bool(self.run), "run=FOLDER")
        as_nf4 = self.onto is MergeOnto.nf4 or self.format is ModelFormat.nf4 or bool(self.measure)
        require_used(self, "gguf_type", self.format is ModelFormat.gguf, "format=gguf")
        require_used(self, "max_shard_size", self.format is not ModelFormat.gguf, "format=safetensors or nf4")
        require_used(self, "double_quantization", as_nf4, "onto=nf4, format=nf4 or measure=FILE")
        require_used(self, "precision", as_nf4, "onto=nf4, format=nf4 or measure=FILE")
        require_used(self, "measure_tokens", bool(self.measure), "measure=FILE")


def merge(config: MergeConfig) -> None:
    """Merge, say what came out, and measure it where asked to."""
    from cqlora.weights.merge import check_what_goes_along, plan_merge, write_merge
    from cqlora.weights.merge_checkpoint import last_checkpoints
    from cqlora.weights.merge_lineage import read_training

    averaged = list(map(Path, config.adapter_average))
    if config.run:
        averaged = last_checkpoints(Path(config.run), config.last)
    planned = plan_merge(
        Path(config.base), averaged or list(map(Path, config.adapter)), config.onto, config.double_quantization,
        config.precision, bool(averaged), config.adapter_weight, config.add,
    )  # fmt: skip
    check_what_goes_along(planned, ACCEPT.replace("{key}", "accept_changed"), config.accept_changed)
    for note in planned.notes:
        print(f"note: {note}")
    if config.measure:
        if planned.adapters[0].of_checkpoint:
            raise ConfigError(f"measure reads plain PEFT, and adapter={config.adapter[0]} is a run's checkpoint.")
        trained_on = read_training(planned.adapters[0], config.double_quantization, config.precision)
    if config.rows is MergeRows.only:
        write_in_parts(planned, config)
        return
    write_merge(planned, Path(config.output_dir), settle_form(config))
    print(f"{config.output_dir}: {planned.summary()}")
    if config.format is ModelFormat.gguf:
        print(tell_ollama(Path(config.output_dir)))
    if config.measure:
        from cqlora.weights.merge_drift import measure_drifts

        print(measure_drifts(planned, *trained_on, Path(config.measure), config.measure_tokens))


def tell_ollama(folder: Path) -> str:
    """How Ollama takes in the file, where it could be told how to prompt it."""
    from cqlora.weights.modelfile import MODELFILE

    if (folder / MODELFILE).is_file():
        return f"ollama create {folder.name.lower()} -f {folder / MODELFILE}"
    return (
        f"note: no {MODELFILE} for Ollama, since the chat template is in no form that Ollama can be told; "
        "llama.cpp reads the template from the file itself."
    )


def write_in_parts(planned: "Merge", config: MergeConfig) -> None:
    """Write the base with the rows and the plain adapter beside it, and say how they are served."""
    from cqlora.weights.merge_rows import part_lora, tell_parts, write_parts

    lora, output_dir = part_lora(planned), Path(config.output_dir)
    write_parts(planned, lora, output_dir, settle_form(config))
    print(tell_parts(planned, lora, output_dir))


def settle_form(config: MergeConfig) -> MergeConfig:
    """The configuration with the type that an NF4 folder is to be computed in."""
    if config.format is not ModelFormat.nf4 or config.precision is not Precision.auto:
        return config
    machine = probe_machine()
    device = Device.cuda if machine.gpus else Device.cpu
    return replace(config, precision=choose_precision(device, machine))


def main() -> None:
    """The verb `merge`."""
    ConfigStore.instance().store(name="merge_schema", node=MergeConfig)
    run_program("merge", MergeConfig, merge)


if __name__ == "__main__":
    main()
