"""Tokens per second of a training step on CPU, beside PyTorch and transformers in the same run.

    python3.11 -m venv ../peer && ../peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    python benchmarks/step.py --peer-python ../peer/bin/python [--out docs/results/step.json]

A small Phi-4-reasoning-vision in fp32: forward, backward, clipping by global norm, AdamW, with the same weights,
tokens and pixels on both sides, on the same cores; the sides take turns and wait for each other. The peer is
``Phi3ForCausalLM`` and ``Siglip2VisionModel`` with SDPA and fused AdamW. Each side is tried in the ways there are
to run it, and its fastest is what counts:

    ours         a device a core with its own rows, the weights split over them ("fsdp"); or all on one device
    peer         all cores on each operation, eager; or with ``torch.compile``. Not tried: a process a core (DDP).
    both         memory from glibc as it is, or in huge pages (``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``, glibc 2.35 and
                 Linux with transparent huge pages at "madvise"): XLA allocates a step's temporaries anew each time

full rows    every row is one example of T columns, seven tenths of them one image, half of the rest learnt: ours
             makes logits for a quarter of the columns then, the peer for all. Both sides train; their losses are
             printed. Twice: with the released model's proportions, and with heads of 32 columns (``step_work.MODELS``).
a mix        15 % text alone, 75 % one image, 10 % two or three, text lengths lognormal, shrunk from the mix of the
             design (1,830 patches and 745 text tokens in T = 8,192) in proportion to T. Three sides:
                 packed      ours, many examples in a row of T columns (``data.packing``)
                 unpacked    ours, an example in a row, padded to the batch's longest
                 peer        the same batches as "unpacked", padded as transformers' collator pads
             A batch of theirs holds as many examples as a batch of ours does on average, to whole rows a core. The
             learning rate is too small to change a weight, so all three must give the same mean loss over the mix.
             Ours is run as it was fastest on full rows; the peer so and eager, of which the faster counts.

Batches are made beforehand on both sides: pixels in fp32 for the peer, in bytes for ours, which makes them fp32 itself.

Tokens are real ones: columns of text and of images, padding not counted. A ratio is taken within a turn; the median
over the turns is printed. What a single product of a layer's matrices reaches on each side is printed too: which of a
processor's instructions a library uses decides much of a ratio, and is no merit of ours. Where the peer's slowest turn
took ``MOST_SPREAD`` of its fastest or more, something else had the cores: that is said, and written as ``at_rest``
false. Ratios hold no better than their range then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peer_process import Peer, PeerStopped, peer_process
from step_work import MODEL, MODELS, OPTIMIZER, AllWork, T, make_work

from phivision_jax.batch import Batch
from phivision_jax.convert.hf_config import config_json
from phivision_jax.io.progress import bar

TRAINING_LR, STILL_LR = 1e-4, 1e-12
MOST_SPREAD = 1.25
_OURS, _PEER = (Path(__file__).with_name(name) for name in ("step_ours.py", "step_peer.py"))
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run a side."""

    name: str
    devices: int = 0
    """Ours on so many; the peer where it is 0."""
    compile: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.devices > 0


def ways(cores: int, try_compile: bool) -> list[Way]:
    made = [
        Way("ours, a device a core, huge pages", devices=cores, environment=_HUGE_PAGES),
        Way("ours, a device a core", devices=cores),
        Way("ours, one device, huge pages", devices=1, environment=_HUGE_PAGES),
        Way("ours, one device", devices=1),
        Way("peer"),
        Way("peer, huge pages", environment=_HUGE_PAGES),
        Way("peer, torch.compile", compile=True),
        Way("peer, torch.compile, huge pages", compile=True, environment=_HUGE_PAGES),
    ]
    return [way for way in made if try_compile or not way.compile]


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
    over = f"over {against.name} (range over turns), in CPU time"
    print(f"{'':<34}{'real tokens/s':>14}{'s per turn':>12}{'real columns':>14}   {over}")
    for side in sides:
        middle, low, high = ratio(against, side)
        speed = f"{side.tokens_per_s:>14,.0f}{statistics.median(side.seconds):>12.2f}{side.real_share:>14.1%}"
        print(f"{side.name:<34}{speed}   {middle:.2f} ({low:.2f}…{high:.2f}), {cpu_ratio(against, side):.2f}")


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


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> dict[str, str]:
    """What decides whether huge pages can be asked for: the C library, and Linux's own setting."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "libc": " ".join(platform.libc_ver()),
        "transparent_hugepage": setting.read_text().strip() if setting.exists() else "unknown",
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclasses.dataclass(frozen=True)
class Running:
    """A way to run a side, in its process."""

    way: Way
    process: Peer

    def start(self, learning_rate: float) -> None:
        """The first weights again, and a fresh optimizer."""
        choice = {} if self.way.is_ours else {"compile": self.way.compile}
        self.process.ask("start", learning_rate=learning_rate, **choice)

    def steps(self, name: str) -> dict[str, Any]:
        return self.process.ask("steps", name=name)


@contextlib.contextmanager
def running(choices: Sequence[Way], peer_python: Path, cores: int) -> Iterator[dict[str, Running]]:
    """A process for each way to run a side, by its name."""
    with contextlib.ExitStack() as stack:
        made = {}
        for way in choices:
            python, script = (Path(sys.executable), _OURS) if way.is_ours else (peer_python, _PEER)
            made[way.name] = Running(way, stack.enter_context(peer_process(python, script, cores, way.environment)))
        yield made


def prepare(
    sides: dict[str, Running], shape: str, cores: int, work: dict[str, int], made: AllWork, folder: Path
) -> int:
    """The same weights and work for all, through files that must stay; returns the number of parameters."""
    weights, settings = str(folder / "weights.npz"), {"optimizer": dataclasses.asdict(OPTIMIZER), "threads": cores}
    files = {"full": _written(folder, "full", made.full.peer), "mix": _written(folder, "mix", made.unpacked.peer)}
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
    """Those that can train: ``torch.compile`` needs a compiler of its own, which not every machine has."""
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
            print(f"{name}: torch.compile does not work here; its own words are above")
    return able


def fastest(sides: Sequence[Side], choices: Sequence[Way]) -> Side:
    names = {way.name for way in choices}
    return max((side for side in sides if side.name in names), key=lambda side: side.tokens_per_s)


def full_rows(sides: dict[str, Running], made: AllWork, turns: int, title: str) -> list[Side]:
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in made.full.ours)
    rounds = {name: functools.partial(side.steps, "full") for name, side in sides.items()}
    return compare(rounds, dict.fromkeys(rounds, filled(made.full.ours)), tokens, turns, title)


def products(sides: dict[str, Running], rows: int) -> dict[str, float]:
    """GFLOP/s of a feed-forward layer's first product, in fp32 on all cores, with the library of each side."""
    decoder = MODEL.decoder
    sizes = [rows * T, decoder.hidden_size, 2 * decoder.intermediate_size]
    asked = {"ours": sides["ours, one device"], "peer": sides["peer"]}
    return {name: side.process.ask("product", sizes=sizes, times=50)["gflops"] for name, side in asked.items()}


def a_mix(ours: Running, peers: Sequence[Running], made: AllWork, turns: int) -> list[Side]:
    """Ours packed, ours unpacked, the fastest peer."""
    for side in (ours, *peers):
        side.start(STILL_LR)
    rounds = {
        "ours, packed": functools.partial(ours.steps, "packed"),
        "ours, unpacked": functools.partial(ours.steps, "unpacked"),
        **{peer.way.name: functools.partial(peer.steps, "mix") for peer in peers},
    }
    shares = dict.fromkeys(rounds, filled(made.unpacked.ours)) | {"ours, packed": filled(made.packed)}
    mix = compare(rounds, shares, sum(item.columns for item in made.items), turns, "a mix of lengths")
    return [*mix[:2], max(mix[2:], key=lambda side: side.tokens_per_s)]


def mean_losses(sides: Sequence[Side], made: AllWork) -> dict[str, float]:
    """Of each side over the whole mix."""
    batches = {side.name: made.packed if side.name == "ours, packed" else made.unpacked.ours for side in sides}
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
        cores: How many cores both sides share.
        rows: Rows of a batch of ours; the cores divide them.
        batches: Batches of full rows that a turn goes over.
        examples: Examples of the mix; a turn goes over all of them; the cores divide them.
        turns: How often each side is timed, after one turn to warm up.
        try_compile: Try the peer with torch.compile too, which takes minutes to compile.
        seed: Of weights, tokens, pixels and lengths.
        out: Write the numbers as JSON here too.
    """
    work = {"rows": rows, "batches": batches, "examples": examples, "cores": cores}
    if wrong := [f"--{name} {n}" for name, n in {**work, "turns": turns}.items() if n < 1]:
        raise SystemExit(f"{', '.join(wrong)}: there must be at least one")
    if cores > (found := usable_cores()) or rows % cores or examples % cores:
        raise SystemExit(
            f"--cores {cores}: there must be as many (here {found}); they must divide --rows and --examples"
        )
    if hasattr(os, "sched_setaffinity"):  # the sides inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    load = {"before": os.getloadavg()}
    work["seed"] = seed
    made, content, spreads = make_work(**work), dict[str, Any](), dict[str, float]()
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
            parameters = prepare(sides, shape, cores, work, made, Path(folder))
            if not content:
                gflops = products(sides, rows)
                print("a product alone: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in gflops.items()))
            print(f"\n{shape}: {parameters / 1e6:.1f} M parameters, {cores} cores, T = {T}")
            able = without_failing(sides)
            timed = full_rows(able, made, turns, f"full rows, {shape}")
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
                    able[ours.name], [able[name] for name in dict.fromkeys([peer.name, eager.name])], made, turns
                )
    losses, tokens = mean_losses(mix, made), sum(item.columns for item in made.items)
    print("\nmean loss over the mix: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    text = f"a mix of lengths: {examples} examples, {tokens / examples:.0f} tokens each on average"
    print_table(f"{text}; {len(made.packed)} steps packed, {len(made.unpacked.ours)} steps not", mix, mix[2])
    gain, low, high = ratio(mix[1], mix[0])
    print(f"\npacking alone: ours packed over ours unpacked {gain:.2f} ({low:.2f}…{high:.2f})")
    load["after"] = os.getloadavg()  # holds our own work, too
    print("load over 1, 5 and 15 minutes: " + ", ".join(f"{when} {values}" for when, values in load.items()))
    spreads["mix"] = spread(mix[2])
    print("the peer's slowest turn over its fastest: " + ", ".join(f"{k} {v:.2f}" for k, v in spreads.items()))
    at_rest = max(spreads.values()) < MOST_SPREAD
    if not at_rest:
        print("something else had the cores: run again on a machine at rest")
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
            "steps": {"packed": len(made.packed), "unpacked": len(made.unpacked.ours)},
            "mean_loss": losses,
            "sides": table(mix, mix[2]),
        },
        "packing_gain": {"median": gain, "range": [low, high]},
    }
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
