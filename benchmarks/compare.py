"""Speed of two checkouts: our side of ``step.py``, ``loader.py``, ``packing.py`` and ``conversion.py``, in turns.

    python benchmarks/compare.py --base ../before [--only step loader] [--turns 7]

Each checkout runs its own benchmark modules with its own package, in processes of their own. The ratio is the base's
seconds over ours within a turn: above 1, this checkout is faster. The median over the turns and their range are
printed, in wall and in CPU time; on a busy machine CPU time is the more reliable.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parents[1]
BENCHMARKS: tuple[Benchmark, ...] = ("step", "loader", "packing", "conversion")
type Benchmark = Literal["step", "loader", "packing", "conversion"]
type Round = Callable[[], dict[str, float]]
"""Runs a workload once; ``seconds`` and ``cpu_seconds``."""


def timed(work: Callable[[], Any]) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


class HostSide:
    """The loader's and the packing's work, with the benchmark modules on ``sys.path``: those of one checkout."""

    def loader(self, folder: str) -> dict[str, float]:
        """Decode, resize and patchify JPEGs, then run the pipeline from a dataset to packed batches."""
        import loader

        files = [loader.make_file(loader.photographs(None), size, 5 * i) for i, size in enumerate(loader.SIZES)]

        def work() -> None:
            for content in files:
                loader.preprocess(loader.open_image(content))
            with tempfile.TemporaryDirectory(dir=folder) as place:
                loader.pipeline_speeds(files, Path(place), turns=1)

        return timed(work)

    def packing(self, examples: int) -> dict[str, float]:
        import packing

        row = getattr(packing, "RowShape", None) or packing.Capacity
        lengths = (getattr(packing, "sample_lengths", None) or packing.made_up)(examples)
        tokens = getattr(lengths, "tokens", None)
        tokens = lengths.columns if tokens is None else tokens
        fits = ((tokens <= 8192) & (lengths.patches <= 7168)).nonzero()[0]
        return timed(lambda: packing.ours(packing.pack)(fits, lengths, row(8192, 1, 7168)))


def environment(checkout: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{checkout}:{checkout / 'benchmarks'}", "JAX_PLATFORMS": "cpu"}


def step_round(peer: Any, cores: int) -> Round:
    """Our side of ``step.py``, one step on each full batch."""
    peer.ask("load", shape="the released model's proportions", devices=1, seed=0)
    peer.ask("batches", work={"rows": 2, "batches": 3, "examples": 8 * cores, "cores": cores, "seed": 0})
    peer.ask("start", learning_rate=1e-4)
    return lambda: peer.ask("steps", name="full")


def conversion_round(checkout: Path, source: Path, folder: Path) -> Round:
    """Convert a checkpoint both ways; ``cpu_seconds`` are those of the two processes."""

    def run() -> dict[str, float]:
        def convert(*words: str) -> None:
            command, quiet = [sys.executable, "-m", "convert", *words], subprocess.DEVNULL
            subprocess.run(
                command, cwd=checkout, env=os.environ | environment(checkout), check=True, stdout=quiet, stderr=quiet
            )

        before, start = os.times(), time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            convert("to-jax", str(source), f"{place}/jax")
            convert("to-hf", f"{place}/jax", f"{place}/hf", "--like", str(source))
            seconds, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {"seconds": seconds, "cpu_seconds": cpu}

    return run


def main(
    base: Path,
    only: tuple[Benchmark, ...] = BENCHMARKS,
    turns: int = 7,
    cores: int = 2,
    examples: int = 20_000,
    gb: float = 1.0,
) -> None:
    """Compare this checkout with another one and print the ratios.

    Args:
        base: The other checkout.
        only: Benchmarks to run.
        turns: Timed turns of each side, after one to warm up.
        cores: Threads of a training step.
        examples: Examples to pack.
        gb: Size of the checkpoint to convert, 10⁹ bytes.
    """
    from peer_process import peer_process

    checkouts = {"base": base.resolve(), "here": HERE}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = Path(sys.executable)

        def peer(checkout: Path, script: Path) -> Any:
            return stack.enter_context(peer_process(python, script, cores, environment(checkout)))

        def rounds(benchmark: str, checkout: Path) -> Round:
            if benchmark == "step":
                return step_round(peer(checkout, checkout / "benchmarks" / "step_ours.py"), cores)
            if benchmark == "conversion":
                return conversion_round(checkout, folder / "source", folder)
            side = peer(checkout, Path(__file__).resolve())
            arguments = {"folder": str(folder)} if benchmark == "loader" else {"examples": examples}
            return lambda: side.ask(benchmark, **arguments)

        if "conversion" in only:
            make = [sys.executable, str(HERE / "benchmarks/make_checkpoint.py"), str(folder / "source"), f"--gb={gb}"]
            subprocess.run(make, env=os.environ | environment(HERE), check=True)
        for benchmark in only:
            sides = {name: rounds(benchmark, checkout) for name, checkout in checkouts.items()}
            found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for turn in range(turns + 1):
                for name in list(sides)[:: -1 if turn % 2 else 1]:
                    found[name].append(sides[name]())
            for key in ("seconds", "cpu_seconds"):
                ratios = [b[key] / h[key] for b, h in list(zip(found["base"], found["here"], strict=True))[1:]]
                median = statistics.median(ratios)
                print(f"{benchmark:<12}{key:<14}{median:.3f} ({min(ratios):.3f}…{max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:  # a side, which the comparison asks over pipes
        sys.path.pop(0)  # this file's directory; PYTHONPATH has the benchmarks of the side's checkout
        from peer_process import serve

        serve(HostSide())
    else:
        import tyro

        tyro.cli(main)
