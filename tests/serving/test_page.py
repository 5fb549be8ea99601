"""The page in a real browser, which these tests need (``tests/support/browser.py``); screenshots go to $SCREENSHOTS."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.bombs import encoded
from tests.support.browser import Browser
from tests.support.fake_generator import FakeGenerator
from tests.support.serving import served, wait_until

pytestmark = pytest.mark.slow

ANSWER = (
    "I see two things:\n- the red car: [0.125, 0.500, 0.500, 0.875]\n- the sun: [0.8, 0.2]\n"
    "The list [1, 2, 3] and the interval [0, 1] are text, and so is <b>this</b>."
)
THOUGHT = "The image shows a car below the sun. " * 6


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def photo() -> bytes:
    image = Image.fromarray(np.linspace([120, 180, 240], [70, 140, 60], 480).astype(np.uint8)[:, None].repeat(640, 1))
    canvas = ImageDraw.Draw(image)
    canvas.ellipse([480, 64, 544, 128], "gold")
    canvas.rectangle([90, 260, 310, 400], "firebrick")
    canvas.ellipse([110, 370, 170, 430], "black")
    canvas.ellipse([230, 370, 290, 430], "black")
    return encoded(image, "PNG")


@pytest.fixture
def fake():
    return FakeGenerator(answer=ANSWER, thought=THOUGHT, waits=0.01)


@pytest.fixture
def page(browser, fake):
    with served(fake) as address:
        browser.errors.clear()
        browser.requested.clear()
        browser.resize(1200, 900)
        browser.open(address)
        browser.wait("document.querySelector('#model').textContent === 'tiny'")
        yield browser
        assert browser.errors == []
        assert all(url.startswith((address, "data:")) for url in browser.requested), browser.requested
        browser.open("about:blank")


def screenshot(page: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def texts(page: Browser, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def finished(page: Browser, turns: int = 1) -> None:
    page.wait(
        f"document.querySelectorAll('.turn').length === {turns} && !document.querySelector('#send').hidden"
        " && [...document.querySelectorAll('.numbers')].at(-1).textContent"
    )


def boxes(page: Browser) -> list[list[float]]:
    """Left, top, width and height of each mark, relative to the image that it is on."""
    return page.evaluate(
        "(() => { const i = document.querySelector('.marked img').getBoundingClientRect();"
        " return [...document.querySelectorAll('.marked i')].map(e => { const b = e.getBoundingClientRect();"
        " return [(b.x - i.x) / i.width, (b.y - i.y) / i.height, b.width / i.width, b.height / i.height]; }); })()"
    )


def test_dropped_image_is_asked_about_and_boxes_are_drawn(page, photo, fake):
    screenshot(page, "empty")
    page.transfer("drop", "#turns", photo)
    page.wait("document.querySelector('#images img')?.complete")
    page.type("#question", "Where is the car?")
    page.press("Enter")
    page.wait("!!document.querySelector('.marked i')")  # while it streams
    finished(page)
    assert fake.images == [(640, 480)] and fake.submitted[0].mode == "auto"
    assert texts(page, ".answer")[0] == ANSWER
    box, point = boxes(page)
    assert np.allclose(box, [0.125, 0.5, 0.375, 0.375], atol=0.01)
    assert np.allclose(np.array(point[:2]) + np.array(point[2:]) / 2, [0.8, 0.2], atol=0.01)
    assert texts(page, ".marked b") == ["the red car", "the sun"]
    screenshot(page, "boxes")


@pytest.mark.parametrize("mode", ["auto", "think", "nothink"])
def test_mode_is_sent_and_thought_is_folded(page, fake, mode):
    page.click(f"#mode label:has([value={mode}])")
    page.type("#question", "Why?")
    page.click("#send")
    if mode == "think":
        page.wait("document.querySelector('.thought summary')?.textContent.startsWith('Thinking')")
        screenshot(page, "thinking")
    finished(page)
    assert fake.submitted[0].mode == mode
    if mode == "think":
        assert page.evaluate("!document.querySelector('.thought').open && !document.querySelector('.thought').hidden")
        assert page.evaluate("/^Thought for [0-9.]+ s$/.test(document.querySelector('.thought summary').textContent)")
        page.click(".thought summary")
        assert texts(page, ".thought div")[0] == THOUGHT
        screenshot(page, "thought")
    else:
        assert page.evaluate("document.querySelector('.thought').hidden")
    words = len(ANSWER.split()) + (len(THOUGHT.split()) if mode == "think" else 0)
    assert f"{words} tokens" in texts(page, ".numbers")[0] and "tokens/s" in texts(page, ".numbers")[0]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop(page, fake, how):
    fake.answer = "word " * 10_000
    page.type("#question", "Count.")
    page.press("Enter")
    page.wait("document.querySelector('.answer')?.textContent.includes('word word')")
    screenshot(page, "streaming")
    page.click("#stop") if how == "button" else page.press("Escape")
    finished(page)
    wait_until(lambda: fake.cancelled == 1 and not fake.active)
    assert "stopped" in texts(page, ".numbers")[0] and texts(page, ".answer")[0].startswith("word word")


def test_several_turns_keep_images_and_answers(page, photo, fake, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo)
    fake.answer = "Yes."
    page.choose_files("#files", tmp_path / "photo.png")
    page.wait("document.querySelectorAll('#images img').length === 1")
    page.transfer("paste", "#question", photo)
    page.wait("document.querySelectorAll('#images img').length === 2")
    page.click("#images li:first-child button")
    page.wait("document.querySelectorAll('#images img').length === 1")
    for turn, question in enumerate(["First?", "Second?"], start=1):
        page.type("#question", question)
        page.press("Enter")
        finished(page, turn)
    messages, images = fake.submitted[1].conversation()
    assert [m["content"] for m in messages] == ["<image>\nFirst?", "Yes.", "Second?"] and len(images) == 1
    page.click("#clear")
    assert page.evaluate("!document.querySelector('.turn') && !document.querySelector('#welcome').hidden")


def test_keyboard_alone(page, fake):
    """Tab reaches everything, arrows change the mode, Shift+Enter breaks the line, Enter asks."""
    page.evaluate("document.querySelector('#question').focus()")
    page.type("#question", "One")
    page.press("Enter", modifiers=8)
    page.send("Input.insertText", text="two")
    reached = []
    for _ in range(5):
        page.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.value || document.activeElement.tagName")
        )
        if reached[-1] == "auto":
            page.press("ArrowRight")
    assert reached == ["add", "auto", "SUMMARY", "send", "clear"] or reached[:4] == ["add", "auto", "SUMMARY", "send"]
    page.type("#question", "")
    page.press("Enter")
    finished(page)
    assert texts(page, ".question") == ["One\ntwo"] and fake.submitted[0].mode == "think"


def test_example_and_settings(page, fake):
    page.click("#examples button")
    page.click("#settings summary")
    page.type("#max_tokens", "2")
    page.type("#thinking_budget", "5")
    screenshot(page, "settings")
    page.click("#send")
    finished(page)
    request = fake.submitted[0]
    assert (request.max_new_tokens, request.thinking_budget, request.temperature) == (2, 5, 0)
    assert "cut off by a limit" in texts(page, ".numbers")[0]


def test_error_is_shown_and_the_question_can_be_asked_again(page, fake):
    page.type("#question", "x" * 10_001)
    page.press("Enter")
    finished_error = "document.querySelector('.error')?.textContent"
    assert "10001 tokens" in page.wait(finished_error)
    assert page.evaluate("document.querySelector('#question').value.length") == 10_001
    above_the_form = "document.querySelector('.error').getBoundingClientRect().bottom"
    page.wait(f"{above_the_form} <= document.querySelector('#ask').getBoundingClientRect().top")
    page.errors[:] = [error for error in page.errors if "status of 400" not in error]  # the browser's own line
    screenshot(page, "error")


@pytest.mark.parametrize("dark", [False, True])
def test_phone(page, photo, dark):
    page.resize(390, 844, dark=dark)
    screenshot(page, f"phone-empty-{'dark' if dark else 'light'}")
    page.transfer("drop", "#turns", photo)
    page.wait("document.querySelector('#images img')?.complete")
    page.click("#mode label:has([value=think])")
    page.type("#question", "Where is the car?")
    page.click("#send")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    screenshot(page, f"phone-{'dark' if dark else 'light'}")
