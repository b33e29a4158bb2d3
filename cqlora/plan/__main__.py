"""`python -m cqlora.plan`: the same overrides as `cqlora.run`; exit code 0 where the run fits, else 3."""

from dataclasses import dataclass
from enum import Enum

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.config.checks import require_positive, require_range
from cqlora.config.schema import RunConfig
from cqlora.errors import DoesNotFit
from cqlora.launch.continuation import check_continuation
from cqlora.launch.settle import look_ahead, settle
from cqlora.plan.fit import Fit
from cqlora.plan.memory import plan_memory
from cqlora.plan.time import plan_time
from cqlora.plan.verdict import judge


class Mode(Enum):
    """What to plan: the layout that was asked for, or the fastest ones that fit."""

    check = "check"
    suggest = "suggest"


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """A run, and what about it to plan."""

    plan: Mode = Mode.check
    """Check the run that is asked for, or suggest the fastest layouts that fit."""
    tokens: int | None = None
    """Tokens of one epoch; null estimates them from the number of documents asked for."""
    added_rows: int = 0
    """Embedding rows that an extension will add, while the base's folder is not there yet."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        require_range("added_rows", self.added_rows, 0, 10_000_000)
        if self.tokens is not None:
            require_positive(self, "tokens")


def plan(config: PlanConfig) -> int:
    """Print a run's plan; return the exit code."""
    from rich.console import Console

    from cqlora.plan.layouts import suggest_layouts
    from cqlora.plan.table import options_table, print_plan

    given = look_ahead(config, config.added_rows)
    settled = settle(config, given)
    if given.adapter is not None:
        check_continuation(settled, given.adapter, given.base)
    time = plan_time(settled, given.rows, config.tokens)
    verdict = judge(settled, given.rows)
    print_plan(settled, plan_memory(settled, given.rows), time, verdict)
    if config.plan is Mode.check:
        return DoesNotFit.exit_code if verdict.fit is Fit.does_not_fit else 0
    fitting = suggest_layouts(settled, given.rows)
    console = Console(width=100, highlight=False)
    console.print()
    if not fitting:
        console.print(f"No layout of this run fits hardware={config.hardware.name}.")
        return DoesNotFit.exit_code
    console.print(options_table(fitting[:5], time, f"Fastest layouts that fit hardware={config.hardware.name}"))
    return 0


def main() -> None:
    """The verb `plan`."""
    ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
    run_program("plan", PlanConfig, plan)


if __name__ == "__main__":
    main()
