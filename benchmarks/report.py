"""The page of a sweep of many long runs: how long it takes to write, how large it is, and how soon it shows its table.

    python -m benchmarks.report [--runs 200] [--points 2000]

Opening is measured by the browser itself (Debian's chromium, without a screen), from the start of navigation to the
second frame after the table of runs is in the document, which is when it has been painted.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from cqlora.report.page import REPORT_FILE, write_report
from tests.browser import open_browser
from tests.report.folders import write_sweep

TIMES = 5
WATCH = """
const watch = new MutationObserver(() => {
  if (!document.querySelector("table tbody tr")) return;
  watch.disconnect();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.tableAt = performance.now(); }));
});
watch.observe(document, { childList: true, subtree: true });
"""
"""Before anything of the page's own runs; performance.now() counts from the start of navigation."""


def make_sweep(folder: Path, runs: int, points: int) -> Path:
    """A sweep of which each run has a training line for each point; folders are copies of twelve."""
    write_sweep(folder, runs=13, steps=points)
    lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()[13:25]
    for number in range(12, runs):
        if not (folder / str(number)).is_dir():
            shutil.copytree(folder / str(number % 12), folder / str(number), ignore=shutil.ignore_patterns("*.html"))
        old = number % 12
        line = lines[old].replace(f'"number": {old},', f'"number": {number},')
        lines.append(line.replace(f'"folder": "{old}"', f'"folder": "{number}"'))
    (folder / "trials.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def open_times(page: Path) -> list[float]:
    """Seconds until the table is painted, of several openings by one browser."""
    seconds = []
    with open_browser(1440, 900) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        for _ in range(TIMES):
            driver.get("about:blank")
            driver.get(page.as_uri())
            while (at := driver.execute_script("return window.tableAt")) is None:
                time.sleep(0.02)
            seconds.append(at / 1000)
    return seconds


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make_sweep(Path(place, "sweep"), given.runs, given.points)
        page = folder / REPORT_FILE
        started, used = time.perf_counter(), time.process_time()
        write_report([folder], page)
        wall, processor = time.perf_counter() - started, time.process_time() - used
        print(f"{given.runs} runs of {given.points} points: written in {wall:.1f} s ({processor:.1f} s of processor), "
              f"{page.stat().st_size / 1e6:.1f} MB")  # fmt: skip
        seconds = open_times(page)
        told = ", ".join(f"{each:.2f}" for each in seconds)
        print(f"opened in {statistics.median(seconds):.2f} s (median of {told})")


if __name__ == "__main__":
    main()
