"""Imports follow the arrows that are listed here, and nothing heavy is loaded before the configuration is right."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cqlora"
MODULES = sorted(PACKAGE.rglob("*.py"))

ARROWS = {
    "__main__": {"cli"},
    "architectures": {"errors"},
    "base": {"architectures", "errors", "system"},
    "chat": {"cli", "config", "engine_config", "inference"},
    "cli": {"config", "errors", "launch", "system"},
    "config": {"architectures", "errors", "system"},
    "convert": {"cli", "config", "vocab", "weights"},
    "data": {"base", "config", "errors", "system"},
    "engine": {"data", "errors", "inference", "system"},
    "engine_config": {"architectures", "base", "config", "engine", "errors", "inference", "lineage", "system"},
    "evaluate": {"cli", "config", "errors", "evaluation", "system", "train"},
    "evaluation": {"base", "config", "data", "engine", "errors", "inference", "lineage", "positions", "system"},
    "extend": {"cli", "config", "errors", "vocab", "weights"},
    "fetch": {"base", "cli", "config", "weights"},
    "generate": {"base", "cli", "config", "engine", "engine_config", "errors", "inference", "system"},
    "inference": {"architectures", "base", "config", "data", "errors", "positions", "system", "weights"},
    "launch": {
        "architectures",
        "base",
        "config",
        "data",
        "errors",
        "evaluation",
        "plan",
        "positions",
        "random_base",
        "report",
        "sweep",
        "system",
        "train",
    },
    "lineage": {"base", "errors", "system"},
    "merge": {"cli", "config", "errors", "launch", "system", "weights"},
    "model": {"architectures", "base", "config", "errors", "lineage", "positions", "system"},
    "model_card": {"base", "config", "errors", "system"},
    "plan": {"config", "errors", "system"},
    "plan.__main__": {"cli", "config", "errors", "launch", "plan"},
    "positions": {"config", "errors"},
    "prepare": {"architectures", "cli", "config", "data", "launch", "random_base", "system"},
    "publication": {"base", "config", "errors", "model_card", "system"},
    "push": {"cli", "config", "errors", "publication"},
    "random_base": {"base", "config", "data", "errors", "model"},
    "report": {"base", "config", "errors", "plan", "serve", "sweep", "system"},
    "report.__main__": {"cli", "errors", "report", "serve"},
    "run": {"cli", "config", "errors", "launch", "system"},
    "serve": {"engine", "engine_config", "errors", "inference", "system"},
    "serve.__main__": {"cli", "errors", "serve"},
    "sweep": {"config", "errors", "system"},
    "system": {"errors"},
    "train": {
        "base",
        "config",
        "data",
        "errors",
        "evaluation",
        "lineage",
        "model",
        "model_card",
        "plan",
        "positions",
        "random_base",
        "system",
    },
    "vocab": {"base", "config", "data", "errors", "system"},
    "weights": {
        "architectures",
        "base",
        "config",
        "data",
        "errors",
        "lineage",
        "model",
        "model_card",
        "positions",
        "system",
        "vocab",
    },
}
"""Room → the rooms that it imports. A room is a package, or a module beside them; a verb is one too, `plan`, `report`
and `serve` by their `__main__`."""

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "wandb", "datasets", "lm_eval"}
WITH_TORCH = {
    "engine", "evaluation.harness", "inference", "model", "train", "vocab", "weights", "system.cuda", "system.shards"
}  # fmt: skip
"""What may load it when it is imported; all else may inside of functions only."""


def name_of(file: Path) -> str:
    parts = ["cqlora", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room that a module stands in; `cqlora` itself is none."""
    first, *rest = module.split(".")[1:] or [""]
    return f"{first}.__main__" if rest == ["__main__"] and first in ("plan", "report", "serve") else first


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
        elif isinstance(node, ast.ImportFrom) and node.module == "cqlora":
            found |= {f"cqlora.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def arrows() -> dict[str, set[str]]:
    """Room → the rooms that its modules import."""
    found: dict[str, set[str]] = {room_of(name_of(file)): set() for file in MODULES}
    for file in MODULES:
        room = room_of(name_of(file))
        found[room] |= {room_of(each) for each in imports_of(file) if each.startswith("cqlora.")} - {room}
    return {room: others for room, others in found.items() if room}


def test_rooms_import_what_is_listed_and_nothing_else():
    assert {room: others for room, others in arrows().items() if others} == ARROWS


def test_no_arrows_lead_in_a_circle():
    remaining = {room: set(others) for room, others in arrows().items()}
    while ground := {room for room, others in remaining.items() if not others}:
        remaining = {room: others - ground for room, others in remaining.items() if room not in ground}
    assert not remaining


def test_the_package_imports_no_script():
    assert not {each for file in MODULES for each in imports_of(file) if each.split(".")[0] in ("scripts", "tests")}


@pytest.mark.parametrize(
    "file",
    [file for file in MODULES if not name_of(file).removeprefix("cqlora.").startswith(tuple(WITH_TORCH))],
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
