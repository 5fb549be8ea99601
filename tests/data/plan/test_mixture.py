from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.data.plan.example_order import Pool, order_examples, task_shares
from phivision_jax.data.plan.mixture import Mixture, Stage
from phivision_jax.data.records import MODES, TASKS
from tests.support.paths import ROOT
from tests.support.records import join_pools

THINK, NOTHINK = MODES.index("think"), MODES.index("nothink")
MATH, GUI, OCR = (TASKS.index(t) for t in ("math", "gui", "ocr"))


def pool(n: int, tokens=10, think: float = 0.0, task=MATH, seed: int = 0) -> Pool:
    """``n`` records of which every 1/think-th thinks; ``tokens`` each, or [n]."""
    modes = np.full(n, NOTHINK)
    modes[np.random.default_rng(seed).permutation(n)[: round(think * n)]] = THINK
    return Pool(np.zeros(n, np.int64), np.broadcast_to(np.asarray(tokens), n), modes, np.full(n, task))


def examples_of(pools: list[Pool], stage: Stage, seed: int = 0) -> list[tuple[int, int]]:
    """Source and record of each example."""
    pool, records = join_pools(pools)
    order, _ = order_examples(pool, [f"s{i}" for i in range(len(pools))], stage, seed)
    return list(zip(pool.sources[order].tolist(), records[order].tolist(), strict=True))


def share(values) -> dict:
    counts = collections.Counter(values)
    return {key: count / counts.total() for key, count in counts.items()}


def token_share(pools, examples, group) -> dict:
    tokens: collections.Counter = collections.Counter()
    for s, i in examples:
        tokens[group(s, i)] += int(pools[s].tokens[i])
    return {key: count / tokens.total() for key, count in tokens.items()}


def test_order_is_permutation_per_epoch():
    examples = examples_of([pool(50)], Stage(epochs=3))
    for epoch in range(3):
        assert sorted(i for _, i in examples[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert examples[:50] != examples[50:100]
    assert examples_of([pool(50)], Stage(examples=70)) == examples[:70]
    assert examples_of([pool(50)], Stage(), seed=1) != examples[:50]
    later = examples_of([pool(50)], Stage(name="later"))
    assert later != examples[:50] and sorted(later) == sorted(examples[:50])


def test_order_interleaves_sources_by_weight():
    """Weights 3 : 1 are due at 1/6, 3/6, 5/6, … and 1/2, 3/2, …: three and one among any four."""
    examples = examples_of([pool(100), pool(100)], Stage(weights={"s0": 3, "s1": 1}, examples=80))
    assert [s for s, _ in examples[:8]] == [0, 0, 1, 0, 0, 0, 1, 0]
    for first in range(0, 80, 4):
        assert [s for s, _ in examples[first : first + 4]].count(1) == 1


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    repeat=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_order_repeats_records(sizes, repeat, epochs, seed):
    pools = [pool(n, seed=i) for i, n in enumerate(sizes)]
    stage = Stage(repeat={f"s{i}": r for i, r in enumerate(repeat[: len(sizes)])}, epochs=epochs)
    one_pass = sum(n * r for n, r in zip(sizes, repeat, strict=False))
    examples = examples_of(pools, stage, seed)
    assert len(examples) == epochs * one_pass
    for first in range(0, len(examples), one_pass):
        counts = collections.Counter(examples[first : first + one_pass])
        assert all(counts[s, i] == repeat[s] for s, n in enumerate(sizes) for i in range(n))


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("held", [(0.05, 0.6), (0.0, 0.6), (0.3, 0.9)])
def test_reasoning_share_holds(unit, held):
    rng = np.random.default_rng(0)
    pools = [pool(8_000, rng.integers(50, 8_000, 8_000), think, seed=i) for i, think in enumerate(held)]
    # Thoughts are long: the shares in examples and in tokens are far apart.
    pools = [Pool(p.sources, p.tokens * np.where(p.modes == THINK, 4, 1), p.modes, p.tasks) for p in pools]
    weights = {"s0": 0.75, "s1": 0.25}
    stage = Stage(reasoning_share=0.2, reasoning_unit=unit, weights=weights, unit=unit, examples=20_000)
    examples = examples_of(pools, stage)

    def modes(s, i):
        return pools[s].modes[i]

    for part in (examples, examples[:5_000]):
        by_mode = share(modes(*e) for e in part) if unit == "examples" else token_share(pools, part, modes)
        by_source = share(s for s, _ in part) if unit == "examples" else token_share(pools, part, lambda s, _: s)
        assert by_mode[THINK] == pytest.approx(0.2, abs=0.005)
        assert by_source[0] == pytest.approx(0.75, abs=0.005)


def test_reasoning_share_wins_over_weights():
    pools = [pool(1_000, think=0.0), pool(1_000, think=1.0)]
    examples = examples_of(pools, Stage(reasoning_share=0.2, weights={"s0": 0.5, "s1": 0.5}, examples=5_000))
    assert share(s for s, _ in examples)[1] == pytest.approx(0.2, abs=0.001)


def test_reasoning_share_of_zero_or_one():
    pools = [pool(100, think=0.3)]
    for wanted, mode in ((0.0, NOTHINK), (1.0, THINK)):
        assert {pools[s].modes[i] for s, i in examples_of(pools, Stage(reasoning_share=wanted))} == {mode}
    with pytest.raises(ValueError, match=r"reasoning_share is 0\.2, but no record of its sources is of mode think"):
        examples_of([pool(10)], Stage(reasoning_share=0.2))


def test_shares_in_mixed_units():
    """Sources by tokens, reasoning by examples: the latter is exact, the former as near as complete epochs allow."""
    rng = np.random.default_rng(1)
    pools = [pool(4_000, rng.integers(100, 900, 4_000), think, seed=i) for i, think in enumerate((0.1, 0.5))]
    stage = Stage(reasoning_share=0.2, unit="tokens", weights={"s0": 0.6, "s1": 0.4}, examples=30_000)
    examples = examples_of(pools, stage)
    assert share(pools[s].modes[i] for s, i in examples)[THINK] == pytest.approx(0.2, abs=0.001)
    assert token_share(pools, examples, lambda s, _: s)[0] == pytest.approx(0.6, abs=0.005)


def test_task_shares_by_hand():
    held = {MATH: 0.8, GUI: 0.15, OCR: 0.05}
    capped = task_shares(held, Stage(task_caps={"math": 0.5}))
    assert capped == pytest.approx({MATH: 0.5, GUI: 0.375, OCR: 0.125})
    # The excess of one pushes another over its own cap.
    twice = task_shares(held, Stage(task_caps={"math": 0.5, "gui": 0.3}))
    assert twice == pytest.approx({MATH: 0.5, GUI: 0.3, OCR: 0.2})
    assert task_shares(held, Stage(task_temperature=0)) == pytest.approx(dict.fromkeys(held, 1 / 3))
    root = task_shares({MATH: 0.64, GUI: 0.36}, Stage(task_temperature=0.5))
    assert root == pytest.approx({MATH: 8 / 14, GUI: 6 / 14})
    with pytest.raises(ValueError, match=r"add up to 0\.90, less than 1"):
        task_shares(held, Stage(task_caps={"math": 0.3, "gui": 0.3, "ocr": 0.3}))


def test_order_holds_task_caps():
    pools = [pool(9_000, task=MATH), pool(600, task=GUI), pool(400, task=OCR)]
    examples = examples_of(pools, Stage(task_caps={"math": 0.4}, examples=5_000))
    assert share(pools[s].tasks[i] for s, i in examples) == pytest.approx({MATH: 0.4, GUI: 0.36, OCR: 0.24}, abs=0.001)


def test_order_finishes_cell_before_repeating():
    pools = [pool(40, think=0.25), pool(30, think=0.5, seed=1)]
    examples = examples_of(pools, Stage(reasoning_share=0.2, examples=400))
    for s, mode in itertools.product((0, 1), (THINK, NOTHINK)):
        cell = [i for source, i in examples if source == s and pools[s].modes[i] == mode]
        size = int((pools[s].modes == mode).sum())
        for first in range(0, len(cell) - size, size):
            assert len(set(cell[first : first + size])) == size


# ---------------------------------------------------------------------------------------------------------------------
# The file.

FILE = """
reasoning_share = 0.2
epochs = 2

[[sources]]
path = "math"
repeat = 3

[[sources]]
path = "other/gui"
name = "screens"
"""


def write(folder: Path, text: str) -> Path:
    (folder / "mix.toml").write_text(text)
    return folder / "mix.toml"


def test_read_without_stages(tmp_path):
    mixture = Mixture.read(write(tmp_path, FILE), epochs=1)
    assert mixture.sources == (("math", tmp_path / "math"), ("screens", tmp_path / "other/gui"))
    assert mixture.stages == (Stage(reasoning_share=0.2, epochs=2, repeat={"math": 3}),)


def test_read_stages_override_file(tmp_path):
    more = '[[stages]]\nname = "align"\nsources = ["screens"]\nexamples = 10\nreasoning_share = 0.0\n[[stages]]\n'
    first, second = Mixture.read(write(tmp_path, FILE + more)).stages
    assert first == Stage("align", ("screens",), examples=10, reasoning_share=0.0)
    assert second == Stage("stage 2", reasoning_share=0.2, epochs=2, repeat={"math": 3})


def test_names_come_from_folders(tmp_path):
    mixture = Mixture.from_directories(tmp_path / "a/train", tmp_path / "b/train", epochs=2)
    assert mixture.names == ("a/train", "b/train") and mixture.stages == (Stage(epochs=2),)
    assert Mixture.read(tmp_path / "a/train").names == ("train",)
    with pytest.raises(ValueError, match="two sources are called"):
        Mixture.from_directories(tmp_path / "a", tmp_path / "a")


@pytest.mark.parametrize(
    "text, message",
    [
        ("sources = 3 3", "not TOML"),
        ("epochs = 1", r"needs \[\[sources\]\]"),
        ("[[sources]]\nname = 'a'", "each of .* needs a path"),
        ("[[sources]]\npath = 'a'\nratio = 2", "a source has path, name, weight and repeat, not ratio"),
        ("reasoning_shre = 1\n[[sources]]\npath = 'a'", "reasoning_share"),
        ("reasoning_share = 20\n[[sources]]\npath = 'a'", "must be a share from 0 to 1, not 20"),
        ("unit = 'rows'\n[[sources]]\npath = 'a'", "unit.*tokens"),
        ("epochs = 1\nexamples = 2\n[[sources]]\npath = 'a'", "epochs or examples, not both"),
        ("examples = 2.5\n[[sources]]\npath = 'a'", r"examples must be an integer or None, not 2\.5"),
        ("reasoning_share = '0.2'\n[[sources]]\npath = 'a'", "reasoning_share must be a number or None, not '0.2'"),
        ("weights = {a = 'x'}\n[[sources]]\npath = 'a'", r"weights\['a'\] must be a number, not 'x'"),
        ("sources = 3", r"needs \[\[sources\]\]"),
        ("[[sources]]\npath = 3", "a path, as text"),
        ("[[sources]]\npath = 'a'\n[[stages]]\nname = 'x'\n[[stages]]\nname = 'x'", "two stages are called 'x'"),
    ],
)
def test_read_names_file_in_errors(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"mix\.toml.*{message}"):
        Mixture.read(path)
    with pytest.raises(FileNotFoundError):
        Mixture.read(tmp_path / "absent.toml")


def test_stage_rejects_bad_names_and_weights():
    for stage, message in [
        (Stage(sources=("s9",)), "sources names 's9'; the sources are s0, s1"),
        (Stage(weights={"s0": 1}), "weights leave out s1"),
        (Stage(weights={"s0": 1, "s2": 1}), "weights names 's2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            examples_of([pool(3), pool(3)], stage)
    assert {s for s, _ in examples_of([pool(3), pool(3)], Stage(weights={"s0": 0, "s1": 2}))} == {1}
    with pytest.raises(ValueError, match="has no records"):
        examples_of([pool(3)], Stage(weights={"s0": 0}))
    with pytest.raises(ValueError, match="weights of 's0' must be a number of 0 or more, not -1"):
        Stage(weights={"s0": -1})


def test_page_explains_every_setting_of_a_stage():
    page = (ROOT / "docs" / "data.md").read_text()
    table = page.partition("<!-- stage -->\n")[2].partition("<!-- end of stage -->")[0].splitlines()[2:]
    examples = dict(re.findall(r"`([^`]+)`", row)[:2] for row in table)
    assert list(examples) == [field.name for field in dataclasses.fields(Stage)]
    for name, example in examples.items():  # each is a valid value, and not the default
        stage = Stage(**tomllib.loads(f"{name} = {example}"))
        assert getattr(stage, name) != getattr(Stage(), name), name
