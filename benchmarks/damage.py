"""What becomes of a training's checkpoints when something happens to a file of theirs.

    python benchmarks/damage.py --flips 200 --seed 0 [--results docs/results/damage.json]

A small state (fp32 and bf16 arrays, stacked layers, optimizer moments) is saved twice, as steps 10 and 20, by the code
that training uses. Each trial takes a fresh copy, does one thing to one file of step 20 and restores:

    flip       one bit; half of them anywhere in all bytes, half in a file drawn first, so that small files get theirs
    truncate   a file loses its second half; each file once
    delete     a file is gone; each file once

and this in three cases: step 20 is the newest of two (wanted: step 10, bit for bit, and a sentence that names the
file), the only one (wanted: an error that names the file), or the newest of two and without its manifest, as after a
kill just before that was written (wanted: never another state than one of the two that were saved). Prints a table.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from phivision_jax.checkpoint.layout import CHECKPOINTS, DAMAGED, SEALED
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.checkpoint.manifest import MANIFEST

OLD, NEW = 10, 20
type State = dict[str, Any]
FELL_BACK, STOPPED = "fell back, file named", "stopped, file named"
UNSEALED_FELL_BACK, HARMLESS = "fell back, array or Orbax's error named", "restored, bit for bit as saved"


def make_state(step: int) -> State:
    """Arrays of random bits that differ from step to step, under the names that a training has."""
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
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def make_run(run: Path, steps: tuple[int, ...]) -> None:
    """A run's directory with these steps, saved and sealed."""
    assets = run / "assets"
    assets.mkdir(parents=True)
    (assets / "tokenizer.json").write_text(json.dumps({"vocab": {f"token {i}": i for i in range(200)}}))
    checkpoints = RunCheckpoints(run, keep=2, keep_best="accuracy")
    for step in steps:
        state = make_state(step)
        checkpoints.save(state, make_tail(), {"model": {}, "run": {}}, assets, {"accuracy": step / 100})
    checkpoints.close()


def restore(run: Path) -> tuple[State, str]:
    """The state that a start of training would get, and what it is told."""
    told: list[str] = []
    checkpoints = RunCheckpoints(run, keep=2, say=told.append)
    state, _, _ = checkpoints.restore(abstract(make_state(0)), abstract(make_tail()))
    checkpoints.close()
    return state, "\n".join(told)


def same(a: State, b: State) -> bool:
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    )


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def outcome(run: Path, name: str, sealed: bool = True) -> str:
    """What a start of training makes of a run whose newest step was damaged in the file of this name."""
    only = not (run / CHECKPOINTS / str(OLD)).exists()
    try:
        state, told = restore(run)
    except CheckpointError as error:
        return STOPPED if only and name in str(error) else f"WRONG: {error}"
    if only and sealed:
        return f"WRONG: restored the only step: {told}"
    aside = (run / CHECKPOINTS / f"{DAMAGED}{NEW:06d}").is_dir() and not (run / CHECKPOINTS / str(NEW)).exists()
    if same(state, make_state(OLD)) and aside and told:
        if not sealed:
            return UNSEALED_FELL_BACK
        return FELL_BACK if name in told else f"WRONG: {name} is not named: {told}"
    if same(state, make_state(NEW)) and not sealed:
        return HARMLESS
    return f"WRONG: another state, or the damaged one was left where it was: {told}"


def trials(flips: int, draw: random.Random, files: list[Path]) -> list[tuple[str, Callable, Path]]:
    """(what, the deed, the file); file paths as given."""
    sizes = [path.stat().st_size for path in files]
    anywhere = draw.choices(files, weights=sizes, k=flips // 2)
    each = [path for path, size in zip(files, sizes, strict=True) if size]
    drawn = anywhere + draw.choices(each, k=flips - len(anywhere))
    done: list[tuple[str, Callable, Path]] = [("flip", flip, path) for path in drawn]
    done += [("truncate", truncate, path) for path in each]
    return done + [("delete", delete, path) for path in files]


def measure(flips: int, seed: int, directory: Path, most: int | None = None) -> dict[str, dict[str, Counter[str]]]:
    """{case: {what: how often each outcome came}}; ``most`` bounds the number of truncations and of deletions."""
    draw = random.Random(seed)
    templates = {"newest of two": (OLD, NEW), "only one": (NEW,), "newest, no manifest yet": (OLD, NEW)}
    table: dict[str, dict[str, Counter[str]]] = {}
    for case, steps in templates.items():
        template, work = directory / f"template of {case}", directory / "trial"
        make_run(template, steps)
        sealed = case != "newest, no manifest yet"
        if not sealed:
            (template / CHECKPOINTS / str(NEW) / MANIFEST).unlink()
            (template / CHECKPOINTS / SEALED).write_text(json.dumps([OLD]))
        newest = template / CHECKPOINTS / str(NEW)
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        counts = table[case] = {what: Counter() for what in ("flip", "truncate", "delete")}
        for what, deed, path in trials(flips, draw, files):
            if most is not None and what != "flip" and counts[what].total() >= most:
                continue
            shutil.copytree(template, work)
            deed(work / path.relative_to(template), draw)
            counts[what][outcome(work, path.relative_to(newest).as_posix(), sealed)] += 1
            shutil.rmtree(work)
    return table


def main(flips: int = 200, seed: int = 0, results: Path | None = None) -> None:
    """Do all of it, print the table, fail when anything came out otherwise than wanted.

    Args:
      flips: bits, in each of the three cases.
      results: JSON file to write the table to.
    """
    for reporter in ("absl", "asyncio"):  # Orbax's errors, which are made here on purpose
        logging.getLogger(reporter).setLevel(logging.CRITICAL)
    # What Orbax leaves of a failed restore tells of itself when it is collected.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        table = measure(flips, seed, Path(directory))
    print(f"{'step 20 is':<26}{'damage':<10}{'times':>6}  outcome")
    for case, counts in table.items():
        for what, outcomes in counts.items():
            for name, count in outcomes.most_common():
                print(f"{case:<26}{what:<10}{count:>6}  {name}")
    if results is not None:
        content = {"seed": seed, "flips": flips, "outcomes": table}
        results.write_text(json.dumps(content, indent=1) + "\n")
    if any(name.startswith("WRONG") for counts in table.values() for found in counts.values() for name in found):
        sys.exit("some damage was not seen")


if __name__ == "__main__":
    tyro.cli(main)
