from __future__ import annotations

import pytest

from tests.support.datasets import write_dataset
from tests.support.records import mixed_records


@pytest.fixture(scope="package")
def dataset(tmp_path_factory, processor):
    """24 records ``r000`` … without images, with one and with two."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", mixed_records(24), processor)
