"""Tokens per second of generation on CPU, compared with transformers' ``generate`` on the same weights in one run.

    python3.11 -m venv ../peer && ../peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy safetensors
    python benchmarks/smollm2.py ../smollm2
    python benchmarks/decode.py --peer-python ../peer/bin/python --smollm2 ../smollm2 [--out docs/results/decode.json]

Two decoders: 180 M random parameters in the released model's proportions, and SmolLM2-135M-Instruct (``smollm2.py``).
Ours is the engine of ``phivision_jax.inference``; the peer is ``Phi3ForCausalLM`` with SDPA and its own ``generate``.
Both get the same token ids and answer greedily, without a stop token, with as many tokens as asked for. They take
turns; every turn has other words of the same lengths, so that nothing is left of the turn before. Ratios are taken
within a turn; the median over the turns is printed. Ids are compared as well, in fp32.

batch 1         One prompt at a time, in fp32 and bf16. Tokens per second include the prefill.
first token     Seconds from a prompt to its first token, in fp32 and bf16.
batch 16        Requests whose lengths of prompt and answer are log-uniform. The peer takes 16 at a time, padded on the
                left, and generates as long as the longest answer; our engine has 16 slots and refills them.
refilling       What continuous batching alone brings: a smaller model on our engine, once with all requests at hand,
                once in fixed batches of 16, which are computed until the longest answer is complete. Lengths of answers
                are log-uniform.

Compilation is not part of these times. Its seconds are reported: of all programs that requests can need, without a
cache. When the other side's slowest turn takes ``MOST_SPREAD`` of its fastest or more, other work used the cores; a
message reports it, and ``at_rest`` is false.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import decode_work as work
import tyro
from decode_work import Item, Sizes
from peer_process import Peer, peer_process
from step import MOST_SPREAD, cpu_name, usable_cores

from phivision_jax.io.progress import bar
from phivision_jax.processor import Processor

_OURS, _PEER = (Path(__file__).with_name(name) for name in ("decode_ours.py", "decode_peer.py"))
PROPORTIONS, SMOLLM2 = "180 M, released proportions", "SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16")
type Work = Literal["batch 1", "first token", "batch", "refilling"]
WORKS: tuple[Work, ...] = ("batch 1", "first token", "batch", "refilling")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the same work on two sides, in turns."""

    model: str
    work: str
    dtype: str
    tokens: int
    """Tokens of the answers of a turn."""
    ours: list[float]
    """Seconds of each turn."""
    other: list[float]
    """Those of the peer; or of our engine without refilling."""
    cpu_ratio: float
    equal_ids: float
    """Share of the ids of the first turn that are equal, up to the first difference of each answer."""

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """Our tokens per second over the other side's, the median over the turns."""
        return statistics.median(self.ratios)

    def numbers(self) -> dict[str, Any]:
        speeds = {name: self.tokens / statistics.median(getattr(self, name)) for name in ("ours", "other")}
        found = {"ratio": self.ratio, "ratio_range": [min(self.ratios), max(self.ratios)], "tokens_per_s": speeds}
        return dataclasses.asdict(self) | found


def groups_of(processor: Processor, items: Sequence[Item], size: int) -> list[dict[str, Any]]:
    """Requests as both sides take them, in groups of at most ``size``."""
    return [
        {
            "prompts": [work.prompt_ids(processor, item.text) for item in items[i : i + size]],
            "answers": [item.answer for item in items[i : i + size]],
        }
        for i in range(0, len(items), size)
    ]


def equal_share(ours: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Share of ids before the first difference of each answer."""
    same = 0
    for mine, theirs in zip(ours, other, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
    return same / sum(map(len, ours))


type Groups = list[dict[str, Any]]
type Turn = Callable[[int], tuple[Groups, Groups]]
"""The requests of a turn, in groups: of our side, and of the other."""


def compare(model: str, name: str, dtype: str, ours: Peer, other: Peer, turns: int, turn_of: Turn) -> Row:
    """Run both sides ``turns`` times, in an order that alternates."""
    sides = {"ours": ours, "other": other}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    tokens = 0
    with bar(f"{model}, {name}, {dtype}", 2 * (turns + 1)) as advance:
        for turn in range(turns + 1):  # the first warms up and is not timed
            groups = dict(zip(sides, turn_of(turn), strict=True))
            tokens = sum(sum(group["answers"]) for group in groups["ours"])
            for side in list(sides)[:: -1 if turn % 2 else 1]:
                answers[side].append(sides[side].ask("generate", groups=groups[side]))
                advance(1)
    seconds = {side: [answer["seconds"] for answer in found[1:]] for side, found in answers.items()}
    cpu = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(*answers.values(), strict=True)]
    equal = equal_share(answers["ours"][0]["ids"], answers["other"][0]["ids"])
    return Row(model, name, dtype, tokens, seconds["ours"], seconds["other"], statistics.median(cpu[1:]), equal)


def against_peer(
    model: str,
    directory: Path,
    ours: Peer,
    peer: Peer,
    sizes: Sizes,
    turns: int,
    cores: int,
    only: Sequence[str],
    bf16_batch: bool,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """All comparisons of one model, and what compiling took."""
    processor, rows, compiled = work.processor_of(directory), [], []
    prompt, answer = sizes.single
    most = max(sizes.first, sizes.mixed_prompts[1] + sizes.mixed_answers[1], prompt + answer) + 64

    def same(items: Callable[[int], list[Item]], ours_at_once: int, peer_at_once: int) -> Turn:
        def turn_of(turn: int) -> Any:
            asked = items(turn)
            return groups_of(processor, asked, ours_at_once), groups_of(processor, asked, peer_at_once)

        return turn_of

    def one(tokens: int, answer: int) -> Turn:
        return same(lambda turn: work.items(processor, 1, (tokens, tokens), (answer, answer), turn), 1, 1)

    def mixed(turn: int) -> list[Item]:
        return work.items(processor, sizes.mixed, sizes.mixed_prompts, sizes.mixed_answers, turn)

    kinds: dict[str, tuple[int, Turn]] = {
        "batch 1": (1, one(prompt, answer)),
        "first token": (1, one(sizes.first, 1)),
        "batch": (sizes.batch, same(mixed, sizes.mixed, sizes.batch)),
    }
    for dtype in DTYPES:
        loaded, slots_now = {"directory": str(directory), "dtype": dtype}, 0
        peer.ask("load", **loaded, threads=cores)
        for kind, (slots, turn_of) in kinds.items():
            if kind not in only or (kind == "batch" and dtype == "bfloat16" and not bf16_batch):
                continue
            if slots != slots_now:
                slots_now = slots
                compiled.append({"model": model, "slots": slots} | ours.ask("load", **loaded, slots=slots, length=most))
            name = f"batch {slots}" if kind == "batch" else kind
            rows.append(compare(model, name, dtype, ours, peer, turns, turn_of))
    return rows, compiled


def refilling(directory: Path, ours: Peer, sizes: Sizes, turns: int) -> Row:
    """Our engine with continuous batching and in fixed batches."""
    processor = work.processor_of(directory)
    most = sizes.mixed_prompts[1] + sizes.refilled_answers[1] + 64
    ours.ask("load", directory=str(directory), dtype="float32", slots=sizes.batch, length=most)

    def turn_of(turn: int) -> Any:
        items = work.items(processor, sizes.refilled, (16, 32), sizes.refilled_answers, turn)
        batches = [group | {"fixed": True} for group in groups_of(processor, items, sizes.batch)]
        return groups_of(processor, items, sizes.refilled), batches

    return compare("4 M, random", "refilling", "float32", ours, ours, turns, turn_of)


def spread_of(rows: Sequence[Row]) -> float:
    """The largest ratio of the other side's slowest turn to its fastest: above 1 where other work used the cores."""
    return max((max(row.other) / min(row.other) for row in rows), default=1.0)


def print_rows(rows: Sequence[Row]) -> None:
    print(f"\n{'':<58}{'ours':>10}{'other':>10}   ratio (range over turns), in CPU time, equal ids")
    for row in rows:
        found = row.numbers()
        speeds = "".join(f"{found['tokens_per_s'][side]:>10,.1f}" for side in ("ours", "other"))
        ratio = f"{row.ratio:.2f} ({min(row.ratios):.2f}…{max(row.ratios):.2f}), {row.cpu_ratio:.2f}"
        name = f"{row.model}: {row.work}, {row.dtype}"
        print(f"{name:<58}{speeds}   {ratio}, {row.equal_ids:.1%}")


def main(
    peer_python: Path,
    smollm2: Path | None = None,
    cores: int = 2,
    turns: int = 5,
    only: tuple[Work, ...] = WORKS,
    bf16_batch: bool = True,
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Compare, time, and print the table.

    Args:
        peer_python: Python of an environment with torch and transformers 5.
        smollm2: Directory written by ``smollm2.py``; without it only the random model is compared.
        cores: Number of cores that both sides share.
        turns: Timed turns of each side, after one to warm up.
        only: Comparisons to make.
        bf16_batch: Also the batch of 16 in bf16, in which the peer is slow on CPUs without arithmetic in bf16.
        quick: Do hardly any work, to try the benchmark.
        out: Write the numbers to this JSON file as well.
    """
    if cores > (found := usable_cores()) or min(cores, turns) < 1:
        raise SystemExit(f"--cores {cores} --turns {turns}: this machine has {found} cores; give at least 1 of each")
    if hasattr(os, "sched_setaffinity"):  # the sides inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    sizes, load = work.QUICK if quick else Sizes(), {"before": os.getloadavg()}
    rows: list[Row] = []
    compiled: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}

    def save() -> None:
        """Write what has been measured so far."""
        written = {
            "cpu": cpu_name(),
            "cores": cores,
            "turns": turns,
            "load": load | {"after": os.getloadavg()},  # includes this benchmark
            "at_rest": spread_of(rows) < MOST_SPREAD,
            "versions": versions,
            "sizes": dataclasses.asdict(sizes),
            "rows": [row.numbers() for row in rows],
            "compiled": compiled,
        }
        if out:
            out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        no_cache = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        ours_process = peer_process(Path(sys.executable), _OURS, cores, no_cache | {"PYTHONPATH": os.getcwd()})
        with ours_process as ours, peer_process(peer_python, _PEER, cores) as peer:
            versions |= {"ours": ours.ask("versions"), "peer": peer.ask("versions")}
            for owner, values in versions.items():
                print(f"{owner}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
            models = {PROPORTIONS: Path(folder) / "proportions"} | ({SMOLLM2: smollm2} if smollm2 else {})
            work.write_random(models[PROPORTIONS], work.SMALL if quick else work.PROPORTIONS)
            for model, directory in models.items() if {*only} - {"refilling"} else ():
                more = against_peer(model, directory, ours, peer, sizes, turns, cores, only, bf16_batch)
                rows += more[0]
                compiled += more[1]
                save()
            if "refilling" in only:
                peer.ask("unload")
                work.write_random(Path(folder) / "small", work.SMALL)
                rows.append(refilling(Path(folder) / "small", ours, sizes, max(1, turns // 2)))
    print_rows(rows)
    for one in compiled:
        print("compiled {programs} programs in {compile_seconds:.0f} s ({model}, {dtype}, {slots} slots)".format(**one))
    save()
    spread = spread_of(rows)
    if spread >= MOST_SPREAD:
        print(f"the other side's slowest turn took {spread:.2f} of its fastest: run again on a machine at rest")


if __name__ == "__main__":
    tyro.cli(main)
