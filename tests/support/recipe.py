"""The recipe's configurations, and the slices that it is laid out for."""

import importlib.util

from phivision_jax.training.run_config import RunConfig
from tests.support.paths import ROOT

STAGES = ("stage1", "stage2", "stage3")
PODS = [
    ("TPU v5 lite", 256, 1),
    ("TPU v5", 128, 1),
    ("TPU v5", 256, 2),
    ("TPU v6 lite", 256, 1),
    ("cpu", 8, 1),
]
"""Device kind, devices and slices."""


def recipe(stage: str) -> RunConfig:
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs/phi4_rv_15b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return RunConfig.from_dict(module.get_config(stage).to_dict())
