from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.mixture import Mixture, Stage
from phivision_jax.data.plan.plan import _ARRAYS, Plan, make_plan, plan_inputs
from phivision_jax.data.plan.record_sizes import lengths_of
from phivision_jax.data.records import MODES
from phivision_jax.images.naflex import grid_of
from phivision_jax.io.messages import first_difference
from tests.support.paths import ROOT
from tests.support.records import BARE_PROCESSOR, BareDataset

STAGE_FIELDS = {f.name for f in dataclasses.fields(Stage)}


def plan_of(dataset, **settings) -> Plan:
    """A plan of one source and one stage; ``settings`` are the stage's, sizes of a row, or the plan's."""
    stage = Stage(**{k: v for k, v in settings.items() if k in STAGE_FIELDS})
    rest = {k: v for k, v in settings.items() if k not in STAGE_FIELDS}
    mixture = Mixture((("bare", Path("bare")),), (stage,))
    sizes = {"length": 12, "vision_rows": 1, "num_patches": 8}
    shape = RowShape(**{name: rest.pop(name, size) for name, size in sizes.items()})
    return make_plan([dataset], mixture, BARE_PROCESSOR, shape, **rest)


def rows(plan: Plan) -> list[list[int]]:
    assert not plan.sources.any()
    return [row[:, 1].tolist() for row in plan.rows(0, plan.num_rows)]


SHAPE = RowShape(12, 1, 8)

# Images of 24x16 pixels are 6 patches of 8x8, of 16x16 four. With text: 4+6, 2, 5+4, 3, 12, 13, and 1 + two of six.
SMALL = ([4, 2, 5, 3, 12, 13, 1], [[(24, 16)], [], [(16, 16)], [], [], [], [(24, 16), (24, 16)]])


def test_lengths_of_sizes():
    lengths = lengths_of(BareDataset(*SMALL).index, BARE_PROCESSOR.layout)
    assert lengths.tokens.tolist() == [10, 2, 9, 3, 12, 13, 13]
    assert lengths.patches.tolist() == [6, 0, 4, 0, 0, 0, 12]
    assert lengths_of(BareDataset([3], [[]]).index, BARE_PROCESSOR.layout).patches.tolist() == [0]


def test_plan_by_hand():
    """T = 12, P = 8: 12 alone, 10 + 2, 9 + 3; 13 tokens are too long; so are 13 with 12 patches, which are too many."""
    plan = plan_of(BareDataset(*SMALL))
    assert sorted(sorted(row) for row in rows(plan)) == [[0, 1], [2, 3], [4]]
    assert plan.rejected.tolist() == [[0, 5, 0], [0, 6, 0]]
    assert (plan.num_rows, len(plan.examples)) == (3, 5)
    assert plan.text_padding == 0 and plan.patch_padding == pytest.approx(1 - 10 / 24)
    assert "do not fit a row: 2 records of bare (tokens)" in plan.summary()


def test_plan_rejects_images_for_patches():
    dataset = BareDataset([1, 1, 1], [[(24, 16), (24, 16)], [(24, 16)], [(24, 16)] * 3])
    one, two = (plan_of(dataset, length=40, vision_rows=r, num_patches=12 // r) for r in (1, 2))
    assert one.rejected.tolist() == two.rejected.tolist() == [[0, 2, 1]]
    # Two vision rows of 8 have 16 patches in all, yet take no third image of 6.
    assert plan_of(dataset, length=40, vision_rows=2, num_patches=8).rejected.tolist() == [[0, 2, 1]]
    with pytest.raises(ValueError, match=r"none of 3 records fits.*the smallest needs 7 tokens and 6 patches"):
        plan_of(dataset, num_patches=5)


def test_rows_fill_up_last_step():
    plan = plan_of(BareDataset([7] * 5, [[]] * 5))
    assert plan.num_rows == 5 and plan.num_steps(2) == 3
    steps = [[row[:, 1].tolist() for row in plan.rows(s, 2)] for s in range(3)]
    assert [*steps[0], *steps[1], *steps[2]][:5] == rows(plan) and steps[2][1] == []
    assert plan.rows(2, 2)[1].shape == (0, 2)
    with pytest.raises(IndexError, match="step 3 of a plan with 3 steps"):
        plan.rows(3, 2)


@settings(max_examples=60)
@given(
    text=st.lists(st.integers(1, 14), min_size=1, max_size=40),
    image_size=st.sampled_from([(24, 16), (16, 16), (8, 16)]),
    every=st.integers(1, 4),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
    window=st.integers(1, 50),
    vision_rows=st.integers(1, 3),
)
def test_plan_uses_each_record_once_per_epoch(text, image_size, every, seed, epochs, window, vision_rows):
    dataset = BareDataset(text, [[image_size] if i % every == 0 else [] for i in range(len(text))])
    lengths = lengths_of(dataset.index, BARE_PROCESSOR.layout)
    if not (lengths.tokens <= 12).any():
        return
    plan = plan_of(dataset, seed=seed, epochs=epochs, window=window, vision_rows=vision_rows)
    rejected = set(plan.rejected[:, 1].tolist())
    assert rejected == set(np.flatnonzero(lengths.tokens > 12).tolist())
    accepted = len(dataset) - len(rejected)
    # Windows end with the epoch, so each epoch is one stretch of the plan; but for sets that do not fill two rows.
    flat = [i for row in rows(plan) for i in row]
    assert sorted(flat) == sorted(epochs * sorted(set(range(len(dataset))) - rejected))
    for e in range(epochs) if lengths.tokens[sorted(set(flat))].sum() >= 24 else ():
        assert sorted(flat[e * accepted : (e + 1) * accepted]) == sorted(set(range(len(dataset))) - rejected)
    for row in rows(plan):
        assert row and lengths.tokens[row].sum() <= 12 and lengths.patches[row].sum() <= 8 * vision_rows
    assert plan.tokens_used == epochs * lengths.tokens[[i for i in range(len(dataset)) if i not in rejected]].sum()


def test_plan_packs_passes_of_tiny_dataset_together():
    plan = plan_of(BareDataset([5], [[]]), epochs=48)  # of 12 positions: two in a row
    assert plan.num_rows == 24 and plan.text_padding == pytest.approx(1 / 6)


def test_plan_examples_shorten_last_epoch():
    plan = plan_of(BareDataset([5] * 10, [[]] * 10), examples=25)
    counts = collections.Counter(i for row in rows(plan) for i in row)
    assert sum(counts.values()) == 25 and set(counts.values()) == {2, 3}


def test_plan_order_depends_on_seed_epoch_window():
    dataset = BareDataset([12] * 30, [[]] * 30)  # one per row: the order is seen bare
    first, second = np.split(np.array(rows(plan_of(dataset, epochs=2))).reshape(-1), 2)
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    assert not np.array_equal(first, np.array(rows(plan_of(dataset, seed=1))).reshape(-1))
    # Not only the rows' order: which records share a window is new in each epoch.
    first, second = np.split(np.array(rows(plan_of(dataset, epochs=2, window=5))).reshape(-1), 2)
    assert set(first[:5]) != set(second[:5])
    # Best-fit-decreasing puts large rows first; the shuffle inside the window undoes that.
    mixed = BareDataset([12] * 30 + [7] * 30, [[]] * 60)
    large = np.array([dataset_row[0] < 30 for dataset_row in rows(plan_of(mixed))])
    assert 8 < large[:30].sum() < 22


HASH = "a8defc477fae7ca9bc706bcb1ff57e418d42b20bfa3a519c416bd2725d62eff6"


ARRAYS = "cffd59b7f181e99beed27190d072ff4973351a20910306f7a2296d9c8aabb830"
"""sha256 over the arrays alone: shows whether a new ``HASH`` comes from new inputs or from other rows."""


def test_hash_covers_inputs():
    plan = plan_of(BareDataset(*SMALL))
    arrays = hashlib.sha256()
    for name, dtype in _ARRAYS.items():
        arrays.update(np.ascontiguousarray(getattr(plan, name), dtype=dtype).data)
    assert arrays.hexdigest() == ARRAYS
    # Runs resume by the hash, so it must be the same on every machine and in later versions.
    assert plan.hash == HASH
    other = BareDataset(*SMALL)
    other.hash = "1" * 64
    changed = [
        plan_of(BareDataset(*SMALL), seed=1),
        plan_of(BareDataset(*SMALL), epochs=2),
        plan_of(BareDataset(*SMALL), num_patches=9),
        plan_of(BareDataset(*SMALL), window=3),
        plan_of(BareDataset(*SMALL), batch_rows=2),
        plan_of(BareDataset(*SMALL), on_overflow="resize"),
        plan_of(other),
    ]
    assert len({plan.hash, *(p.hash for p in changed)}) == 1 + len(changed)


def test_plan_inputs_match_plan():
    mixture = Mixture((("bare", Path("bare")),))
    inputs = plan_inputs([BareDataset(*SMALL)], mixture, BARE_PROCESSOR, SHAPE)
    assert inputs == plan_of(BareDataset(*SMALL)).inputs == json.loads(json.dumps(inputs))


def test_hash_in_fresh_process():
    code = "import tests.data.plan.test_plan as t; print(t.plan_of(t.BareDataset(*t.SMALL)).hash)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == HASH


def test_save_and_load(tmp_path):
    plan = plan_of(BareDataset(*SMALL), epochs=3)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.row_shape == plan.row_shape == SHAPE
    assert loaded.hash == plan.hash and rows(loaded) == rows(plan)
    assert np.array_equal(loaded.rejected, plan.rejected)
    assert loaded.summary() == plan.summary() and loaded.shares == plan.shares
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    plan_of(BareDataset(*SMALL)).save(tmp_path / "plan")  # replaces it
    assert Plan.load(tmp_path / "plan").hash == HASH


def test_load_rejects_damaged_plan(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan at"):
        Plan.load(tmp_path / "plan")
    plan_of(BareDataset(*SMALL)).save(tmp_path / "plan")
    examples = tmp_path / "plan" / "examples.npy"
    content = examples.read_bytes()
    examples.write_bytes(content[:-4] + b"\1\0\0\0")
    with pytest.raises(ValueError, match="do not have the hash"):
        Plan.load(tmp_path / "plan")
    examples.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"examples\.npy is damaged"):
        Plan.load(tmp_path / "plan")
    about = tmp_path / "plan" / "plan.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        Plan.load(tmp_path / "plan")


def test_plan_rejects_bad_arguments():
    dataset = BareDataset(*SMALL)
    with pytest.raises(ValueError, match="epochs or examples, not both"):
        plan_of(dataset, epochs=1, examples=3)
    with pytest.raises(ValueError, match="epochs must be a number above 0, not 0"):
        plan_of(dataset, epochs=0)
    with pytest.raises(ValueError, match=r"2 records do not fit.*the first is 'r5' \(13 tokens, 0 patches\)"):
        plan_of(dataset, on_overflow="error")
    with pytest.raises(ValueError, match="1 datasets for a mixture of 2"):
        make_plan([dataset], Mixture((("a", Path("a")), ("b", Path("b")))), BARE_PROCESSOR, RowShape(1, 1, 8))
    other = SimpleNamespace(**{**vars(BARE_PROCESSOR), "text_fingerprint": "d" * 64})
    with pytest.raises(ValueError, match=r"another tokenizer or chat template.*import the records again"):
        make_plan([dataset], Mixture((("bare", Path("bare")),)), other, SHAPE)


def test_plan_resizes_large_images():
    """60 patches of 64x60 pixels do not fit P = 30, nor, with 20 tokens, T = 40."""
    dataset = BareDataset([5, 20, 39, 3], [[(64, 60)], [(64, 60), (24, 16)], [(64, 60)], [(24, 16)]])
    plan = plan_of(dataset, length=40, num_patches=30, on_overflow="resize")
    assert plan.rejected.tolist() == [[0, 2, 0]]  # no room for an image of any size
    assert sorted(plan.patch_limits) == [(0, 0), (0, 1)]
    for i, text, sizes in ((0, 5, [(64, 60)]), (1, 20, [(64, 60), (24, 16)])):
        limit = plan.patch_limits[0, i]

        def patches(limit: int, sizes=sizes) -> int:
            return sum(int(np.prod(grid_of(*size, 8, min(4, limit), limit))) for size in sizes)

        assert patches(limit) <= min(30, 40 - text) < patches(limit + 1)  # the largest that fits
    assert len(plan.resized) == 2 and "resized to fewer patches: 2 records" in plan.summary()
    patches = [(64, 60, plan.patch_limits[0, 0]), (64, 60, plan.patch_limits[0, 1]), (24, 16, plan.patch_limits[0, 1])]
    total = sum(int(np.prod(grid_of(w, h, 8, min(4, limit), limit))) for w, h, limit in patches)
    assert plan.tokens_used == 5 + 20 + 3 + 6 + total


def test_plan_balances_attention_work_of_steps():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 5, 900), rng.integers(6, 12, 300)])
    dataset = BareDataset(lengths.tolist(), [[]] * len(lengths))

    def spread(plan: Plan) -> float:
        work = np.array([(lengths[row[:, 1]] ** 2).sum() for row in plan.rows(0, plan.num_rows)])
        steps = work[: len(work) // 8 * 8].reshape(-1, 8)
        return float((steps.max(axis=1) / steps.mean(axis=1)).mean())

    assert spread(plan_of(dataset, batch_rows=8)) < 1.1 < 1.3 < spread(plan_of(dataset))
    # Every window begins in the middle of a step; that one too is kept close.
    assert spread(plan_of(dataset, batch_rows=8, window=150)) < 1.15


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_plan_holds_shares(unit):
    """20 % reasoning from sources with 5 % to 60 % of it; answers that think are several times as long."""
    rng = np.random.default_rng(0)
    datasets = []
    for think in (0.05, 0.2, 0.4, 0.6):
        modes = np.where(rng.random(3000) < think, MODES.index("think"), MODES.index("nothink"))
        text = np.where(modes == MODES.index("think"), rng.integers(100, 400, 3000), rng.integers(5, 100, 3000))
        datasets.append(BareDataset(text.tolist(), [[(24, 16)] if i % 3 else [] for i in range(3000)], modes))
    names = ("a", "b", "c", "d")
    weights = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    stage = Stage(reasoning_share=0.2, reasoning_unit=unit, unit=unit, weights=weights, examples=12_000)
    mixture = Mixture(tuple((name, Path(name)) for name in names), (stage,))
    plan = make_plan(datasets, mixture, BARE_PROCESSOR, RowShape(512, 1, 64), batch_rows=8)
    # Counted from the rows themselves, not from the plan's own shares.
    pairs = np.concatenate(plan.rows(0, plan.num_rows))
    tokens = np.array([lengths_of(d.index, BARE_PROCESSOR.layout).tokens for d in datasets])[pairs[:, 0], pairs[:, 1]]
    modes = np.array([d.index.modes for d in datasets])[pairs[:, 0], pairs[:, 1]]
    amount = tokens if unit == "tokens" else np.ones(len(pairs))
    assert amount[modes == MODES.index("think")].sum() / amount.sum() == pytest.approx(0.2, abs=0.005)
    for s, name in enumerate(names):
        assert amount[pairs[:, 0] == s].sum() / amount.sum() == pytest.approx(weights[name], abs=0.005)
        found = next(d for d in plan.shares if (d.kind, d.name) == ("source", name))
        share = found.token_share if unit == "tokens" else found.example_share
        assert share == pytest.approx(amount[pairs[:, 0] == s].sum() / amount.sum())
        assert found.passes == pytest.approx((pairs[:, 0] == s).sum() / 3000)
    assert "mode   think" in plan.summary() and "passes" in plan.summary()


def test_plan_of_one_stage_equals_its_part():
    datasets = [BareDataset([12] * 60, [[]] * 60)]
    stages = (Stage("first", examples=30), Stage("second", examples=30))
    mixture = Mixture((("a", Path("a")),), stages)
    both = np.concatenate(make_plan(datasets, mixture, BARE_PROCESSOR, RowShape(12)).rows(0, 60))[:, 1]
    alone = [make_plan(datasets, mixture.only(s.name), BARE_PROCESSOR, RowShape(12)).rows(0, 30) for s in stages]
    first, second = (np.concatenate(rows)[:, 1] for rows in alone)
    assert sorted(first) == sorted(both[:30]) and sorted(second) == sorted(both[30:])
    assert len(set(first.tolist()) & set(second.tolist())) < 25  # not the same records over again


def test_first_difference_of_inputs():
    inputs = plan_of(BareDataset(*SMALL)).inputs
    other = plan_of(BareDataset(*SMALL), epochs=2, seed=0).inputs
    assert first_difference(inputs, inputs) is None
    assert first_difference(inputs, other) == "stages.0.epochs is 2.0 there, 1.0 here"
    other = plan_of(BareDataset(*SMALL), batch_rows=4).inputs
    assert first_difference(inputs, other) == "batch_rows is 4 there, 1 here"
    # The default, 1 and 1.0 give one plan.
    assert plan_of(BareDataset(*SMALL), epochs=1).hash == plan_of(BareDataset(*SMALL), epochs=1.0).hash == HASH


def test_save_replaces_only_plans(tmp_path):
    (tmp_path / "notes").mkdir()
    for where in (tmp_path / "notes", Path(".")):
        with pytest.raises(FileExistsError, match=r"not a plan|no name"):
            plan_of(BareDataset(*SMALL)).save(where)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_summary_shows_requested_shares():
    """Weights that cannot hold beside the reasoning share, and a source of which nothing fits."""
    think, direct = np.full(20, MODES.index("think")), np.full(20, MODES.index("nothink"))
    datasets = [BareDataset([6] * 20, [[]] * 20, m) for m in (think, direct)] + [BareDataset([99], [[]])]
    names = ("a", "b", "c")
    stage = Stage(reasoning_share=0.2, weights={"a": 0.5, "b": 0.25, "c": 0.25}, examples=100)
    mixture = Mixture(tuple((name, Path(name)) for name in names), (stage,))
    plan = make_plan(datasets, mixture, BARE_PROCESSOR, SHAPE)
    found = {(d.kind, d.name): (d.examples, d.requested, d.passes) for d in plan.shares}
    assert found["source", "a"] == (20, 0.5, 1.0) and found["source", "c"] == (0, 0.25, None)
    assert found["mode", "think"][:2] == (20, 0.2) and found["part", "b, nothink"] == (80, None, 4.0)
    assert "requested 25.00% of examples" in plan.summary()
    assert "do not fit a row: 1 records of c (tokens)" in plan.summary()


def test_plan_keeps_order_of_stages():
    datasets = [BareDataset([6] * 40, [[]] * 40), BareDataset([6] * 20, [[]] * 20)]
    stages = (Stage("first", sources=("b",), examples=10), Stage("second"))
    plan = make_plan(datasets, Mixture((("a", Path("a")), ("b", Path("b"))), stages), BARE_PROCESSOR, SHAPE)
    order = np.concatenate(plan.rows(0, plan.num_rows))
    assert (order[:10, 0] == 1).all() and len(order) == 70
    assert sorted(map(tuple, order[10:].tolist())) == [(0, i) for i in range(40)] + [(1, i) for i in range(20)]
    assert [(d.stage, d.name, d.examples) for d in plan.shares if d.kind == "source"] == [
        ("first", "b", 10), ("second", "a", 40), ("second", "b", 20),
    ]  # fmt: skip
