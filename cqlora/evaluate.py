"""`python -m cqlora.evaluate`, and `evaluate` for Python: models side by side, a table and evaluation.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.errors import ConfigError
from cqlora.evaluation.config import EvaluateConfig
from cqlora.system.signals import stop_on_signals

if TYPE_CHECKING:
    from cqlora.config.schema import DataConfig
    from cqlora.evaluation.models import ModelChoice


def evaluate(config: EvaluateConfig) -> None:
    """Measure, print the tables, write the record."""
    from hydra.core.hydra_config import HydraConfig

    from cqlora.evaluation.record import FILE_NAME, evaluate_models, refuse_foreign, write_record
    from cqlora.evaluation.table import show_record
    from cqlora.system.durable import require_place
    from cqlora.system.progress import StageDisplay, open_console, show_log

    show_log()
    folder = Path(config.run or HydraConfig.get().runtime.output_dir)
    file = Path(config.output) if config.output else folder / FILE_NAME
    if file.is_dir():
        raise ConfigError(f"output={file} is a folder; give the file that the record is written to.")
    if file.suffix != ".json":
        raise ConfigError(f"output={file} is to be a record; give a name that ends in .json.")
    if config.output:
        refuse_foreign(file)
    with find_models(config) as found, StageDisplay(is_main=True, first="reading the models' folders") as display:
        require_place(file)
        record = evaluate_models(config, found.models, found.data, found.seed, display.show)
    write_record(record, file)
    console = open_console()
    show_record(console, record)
    console.print(f"record  {file}", soft_wrap=True)


class Found(NamedTuple):
    """What is measured, and on what where the command does not say."""

    models: "list[ModelChoice]"
    data: "DataConfig"
    seed: int | None
    """Of what the data group holds out; None is the command's."""


@contextmanager
def find_models(config: EvaluateConfig) -> Iterator[Found]:
    """The models and the data group that stand where none is given; a checkpoint's adapter lives as long as the block.

    Raises:
        CqloraError: a folder that is no run, or a checkpoint that cannot be used.
    """
    from cqlora.evaluation.models import read_models

    if not config.run:
        yield Found(read_models(config.list_words(), config.quantization), read_sample_group(), None)
        return
    from cqlora.config.run_yaml import RUN_FILE, load_run_yaml

    run = Path(config.run)
    frozen = load_run_yaml(run / RUN_FILE)
    with TemporaryDirectory(prefix="cqlora-evaluate-") as folder:
        adapter, shown = find_adapter(run, config.checkpoint, Path(folder))
        base, trained = read_models([frozen.model.path, f"{frozen.model.path}+{adapter}"], config.quantization)
        name = f"{base.name}+{run.resolve().name}/{shown.name}"
        models = [base, replace(trained, name=name, adapter_shown=str(shown))]
        yield Found(models, frozen.data, frozen.seed)


def find_adapter(run: Path, checkpoint: str, place: Path) -> tuple[Path, Path]:
    """What a run has trained, as an adapter's folder, and where it comes from: adapter/, or a checkpoint.

    That of a checkpoint is made under `place`.
    """
    if checkpoint == "adapter" or (not checkpoint and (run / "adapter").is_dir()):
        return run / "adapter", run / "adapter"
    from cqlora.train.export import export_checkpoint, find_checkpoint

    found = find_checkpoint(run, checkpoint)
    export_checkpoint(run, found, place / "adapter")
    return place / "adapter", found


def read_sample_group() -> "DataConfig":
    """The data group `sample`, whose text is bundled."""
    from omegaconf import OmegaConf

    from cqlora.config.schema import CONFIG_DIR, DataConfig

    composed = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONFIG_DIR / "data" / "sample.yaml"))
    group = OmegaConf.to_object(composed)
    assert isinstance(group, DataConfig)
    return group


def main() -> None:
    """The verb `evaluate`."""
    with stop_on_signals():
        ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
        run_program("evaluate", EvaluateConfig, evaluate)


if __name__ == "__main__":
    main()
