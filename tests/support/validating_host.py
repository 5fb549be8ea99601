"""One of two hosts in a test of ``test_validation``: ``python validating_host.py ADDRESS NUMBER DATASET``.

Prints the validator's result as a line of JSON.
"""

from __future__ import annotations

import json
import sys

import jax

from phivision_jax.data.store.dataset import Dataset


def main(address: str, number: str, directory: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    from tests.support.validating import measured_on

    print(json.dumps(measured_on(Dataset.open(directory), devices=2, fsdp=2)))


main(*sys.argv[1:])
