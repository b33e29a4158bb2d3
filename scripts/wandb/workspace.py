"""Make a W&B workspace of a project's runs: `python scripts/wandb/workspace.py ENTITY PROJECT`.

It needs `pip install 'cqlora[workspace]'` and a W&B server that can be reached; the page's address is printed.
"""

import sys
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces


def build(entity: str, project: str) -> Any:
    """Losses by tokens, what training cost, and which settings were best; runs grouped by sweep."""
    held_out = [
        panels.LinePlot(x="train/tokens", y=["eval/loss"], title="Held-out loss"),
        panels.ParallelCoordinatesPlot(
            columns=[
                panels.ParallelCoordinatesPlotColumn(metric=name)
                for name in ("c::lora.rank", "c::stage.learning_rate", "eval/loss")
            ],
            title="Settings and held-out loss",
        ),
    ]
    training = [
        panels.LinePlot(x="train/tokens", y=[f"train/{name}"], title=name)
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="cqlora",
        sections=[
            workspaces.Section(name="What was bought", panels=held_out, is_open=True),
            workspaces.Section(name="Training", panels=training, is_open=True),
        ],
    )


def main() -> None:
    """The command."""
    if len(sys.argv) != 3:
        sys.exit("give a W&B entity and project: python scripts/wandb/workspace.py ENTITY PROJECT")
    print(build(*sys.argv[1:]).save().url)


if __name__ == "__main__":
    main()
