"""Training steps for tests: the smallest configuration with every part, and rows that are difficult to split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from phivision_jax import sharding
from phivision_jax.batch import Batch, RowShape, batch_spec
from phivision_jax.data.feed.pipeline import to_device
from phivision_jax.images.layout import PatchedImage
from phivision_jax.models.phivision import Params
from phivision_jax.rows import expand, fill_rows
from phivision_jax.text.constants import IGNORE
from phivision_jax.training.run_config import OptimConfig, RunConfig
from phivision_jax.training.step import State, TrainStep, make_train_step
from tests.support.batches import QUICK, TINY

# P is such that shapes in compiled programs tell patches and tokens apart.
ROWS, T, R, P = 8, 48, 2, 13
SHAPE = RowShape(T, R, P)
SPEC = batch_spec(ROWS, SHAPE, TINY.vision.patch_dim)

RUN = RunConfig(
    model=TINY,
    dtype="float32",
    remat="none",
    vision_remat="none",
    microbatches=1,
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1, clip_norm=1e9),
)


def with_mode(cfg: RunConfig, image_attention: Any) -> RunConfig:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, image_attention=image_attention))


def rows_across(seed: int, image_attention: Any) -> Batch:
    """Three examples a row; the image of the second is across the middle, where two shards along context meet.

    Even rows have a loss on every text token, odd rows on one or two, so that a mean of means is not the mean.
    """
    rng = np.random.default_rng(seed)

    def example(before: int, grid: tuple[int, int], after: int, learnt: int) -> Any:
        ids = rng.integers(1, 60, before + 1 + after)
        labels = np.where(np.arange(len(ids)) >= len(ids) - learnt, ids, IGNORE)
        ids[before], labels[before] = -200, IGNORE
        patches = rng.integers(0, 256, (grid[0] * grid[1], TINY.vision.patch_dim), np.uint8)
        return expand(ids.tolist(), [PatchedImage(patches, (grid,))], labels.tolist())

    rows = []
    for b in range(ROWS):
        many = b % 2 == 0
        rows.append(
            [
                example(4 + b % 3, (2, 2), 2, 9 if many else 0),
                example(7 + b % 2, (3, 3), 4 - b % 3, 9 if many else 1),
                example(3, (1, 3) if b % 4 else (2, 3), 5, 9 if many else b % 3 // 2),
            ]
        )
    return fill_rows(
        rows,
        SHAPE,
        dataclasses.replace(TINY, image_attention=image_attention),
    )


def step_on(cfg: RunConfig, shape: dict[str, int], devices: int, steps: int = 20) -> TrainStep:
    return make_train_step(cfg, sharding.make_mesh(shape, jax.devices()[:devices]), steps)


def compile_quickly(step: TrainStep) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    return step.lower(SPEC).compile(compiler_options=QUICK)


def run(
    step: TrainStep, compiled: Callable, params: Params, batches: list[Batch]
) -> tuple[list[float], dict[tuple, np.ndarray], State]:
    """Losses of all steps, gradients of the first by path, and the last state.

    Adam's first moment after one step is (1 − b1) times the gradient: no second program for gradients alone.
    """
    shardings = step.batch_shardings(SPEC)
    state, losses, grads = step.init(params), [], {}
    for batch in batches:
        state, metrics = compiled(state, to_device(batch, shardings, ROWS))
        losses.append(float(metrics["loss"]))
        if not grads:
            grads = {path: np.asarray(x) / (1 - step.cfg.b1) for path, x in first_moments(state).items()}
    return losses, grads, state


def first_moments(state: State) -> dict[tuple, jax.Array]:
    return next(part.mu for part in state["opt_state"].inner if hasattr(part, "mu"))
