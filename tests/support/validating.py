"""Validators over a small dataset, for tests on one host and on two."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from phivision_jax import sharding
from phivision_jax.data.feed.encode import GROUP_NAMES
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from phivision_jax.training.run_config import DataConfig, RunConfig
from phivision_jax.training.step import make_train_step
from phivision_jax.training.train_data import Feed
from phivision_jax.training.validation import Validator
from tests.support.records import CONFIG

PROCESSOR = Processor.small(CONFIG)
# Weights apply to training only: every loss here is without them.
WEIGHTS = (("math", 9.0),)
DATA = DataConfig(batch_rows=4, length=160, vision_rows=2, num_patches=80, num_threads=0, loss_weights=WEIGHTS)
RUN = RunConfig(model=CONFIG, data=DATA, dtype="float32", remat="none", vision_remat="none", validate_batches=100)


def random_params() -> phivision.Params:
    state = phivision.abstract(CONFIG)[1]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), nnx.to_pure_dict(state))


def validator(dataset, cfg: RunConfig = RUN, devices: int = 1, **shape: int) -> Validator:
    data = cfg.data
    mixture, rows = Mixture.from_directories("set"), data.row_shape(CONFIG)
    plan = make_plan([dataset], mixture, PROCESSOR, rows, batch_rows=data.batch_rows)
    mesh = sharding.make_mesh(shape, jax.devices()[:devices])
    step = make_train_step(dataclasses.replace(cfg, microbatches=cfg.microbatches or 1), mesh, 10, len(GROUP_NAMES))
    feed = Feed(cfg, step, [dataset], plan, PROCESSOR)
    return Validator(step, feed, min(cfg.validate_batches, plan.num_steps(data.batch_rows)))


def place(measure: Validator, params: Any) -> Any:
    return jax.device_put(params, measure._compiled.input_shardings[0][0])


def measured_on(dataset, devices: int, **shape: int) -> dict[str, float]:
    measure = validator(dataset, RUN, devices, **shape)
    return measure(place(measure, random_params()))
