from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Tests of this folder share helpers; with import mode importlib a folder is not on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

from made_up import CONFIG

from phivision_jax.processor import Processor


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.small(CONFIG)
