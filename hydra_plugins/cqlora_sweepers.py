"""Where Hydra looks for sweepers: `hydra/sweeper=grid` and `optuna`; what they do is in cqlora.launch.sweeps."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Every combination of the values that were typed."""

    def __init__(self, params: dict[str, str] | None) -> None:
        self.params = params or {}
        self.parts: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands to a sweeper."""
        self.parts = {"context": hydra_context, "task": task_function, "config": config}

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs."""
        from cqlora.launch.sweeps import Sweep, sweep_grid

        sweep_grid(Sweep(**self.parts), [f"{key}={value}" for key, value in self.params.items()] + arguments)


class SearchSweeper(GridSweeper):
    """Values that Optuna proposes, one trial after another."""

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials."""
        from cqlora.launch.sweeps import Sweep, sweep_search

        sweep_search(Sweep(**self.parts), [f"{key}={value}" for key, value in self.params.items()] + arguments)
