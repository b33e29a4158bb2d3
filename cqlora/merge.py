"""`python -m cqlora.merge`: adapters into their base, as safetensors, a GGUF file or an NF4 folder."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.cli import run_program
from cqlora.config.checks import check_fields, check_path, require_used
from cqlora.config.choices import Device, GgufType, MergeOnto, ModelFormat, Precision
from cqlora.errors import ConfigError
from cqlora.launch.settle import choose_precision
from cqlora.system.companions import ACCEPT, check_accepted
from cqlora.system.machine import probe_machine
from cqlora.weights.sizes import parse_size


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """A base, what to merge into it, and what comes out."""

    base: str = MISSING
    """Hugging Face folder of the 16-bit base."""
    adapter: Any = MISSING
    """Adapter folder, or several in the order in which they were trained: [pretrained,tuned]; [] only rewrites the
    base in another format."""
    output_dir: str = MISSING
    """Folder that the merged model is written to."""
    accept_changed: list[str] = field(default_factory=list)
    """Files beside the base's weights that may be others than when it was written or the adapter trained, such as
    [generation_config.json]; they go along as they are now."""
    onto: MergeOnto = MergeOnto["16bit"]
    """What the adapter is added to: the base's own weights, or what their NF4 form stood for in training."""
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
        check_fields(self, paths=("base", "output_dir", "measure"), filled=("base", "output_dir"))
        parse_size("max_shard_size", self.max_shard_size)
        check_accepted("accept_changed", self.accept_changed)
        self.adapter = [self.adapter] if isinstance(self.adapter, str) else self.adapter
        if not isinstance(self.adapter, list) or not all(isinstance(folder, str) for folder in self.adapter):
            raise ConfigError(f"adapter={self.adapter} is no folder; use adapter=FOLDER or adapter=[FIRST,SECOND].")
        if len(set(self.adapter)) < len(self.adapter):
            raise ConfigError(f"adapter={self.adapter} names a folder twice; merge each adapter once.")
        if not self.adapter and self.format is ModelFormat.safetensors:
            raise ConfigError("adapter=[] merges nothing; give an adapter, or format=gguf or nf4 to rewrite the base.")
        if self.measure and not Path(self.measure).is_file():
            raise ConfigError(f"measure={self.measure} does not exist; give a file of text.")
        if self.measure and len(self.adapter) != 1:
            raise ConfigError(f"measure compares with one adapter's training, and adapter= has {len(self.adapter)}.")
        if not all(self.adapter):
            raise ConfigError("adapter= names an empty folder; use adapter=FOLDER or adapter=[FIRST,SECOND].")
        self.adapter = [os.path.expanduser(folder) for folder in self.adapter]
        for folder in self.adapter:
            check_path("adapter", folder)
        self._check_effects()
        if self.measure_tokens < 2:
            raise ConfigError(f"measure_tokens={self.measure_tokens} is too few; use at least 2.")

    def _check_effects(self) -> None:
        """Raise ConfigError for an option that this merge does not read."""
        as_nf4 = self.onto is MergeOnto.nf4 or self.format is ModelFormat.nf4 or bool(self.measure)
        require_used(self, "gguf_type", self.format is ModelFormat.gguf, "format=gguf")
        require_used(self, "max_shard_size", self.format is not ModelFormat.gguf, "format=safetensors or nf4")
        require_used(self, "double_quantization", as_nf4, "onto=nf4, format=nf4 or measure=FILE")
        require_used(self, "precision", as_nf4, "onto=nf4, format=nf4 or measure=FILE")
        require_used(self, "measure_tokens", bool(self.measure), "measure=FILE")


def merge(config: MergeConfig) -> None:
    """Merge, say what came out, and measure it where asked to."""
    from cqlora.weights.merge import check_what_goes_along, plan_merge, write_merge
    from cqlora.weights.merge_lineage import read_training

    folders = [Path(folder) for folder in config.adapter]
    planned = plan_merge(Path(config.base), folders, config.onto, config.double_quantization, config.precision)
    check_what_goes_along(planned, ACCEPT.replace("{key}", "accept_changed"), config.accept_changed)
    for note in planned.notes:
        print(f"note: {note}")
    if config.measure:
        trained_on = read_training(planned.adapters[0], config.double_quantization, config.precision)
    write_merge(planned, Path(config.output_dir), settle_form(config))
    merged = f"{len(folders)} adapter{'s' * (len(folders) != 1)} merged"
    print(f"{config.output_dir}: {merged}, {planned.changed()} of {len(planned.source.specs)} tensors changed.")
    if config.measure:
        from cqlora.weights.merge_drift import measure_drifts

        print(measure_drifts(planned, *trained_on, Path(config.measure), config.measure_tokens))


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
