"""The time in which headless Chromium opens the report of an evaluation of 10,000 items in three modes.

    python benchmarks/report_page.py [--out docs/results/report_page.json]

The report is opened as a file, from an empty page until its first answers are listed, and each time the page is loaded
completely, plots included; then an item is opened by its link, and all texts are searched. Needs Chromium.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from phivision_jax.evaluation.report import write_report
from tests.support.browser import Browser
from tests.support.evaluation_runs import BENCHMARKS, sample_rows, write_run

STATUS = "document.querySelector('.status')?.textContent"


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return round(time.perf_counter() - start, 3)


def main(items: int = 10_000, turns: int = 7, out: Path | None = None) -> None:
    """Print the times in seconds.

    Args:
        items: of the evaluation, each in three modes.
        turns: times that the page is opened.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder, Browser(1400, 900) as page:
        directory, address = Path(folder), f"file://{folder}/report.html"
        write_run(directory, sample_rows(directory, items))
        writing = timed(lambda: write_report(directory, None, BENCHMARKS))

        def open_page(link: str, expected: str) -> None:
            page.open(link)
            page.wait(expected)

        opening = []
        for _ in range(turns):
            page.open("about:blank")
            opening.append(timed(lambda: open_page(address, "document.querySelectorAll('.rows li').length")))
        link = page.evaluate("document.querySelectorAll('.rows a.row')[30].href")
        page.open("about:blank")
        linked = timed(lambda: open_page(link, "document.querySelector('.detail img')?.complete"))
        page.evaluate("location.hash = 'text=button 3'")
        searching = timed(lambda: page.wait(f"/^[\\d,]+ of .*page/.test({STATUS}) && !/^0/.test({STATUS})", 300))
        numbers = {
            "items": items,
            "rows": 3 * items,
            "index_bytes": (directory / "data/index.js").stat().st_size,
            "data_bytes": sum(file.stat().st_size for file in (directory / "data").iterdir()),
            "write_s": writing,
            "open_s": {"median": statistics.median(opening), "first": opening[0], "most": max(opening)},
            "open_item_by_link_s": linked,
            "search_all_texts_s": searching,
            "console_errors": len(page.errors),
        }
    print(json.dumps(numbers, indent=1))
    if out is not None:
        out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
