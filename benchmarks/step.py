"""Tokens per second of a training step on CPU, beside PyTorch and transformers in the same run.

    python3.11 -m venv ../peer && ../peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    python benchmarks/step.py --peer-python ../peer/bin/python [--out docs/results/step.json]

A small Phi-4-reasoning-vision in fp32: forward, backward, clipping by global norm, AdamW, with the same weights,
tokens and pixels on both sides, on the same cores; the sides take turns and wait for each other. The peer is
``Phi3ForCausalLM`` and ``Siglip2VisionModel`` with SDPA and fused AdamW; it is tried with and without
``torch.compile``, and the faster one is what we are held against. Batches are made beforehand on both sides.

full rows    every row is one example of T columns, with one image. Both sides train; their losses are printed.
a mix        15 % text alone, 75 % one image, 10 % two or three, text lengths lognormal, shrunk from the mix of the
             design (1,830 patches and 745 text tokens in T = 8,192) in proportion to T. Three sides:
                 packed      ours, many examples in a row of T columns (``data.packing``)
                 unpacked    ours, an example in a row, padded to the batch's longest
                 peer        the same batches as "unpacked", padded as transformers' collator pads
             A batch of theirs holds as many examples as a batch of ours does on average. The learning rate is too
             small to change a weight, so all three must give the same mean loss over the mix.

Tokens are real ones: columns of text and of images, padding not counted. A ratio is taken within a turn; the median
over the turns is printed. Where the peer's slowest turn took ``MOST_SPREAD`` of its fastest or more, something else had
the cores: the tables are printed, and no file is written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from peer_process import Peer, PeerStopped, peer_process
from step_work import MODEL, T, full_rows, mixed_items, packed, unpacked

from convert.mapping import hf_tensors
from phivision_jax import sharding
from phivision_jax.batch import Batch
from phivision_jax.data.pipeline import to_device
from phivision_jax.progress import bar
from phivision_jax.training.config import OptimConfig, RunConfig
from phivision_jax.training.step import TrainStep, init_params, make_train_step

TRAINING_LR, STILL_LR = 1e-4, 1e-12
OPTIMIZER = OptimConfig(warmup_steps=0, final_lr_ratio=1.0, weight_decay=0.1, clip_norm=1.0)
MOST_SPREAD = 1.25
_PEER = Path(__file__).with_name("step_peer.py")


class Ours:
    """Our step, as ``train.py`` runs it, compiled once for each shape of batch."""

    def __init__(self, seed: int) -> None:
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        keep = {"remat": "none", "vision_remat": "none", "microbatches": 1}  # as the peer, which computes nothing twice
        self.run = RunConfig(model=MODEL, dtype="float32", optim=OPTIMIZER, seed=seed, **keep)  # type: ignore[arg-type]
        self.params = jax.tree.map(np.asarray, init_params(self.run, self._step(TRAINING_LR)))
        self.compile_seconds = 0.0

    def _step(self, learning_rate: float) -> TrainStep:
        optim = dataclasses.replace(OPTIMIZER, learning_rate=learning_rate)
        return make_train_step(dataclasses.replace(self.run, optim=optim), self.mesh, steps=1_000_000)

    def start(self, learning_rate: float) -> None:
        """The first weights again, and a fresh optimizer."""
        self.step = self._step(learning_rate)
        self.state = self.step.init(self.params)
        self.compiled: dict[tuple, Any] = {}

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches on the device, their shapes compiled for."""
        placed = []
        for batch in batches:
            rows = len(batch.tokens)
            placed.append(to_device(batch, sharding.batch_shardings(self.mesh, batch), rows))
            if self._shape(batch) not in self.compiled:
                start = time.perf_counter()
                self.compiled[self._shape(batch)] = self.step.compile(batch)
                self.compile_seconds += time.perf_counter() - start
        return placed

    @staticmethod
    def _shape(batch: Batch) -> tuple:
        return (*batch.tokens.shape, *batch.patches.shape)

    def steps(self, batches: Sequence[Batch]) -> dict[str, Any]:
        seconds, losses, cpu = [], [], time.process_time()
        for batch in batches:
            start = time.perf_counter()
            self.state, metrics = self.compiled[self._shape(batch)](self.state, batch)
            jax.block_until_ready(self.state)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
        return {"seconds": sum(seconds), "cpu_seconds": time.process_time() - cpu, "losses": losses}


def give(peer: Peer, folder: Path, name: str, batches: Sequence[dict[str, np.ndarray]]) -> None:
    files = [str(folder / f"{name}{i}.npz") for i in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        np.savez(file, **batch)  # type: ignore[arg-type]
    peer.ask("batches", name=name, files=files)


@dataclasses.dataclass(frozen=True)
class Side:
    """One line of a table."""

    name: str
    tokens_per_s: float
    """Real ones, at the median over the turns."""
    seconds: list[float]
    """Of each turn over all batches."""
    cpu_seconds: list[float]
    """The same in CPU time of all threads. On busy cores it counts threads that spin, too: no remedy for those."""
    losses: list[float]
    """Of each step of the first turn."""
    real_share: float
    """Real columns over all columns computed."""


def compare(sides: dict[str, Any], shares: dict[str, float], tokens: int, turns: int, title: str) -> list[Side]:
    """Every side, ``turns`` times, in an order that is turned round each time."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with bar(title, (turns + 1) * len(sides)) as advance:
        for turn in range(turns + 1):  # the first warms up and is not timed
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                answers[name].append(sides[name]())
                advance(1)
    made = []
    for name, (first, *timed) in answers.items():
        seconds, cpu = [a["seconds"] for a in timed], [a["cpu_seconds"] for a in timed]
        made.append(Side(name, tokens / statistics.median(seconds), seconds, cpu, first["losses"], shares[name]))
    return made


def cpu_ratio(theirs: Side, ours: Side) -> float:
    return statistics.median(b / a for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True))


def ratio(theirs: Side, ours: Side) -> tuple[float, float, float]:
    """Tokens per second of ours over theirs: median over the turns, lowest and highest."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_table(title: str, sides: Sequence[Side], against: Side) -> None:
    print(f"\n{title}")
    print(
        f"{'':<22}{'real tokens/s':>14}{'s per turn':>12}{'real columns':>14}   over {against.name} (range over turns)"
    )
    for side in sides:
        middle, low, high = ratio(against, side)
        speed = f"{side.tokens_per_s:>14,.0f}{statistics.median(side.seconds):>12.2f}{side.real_share:>14.1%}"
        print(f"{side.name:<22}{speed}   {middle:.2f} ({low:.2f}…{high:.2f}), {cpu_ratio(against, side):.2f}")


def spread(side: Side) -> float:
    """Slowest over fastest turn."""
    return max(side.seconds) / min(side.seconds)


def filled(batches: Sequence[Batch]) -> float:
    return float(sum((b.segment_ids > 0).sum() for b in batches) / sum(b.tokens.size for b in batches))


def table(sides: Sequence[Side], against: Side) -> list[dict[str, Any]]:
    """As ``print_table``, for the file."""
    made = []
    for side in sides:
        middle, low, high = ratio(against, side)
        ratios = {"ratio": middle, "ratio_range": [low, high], "cpu_ratio": cpu_ratio(against, side)}
        made.append({**dataclasses.asdict(side), "over": against.name, **ratios})
    return made


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(
    peer_python: Path,
    cores: int = 2,
    rows: int = 2,
    batches: int = 3,
    examples: int = 48,
    turns: int = 7,
    try_compile: bool = True,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Compare, time, and print the tables.

    Args:
        peer_python: Python of an environment with torch and transformers 5.
        cores: How many cores both sides share.
        rows: Rows of a batch of ours.
        batches: Batches of full rows that a turn goes over.
        examples: Examples of the mix; a turn goes over all of them.
        turns: How often each side is timed, after one turn to warm up.
        try_compile: Try the peer with torch.compile too, which takes minutes to compile.
        seed: Of weights, tokens, pixels and lengths.
        out: Write the numbers as JSON here too.
    """
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores; the peers inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    load = {"before": os.getloadavg()}
    ours, rng = Ours(seed), np.random.default_rng(seed)
    full, items = full_rows(rng, rows, batches), mixed_items(rng, examples)
    in_rows = packed(items, rows)
    alone = unpacked(items, round(len(items) / len(in_rows)))
    with (
        tempfile.TemporaryDirectory() as directory,
        peer_process(peer_python, _PEER, cores) as eager,
        peer_process(peer_python, _PEER, cores) as compiled,
    ):
        peers = {"peer": eager, "peer, torch.compile": compiled} if try_compile else {"peer": eager}
        versions = {
            "ours": {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__},
            "peer": eager.ask("versions"),
        }
        for owner, values in versions.items():
            print(f"{owner}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
        folder = Path(directory)
        tensors = dict(hf_tensors(ours.params, MODEL))
        np.savez(folder / "weights.npz", **tensors)  # type: ignore[arg-type]
        for peer in peers.values():
            optimizer = dataclasses.asdict(OPTIMIZER)
            peer.ask(
                "load", config=MODEL.to_hf(), weights=str(folder / "weights.npz"), optimizer=optimizer, threads=cores
            )
            give(peer, folder, "full", full.peer)
            give(peer, folder, "mix", alone.peer)
        parameters = sum(tensor.size for tensor in tensors.values())
        print(f"{parameters / 1e6:.1f} M parameters, {cores} cores, T = {T}")
        rounds = {}
        for name, peer in list(peers.items()):
            try:
                peer.ask("start", compile="compile" in name, learning_rate=TRAINING_LR)
                peer.ask("steps", name="full")  # compiles
                peer.ask("start", compile="compile" in name, learning_rate=TRAINING_LR)
                rounds[name] = functools.partial(peer.ask, "steps", name="full")
            except PeerStopped:
                if "compile" not in name:
                    raise
                print("torch.compile does not work here; its own words are above")
                del peers[name]
        ours.start(TRAINING_LR)
        placed = ours.prepare(full.ours)
        tokens = sum(int((b.segment_ids > 0).sum()) for b in full.ours)
        sides = {"ours": lambda: ours.steps(placed), **rounds}
        full_sides = compare(sides, dict.fromkeys(sides, filled(full.ours)), tokens, turns, "full rows")
        best = max(full_sides[1:], key=lambda side: side.tokens_per_s)
        print("\nloss at each step of the first turn")
        for side in full_sides:
            print(f"{side.name:<22}" + " ".join(f"{loss:.6f}" for loss in side.losses))
        print_table(f"full rows: {rows} of T = {T}, {tokens // batches:,} tokens a step", full_sides, best)

        peer = peers[best.name]
        peer.ask("start", compile="compile" in best.name, learning_rate=STILL_LR)
        ours.start(STILL_LR)
        placed_rows, placed_alone = ours.prepare(in_rows), ours.prepare(alone.ours)
        tokens = sum(item.columns for item in items)
        sides = {
            "ours, packed": lambda: ours.steps(placed_rows),
            "ours, unpacked": lambda: ours.steps(placed_alone),
            best.name: lambda: peer.ask("steps", name="mix"),
        }
        shares = {"ours, packed": filled(in_rows), **dict.fromkeys(["ours, unpacked", best.name], filled(alone.ours))}
        mix_sides = compare(sides, shares, tokens, turns, "a mix of lengths")
    targets = {"ours, packed": [b.loss_weights.sum() for b in in_rows]}
    targets["ours, unpacked"] = targets[best.name] = [b.loss_weights.sum() for b in alone.ours]
    mean_losses = {side.name: float(np.average(side.losses, weights=targets[side.name])) for side in mix_sides}
    print("\nmean loss over the mix: " + ", ".join(f"{name} {loss:.6f}" for name, loss in mean_losses.items()))
    text = f"a mix of lengths: {len(items)} examples, {tokens / len(items):.0f} tokens each on average"
    print_table(f"{text}; {len(in_rows)} steps packed, {len(alone.ours)} steps not", mix_sides, mix_sides[2])
    gain, low, high = ratio(mix_sides[1], mix_sides[0])
    print(f"\npacking alone: ours packed over ours unpacked {gain:.2f} ({low:.2f}…{high:.2f})")
    load["after"] = os.getloadavg()  # holds our own work, too
    print("load over 1, 5 and 15 minutes: " + ", ".join(f"{when} {values}" for when, values in load.items()))
    spreads = {"full_rows": spread(best), "mix": spread(mix_sides[2])}
    print("the peer's slowest turn over its fastest: " + ", ".join(f"{k} {v:.2f}" for k, v in spreads.items()))
    if out is not None and max(spreads.values()) >= MOST_SPREAD:
        raise SystemExit(f"{out} is not written: something else had the cores; run again on a machine at rest")
    if out is not None:
        content = {
            "model": dataclasses.asdict(MODEL),
            "optimizer": dataclasses.asdict(OPTIMIZER),
            "parameters": parameters,
            "T": T,
            "rows": rows,
            "cores": cores,
            "cpu": cpu_name(),
            "seed": seed,
            "turns": turns,
            "load": load,
            "peer_spread": spreads,
            "versions": versions,
            "full_rows": table(full_sides, best),
            "mix": {
                "examples": len(items),
                "tokens": tokens,
                "steps": {"packed": len(in_rows), "unpacked": len(alone.ours)},
                "mean_loss": mean_losses,
                "sides": table(mix_sides, mix_sides[2]),
            },
            "packing_gain": {"median": gain, "range": [low, high]},
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
