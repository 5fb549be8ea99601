"""One of the two processes of a test in ``test_pipeline``: ``python two_hosts.py ADDRESS NUMBER DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from made_up import CONFIG

from phivision_jax.data.pipeline import batches, rows_of_process, to_device
from phivision_jax.data.plan import Plan
from phivision_jax.data.records import Dataset
from phivision_jax.processor import Processor


def main(address: str, number: str, directory: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    # The hosts' devices alternate along "data": the rows of a host are not one stretch.
    devices = np.array(jax.devices()).reshape(2, 2).T
    sharding = NamedSharding(Mesh(devices.reshape(4), ("data",)), PartitionSpec("data"))
    dataset, plan = Dataset.open(Path(directory) / "set"), Plan.load(Path(directory) / "plan")
    rows_here = rows_of_process(sharding, 4)
    for batch, info in batches(dataset, plan, Processor.small(CONFIG), batch_rows=4, rows_here=rows_here):
        on_device = to_device(batch, sharding, 4)
        held = {s.index[0].start: np.asarray(s.data)[0] for s in on_device.tokens.addressable_shards}
        for row, tokens in sorted(held.items()):
            print(info.step, row, *tokens)


main(*sys.argv[1:])
