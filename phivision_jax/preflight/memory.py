"""What fills a chip's memory, by name: from the compiler's own tables.

``compiled.memory_analysis()`` gives sums only, and for TPUs an empty buffer assignment. What the compiler writes down
when asked (``dump_options``) has it all, in two files for each program:

    *-buffer-assignment.txt    every value's size and place: parameters, outputs, and one block of temporaries in which
                               values take turns
    *-live-range.txt           from which step of the schedule to which a value is needed, loop bodies included

Its own list of "live ranges at peak" is not used: it takes another moment than the one with the most bytes.

A program that does not fit is an error with one of two texts: an early one with a sum, and a late one with a table,
which ``allocations`` reads.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Buffer:
    bytes: int
    what: str
    """Name of the instruction, type of the value."""


def dump_options(directory: Path) -> dict[str, str | bool]:
    """Compiler options that write the tables of a program into a directory."""
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def dumped(directory: Path, module: str) -> tuple[str, str]:
    """The two tables of a program that was compiled with ``dump_options``.

    Args:
      module: name of the program, like ``jit_step``.

    Raises:
      FileNotFoundError: when the directory does not hold exactly one such program.
    """
    texts = []
    for table in ("buffer-assignment", "live-range"):
        found = sorted(directory.glob(f"*.{module}.*-{table}.txt"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{directory} holds {len(found)} tables {table} of {module}, not one; dump into an empty directory"
            )
        texts.append(found[0].read_text())
    return texts[0], texts[1]


_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*?):?$")
_VALUE = re.compile(r"\s*value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): ([a-z0-9]+\[[\d,]*\]|\S+)")
_LIVE = re.compile(r"    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")


def peak_buffers(assignment: str, live_range: str) -> list[Buffer]:
    """What is in memory at the moment with the most of it, largest first.

    Args:
      assignment, live_range: as ``dumped`` gives them.

    Raises:
      ValueError: when the first text has no allocations.
    """
    spans = _spans(live_range)
    held: list[Buffer] = []  # by parameters and results, all the time
    passing: list[tuple[int, int, int, Buffer]] = []  # first and last step, place in the block of temporaries
    size, kind, named, found = 0, "", True, False
    for line in assignment.splitlines():
        if match := _ALLOCATION.match(line):
            found, size, kind, named = True, int(match[1]), match[2], False
        elif (match := _VALUE.match(line)) and "color" not in kind:  # colours are memories other than HBM
            name, bytes_, offset, type_ = match[1], int(match[2]), int(match[3]), match[4]
            if "temp" not in kind:
                if not named:
                    held.append(Buffer(size, f"{name} {type_}"))
                named = True
            elif name in spans:
                passing.append((*spans[name], offset, Buffer(bytes_, f"{name} {type_}")))
    if not found:
        raise ValueError("this is not a table of buffers: it has no allocations")
    at_peak: dict[int, Buffer] = {}
    for step in sorted({first for first, *_ in passing}):
        alive: dict[int, Buffer] = {}
        for first, last, offset, buffer in passing:
            # Values at the same place share it: an update in place, a loop's state.
            if first <= step <= last and buffer.bytes > alive.get(offset, Buffer(-1, "")).bytes:
                alive[offset] = buffer
        if sum(b.bytes for b in alive.values()) > sum(b.bytes for b in at_peak.values()):
            at_peak = alive
    return sorted([*held, *at_peak.values()], key=lambda buffer: -buffer.bytes)


def _spans(live_range: str) -> dict[str, tuple[int, int]]:
    spans = {}
    for line in live_range.splitlines():
        if match := _LIVE.match(line):
            spans[match[1] + match[2].removesuffix("{}")] = (int(match[3]), int(match[4]))
    return spans


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def allocations(error: str) -> list[tuple[int, str]]:
    """(bytes, what) of the largest allocations in the text of an out-of-memory error; empty where it has no table.

    Bytes are as exact as the compiler prints them, to three or four digits.
    """
    table = []
    for entry in re.split(r"\n\s*\d+\. Size: ", error)[1:]:
        size = re.match(r"([\d.]+)([BKMG])", entry)
        if size is None:
            continue
        fields = dict(re.findall(r"^\s*(Operator|Shape|XLA label): (.*)$", entry, re.MULTILINE))
        source = re.search(r'op_name="([^"]*)"', fields.get("Operator", ""))
        label = re.match(r"%?([\w.\-]+)", fields.get("XLA label", ""))
        words = [label and label[1], re.sub(r"\{[^}]*\}", "", fields.get("Shape", "")), source and source[1]]
        table.append((round(float(size[1]) * _UNITS[size[2]]), " ".join(filter(None, words))))
    return table


def needed(error: str, held: int) -> int | None:
    """Bytes that a program would have needed, from the text of an out-of-memory error; None where it does not say.

    Args:
      held: bytes of the program's arguments, for the early text, which speaks of temporaries alone.
    """
    if match := re.search(r"Used ([\d.]+)([BKMG]) of [\d.]+[BKMG] hbm", error):
        return round(float(match[1]) * _UNITS[match[2]])
    if match := re.search(r"temporaries \(([\d.]+)([BKMG])\) exceeds", error):
        return held + round(float(match[1]) * _UNITS[match[2]])
    return None
