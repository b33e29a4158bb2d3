"""Imports point one way, and nothing heavy is loaded before the configuration is known to be right."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cqlora"
MODULES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN = {
    "cqlora.model": ("cqlora.data", "cqlora.trainer", "cqlora.train", "cqlora.checkpoint", "cqlora.tracking"),
    "cqlora.data": ("cqlora.model", "cqlora.trainer", "cqlora.train", "cqlora.checkpoint", "cqlora.tracking"),
    "cqlora.checkpoint": ("cqlora.model", "cqlora.data", "cqlora.trainer", "cqlora.train"),
    "cqlora.tracking": ("cqlora.model", "cqlora.data", "cqlora.trainer", "cqlora.train"),
    "cqlora.trainer": ("cqlora.train", "cqlora.launch"),
    "cqlora.train": ("cqlora.launch",),
    "cqlora.weights": ("cqlora.trainer", "cqlora.train"),
    "cqlora.vocab": ("cqlora.trainer", "cqlora.train"),
    "cqlora.evaluate": ("cqlora.trainer", "cqlora.train"),
    "cqlora.inference": ("cqlora.trainer", "cqlora.train", "cqlora.model", "cqlora.engine", "cqlora.chat"),
    "cqlora.engine": ("cqlora.trainer", "cqlora.train", "cqlora.model"),
    "cqlora.serve": ("cqlora.trainer", "cqlora.train", "cqlora.model"),
    "cqlora.plan": ("cqlora.trainer", "cqlora.train", "cqlora.model", "cqlora.data"),
    "cqlora.config": ("cqlora.model", "cqlora.data", "cqlora.train", "cqlora.base"),
    "cqlora.errors": ("cqlora",),
}
"""Room → what it never imports. Nobody imports `run`, and the package never imports `scripts`."""

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "wandb", "datasets"}
LIGHT_MODULES = [
    "__main__",
    "base",
    "choices",
    "cli",
    "architectures",
    "config",
    "config_checks",
    "continuation",
    "diagnosis",
    "errors",
    "frozen",
    "launch",
    "metrics",
]
LIGHT_MODULES += ["cluster", "folder", "preflight", "processes", "run", "signals", "slurm"]
LIGHT_MODULES += ["composition", "config_files", "foreign_names", "reference", "secrets"]
LIGHT_ROOMS = ["data", "plan"]


def name_of(file: Path) -> str:
    parts = ["cqlora", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def imports_of(file: Path, at_import_only: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import_only`, those outside functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if at_import_only and id(node) in inside_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def is_inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_follow_the_arrows(file):
    module = name_of(file)
    rooms = [room for room in FORBIDDEN if is_inside(module, room)]
    for imported in imports_of(file):
        assert not is_inside(imported, "scripts"), f"{module} imports {imported}"
        assert not is_inside(imported, "cqlora.run"), f"{module} imports {imported}"
        for room in rooms:
            for forbidden in FORBIDDEN[room]:
                assert not is_inside(imported, forbidden), f"{module} imports {imported}"


@pytest.mark.parametrize(
    "file",
    [f for f in MODULES if name_of(f).split(".")[1:2] and name_of(f).split(".")[1] in LIGHT_MODULES + LIGHT_ROOMS],
    ids=name_of,
)
def test_what_runs_before_the_configuration_is_checked_loads_nothing_heavy(file):
    heavy = {name.split(".")[0] for name in imports_of(file, at_import_only=True)} & HEAVY
    assert not heavy, f"{name_of(file)} imports {heavy} at import"


def test_no_function_needs_a_second_screen():
    long = []
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name_of(file)}.{node.name} has {lines} lines")
    assert not long
