"""A worker of a run: `python -m cqlora.train RUN_YAML PARENT`, hearing signals before torch is imported."""

import logging
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from cqlora.errors import CqloraError
from cqlora.system.documents import escape_controls
from cqlora.system.handover import write_failure
from cqlora.system.refusals import described_as_sentence
from cqlora.system.signals import INTERRUPTED, die_with, preempt_on_signals

logger = logging.getLogger("cqlora.train")


def main() -> None:
    """Train from the settled configuration that `cqlora.launch.start` has staged, and end with the process that did."""
    run_file, parent = Path(sys.argv[1]), int(sys.argv[2])
    again = f"the same command with hydra.run.dir={run_file.parent}"
    die_with(parent)
    sys.excepthook = report_unexpected
    try:
        with described_as_sentence(), preempt_on_signals(lambda: f"{again} starts it again."):
            train_from(run_file)
    except CqloraError as error:
        if not write_failure(str(error)):
            print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def train_from(run_file: Path) -> None:
    """Import what trains, and train."""
    from cqlora.config.run_yaml import load_run_yaml
    from cqlora.system.progress import show_log

    config = load_run_yaml(run_file)
    show_log()
    logger.info("run %s: importing torch", run_file.parent)
    from cqlora.train.run import train

    train(config, run_file.parent)


def report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an unexpected error, with its traceback, to the process that started this worker."""
    text = "".join(traceback.format_exception(kind, error, trace))
    if not write_failure(f"worker {os.environ.get('RANK', '0')} failed.\n{text}"):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    main()
