"""The line of a training run: in place on a terminal, lines of text elsewhere."""

import io
import re

import pytest
from rich.console import Console

from phivision_jax.io import progress
from phivision_jax.io.progress import training_bar

ROW = {"loss": 2.34567, "tokens_per_s": 52345.6, "mfu": 0.4123, "goodput": 0.975, "grad_norm": 1.0}


def test_training_bar_shows_newest_metrics_and_time_left(monkeypatch):
    out, time = io.StringIO(), 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: time)
    with training_bar(1200, 100, console=Console(file=out)) as show:
        show(100, loss=3.0)
        time = 50.0
        show(200, **ROW)
        time = 75.0
        show(250, **{"eval/accuracy": 0.5, "validation/loss": 2.5})
    assert out.getvalue().splitlines() == [
        "step 100/1,200  loss 3",
        "step 200/1,200  loss 2.346 · 0:08:20 left · 52,346 tokens/s · MFU 41.2% · goodput 97.5%",
        "step 250/1,200  loss 2.346 · 0:07:55 left · validation loss 2.5 · 52,346 tokens/s · MFU 41.2% · goodput 97.5%"
        " · accuracy 50.0%",
    ]


def test_file_gets_plain_lines():
    out = io.StringIO()
    with training_bar(10, 0, console=Console(file=out, width=40)) as show:
        show(5, **ROW)
        show(6, **ROW)
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue() and out.getvalue().count("\n") == 2


@pytest.mark.parametrize("width", [60, 160])
def test_terminal_gets_one_line_in_place(width):
    out = io.StringIO()
    with training_bar(10, 0, console=Console(file=out, force_terminal=True, width=width)) as show:
        show(4, **ROW)
        show(10, **ROW | {"loss": 1.5})
    text = out.getvalue()
    assert "\x1b[" in text and text.count("\n") == 1  # at the end
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("\r")[-1].rstrip()
    assert shown.startswith("step 10/10  loss 1.5 · 0:00:00 left")
    assert ("…" not in shown) == ("goodput" in shown) == (width > 100)


def test_other_processes_print_nothing(capsys):
    with training_bar(10, 0, shown=False) as show:
        show(5, **ROW)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("title", ["[/b] [red]x", "\x1b]0;title\x07 [2J", "import [/]"])
def test_titles_of_bars_are_text(capsys, title):
    with progress.bar(title, 3) as advance:
        advance(3)
    shown = capsys.readouterr().out
    assert title.replace("\x1b", r"\x1b").replace("\x07", r"\x07") in " ".join(shown.split()) and "\x07" not in shown
