"""Samples of items and their fingerprints."""

from __future__ import annotations

import dataclasses
import json

import pytest

from phivision_jax.evaluation.task import Sampling, fingerprint, sample, survey
from phivision_jax.inference.requests import Request
from tests.support.sums_benchmark import Sums, image, write_sums


def test_sample_is_random_and_the_same_for_a_seed():
    chosen = sample(1000, 50, 1)
    assert len(set(chosen)) == 50 and list(chosen) == sorted(chosen) and chosen == sample(1000, 50, 1)
    assert chosen != sample(1000, 50, 2) and sample(5, 0, 1) == sample(5, 9, 1) == (0, 1, 2, 3, 4)


def test_shards_are_a_partition(tmp_path):
    write_sums(tmp_path / "sums.json", 23)
    task = survey(Sums(), Sums().items(str(tmp_path / "sums.json")), Sampling())
    shards = [task.shard(i, 4).chosen for i in range(4)]
    assert sum(shards, ()) == task.chosen and {len(shard) for shard in shards} == {5, 6}


@pytest.mark.parametrize(
    "change",
    [
        {"images": [image(2)]},
        {"messages": "other?"},
        {"temperature": 0.1},
        {"max_new_tokens": 5},
        {"thinking_budget": 3},
        {"seed": 1},
        {"stop": ("x",)},
    ],
)
def test_fingerprint_has_everything_but_the_mode(change):
    request = Request("what?", images=[image(1)])
    assert fingerprint(dataclasses.replace(request, **change)) != fingerprint(request)
    assert fingerprint(dataclasses.replace(request, mode="think")) == fingerprint(request)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_fingerprint_of_a_benchmark_changes_with_any_item(tmp_path, column):
    """Question, answer, or bytes of an image."""
    rows = write_sums(path := tmp_path / "sums.json", 9)
    before = survey(Sums(), Sums().items(str(path)), Sampling()).fingerprint
    assert survey(Sums(), Sums().items(str(path)), Sampling()).fingerprint == before
    rows[4][column] += 100
    path.write_text(json.dumps(rows))
    assert survey(Sums(), Sums().items(str(path)), Sampling()).fingerprint != before


def test_equal_ids_are_refused(tmp_path):
    write_sums(path := tmp_path / "sums.json", 3)
    items = Sums().items(str(path))
    with pytest.raises(ValueError, match="two items have the id '1'"):
        survey(Sums(), [*items, items[1]], Sampling())
    with pytest.raises(ValueError, match="sums has no items"):
        survey(Sums(), [], Sampling())
