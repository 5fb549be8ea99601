"""The text of a compiled program, taken apart: computations, instructions, sizes, loops.

What is read is the scheduled HLO that ``compiled.as_text()`` prints (by ``collectives.py`` and ``matmuls.py``). A
compiler's own totals count the body of a loop once, and a search for names misses what is inside a fusion. So a program
is walked from its entry the way it runs:

    ENTRY main ── while (40 trips) ── body ── all-gather            40 times, loops (40,)
        │                             └── while (3) ── all-reduce   120 times, loops (40, 3)
        └── fusion ── all-reduce                                    once, loops ()
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    """Of its result, as printed, layouts and all."""
    opcode: str
    rest: str
    """Operands and attributes."""

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of its operands, in order; a constant has none."""
        inside = next((self.rest[:i] for i, depth in enumerate(_depths(self.rest)) if depth < 0), self.rest)
        return re.findall(r"%([\w.\-]+)", inside)

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that it runs once; of those of a "conditional" it runs one. A loop's body is not among them."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    @property
    def branches(self) -> list[str]:
        """Of a conditional: the computations of which it runs one.

        Raises:
          ValueError: when it names none.
        """
        if not self.called:
            raise ValueError(f"HLO: the {self.opcode} {self.name} states no branches")
        return self.called

    def attribute(self, key: str) -> str:
        """The name or word after ``key=``.

        Raises:
          ValueError: when the instruction does not state it.
        """
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        if match is None:
            raise ValueError(f"HLO: {self.opcode} {self.name} states no {key}")
        return match[1]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, list[Instruction]]
    """Instructions of each, in the order in which they are scheduled; the last is the root."""
    entry: str
    devices: int
    """That run it together. Of several slices each has a program of its own, and this counts those of one."""

    def trips(self, loop: Instruction) -> int:
        """How often a ``while`` runs its body.

        XLA:CPU writes the trips beside the loop; for TPU they follow from the one constant that the condition compares
        with, since the counter of a scan starts at 0, and from what the body adds to it: 2, where it was unrolled.

        Raises:
          ValueError: when they are not one constant.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        condition = loop.attribute("condition")
        names = [condition, *(name for instruction in self.computations[condition] for name in instruction.called)]
        constants = {
            int(match[1])
            for name in names
            for instruction in self.computations.get(name, [])
            if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.rest))
        }
        if len(constants) != 1:
            raise ValueError(
                f"HLO: the loop {loop.name} cannot be counted, since its trips are not one constant: "
                f"{sorted(constants)}"
            )
        return -(-constants.pop() // self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """What the body adds to the element of its state that the condition looks at; 1 where that is not plain."""
        looked_at = [
            re.search(r"index=(\d+)", instruction.rest)
            for instruction in self.computations[loop.attribute("condition")]
            if instruction.opcode == "get-tuple-element"
        ]
        body = {instruction.name: instruction for instruction in self.computations[loop.attribute("body")]}
        root = next(reversed(body.values()), None)
        if len(looked_at) != 1 or looked_at[0] is None or root is None or root.opcode != "tuple":
            return 1
        counter = body.get(root.operands[int(looked_at[0][1])])
        if counter is None or counter.opcode != "add":
            return 1
        added = (body[name] for name in counter.operands if name in body and body[name].opcode == "constant")
        return next((int(one.rest.partition(")")[0]) for one in added), 1)


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


def parse(text: str) -> Module:
    """The computations of a module.

    Args:
      text: ``compiled.as_text()``.

    Raises:
      ValueError: when the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    header = text[: text.find("\n")]
    counts = (re.search(rf"\b{key}=(\d+)", header) for key in ("replica_count", "num_partitions"))
    return Module(computations, entry, math.prod(int(match[1]) for match in counts if match))


_BITS = {"pred": 8, "bf16": 16, "token": 0}


def num_bytes(type_: str) -> int:
    """Of an array type, or of all arrays of a tuple: ``(f32[8,16]{1,0}, bf16[4])`` has 520."""
    total = 0
    for dtype, dims in arrays(type_):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[1]) if digits else 0
        total += -(-math.prod(dims) * bits // 8)
    return total


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and dimensions of every array in a type."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)
    ]


def elements(type_: str) -> list[str]:
    """The elements of a tuple type, nested tuples whole; an array is its own only element."""
    if not type_.startswith("("):
        return [type_]
    parts, inner = [""], type_[1:-1]
    for character, depth in zip(inner, _depths(inner), strict=True):
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _depths(text: str) -> list[int]:
    """Depth in brackets after each character."""
    depths, depth = [], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        depths.append(depth)
    return depths
