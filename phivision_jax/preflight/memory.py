"""The buffers that fill a chip's memory at the peak, read from the compiler's own tables.

``compiled.memory_analysis()`` has only sums, and for TPUs its buffer assignment is empty. With ``dump_options`` the
compiler writes two files for each program:

    *-buffer-assignment.txt    size and offset of every value: parameters, outputs, and one block of temporaries in
                               which values take turns
    *-live-range.txt           first and last step of the schedule that need a value, loop bodies included

The compiler's own list of "live ranges at peak" is not used: it is of another step than the one with the most bytes.

A program that does not fit fails with one of two messages: an early one with a sum, and a late one with a table, which
``allocations`` reads.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from phivision_jax.preflight import hlo


class Buffer(NamedTuple):
    """A value in memory."""

    bytes: int
    what: str
    """Instruction, type, and the named scopes that made it."""


def scope(op_name: str) -> str:
    """Shorten a compiler's ``op_name`` to named scopes, primitive, and the pass that it belongs to.

    ``jit(step)/transpose(jvp(decoder))/while/body/checkpoint/rematted_computation/attention/dot_general`` becomes
    ``decoder/attention/dot_general, recomputed``.
    """
    inside = "recomputed" if "rematted_computation" in op_name else "backward" if "transpose(" in op_name else ""
    if "/" not in op_name:  # an argument's path, like state['params']['decoder']
        return op_name
    parts = [re.sub(r"^(?:(?:transpose|jvp|vmap)\()+|\)+$", "", part) for part in op_name.split("/")]
    names = [part for part in parts if not _PLUMBING.fullmatch(part)] or parts[-1:]
    return "/".join(names) + (f", {inside}" if inside else "")


_PLUMBING = re.compile(
    r"|while|body|cond|branch_\d+_fun|eval_jaxpr|closed_call|checkpoint|remat2?|rematted_computation|shard_map|jit\(?.*"
)


def op_names(module: hlo.Module) -> dict[str, str]:
    """The ``op_name`` of every instruction; without one, that of an instruction it calls, an operand, or its user.

    So a fusion has that of its product, a copy that of its source, and a buffer that of the loop that fills it.
    """
    found: dict[str, str] = {}
    for instructions in module.computations.values():  # callees come before callers, operands before users
        for x in instructions:
            own = x.op_name if "/" in x.op_name or x.opcode == "parameter" else ""  # not the compiler's "broadcast.7"
            inside = (found.get(y.name, "") for name in x.called for y in reversed(module.computations.get(name, [])))
            before = (found[name] for name in x.operands if name in found and x.opcode != "tuple")
            found[x.name] = own or next(filter(None, (*inside, *before)), "")
        for x in reversed(instructions):
            found.update({name: found.get(name) or found[x.name] for name in x.operands})
    return found


def dump_options(directory: Path) -> dict[str, str | bool]:
    """Compiler options that write the tables of a program into a directory."""
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def dumped(directory: Path, module: str) -> tuple[str, str]:
    """Read the two tables of a program that was compiled with ``dump_options``.

    Args:
      module: name of the program, like ``jit_step``.

    Raises:
      FileNotFoundError: when the directory does not hold exactly one such program.
    """
    found = [path for table in _TABLES for path in directory.glob(f"*.{module}.*-{table}.txt")]
    if len(found) != len(_TABLES):
        raise FileNotFoundError(f"{directory} has {len(found)} tables of {module} instead of 2; use an empty directory")
    return found[0].read_text(), found[1].read_text()


_TABLES = ("buffer-assignment", "live-range")
_VALUE = re.compile(r"value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): ([a-z0-9]+\[[\d,]*\]|\S+)")
_LIVE = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)


def peak_buffers(assignment: str, live_range: str, sources: Mapping[str, str]) -> list[Buffer]:
    """List the values in memory at the step with the most bytes, largest first.

    Args:
      assignment, live_range: the tables (``dumped``).
      sources: ``op_names`` of the program.

    Raises:
      ValueError: when the first table has no allocations.
    """
    spans = {name + i.removesuffix("{}"): (int(first), int(last)) for name, i, first, last in _LIVE.findall(live_range)}
    held: list[Buffer] = []  # parameters and results, in memory at every step
    passing: list[tuple[int, int, int, Buffer]] = []  # first and last step, offset in the block of temporaries
    blocks = re.split(r"^allocation \d+: size ", assignment, flags=re.MULTILINE)[1:]
    if not blocks:
        raise ValueError("this text is no table of buffers: it has no allocations")
    for block in blocks:
        size, _, kind = block.partition("\n")[0].partition(",")
        values = [] if "color" in kind else _VALUE.findall(block)  # colours are memories other than HBM
        for name, own_size, offset, type_ in values if "temp" in kind else values[:1]:
            what = " ".join(filter(None, (name, type_, scope(sources.get(name.partition("{")[0], "")))))
            if "temp" not in kind:
                held.append(Buffer(int(size), what))
            elif name in spans:
                passing.append((*spans[name], int(offset), Buffer(int(own_size), what)))
    # Values at the same offset share memory (an update in place, a loop's state): the largest, added last, counts.
    passing.sort(key=lambda one: -one[3].bytes)
    steps = sorted({first for first, *_ in passing})
    alive = ({offset: buffer for i, j, offset, buffer in reversed(passing) if i <= step <= j} for step in steps)
    peak = max(alive, key=lambda buffers: sum(buffer.bytes for buffer in buffers.values()), default={})
    return sorted([*held, *reversed(peak.values())], key=lambda buffer: -buffer.bytes)


def _bytes(size: str) -> int:
    """Bytes of a size like ``1.34G``."""
    return round(float(size[:-1]) * 1024 ** "BKMG".index(size[-1]))


def allocations(error: str) -> list[Buffer]:
    """The largest allocations in an out-of-memory message, largest first; empty where it has no table.

    Sizes are as exact as the compiler prints them, to three or four digits.
    """
    table = []
    for entry in re.split(r"\n\s*\d+\. Size: (?=[\d.]+[BKMG])", error)[1:]:
        fields = dict(re.findall(r"^\s*(Operator|Shape|XLA label): (.*)$", entry, re.MULTILINE))
        source = re.search(r'op_name="([^"]*)"', fields.get("Operator", ""))
        label = re.match(r"%?([\w.\-]+)", fields.get("XLA label", ""))
        words = [label and label[1], re.sub(r"\{[^}]*\}", "", fields.get("Shape", "")), source and scope(source[1])]
        table.append(Buffer(_bytes(entry.split()[0]), " ".join(filter(None, words))))
    return sorted(table, key=lambda buffer: -buffer.bytes)


def needed(error: str) -> int | None:
    """Bytes that a program would have needed, from an out-of-memory message; None where it has no sum.

    The early message calls the sum one of temporaries, but arguments are in it.
    """
    match = re.search(r"Used ([\d.]+[BKMG]) of [\d.]+[BKMG] hbm|temporaries \(([\d.]+[BKMG])\) exceeds", error)
    return _bytes(match[1] or match[2]) if match else None
