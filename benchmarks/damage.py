"""Consequences of damaged checkpoint files: a flipped bit, a truncated file, a deleted file.

    python benchmarks/damage.py --flips 200 --seed 0 [--modes run load init-from converted] [--results damage.json]

Each trial damages one file in a fresh copy of a small checkpoint: half of the flips anywhere in all bytes, half in a
file that is sampled first, so that small files get their share; every file is truncated and deleted once.

    run        the newest of two steps, then the only step: a restart falls back to the step before, or stops; in both
               cases with a message that names the file or array. Then it saves the next step.
    load       a step of a run: ``phivision_jax.load`` refuses it with such a message
    init-from  the same when a new run starts from it
    converted  a conversion from Hugging Face: load, a new run and the conversion back refuse it

or the damage is harmless: what is read is, bit for bit, what was saved, as with a flip in a file that nobody reads.
Prints a table; exits with 1 if any other outcome occurred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import phivision_jax
from phivision_jax.checkpoint import loading
from phivision_jax.checkpoint.layout import CHECKPOINTS, DamagedError
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.cli.main import main as phivision
from phivision_jax.convert.hf_config import model_config
from phivision_jax.models.phivision import PhiVision
from phivision_jax.models.siglip2 import VisionTail
from phivision_jax.processor import Processor
from phivision_jax.text.tokenizer import Tokenizer
from tests.support import damage
from tests.support.batches import TINY
from tests.support.damage import HARMLESS, NEW, OLD, abstract, same
from tests.support.released_layout import SMALL, random_tensors, same_directories, shapes_of, write_hf

type Mode = Literal["run", "load", "init-from", "converted"]
type Table = dict[str, dict[str, Counter[str]]]
REFUSED = "refused, file or array named"


def read_by_load(checkpoint: Path) -> Any:
    """Everything that ``load`` reads."""
    model, processor = phivision_jax.load(checkpoint)
    return model.split()[1], processor.fingerprint


def read_by_init_from(checkpoint: Path) -> Any:
    """Everything that a new run reads of the checkpoint it starts from."""
    config = loading.config_of(checkpoint)
    with tempfile.TemporaryDirectory() as directory:
        assets = Path(directory) / "assets"
        loading.copy_assets(checkpoint, assets)
        files = {path.name: path.read_bytes() for path in sorted(assets.iterdir())}
    tail = {"vision_tail": nnx.to_pure_dict(nnx.state(VisionTail(config.vision, rngs=nnx.Rngs(0)), nnx.Param))}
    params = PhiVision(config, rngs=nnx.Rngs(0)).split()[1]
    return loading.read_params(checkpoint, config, abstract(params | tail)), files


def read_by_export(checkpoint: Path) -> Path:
    """The Hugging Face directory to which the checkpoint is converted."""
    out = Path(tempfile.mkdtemp()) / "hf"
    messages = io.StringIO()
    with contextlib.redirect_stderr(messages):
        try:
            phivision(["convert", "to-hf", str(checkpoint), str(out)])
        except SystemExit:
            raise ValueError(messages.getvalue()) from None
    return out


def equal(read: Any, expected: Any) -> bool:
    if isinstance(read, Path):
        return same_directories(read, expected)
    return same(read[0], expected[0]) and read[1] == expected[1]


def judge(checkpoint: Path, name: str, expected: dict[Callable[[Path], Any], Any]) -> str:
    """The outcome for readers of a damaged checkpoint: all of them must refuse it or read what was saved."""
    refused = False
    for read, value in expected.items():
        try:
            if not equal(read(checkpoint), value):
                return f"WRONG: {read.__name__} reads something else, {name} is damaged"
        except (ValueError, DamagedError) as error:
            refused = True
            if str(checkpoint) not in str(error):
                return f"WRONG: {name} is damaged, and the message is: {error}"
    return REFUSED if refused else HARMLESS


def make_step(run: Path) -> Path:
    """A step of a run with the tests' tiny model."""
    model = PhiVision(TINY, rngs=nnx.Rngs(0))
    tail = nnx.to_pure_dict(nnx.state(VisionTail(TINY.vision, rngs=nnx.Rngs(1)), nnx.Param))
    (run / "assets").mkdir(parents=True)
    (run / "assets" / "generation_config.json").write_text(json.dumps({"temperature": 0.8}))
    params = model.split()[1]
    checkpoints = RunCheckpoints(run, keep=1)
    state = {"params": params, "opt_state": {"mu": params["decoder"]}, "step": jnp.int32(NEW)}
    checkpoints.save(state, tail, {"model": dataclasses.asdict(TINY), "run": {}}, run / "assets")
    checkpoints.close()
    return run / CHECKPOINTS / str(NEW)


def make_conversion(directory: Path) -> Path:
    """A converted Hugging Face directory with tokenizer and template."""
    tokens = Tokenizer.small()
    ids = {"vocab_size": tokens.vocab_size, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    values = {**SMALL, **ids}
    source = write_hf(directory / "source", values, random_tensors(shapes_of(values), np.float32))
    Processor.small(model_config(source)).save(source)
    phivision(["convert", "to-jax", str(source), str(directory / "converted")])
    return directory / "converted"


def measure(mode: Mode, flips: int, seed: int, directory: Path) -> Table:
    """{case: {"flip", "truncate", "delete": how often each outcome occurred}}."""
    more: dict[str, Any] = {"work": directory, "flips": flips, "seed": seed}
    if mode == "run":
        cases = {"newest of two": (OLD, NEW), "only one": (NEW,)}
        for case, steps in cases.items():
            damage.make_run(directory / case, steps)
        newest = f"{CHECKPOINTS}/{NEW}"
        return {f"run, {case}": damage.measure(directory / case, newest, damage.judge_run, **more) for case in cases}
    checkpoint = make_conversion(directory) if mode == "converted" else make_step(directory / "run")
    readers: list[Callable[[Path], Any]] = [read_by_init_from if mode == "init-from" else read_by_load]
    if mode == "converted":
        readers += [read_by_init_from, read_by_export]
    expected = {read: read(checkpoint) for read in readers}
    return {mode: damage.measure(checkpoint, ".", lambda copy, name: judge(copy, name, expected), **more)}


def main(
    flips: int = 200,
    seed: int = 0,
    modes: tuple[Mode, ...] = ("run", "load", "init-from", "converted"),
    results: Path | None = None,
) -> None:
    """Run all trials, print the table, and fail when an outcome is not one of those wanted.

    Args:
      flips: bits per case.
      modes: readers of the damaged checkpoint.
      results: JSON file to write the table to.
    """
    for logger in ("absl", "asyncio"):  # errors that are provoked here
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    table: Table = {}
    # Orbax also prints about failed restores when they are garbage-collected.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        for mode in modes:
            table |= measure(mode, flips, seed, Path(directory) / mode)
    print(f"{'checkpoint':<20}{'damage':<10}{'times':>6}  outcome")
    for case, counts in table.items():
        for action, outcomes in counts.items():
            for outcome, count in outcomes.most_common():
                print(f"{case:<20}{action:<10}{count:>6}  {outcome}")
    if results is not None:
        content = {"seed": seed, "flips": flips, "outcomes": table}
        results.write_text(json.dumps(content, indent=1) + "\n")
    if any(outcome.startswith("WRONG") for counts in table.values() for found in counts.values() for outcome in found):
        sys.exit("some damage was not detected")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    tyro.cli(main)
