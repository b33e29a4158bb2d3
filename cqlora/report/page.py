"""The page: one HTML file with its style, its program and its numbers inside, which fetches nothing."""

import hashlib
import sys
from base64 import b64encode
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import cqlora
from cqlora.errors import ConfigError, CqloraError
from cqlora.report.runs import describe_run, is_run, to_json
from cqlora.report.sweeps import describe_runs, describe_sweep, is_sweep
from cqlora.system.durable import replace_file

PAGE_FOLDER = Path(__file__).parent / "page"
REPORT_FILE = "report.html"
_MARK = b'<meta name="generator" content="cqlora report">'
"""What every page of ours has, as page.html has it."""
_PROGRAM = ("labels.js", "columns.js", "elements.js", "charts.js", "tables.js", "run.js", "sweep.js", "main.js")
"""In the order in which one needs the other; they share one scope."""


def describe(folders: list[Path]) -> dict[str, Any]:
    """What the page of a run, of a sweep, or of several runs shows.

    Raises:
        ConfigError: a folder is neither.
    """
    first = folders[0]
    if len(folders) > 1:
        page = describe_runs(folders)
    elif is_run(first):
        page = {"kind": "run", "run": describe_run(first), "name": first.name}
    elif is_sweep(first):
        page = describe_sweep(first)
    else:
        what = "holds neither a run nor a sweep" if first.is_dir() else "is a file"
        what = what if first.exists() else "does not exist"
        raise ConfigError(f"folder={first} {what}; give outputs/… of a run or multirun/… of a sweep.")
    return page | {"written": datetime.now().strftime("%Y-%m-%d %H:%M:%S"), "version": cqlora.__version__}


def write_report(folders: list[Path], file: Path) -> None:
    """Write the page of a run, of a sweep or of several runs, whole or not at all.

    Raises:
        ConfigError: a folder is neither a run's nor a sweep's.
        DiskError: the file cannot be written.
    """
    # A damaged record may hold half a character, which UTF-8 has none of.
    replace_file(file, render(describe(folders)).encode("utf-8", "replace"))


def refuse_foreign(file: Path) -> None:
    """Raise ConfigError for a file that is there and is no page of ours."""
    if file.exists() and not (file.is_file() and _MARK in file.read_bytes()):
        raise ConfigError(f"output={file} is there and was not written by `cqlora report`; give another name.")


def conclude(folder: Path) -> None:
    """Write the page of what has ended in a folder and say where it is; that it cannot be written ends nothing."""
    file = folder / REPORT_FILE
    try:
        write_report([folder], file)
    except CqloraError as error:
        print(f"note: no report was written: {error}", file=sys.stderr)
    else:
        # Beside a run's log, since what a sweep prints is its table.
        print(f"report: {file}", file=sys.stderr, flush=True)


def render(page: dict[str, Any], watched: bool = False) -> str:
    """The page with its numbers; one that is `watched` asks the server it came from for newer ones."""
    style = read("style.css")
    library = read("vendor/echarts.js")
    program = '"use strict";(() => {\n' + "\n".join(read(name) for name in _PROGRAM) + "\n})();"
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest(library)} {digest(program)}",
            f"style-src {digest(style)}",
            f"connect-src {'self' if watched else 'none'}".replace("self", "'self'").replace("none", "'none'"),
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "POLICY": escape(policy, quote=True),
        "TITLE": escape(f"{page['name']} · cqlora"),
        "STYLE": style,
        "LIBRARY": library,
        "PROGRAM": program,
        "WATCHED": "true" if watched else "false",
        "DATA": to_json(page),
    }
    head, *rest = read("page.html").split("{{")
    return head + "".join(parts[name] + text for name, text in (each.split("}}", 1) for each in rest))


def read(name: str) -> str:
    """A file of the page's."""
    return (PAGE_FOLDER / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """What a Content-Security-Policy allows a script or style of this text by."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
