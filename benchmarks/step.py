"""Tokens per second of a training step on CPU, compared with PyTorch and transformers in the same run.

    python3.11 -m venv ../peer && ../peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    python benchmarks/step.py --peer-python ../peer/bin/python [--out docs/results/step.json]

A small Phi-4-reasoning-vision in fp32: forward, backward, clipping by global norm, AdamW. Both sides have the same
weights, tokens, pixels and cores, and take turns. The peer is ``Phi3ForCausalLM`` and ``Siglip2VisionModel`` with SDPA
and fused AdamW. Each side runs in several ways, and its fastest counts:

    ours         one device per core with its own rows and sharded weights ("fsdp"); or everything on one device
    peer         all cores on each operation, eager; or with ``torch.compile``. Not tried: one process per core (DDP).
    both         memory from glibc's default, or in huge pages (``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``, glibc 2.35
                 and Linux with transparent huge pages at "madvise"): XLA allocates a step's temporaries each time

full rows    Every row is one example of T tokens, seven tenths of them one image; half of the text has a loss. Our
             side then computes logits for a quarter of the positions, the peer for all. Both sides train; their losses
             are printed. Two models: the released proportions, and heads of 32 (``step_work.MODELS``).
a mix        15 % text only, 75 % one image, 10 % two or three; text lengths are lognormal. The mix of the design
             (1,830 patches and 745 text tokens at T = 8,192) is scaled down to T. Three sides:
                 packed      ours, many examples in a row of T tokens (``data.plan.packing``)
                 unpacked    ours, one example per row, padded to the batch's longest
                 peer        the same batches as "unpacked", padded as transformers' collator pads
             Unpacked batches have as many examples as packed ones on average, rounded to full rows per core. The
             learning rate is too small to change a weight, so all three must have the same mean loss over the mix. Our
             side runs in its fastest way on full rows; the peer in its fastest way and eager, of which the faster
             counts.

Both sides make their batches beforehand: pixels in fp32 for the peer, in bytes for ours, which converts them itself.

Tokens exclude padding. A ratio is taken within a turn; the median over the turns is printed. The speed of a single
matrix product on each side is also printed: much of a ratio may depend on the instructions that a library uses. When
the peer's slowest turn takes ``MOST_SPREAD`` of its fastest or more, other work used the cores; a message reports it,
``at_rest`` is false, and ratios are no more precise than their range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peer_process import Peer, PeerStopped, peer_process
from step_sides import Side, compare, print_table, ratio, spread, table
from step_work import MODEL, MODELS, OPTIMIZER, AllWork, T, make_work

from phivision_jax.batch import Batch
from phivision_jax.convert.hf_config import config_json

TRAINING_LR, STILL_LR = 1e-4, 1e-12
MOST_SPREAD = 1.25
_OURS, _PEER = (Path(__file__).with_name(name) for name in ("step_ours.py", "step_peer.py"))
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a side."""

    name: str
    devices: int = 0
    """Devices of our side; 0 for the peer."""
    compile: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.devices > 0


def ways(cores: int, try_compile: bool) -> list[Way]:
    choices = [
        Way("ours, one device per core, huge pages", devices=cores, environment=_HUGE_PAGES),
        Way("ours, one device per core", devices=cores),
        Way("ours, one device, huge pages", devices=1, environment=_HUGE_PAGES),
        Way("ours, one device", devices=1),
        Way("peer"),
        Way("peer, huge pages", environment=_HUGE_PAGES),
        Way("peer, torch.compile", compile=True),
        Way("peer, torch.compile, huge pages", compile=True, environment=_HUGE_PAGES),
    ]
    return [way for way in choices if try_compile or not way.compile]


def filled(batches: Sequence[Batch]) -> float:
    return float(sum((b.segment_ids > 0).sum() for b in batches) / sum(b.tokens.size for b in batches))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> dict[str, str]:
    """The C library and Linux's setting, which decide whether huge pages are available."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "libc": " ".join(platform.libc_ver()),
        "transparent_hugepage": setting.read_text().strip() if setting.exists() else "unknown",
    }


def cpu_name() -> str:
    """The processor's name; its architecture where Linux does not have one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclasses.dataclass(frozen=True)
class Running:
    """One way to run a side, in its process."""

    way: Way
    process: Peer

    def start(self, learning_rate: float) -> None:
        """Reset the weights and the optimizer."""
        choice = {} if self.way.is_ours else {"compile": self.way.compile}
        self.process.ask("start", learning_rate=learning_rate, **choice)

    def steps(self, name: str) -> dict[str, Any]:
        return self.process.ask("steps", name=name)


@contextlib.contextmanager
def running(choices: Sequence[Way], peer_python: Path, cores: int) -> Iterator[dict[str, Running]]:
    """A process for each way to run a side, by its name."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for way in choices:
            python, script = (Path(sys.executable), _OURS) if way.is_ours else (peer_python, _PEER)
            sides[way.name] = Running(way, stack.enter_context(peer_process(python, script, cores, way.environment)))
        yield sides


def prepare(
    sides: dict[str, Running], shape: str, cores: int, work: dict[str, int], prepared: AllWork, folder: Path
) -> int:
    """Give all sides the same weights and work, through files that must stay; return the number of parameters."""
    weights, settings = str(folder / "weights.npz"), {"optimizer": dataclasses.asdict(OPTIMIZER), "threads": cores}
    files = {
        "full": _written(folder, "full", prepared.full.peer),
        "mix": _written(folder, "mix", prepared.unpacked.peer),
    }
    ours = [side for side in sides.values() if side.way.is_ours]
    for side in ours:
        loaded = side.process.ask("load", shape=shape, devices=side.way.devices, seed=work["seed"])
        side.process.ask("batches", work=work)
    ours[0].process.ask("weights", file=weights)
    for side in sides.values():
        if not side.way.is_ours:
            side.process.ask("load", config=config_json(MODELS[shape]), weights=weights, **settings)
            for name in files:
                side.process.ask("batches", name=name, files=files[name])
    return loaded["parameters"]


def _written(folder: Path, name: str, batches: Sequence[dict[str, np.ndarray]]) -> list[str]:
    files = [str(folder / f"{name}{i}.npz") for i in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        np.savez(file, **batch)  # type: ignore[arg-type]
    return files


def without_failing(sides: dict[str, Running]) -> dict[str, Running]:
    """Sides that can train: ``torch.compile`` needs a C++ compiler, which not every machine has."""
    able = {}
    for name, side in sides.items():
        try:
            side.start(TRAINING_LR)
            if side.way.compile:
                side.steps("full")
                side.start(TRAINING_LR)
            able[name] = side
        except PeerStopped:
            if not side.way.compile:
                raise
            print(f"{name}: torch.compile does not work here; its error is above")
    return able


def fastest(sides: Sequence[Side], choices: Sequence[Way]) -> Side:
    names = {way.name for way in choices}
    return max((side for side in sides if side.name in names), key=lambda side: side.tokens_per_s)


def full_rows(sides: dict[str, Running], prepared: AllWork, turns: int, title: str) -> list[Side]:
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in prepared.full.ours)
    rounds = {name: functools.partial(side.steps, "full") for name, side in sides.items()}
    return compare(rounds, dict.fromkeys(rounds, filled(prepared.full.ours)), tokens, turns, title)


def products(sides: dict[str, Running], rows: int) -> dict[str, float]:
    """GFLOP/s of a feed-forward layer's first product in fp32 on all cores, with each side's library."""
    decoder = MODEL.decoder
    sizes = [rows * T, decoder.hidden_size, 2 * decoder.intermediate_size]
    asked = {"ours": sides["ours, one device"], "peer": sides["peer"]}
    return {name: side.process.ask("product", sizes=sizes, times=50)["gflops"] for name, side in asked.items()}


def a_mix(ours: Running, peers: Sequence[Running], prepared: AllWork, turns: int) -> list[Side]:
    """Compare our side packed and unpacked with the fastest peer."""
    for side in (ours, *peers):
        side.start(STILL_LR)
    rounds = {
        "ours, packed": functools.partial(ours.steps, "packed"),
        "ours, unpacked": functools.partial(ours.steps, "unpacked"),
        **{peer.way.name: functools.partial(peer.steps, "mix") for peer in peers},
    }
    shares = dict.fromkeys(rounds, filled(prepared.unpacked.ours)) | {"ours, packed": filled(prepared.packed)}
    mix = compare(rounds, shares, sum(item.tokens for item in prepared.items), turns, "a mix of lengths")
    return [*mix[:2], max(mix[2:], key=lambda side: side.tokens_per_s)]


def mean_losses(sides: Sequence[Side], prepared: AllWork) -> dict[str, float]:
    """Mean loss of each side over the mix."""
    batches = {side.name: prepared.packed if side.name == "ours, packed" else prepared.unpacked.ours for side in sides}
    weights = {name: [float(b.loss_weights.sum()) for b in of_side] for name, of_side in batches.items()}
    return {side.name: float(np.average(side.losses, weights=weights[side.name])) for side in sides}


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
        cores: Number of cores that both sides share.
        rows: Rows of a packed batch; a multiple of the cores.
        batches: Batches of full rows in a turn.
        examples: Examples of the mix, all in each turn; a multiple of the cores.
        turns: Timed turns of each side, after one to warm up.
        try_compile: Also run the peer with torch.compile, which compiles for minutes.
        seed: Seed of weights, tokens, pixels and lengths.
        out: Write the numbers to this JSON file as well.
    """
    work = {"rows": rows, "batches": batches, "examples": examples, "cores": cores}
    if wrong := [f"--{name} {n}" for name, n in {**work, "turns": turns}.items() if n < 1]:
        raise SystemExit(f"{', '.join(wrong)}: give at least 1")
    if cores > (found := usable_cores()) or rows % cores or examples % cores:
        raise SystemExit(
            f"--cores {cores}: this machine has {found}; give at most as many, dividing --rows and --examples"
        )
    if hasattr(os, "sched_setaffinity"):  # the sides inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    load = {"before": os.getloadavg()}
    work["seed"] = seed
    prepared, content, spreads = make_work(**work), dict[str, Any](), dict[str, float]()
    for shape in MODELS:
        choices = ways(cores, try_compile)
        with running(choices, peer_python, cores) as sides, tempfile.TemporaryDirectory() as folder:
            versions = {
                "ours": sides[choices[0].name].process.ask("versions"),
                "peer": sides["peer"].process.ask("versions"),
            }
            if not content:
                for owner, values in versions.items():
                    print(f"{owner}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
            parameters = prepare(sides, shape, cores, work, prepared, Path(folder))
            if not content:
                gflops = products(sides, rows)
                print("a single product: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in gflops.items()))
            print(f"\n{shape}: {parameters / 1e6:.1f} M parameters, {cores} cores, T = {T}")
            able = without_failing(sides)
            timed = full_rows(able, prepared, turns, f"full rows, {shape}")
            ours = fastest(timed, [way for way in choices if way.is_ours])
            theirs = [way for way in choices if not way.is_ours]
            peer, eager = fastest(timed, theirs), fastest(timed, [way for way in theirs if not way.compile])
            print("\nloss at each step of the first turn")
            for side in timed:
                print(f"{side.name:<34}" + " ".join(f"{loss:.6f}" for loss in side.losses))
            print_table(f"full rows: {rows} of T = {T}", timed, peer)
            middle, low, high = ratio(peer, ours)
            print(f"\nfull rows, {shape}: {ours.name} over {peer.name} {middle:.2f} ({low:.2f}…{high:.2f})")
            content[shape] = {
                "model": dataclasses.asdict(MODELS[shape]),
                "parameters": parameters,
                "full_rows": table(timed, peer),
                "ours_over_peer": {"ours": ours.name, "peer": peer.name, "median": middle, "range": [low, high]},
            }
            spreads[shape] = spread(peer)
            if shape == next(iter(MODELS)):
                mix = a_mix(
                    able[ours.name], [able[name] for name in dict.fromkeys([peer.name, eager.name])], prepared, turns
                )
    losses, tokens = mean_losses(mix, prepared), sum(item.tokens for item in prepared.items)
    print("\nmean loss over the mix: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    text = f"a mix of lengths: {examples} examples, {tokens / examples:.0f} tokens each on average"
    print_table(f"{text}; {len(prepared.packed)} steps packed, {len(prepared.unpacked.ours)} steps not", mix, mix[2])
    gain, low, high = ratio(mix[1], mix[0])
    print(f"\npacking alone: ours packed over ours unpacked {gain:.2f} ({low:.2f}…{high:.2f})")
    load["after"] = os.getloadavg()  # includes this benchmark
    print("load over 1, 5 and 15 minutes: " + ", ".join(f"{when} {values}" for when, values in load.items()))
    spreads["mix"] = spread(mix[2])
    print("the peer's slowest turn over its fastest: " + ", ".join(f"{k} {v:.2f}" for k, v in spreads.items()))
    at_rest = max(spreads.values()) < MOST_SPREAD
    if not at_rest:
        print("other work used the cores; run again on a machine at rest")
    if out is None:
        return
    written = {
        "optimizer": dataclasses.asdict(OPTIMIZER),
        "T": T,
        **work,
        "cpu": cpu_name(),
        "memory": memory(),
        "turns": turns,
        "load": load,
        "peer_spread": spreads,
        "at_rest": at_rest,
        "versions": versions,
        "product_gflops": gflops,
        "shapes": content,
        "mix": {
            "tokens": tokens,
            "steps": {"packed": len(prepared.packed), "unpacked": len(prepared.unpacked.ours)},
            "mean_loss": losses,
            "sides": table(mix, mix[2]),
        },
        "packing_gain": {"median": gain, "range": [low, high]},
    }
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
