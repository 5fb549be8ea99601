from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data.feed.encode import GROUP_NAMES, group_weights
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from tests.support.datasets import write_dataset
from tests.support.records import make_record

SHAPE = RowShape(160, 1, 80)


def by_name(*rules: tuple[str, float]) -> dict[str, float]:
    return dict(zip(GROUP_NAMES, group_weights(rules).tolist(), strict=True))


def test_group_weights_use_first_match():
    weights = by_name(("think/math", 3.0), ("^think", 0.5), ("math", 2.0))
    # Both names end in "think/math"; a pattern matches anywhere.
    assert weights["think/math"] == weights["nothink/math"] == 3.0
    assert weights["think/ocr"] == 0.5 and weights["nothink/ocr"] == 1.0
    assert by_name(("^think/math", 3.0), ("math", 2.0))["nothink/math"] == 2.0
    assert group_weights(()).dtype == np.float32 and set(by_name().values()) == {1.0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("maths", 2.0)], r"'maths' matches no mode and task; modes are think, nothink, tasks are general, math"),
        ([("(", 2.0)], r"'\(' is not a regular expression"),
        ([("math", -1.0)], r"weight of 'math' must be 0 or more, not -1"),
        ([("math", float("inf"))], r"must be 0 or more, not inf"),
        ([(".", 0.0)], "nothing to learn"),
    ],
)
def test_group_weights_reject_bad_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        group_weights(rules)


def test_batches_weigh_targets_by_group(tmp_path, processor):
    thought = {"role": "assistant", "content": "<think>two and two</think>yes"}
    records = [make_record(i, task=("math", "ocr")[i % 2]) for i in range(12)]
    records[3] = dataclasses.replace(records[3], mode="think", messages=(records[3].messages[0], thought))
    dataset = write_dataset(tmp_path / "set", records, processor)
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, SHAPE)
    weights = group_weights([("^think", 0.25), ("math", 2.0)])
    wanted = {"math": 2.0, "ocr": 1.0}
    plain = batches([dataset], plan, processor, batch_rows=2)
    weighed = batches([dataset], plan, processor, batch_rows=2, loss_weights=weights)
    seen = set()
    for (before, info), (after, _) in zip(plain, weighed, strict=True):
        assert after.loss_weights.dtype == np.float32
        np.testing.assert_array_equal(before.tokens, after.tokens)
        for j, row in enumerate(info.record_ids):
            for segment, record_id in enumerate(row, start=1):
                i = int(record_id[1:])
                factor = 0.25 if i == 3 else wanted[records[i].task]
                own = before.segment_ids[j] == segment
                np.testing.assert_array_equal(after.loss_weights[j][own], factor * before.loss_weights[j][own])
                assert before.loss_weights[j][own].sum() > 0
                seen.add(factor)
    assert seen == {0.25, 1.0, 2.0}
    assert not after.loss_weights[after.segment_ids == 0].any()


def test_batches_bounds(tmp_path, processor):
    dataset = write_dataset(tmp_path / "set", [make_record(i) for i in range(60)], processor)
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, SHAPE)
    steps = plan.num_steps(2)

    def steps_of(**bounds) -> list[int]:
        return [info.step for _, info in batches([dataset], plan, processor, batch_rows=2, **bounds)]

    assert steps > 3 and steps_of(end_step=2) == [0, 1] and steps_of(start_step=1, end_step=3) == [1, 2]
    assert steps_of(end_step=steps + 5) == list(range(steps)) and steps_of(start_step=2, end_step=2) == []
