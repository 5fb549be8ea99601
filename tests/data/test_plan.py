from __future__ import annotations

import collections
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
from made_up import BARE_PROCESSOR, BareDataset

from phivision_jax.data.plan import Plan, lengths_of, make_plan


def made(dataset, **settings) -> Plan:
    return make_plan(dataset, BARE_PROCESSOR, **{"length": 12, "vision_rows": 1, "num_patches": 8} | settings)


def rows(plan: Plan) -> list[list[int]]:
    assert not plan.sources.any()
    return [row[:, 1].tolist() for row in plan.rows(0, plan.num_rows)]


# Images of 24x16 pixels are 6 patches of 8x8, of 16x16 four. With text: 4+6, 2, 5+4, 3, 12, 13, and 1 + two of six.
SMALL = ([4, 2, 5, 3, 12, 13, 1], [[(24, 16)], [], [(16, 16)], [], [], [], [(24, 16), (24, 16)]])


def test_lengths_are_arithmetic_on_sizes():
    lengths = lengths_of(BareDataset(*SMALL).index, BARE_PROCESSOR.config)
    assert lengths.columns.tolist() == [10, 2, 9, 3, 12, 13, 13]
    assert lengths.patches.tolist() == [6, 0, 4, 0, 0, 0, 12]
    assert lengths_of(BareDataset([3], [[]]).index, BARE_PROCESSOR.config).patches.tolist() == [0]


def test_a_plan_on_paper():
    """T = 12, P = 8: 12 alone, 10 + 2, 9 + 3; 13 columns are too long, 12 patches too many in 13 columns."""
    plan = made(BareDataset(*SMALL))
    assert sorted(sorted(row) for row in rows(plan)) == [[0, 1], [2, 3], [4]]
    assert [(r.record, r.id, r.reason) for r in plan.rejected] == [(5, "r5", "columns"), (6, "r6", "columns")]
    summary = plan.summary()
    assert (summary.rows, summary.examples, summary.rejected) == (3, 5, {"columns": 2})
    assert summary.text_padding == 0 and summary.patch_padding == pytest.approx(1 - 10 / 24)
    assert "rejected for columns: 2 records" in str(summary)


def test_images_that_fit_no_vision_row_are_rejected_for_patches():
    dataset = BareDataset([1, 1, 1], [[(24, 16), (24, 16)], [(24, 16)], [(24, 16)] * 3])
    one, two = (made(dataset, length=40, vision_rows=r, num_patches=12 // r) for r in (1, 2))
    assert [(r.record, r.reason) for r in one.rejected] == [(2, "patches")]
    assert [(r.record, r.reason) for r in two.rejected] == [(2, "patches")]
    # Two vision rows of 8 have 16 patches in all, yet take no third image of 6.
    assert [r.record for r in made(dataset, length=40, vision_rows=2, num_patches=8).rejected] == [2]
    with pytest.raises(ValueError, match=r"none of 3 records fits.*the smallest needs 7 columns and 6 patches"):
        made(dataset, num_patches=5)


def test_steps_cover_all_rows_and_the_last_is_filled_up():
    plan = made(BareDataset([7] * 5, [[]] * 5))
    assert plan.num_rows == 5 and plan.num_steps(2) == 3
    steps = [[row[:, 1].tolist() for row in plan.rows(s, 2)] for s in range(3)]
    assert [*steps[0], *steps[1], *steps[2]][:5] == rows(plan) and steps[2][1] == []
    assert plan.rows(2, 2)[1].shape == (0, 2)
    with pytest.raises(IndexError, match="step 3 of a plan with 3 steps"):
        plan.rows(3, 2)


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.integers(1, 14), min_size=1, max_size=40),
    picture=st.sampled_from([(24, 16), (16, 16), (8, 16)]),
    every=st.integers(1, 4),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
    window=st.integers(1, 50),
    vision_rows=st.integers(1, 3),
)
def test_each_epoch_uses_each_record_once(text, picture, every, seed, epochs, window, vision_rows):
    dataset = BareDataset(text, [[picture] if i % every == 0 else [] for i in range(len(text))])
    lengths = lengths_of(dataset.index, BARE_PROCESSOR.config)
    if not (lengths.columns <= 12).any():
        return
    plan = made(dataset, seed=seed, epochs=epochs, window=window, vision_rows=vision_rows)
    rejected = {r.record for r in plan.rejected}
    assert rejected == set(np.flatnonzero(lengths.columns > 12).tolist())
    accepted = len(dataset) - len(rejected)
    # Windows end with the epoch, so each epoch is one stretch of the plan.
    flat = [i for row in rows(plan) for i in row]
    for e in range(epochs):
        assert sorted(flat[e * accepted : (e + 1) * accepted]) == sorted(set(range(len(dataset))) - rejected)
    for row in rows(plan):
        assert row and lengths.columns[row].sum() <= 12 and lengths.patches[row].sum() <= 8 * vision_rows
    assert plan.columns_used == epochs * lengths.columns[[i for i in range(len(dataset)) if i not in rejected]].sum()


def test_number_of_examples_cuts_the_last_epoch_short():
    plan = made(BareDataset([5] * 10, [[]] * 10), num_examples=25)
    counts = collections.Counter(i for row in rows(plan) for i in row)
    assert sum(counts.values()) == 25 and set(counts.values()) == {2, 3}


def test_seed_epoch_and_window_change_the_order():
    dataset = BareDataset([12] * 30, [[]] * 30)  # one per row: the order is seen bare
    first, second = np.split(np.array(rows(made(dataset, epochs=2))).reshape(-1), 2)
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    assert not np.array_equal(first, np.array(rows(made(dataset, seed=1))).reshape(-1))
    # Not only the rows' order: which records share a window is new in each epoch.
    first, second = np.split(np.array(rows(made(dataset, epochs=2, window=5))).reshape(-1), 2)
    assert set(first[:5]) != set(second[:5])
    # Best-fit-decreasing puts large rows first; the shuffle inside the window undoes that.
    mixed = BareDataset([12] * 30 + [7] * 30, [[]] * 60)
    large = np.array([dataset_row[0] < 30 for dataset_row in rows(made(mixed))])
    assert 8 < large[:30].sum() < 22


HASH = "21d8c397850e42cd97995f5b7d68114e8593e6f5498023eed1041741255d6479"


def test_the_hash_is_the_same_everywhere_and_covers_everything():
    plan = made(BareDataset(*SMALL))
    # The same in this process, on other machines, next year: training resumes by it.
    assert plan.hash == HASH
    other = BareDataset(*SMALL)
    other.hash = "1" * 64
    changed = [
        made(BareDataset(*SMALL), seed=1),
        made(BareDataset(*SMALL), epochs=2),
        made(BareDataset(*SMALL), num_patches=9),
        made(BareDataset(*SMALL), window=3),
        made(other),
    ]
    assert len({plan.hash, *(p.hash for p in changed)}) == 1 + len(changed)
    assert made(BareDataset(*SMALL), epochs=1).hash == made(BareDataset(*SMALL), num_examples=5).hash == plan.hash


def test_the_hash_is_the_same_in_a_fresh_process():
    code = "import test_plan as t; print(t.made(t.BareDataset(*t.SMALL)).hash)"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == HASH


def test_save_and_load(tmp_path):
    plan = made(BareDataset(*SMALL), epochs=3)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.hash == plan.hash and rows(loaded) == rows(plan) and loaded.rejected == plan.rejected
    assert loaded.summary() == plan.summary()
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    made(BareDataset(*SMALL)).save(tmp_path / "plan")  # replaces it
    assert Plan.load(tmp_path / "plan").hash == HASH


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan at"):
        Plan.load(tmp_path / "plan")
    made(BareDataset(*SMALL)).save(tmp_path / "plan")
    examples = tmp_path / "plan" / "examples.npy"
    content = examples.read_bytes()
    examples.write_bytes(content[:-4] + b"\1\0\0\0")
    with pytest.raises(ValueError, match="do not have the hash"):
        Plan.load(tmp_path / "plan")
    examples.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="an array is broken"):
        Plan.load(tmp_path / "plan")
    about = tmp_path / "plan" / "plan.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        Plan.load(tmp_path / "plan")


def test_errors():
    dataset = BareDataset(*SMALL)
    with pytest.raises(ValueError, match="epochs or num_examples, not both"):
        made(dataset, epochs=1, num_examples=3)
    with pytest.raises(ValueError, match="at least one example"):
        made(dataset, epochs=0)
    other = SimpleNamespace(**{**vars(BARE_PROCESSOR), "text_fingerprint": "d" * 64})
    with pytest.raises(ValueError, match=r"another tokenizer or chat template.*import the records again"):
        make_plan(dataset, other, length=12, vision_rows=1, num_patches=8)
