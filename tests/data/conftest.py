from __future__ import annotations

import pytest

from phivision_jax.processor import Processor
from tests.support.records import CONFIG


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.small(CONFIG)
