"""Hosts as real processes of ``jax.distributed``: killed at random steps, continued by another number of hosts."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import Plan, make_plan
from phivision_jax.data.store.dataset import Dataset
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT, SUPPORT
from tests.support.records import mixed_records

ROWS, EPOCHS = 4, 3


@pytest.fixture(scope="module")
def planned(tmp_path_factory, processor) -> tuple[Path, list[Dataset], Plan]:
    """Two sources, every record once in each of three epochs."""
    folder = tmp_path_factory.mktemp("hosts")
    records = mixed_records(150)
    datasets = [
        write_dataset(folder / "set0", records[:100], processor),
        write_dataset(folder / "set1", records[100:], processor),
    ]
    mixture = Mixture.from_directories(folder / "set0", folder / "set1", epochs=EPOCHS)
    plan = make_plan(datasets, mixture, processor, RowShape(160, 2, 80), batch_rows=ROWS)
    plan.save(folder / "plan")
    return folder, datasets, plan


def run_hosts(folder: Path, count: int, first: int, last: int) -> dict[tuple[int, int], tuple[list, list]]:
    """Ids and tokens of each row that ``count`` hosts make in the steps ``first`` … ``last`` − 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={ROWS // count}",
        "JAX_PLATFORMS": "cpu",
    }
    words = [str(folder), str(first), str(last)]
    hosts = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "hosts.py", address, str(number), str(count), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    held = {}
    for number, host in enumerate(hosts):
        out, err = host.communicate(timeout=300)
        # A host that notices another's end first may abort.
        assert host.returncode in (0, -signal.SIGKILL, -signal.SIGABRT), err[-2000:]
        for line in (json.loads(line) for line in out.splitlines() if line.startswith("{")):  # the others are Gloo's
            assert line["row"] % count == number
            held[line["step"], line["row"]] = (line["ids"], line["tokens"])
    return held


def one_host(planned, processor) -> dict[tuple[int, int], tuple[list, list]]:
    """The uninterrupted run of one host, in this process."""
    _, datasets, plan = planned
    return {
        (info.step, row): (list(info.record_ids[row]), batch.tokens[row].tolist())
        for batch, info in batches(datasets, plan, processor, batch_rows=ROWS)
        for row in range(ROWS)
    }


@pytest.mark.parametrize("stops", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_hosts_are_continued_by_others(planned, processor, stops):
    folder, _, plan = planned
    expected = one_host(planned, processor)
    steps = plan.num_steps(ROWS)
    rng = random.Random(stops)
    ends = [*sorted(rng.sample(range(1, steps), stops)), steps]
    counts = [2, 4, 1, *itertools.islice(itertools.cycle([4, 2, 1, 2, 4, 1]), len(ends))]
    held: dict[tuple[int, int], tuple[list, list]] = {}
    for count, first, last in zip(counts, [0, *ends], ends, strict=False):
        part = run_hosts(folder, count, first, last)
        assert sorted(part) == [(step, row) for step in range(first, last) for row in range(ROWS)]
        held |= part
    assert held == expected
    # No example is lost or doubled within an epoch: an epoch is the next 150 examples of the sequence.
    sequence = [record_id for key in sorted(held) for record_id in held[key][0]]
    assert len(sequence) == EPOCHS * 150
    for epoch in range(EPOCHS):
        assert sorted(sequence[150 * epoch : 150 * (epoch + 1)]) == sorted(r.id for r in mixed_records(150))
