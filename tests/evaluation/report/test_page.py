"""The page in a real browser, which these tests need (``tests/support/browser.py``); screenshots go to $SCREENSHOTS."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import urllib.parse
from pathlib import Path

import pytest

from phivision_jax.evaluation.report import write_report
from tests.support.browser import Browser
from tests.support.evaluation_runs import BENCHMARKS, HOSTILE, sample_rows, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    ours, theirs = folder / "ours ü", folder / "theirs"
    write_run(ours, sample_rows(ours, 240))
    write_run(theirs, sample_rows(theirs, 240, seed=1))
    write_report(ours, theirs, BENCHMARKS)
    return f"file://{urllib.parse.quote(str(ours))}/report.html"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(report):
    """The same over HTTP."""
    folder = urllib.parse.unquote(report.removeprefix("file://").removesuffix("/report.html"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/report.html"
        server.shutdown()


@pytest.fixture
def page(browser, report):
    browser.errors.clear()
    browser.requested.clear()
    browser.resize(1280, 900)
    browser.open("about:blank")
    browser.open(report)
    browser.wait("document.querySelectorAll('.rows li').length")
    yield browser
    assert browser.errors == [] and browser.evaluate("window.hacked") is None
    assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requested), browser.requested


def choose(page: Browser, name: str, label: str) -> None:
    page.evaluate(
        f"(s => {{ s.value = [...s.options].find(o => o.text === '{label}').value; s.onchange(); }})"
        f"(document.querySelector('select[data-filter={name}]'))"
    )


def count(page: Browser) -> int:
    """Answers that the filters leave, of all."""
    return int(page.evaluate("document.querySelector('.status').textContent").split(" of ")[0].replace(",", ""))


def screenshot(page: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def test_plots_are_drawn(page):
    sizes = page.evaluate("[...document.querySelectorAll('figure.plot img')].map(i => [i.complete, i.naturalWidth])")
    assert sizes == [[True, 1496]] * 4
    screenshot(page, "report")


def test_page_is_the_same_over_http(browser, served):
    browser.errors.clear()
    browser.open(served)
    browser.wait("document.querySelectorAll('.rows li').length")
    browser.click(".rows a.row")
    browser.wait("document.querySelector('.detail img')?.naturalWidth")
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth)") and browser.errors == []


def test_filters_count_the_rows(page, tmp_path):
    expected = sample_rows(tmp_path, 240)
    choose(page, "result", "all")
    assert count(page) == len(expected) == 720
    choose(page, "benchmark", "ScreenSpot-v2")
    choose(page, "mode", "auto")
    choose(page, "taken", "did not think")
    rows = [r for r in expected if (r.benchmark, r.mode, r.taken) == ("screenspot_v2", "auto", "nothink")]
    assert count(page) == len(rows)
    choose(page, "result", "correct")
    assert count(page) == sum(r.value == 1 for r in rows)
    choose(page, "benchmark", "all")
    choose(page, "mode", "all")
    choose(page, "taken", "all")
    for label, wanted in {
        "failed": lambda r: r.failed,
        "cut off at the limit": lambda r: r.finish_reason == "length",
        "unparsed": lambda r: r.extracted is None and not r.failed,
        "scored by a judge": lambda r: r.judge,
        "not correct": lambda r: r.value < 1,
    }.items():
        choose(page, "result", label)
        assert count(page) == sum(map(bool, map(wanted, expected))) > 0, label


def test_changes_between_runs_can_be_listed(page):
    choose(page, "result", "all")
    counts = []
    for label in ("gained", "lost", "equal"):
        choose(page, "change", label)
        counts.append(count(page))
    assert sum(counts) == 720 and min(counts) > 10
    page.click(".rows a.row")
    assert "The other run" in page.wait("document.querySelector('.detail')?.textContent")


def test_item_shows_its_image_and_boxes(page):
    choose(page, "benchmark", "ScreenSpot-v2")
    page.click(".rows a.row")
    page.wait("document.querySelector('.detail img')?.naturalWidth === 640")
    marks = page.evaluate(
        "(f => [...document.querySelectorAll('.mark')].map(m => { const b = m.getBoundingClientRect();"
        " return [m.className, (b.x - f.x) / f.width, (b.y - f.y) / f.height]; }))"
        "(document.querySelector('.frame').getBoundingClientRect())"
    )
    assert [mark[0] for mark in marks] == ["mark reference", "mark answer"]
    reference = page.evaluate(
        "[...document.querySelectorAll('.detail h3')].find(h => h.textContent === 'Reference').nextSibling.textContent"
    )
    assert marks[0][1:] == pytest.approx([float(value) for value in reference.strip("[]").split(",")][:2], abs=0.005)
    screenshot(page, "item")
    page.resize(390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "item_narrow")


def test_link_opens_its_item_whatever_the_filters_are(page, report):
    choose(page, "result", "correct")
    page.click(".rows li:nth-child(7) a.row")
    page.wait("document.querySelectorAll('.detail a').length")
    links = "[...document.querySelectorAll('.detail a')]"
    link = page.evaluate(f"{links}.find(a => a.textContent === 'link to this item').href")
    title = page.evaluate("document.querySelector('li.open .item').textContent")
    page.open("about:blank")
    page.open(link)
    assert (
        page.wait("document.querySelector('li.open .detail') && document.querySelector('li.open .item').textContent")
        == title
    )
    assert page.evaluate("document.querySelector('li.open').getBoundingClientRect().top") < 100  # in view


def test_modes_of_an_item_link_to_each_other(page):
    page.click(".rows a.row")
    page.wait("document.querySelectorAll('.modes a').length")
    item = page.evaluate("document.querySelector('li.open .item').textContent")
    mode = page.evaluate("document.querySelector('.modes a').textContent.slice(2)")
    page.click(".modes a")
    page.wait(f"document.querySelector('li.open .mode')?.textContent.startsWith('{mode}')")
    assert page.evaluate("document.querySelector('li.open .item').textContent") == item


def test_search_finds_text_that_is_in_no_list(page):
    choose(page, "result", "all")
    page.type("input[type=search]", "LOOK AT THE IMAGE")
    page.wait(
        "location.hash.includes('text=') && /^(?!720)\\d+ of 720/.test(document.querySelector('.status').textContent)"
    )
    assert 200 < count(page) < 500


def test_pages_turn(page):
    first = page.evaluate("document.querySelector('.rows a.row').href")
    page.click(".pages button:nth-child(3)")
    page.wait(f"document.querySelector('.rows a.row').href !== {first!r}")
    assert "page 2 of" in page.evaluate("document.querySelector('.status').textContent")


def test_hostile_texts_stay_texts(page):
    page.type("input[type=search]", "onerror")
    page.wait("/^3 of 720/.test(document.querySelector('.status').textContent)")
    page.click(".rows a.row")
    text = page.wait("document.querySelector('.detail')?.textContent")
    assert HOSTILE in text and page.evaluate("document.querySelectorAll('.detail script, img[src=x]').length") == 0
    link = page.evaluate("location.href")
    page.open("about:blank")
    page.open(link)
    page.wait("document.querySelectorAll('li.open .detail').length")


def test_page_of_many_items_opens(browser, tmp_path):
    """10,000 items in three modes; ``benchmarks/report_page.py`` measures the time."""
    write_run(tmp_path, sample_rows(tmp_path, 10_000))
    write_report(tmp_path, None, BENCHMARKS)
    browser.errors.clear()
    browser.open(f"file://{tmp_path}/report.html#result=")
    browser.wait("document.querySelectorAll('.rows li').length === 50")
    assert count(browser) == 30_000 and browser.errors == []
