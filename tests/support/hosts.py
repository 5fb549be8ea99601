"""One of several hosts in the tests of ``test_hosts``: ``python hosts.py ADDRESS NUMBER COUNT DIRECTORY FIRST LAST``.

Prints a line of JSON for each row that its devices hold, from step FIRST on; at step LAST, when all hosts have come to
it, it kills itself, with the rows of that step and some more already made ahead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phivision_jax.data.feed.pipeline import batches, rows_of_process, to_device
from phivision_jax.data.plan.plan import Plan
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.processor import Processor
from tests.support.records import CONFIG

ROWS = 4


def main(address: str, number: str, count: str, directory: str, first: str, last: str) -> None:
    jax.distributed.initialize(address, num_processes=int(count), process_id=int(number))
    # The hosts' devices alternate along "data": the rows of a host are not one stretch.
    devices = np.array(jax.devices()).reshape(int(count), -1).T
    sharding = NamedSharding(Mesh(devices.reshape(ROWS), ("data",)), PartitionSpec("data"))
    datasets = [Dataset.open(path) for path in sorted(Path(directory).glob("set*"))]
    plan = Plan.load(Path(directory) / "plan")
    here = rows_of_process(sharding, ROWS)
    for batch, info in batches(
        datasets, plan, Processor.small(CONFIG), batch_rows=ROWS, rows_here=here, start_step=int(first)
    ):
        if info.step == int(last):
            sys.stdout.flush()
            sync_global_devices("stop")
            os.kill(os.getpid(), signal.SIGKILL)
        on_device = to_device(batch, sharding, ROWS)
        held = {s.index[0].start: np.asarray(s.data)[0] for s in on_device.tokens.addressable_shards}
        for row, ids in zip(here, info.record_ids, strict=True):
            print(json.dumps({"step": info.step, "row": row, "ids": ids, "tokens": held[row].tolist()}))


main(*sys.argv[1:])
