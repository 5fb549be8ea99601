"""Skipped updates: the rule by hand, bit for bit, and their log."""

import dataclasses
import functools
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phivision_jax.training.guard import WINDOW, SkippedUpdates, guarded
from phivision_jax.training.run_config import GuardConfig

CFG = GuardConfig(spike=4.0, warmup=5, patience=3)
PARAMS = {"w": jnp.arange(3.0), "b": jnp.ones(())}
GRADS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}


@functools.cache
def compiled(cfg):
    tx = guarded(optax.adam(0.1), cfg)
    return tx.init(PARAMS), jax.jit(lambda grads, state, **more: tx.update(grads, state, PARAMS, **more))


def walk(losses, cfg=CFG, grads=None, empty=()):
    """(updates, state) after each loss; those of the steps in ``empty`` are of no target token."""
    state, update = compiled(cfg)
    states = []
    for i, loss in enumerate(losses):
        weight = jnp.float32(0 if i in empty else 0.5)
        updates, state = update((grads or {}).get(i, GRADS), state, loss=jnp.float32(loss), weight=weight)
        states.append((updates, state))
    return states


@pytest.mark.parametrize(
    ("loss", "bad"),
    [(math.nan, {}), (math.inf, {}), (1.0, {"w": jnp.array([0.0, math.nan, 0.0])}), (1.0, {"b": jnp.array(-math.inf)})],
)
def test_guarded_not_finite_changes_nothing(loss, bad):
    before, after = walk([1.0, loss], grads={1: GRADS | bad})
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(after[0]))
    for old, new in zip(jax.tree.leaves(before[1].inner), jax.tree.leaves(after[1].inner), strict=True):
        assert (np.asarray(old) == np.asarray(new)).all()
    assert (after[1].skipped_in_a_row, after[1].skipped, after[1].accepted) == (1, 1, 1)
    assert (after[1].mean, after[1].variance) == (before[1].mean, before[1].variance)


def test_step_without_a_target_token_changes_nothing_and_is_not_in_a_row():
    """Momentum would move the parameters although the gradient is zero."""
    losses, zero = [1.0, math.nan, 0.0, 0.0, math.nan], jax.tree.map(jnp.zeros_like, GRADS)
    steps = walk(losses, grads={2: zero, 3: zero}, empty=(2, 3))
    for updates, state in steps[2:4]:
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))
        for old, new in zip(jax.tree.leaves(steps[1][1].inner), jax.tree.leaves(state.inner), strict=True):
            assert (np.asarray(old) == np.asarray(new)).all()
        assert (state.mean, state.accepted) == (1.0, 1)
    assert [int(state.skipped_in_a_row) for _, state in steps] == [0, 1, 1, 1, 2]
    assert [int(state.skipped) for _, state in steps] == [0, 1, 2, 3, 4]


def test_step_without_a_target_token_is_logged_and_ends_no_training(tmp_path):
    messages = []
    seen = SkippedUpdates(tmp_path, patience=1, log=messages.append)
    for step in (4, 5):
        seen.add(step, {"loss": 0.0, "weight": 0.0, "grad_norm": 0.0, "skipped_in_a_row": 7}, [["x" * 5000, "set:2"]])
    (line, _) = [json.loads(line) for line in seen.path.read_text().splitlines()]
    assert (line["reason"], line["rows"][0][1], len(messages)) == ("no target token", "set:2", 2)
    assert "the update of step 4 was skipped (no target token)" in messages[0] and len(messages[0]) < 300


def test_guarded_accepted_update_is_the_optimizers():
    tx = optax.adam(0.1)
    plain, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    (updates, state), *_ = walk([1.0])
    for mine, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert (state.skipped_in_a_row, state.accepted) == (0, 1)


def test_guarded_mean_and_variance():
    losses = [3.0, 1.0, 2.0, 2.5, 2.25]
    state = walk(losses)[-1][1]
    assert state.mean == pytest.approx(statistics.fmean(losses))
    assert state.variance == pytest.approx(statistics.pvariance(losses), rel=1e-5)


def test_guarded_spike_by_hand():
    losses = [3.0, 1.0, 2.0, 2.5, 1.5]
    limit = statistics.fmean(losses) + 4 * statistics.pstdev(losses)

    def skipped(*more):
        return int(walk([*losses, *more])[-1][1].skipped)

    assert skipped(limit - 1e-3) == 0 and skipped(limit + 1e-3) == 1
    assert int(walk([*losses[:4], 1e6])[-1][1].skipped) == 0  # the fifth: still in the warm-up
    off = dataclasses.replace(CFG, spike=0.0)
    assert int(walk([*losses, 1e6], off)[-1][1].skipped) == 0


def test_guarded_window_forgets():
    """After many losses near 10, a loss near 1 no longer counts much: the mean follows at 1/100 a step."""
    off = dataclasses.replace(CFG, spike=0.0)
    state = walk([1.0] * WINDOW + [10.0] * WINDOW, off)[-1][1]
    assert state.mean == pytest.approx(10 - 9 * 0.99**WINDOW, rel=1e-4)


def test_guarded_counts_in_a_row():
    counts = [int(state.skipped_in_a_row) for _, state in walk([1, math.nan, math.nan, 1, math.nan])]
    assert counts == [0, 1, 2, 0, 1]


def test_skipped_updates_log_and_patience(tmp_path):
    messages = []
    seen = SkippedUpdates(tmp_path, patience=3, log=messages.append, late=1)
    rows = [[f"set:{i}" for i in range(10)], ["other:1"]]

    def metrics(in_a_row, loss=math.nan):
        return {"loss": loss, "weight": 9.0, "grad_norm": 2.0, "skipped_in_a_row": in_a_row}

    seen.add(6, metrics(0, 1.0), rows)
    seen.add(7, metrics(1), rows)
    assert not messages and not seen.path.exists()  # step 7 may still be running
    seen.add(8, metrics(2, 9.0), rows)
    assert (
        len(messages) == 1
        and "the update of step 7 was skipped" in messages[0]
        and "set:0" in messages[0]
        and "and 3 more" in messages[0]
    )
    seen.add(9, metrics(3), rows)
    assert "(spike)" in messages[1]
    with pytest.raises(FloatingPointError, match=r"3 skipped updates in a row.* --replay=9"):
        seen.drain()
    lines = [json.loads(line) for line in seen.path.read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in lines] == [(7, "not finite"), (8, "spike"), (9, "not finite")]
    assert lines[0]["rows"] == rows


def test_guarded_refuses_settings():
    with pytest.raises(ValueError, match="patience at least 1"):
        guarded(optax.sgd(0.1), GuardConfig(patience=0))
