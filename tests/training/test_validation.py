"""The validation loss: by hand, in any packing, on any mesh; it changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data.feed.encode import GROUP_NAMES, encode_record
from phivision_jax.models import phivision
from phivision_jax.rows import fill_rows
from phivision_jax.training import validation
from phivision_jax.training.validation import means
from tests.support.batches import QUICK
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT
from tests.support.records import CONFIG, make_record
from tests.support.validating import DATA, PROCESSOR, RUN, place, random_params, validator

TOLERANCE = 1e-6
THOUGHT = {"role": "assistant", "content": "<think>it is red and round</think>yes"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three groups whose examples have very different numbers of target tokens."""
    records = []
    for i in range(24):
        record = make_record(i, ((), ((24, 16),), ((32, 32), (8, 8)))[i % 3], task=("math", "ocr")[i % 2])
        if i % 4 == 0:
            record = dataclasses.replace(record, mode="think", messages=(record.messages[0], THOUGHT))
        records.append(record)
    return write_dataset(tmp_path_factory.mktemp("data") / "set", records, PROCESSOR)


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(validation, "compiler_options", lambda mesh: QUICK)


@pytest.fixture(scope="module")
def by_hand(dataset, params) -> dict[str, float]:
    """−log p of every target token from the logits, each record alone in its row."""
    graphdef, device_params = phivision.abstract(CONFIG)[0], jax.tree.map(jnp.asarray, params)
    logits = jax.jit(lambda params, batch: phivision.merge(graphdef, params)(batch))
    losses: dict[str, list[float]] = {}
    for i in range(len(dataset)):
        example = encode_record(dataset[i], PROCESSOR)
        batch = fill_rows([[example]], RowShape(100, 1, 64), CONFIG)
        log_p = np.asarray(jax.nn.log_softmax(logits(device_params, jax.tree.map(jnp.asarray, batch))), np.float64)[0]
        (index,) = np.nonzero(batch.loss_weights[0])
        losses.setdefault(GROUP_NAMES[example.group], []).extend(-log_p[index, batch.targets[0, index]])
    means = {f"validation/loss/{name}": float(np.mean(group)) for name, group in losses.items()}
    return means | {"validation/loss": float(np.mean([x for group in losses.values() for x in group]))}


def test_validator_by_hand(dataset, params, by_hand):
    measure = validator(dataset)
    found = measure(place(measure, params))
    assert found.keys() == by_hand.keys() | {"validation/token_accuracy"}
    assert {"validation/loss/think/math", "validation/loss/nothink/math", "validation/loss/nothink/ocr"} <= found.keys()
    for name, value in by_hand.items():
        assert found[name] == pytest.approx(value, abs=TOLERANCE), name
    # A mean of the groups' means, or of the batches', would differ.
    groups = [value for name, value in found.items() if name.count("/") == 3]
    assert abs(np.mean(groups) - found["validation/loss"]) > 1e-3
    assert 0 <= found["validation/token_accuracy"] < 1


@pytest.mark.parametrize(
    ("changes", "devices", "mesh", "microbatches"),
    [
        ({"batch_rows": 6, "length": 100, "vision_rows": 1, "num_patches": 64}, 1, {}, 1),
        ({"batch_rows": 8}, 8, {"fsdp": 4, "data": 2}, 1),
        ({"batch_rows": 4}, 2, {"fsdp": 2}, 2),
    ],
)
def test_validator_in_other_rows_and_on_other_meshes(dataset, params, by_hand, changes, devices, mesh, microbatches):
    cfg = dataclasses.replace(RUN, data=dataclasses.replace(DATA, **changes), microbatches=microbatches)
    measure = validator(dataset, cfg, devices, **mesh)
    found = measure(place(measure, params))
    for name, value in by_hand.items():
        assert found[name] == pytest.approx(value, abs=TOLERANCE), name


def test_validator_repeats_and_keeps_the_parameters(dataset, params):
    cfg = dataclasses.replace(RUN, validate_batches=2)
    measure = validator(dataset, cfg)
    held = place(measure, params)
    first = measure(held)
    assert measure.num_batches == 2 and measure(held) == first
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, held), params)
    measure.num_batches = 1
    assert measure(held) != first


def test_means_by_hand():
    def part(*groups: tuple[float, float], correct: float) -> dict[str, np.ndarray]:
        padded = [*groups, *[(0.0, 0.0)] * (len(GROUP_NAMES) - len(groups))]
        loss, weight = np.array(padded, np.float32).T
        return {"group_loss": loss, "group_weight": weight, "correct": np.float32(correct)}

    # 2 tokens of loss 3 and 6 of loss 1 in group 0, 8 of loss 0.5 in group 1.
    found = means([part((6, 2), correct=1), part((6, 6), (4, 8), correct=3)], GROUP_NAMES)
    assert found == {
        "validation/loss": 1.0,
        "validation/token_accuracy": 0.25,
        f"validation/loss/{GROUP_NAMES[0]}": 1.5,
        f"validation/loss/{GROUP_NAMES[1]}": 0.5,
    }
    with pytest.raises(ValueError, match="no target tokens"):
        means([part((0, 0), correct=0)], GROUP_NAMES)


@pytest.mark.slow
def test_validator_on_two_hosts(dataset, by_hand):
    """Each encodes half of the rows, with very different numbers of target tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/support/validating_host.py", address, str(number), dataset.directory],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    results = []
    for host in hosts:
        out, err = host.communicate(timeout=300)
        assert host.returncode == 0, err[-2000:]
        results += [json.loads(line) for line in out.splitlines() if line.startswith("{")]  # other lines are Gloo's
    assert len(results) == 2 and results[0] == results[1]
    for name, value in by_hand.items():
        assert results[0][name] == pytest.approx(value, abs=TOLERANCE), name
