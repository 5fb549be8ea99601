"""Checkpoints of a small state, and what to do to their files: flip a bit, truncate, delete."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phivision_jax.checkpoint.layout import CHECKPOINTS, DAMAGED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints

OLD, NEW, NEXT = 10, 20, 30
"""Steps of a run: two that are saved, and the one that is saved after restoring."""
type State = dict[str, Any]
type Judge = Callable[[Path, str], str]
"""(copy of the template, name of the damaged file) → outcome."""

FELL_BACK, STOPPED = "fell back, file or array named", "stopped, file or array named"
HARMLESS = "harmless, bit for bit as saved"


def make_state(step: int) -> State:
    """Arrays of random bits that differ from step to step, under the names that a training state has."""
    rng = np.random.default_rng(step)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    def params(dtype: Any = jnp.float32) -> State:
        layers = {"up_proj": {"kernel": array(3, 16, 40, dtype=dtype)}, "norm": {"scale": array(3, 16, dtype=dtype)}}
        return {"decoder": {"layers": layers, "lm_head": {"kernel": array(64, 16, dtype=dtype)}}}

    moments = {"mu": params(jnp.bfloat16), "nu": params(), "count": jnp.int32(step)}
    return {"params": params(), "opt_state": moments, "step": jnp.int32(step)}


def make_tail() -> State:
    return {"head": {"probe": jnp.arange(8, dtype=jnp.float32)}}


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and placement on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def save(checkpoints: RunCheckpoints, run: Path, step: int, metrics: dict[str, float] | None = None) -> None:
    checkpoints.save(make_state(step), make_tail(), {"model": {}, "run": {}}, run / "assets", metrics)


def make_run(run: Path, steps: tuple[int, ...]) -> None:
    """A run directory with these steps."""
    (run / "assets").mkdir(parents=True)
    (run / "assets" / "tokenizer.json").write_text(json.dumps({"vocab": {f"token {i}": i for i in range(200)}}))
    checkpoints = RunCheckpoints(run, keep=2, keep_best="accuracy")
    for step in steps:
        save(checkpoints, run, step, {"accuracy": step / 100})
    checkpoints.close()


def restore(run: Path) -> tuple[State, str]:
    """The state from which a run would continue, and the messages that it logs."""
    log: list[str] = []
    checkpoints = RunCheckpoints(run, keep=2, log=log.append)
    state, _, _ = checkpoints.restore(abstract(make_state(0)), abstract(make_tail()))
    checkpoints.close()
    return state, "\n".join(log)


def same(a: Any, b: Any) -> bool:
    """True if two trees are equal bit for bit."""
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Damage.


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def measure(
    template: Path, damaged: str, judge: Judge, work: Path, *, flips: int, seed: int, limit: int | None = None
) -> dict[str, Counter[str]]:
    """Damage one file after another, each in a fresh copy of a directory.

    Half of the flipped bits are anywhere in all bytes, half in a file that is sampled first, so that small files get
    their share. Every file is truncated and deleted once.

    Args:
      template: directory to copy.
      damaged: directory in it whose files are damaged.
      work: directory for the copies.
      limit: the largest number of truncations, and of deletions.

    Returns:
      For "flip", "truncate" and "delete", how often each outcome occurred.
    """
    rng = random.Random(seed)
    files = sorted(path.relative_to(template) for path in (template / damaged).rglob("*") if path.is_file())
    sizes = [(template / path).stat().st_size for path in files]
    filled = [path for path, size in zip(files, sizes, strict=True) if size]
    sampled = rng.choices(files, weights=sizes, k=flips // 2)
    sampled += rng.choices(filled, k=flips - len(sampled))
    truncated, deleted = (rng.sample(found, min(limit or len(found), len(found))) for found in (filled, files))
    counts: dict[str, Counter[str]] = {}
    for action, paths in ((flip, sampled), (truncate, truncated), (delete, deleted)):
        counts[action.__name__] = Counter()
        for path in paths:
            copy = work / "copy"
            shutil.copytree(template, copy)
            action(copy / path, rng)
            counts[action.__name__][judge(copy, path.relative_to(damaged).as_posix())] += 1
            shutil.rmtree(copy)
    return counts


def judge_run(run: Path, name: str) -> str:
    """Restart a run whose newest step was damaged; it must also be able to save the next step."""
    only = not (run / CHECKPOINTS / str(OLD)).exists()
    try:
        state, log = restore(run)
    except CheckpointError as error:
        return STOPPED if only and names_problem(str(error), name) else f"WRONG: stopped: {error}"
    aside = (run / CHECKPOINTS / f"{DAMAGED}{NEW:06d}").is_dir() and not (run / CHECKPOINTS / str(NEW)).exists()
    if same(state, make_state(NEW)) and not log and not aside:
        outcome = HARMLESS
    elif same(state, make_state(OLD)) and aside and names_problem(log, name):
        outcome = FELL_BACK
    else:
        return f"WRONG: another state, or {name} is not named: {log}"
    checkpoints = RunCheckpoints(run, keep=2, keep_best="accuracy", log=lambda line: None)
    save(checkpoints, run, NEXT)
    checkpoints.close()
    return outcome if same(restore(run)[0], make_state(NEXT)) else f"WRONG: {name} disturbs the step after it"


def names_problem(message: str, name: str) -> bool:
    """True if a message names the damaged file, an array, or the item of which nothing could be read."""
    return any(words in message for words in (f"its file {name} ", "its array ", f"its {name.split('/')[0]}/ cannot"))
