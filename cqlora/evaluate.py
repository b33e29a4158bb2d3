"""`python -m cqlora.evaluate`, and `evaluate` for Python: models side by side, a table and evaluation.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

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

    from cqlora.evaluation.record import FILE_NAME, evaluate_models, write_record
    from cqlora.evaluation.table import show_record
    from cqlora.system.progress import StageDisplay, open_console, show_log

    show_log()
    folder = Path(config.run or HydraConfig.get().runtime.output_dir)
    file = Path(config.output) if config.output else folder / FILE_NAME
    if file.is_dir():
        raise ConfigError(f"output={file} is a folder; give the file that the record is written to.")
    with find_models(config) as (models, data), StageDisplay(is_main=True) as display:
        record = evaluate_models(config, models, data, display.show)
    write_record(record, file)
    console = open_console()
    show_record(console, record)
    console.print(f"record  {file}", soft_wrap=True)


@contextmanager
def find_models(config: EvaluateConfig) -> "Iterator[tuple[list[ModelChoice], DataConfig]]":
    """The models and the data group that stand where none is given; a checkpoint's adapter lives as long as the block.

    Raises:
        CqloraError: a folder that is no run, or a checkpoint that cannot be used.
    """
    from cqlora.evaluation.models import read_models

    if not config.run:
        yield read_models(config.list_words(), config.quantization), read_sample_group()
        return
    from cqlora.config.run_yaml import RUN_FILE, load_frozen

    run = Path(config.run)
    frozen = load_frozen(run / RUN_FILE)
    if config.data is None:
        config.seed = frozen.seed
    with TemporaryDirectory(prefix="cqlora-evaluate-") as folder:
        adapter = find_adapter(run, config.checkpoint, Path(folder))
        words = [frozen.model.path, f"{frozen.model.path}+{adapter}"]
        yield read_models(words, config.quantization), frozen.data


def find_adapter(run: Path, checkpoint: str, place: Path) -> Path:
    """A run's adapter/, or one that is made of a checkpoint in a folder under `place`."""
    if checkpoint == "adapter" or (not checkpoint and (run / "adapter").is_dir()):
        return run / "adapter"
    from cqlora.train.export import export_checkpoint, find_checkpoint

    found = find_checkpoint(run, checkpoint)
    # By its name the record tells which one it was.
    folder = place / f"{run.name}_{found.name}"
    export_checkpoint(run, found, folder)
    return folder


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
