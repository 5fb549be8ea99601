"""The collectives of a compiled program, read from its HLO text: what kind, how large, how often, in which loops.

A compiler's own totals count the body of a loop once, and a search for names misses what is inside a fusion. So the
program is walked from its entry the way it runs:

    ENTRY main ── while (40 trips) ── body ── all-gather            40 times, loops (40,)
        │                             └── while (3) ── all-reduce   120 times, loops (40, 3)
        └── fusion ── all-reduce                                    once, loops ()

The TPU compiler writes a reduce-scatter as a fusion that holds an all-reduce of the whole and keeps a slice of it; such
are told by the name it gives them, ``all-reduce-scatter``, and count as reduce-scatter with the bytes of the slice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str
    """One of ``KINDS``."""
    name: str
    result_bytes: int
    """Of its result on one device, once."""
    loops: tuple[int, ...]
    """Trips of the loops around it, outermost first."""

    @property
    def times(self) -> int:
        """How often it runs in one run of the program."""
        return math.prod(self.loops)

    @property
    def total_bytes(self) -> int:
        return self.result_bytes * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""


def collectives(hlo: str) -> list[Collective]:
    """Every collective that the program runs, in the order of the text; those of a computation called twice, twice.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      ValueError: when the text has no entry computation, or a loop around a collective has no constant number of trips.
    """
    computations, entry = _parse(hlo)
    return list(_walk(computations, entry, ()))


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes of results per device over one run of the program, of each kind that occurs."""
    totals: dict[str, int] = {}
    for collective in found:
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.total_bytes
    return totals


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _walk(computations: dict[str, list[_Instruction]], at: str, loops: tuple[int, ...]) -> Iterator[Collective]:
    for instruction in computations[at]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, instruction.name, _result_bytes(instruction), loops)
        elif instruction.opcode == "while":
            body, condition = _attribute(instruction, "body"), _attribute(instruction, "condition")
            # Trips matter only where something is counted.
            if any(_walk(computations, body, loops)):
                yield from _walk(computations, body, (*loops, _trips(computations, instruction, condition)))
        elif not instruction.opcode.endswith(("-update", "-done")):  # these name again what their start has run
            for called in _called(instruction):
                inside = list(_walk(computations, called, loops))
                if inside and called.startswith("all-reduce-scatter"):
                    inside = [Collective("reduce-scatter", instruction.name, _bytes(instruction.type), loops)]
                yield from inside


def _called(instruction: _Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in re.findall(r"[\w.\-]+", group)]


def _attribute(instruction: _Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.rest)
    if match is None:
        raise ValueError(f"HLO: {instruction.opcode} {instruction.name} states no {key}")
    return match[1]


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction, condition: str) -> int:
    """XLA:CPU writes the trips beside the loop; for TPU they are the one constant that the condition compares with,
    since the counter of a scan starts at 0."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    names = [condition, *(name for instruction in computations[condition] for name in _called(instruction))]
    constants = {
        int(match[1])
        for name in names
        for instruction in computations.get(name, [])
        if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.rest))
    }
    if len(constants) != 1:
        raise ValueError(
            f"HLO: the loop {loop.name} holds collectives, but its trips are not one constant: {sorted(constants)}"
        )
    return constants.pop()


_BITS = {"pred": 8, "bf16": 16, "token": 0}


def _bytes(type_: str) -> int:
    """Of an array type, or of all arrays of a tuple: ``(f32[8,16]{1,0}, bf16[4])`` has 520."""
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[1]) if digits else 0
        total += -(-math.prod(map(int, filter(None, shape.split(",")))) * bits // 8)
    return total


def _result_bytes(instruction: _Instruction) -> int:
    """An all-gather-start or collective-permute-start gives (operands, results, …): the result is its second half."""
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        parts = _elements(instruction.type)
        return _bytes(parts[1]) if len(parts) > 1 else _bytes(instruction.type)
    return _bytes(instruction.type)


def _elements(type_: str) -> list[str]:
    """The elements of a tuple type, nested tuples whole."""
    parts, depth = [""], 0
    for character in type_.strip()[1:-1]:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
