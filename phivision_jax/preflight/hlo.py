"""Parse the text of a compiled program and walk what it runs.

The input is the scheduled HLO that ``compiled.as_text()`` prints. A compiler's own totals count the body of a loop
once, and a text search misses what is inside a fusion, so ``walk`` follows a program from its entry:

    ENTRY main ── while (40 trips) ── body ── all-gather            40 times, loops (40,)
        │                             └── while (3) ── all-reduce   120 times, loops (40, 3)
        └── fusion ── all-reduce                                    once, loops ()

``collectives.py`` and ``matmuls.py`` say what to look for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    """Type of the result as printed, with layouts."""
    opcode: str
    rest: str
    """Operands and attributes."""
    computation: list[Instruction] = dataclasses.field(default_factory=list, repr=False, compare=False)
    """All instructions of the computation that it is in, as in ``Module.computations``."""

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands, in order; a constant has none."""
        inside = re.split(r"\)(?:, [\w\-]+=|$)", self.rest, maxsplit=1)[0]
        return re.findall(r"%([\w.\-]+)", inside)

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that it runs once (a "conditional": one of them). A loop's body is not among them."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    @property
    def op_name(self) -> str:
        """Path of JAX transformations, named scopes and the primitive; empty where the compiler kept none."""
        return self.attribute("op_name", "").replace("\\", "")

    def attribute(self, key: str, default: str | None = None) -> str:
        """The name, word or text in quotes after ``key=``.

        Raises:
          ValueError: when the instruction has no such attribute, and there is no default.
        """
        match = re.search(rf'\b{key}=(?:%?([\w.\-]+)|"([^"]*)")', self.rest)
        if match is None and default is None:
            raise ValueError(f"HLO: {self.opcode} {self.name} has no {key}")
        return (match[1] or match[2]) if match else str(default)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name."""

    name: str
    computations: dict[str, list[Instruction]]
    """Instructions in the order in which they are scheduled; the last is the root."""
    entry: str
    devices: int
    """Devices that run it together. Each of several slices has its own program, which counts its own devices."""

    def trips(self, loop: Instruction) -> int:
        """Number of times a ``while`` runs its body.

        XLA:CPU prints the trips beside the loop. For TPUs they follow from the single constant in the loop's condition,
        or the one that something is less than, since the counter of a scan starts at 0, and from the body's increment
        (2 for a loop unrolled by two).

        Raises:
          ValueError: when the condition does not have exactly one constant.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        condition = self.computations[loop.attribute("condition")]
        every = [x for one in condition for name in one.called for x in self.computations.get(name, [])] + condition
        limits = {name for x in every if x.opcode == "compare" and "direction=LT" in x.rest for name in x.operands}
        found = [x for x in every if x.opcode == "constant"]
        texts = [x.rest for x in [x for x in found if x.name in limits] or found]
        constants = {int(match[1]) for match in map(re.compile(r"(\d+)\)").match, texts) if match}
        if len(constants) != 1:
            raise ValueError(
                f"HLO: cannot count the trips of loop {loop.name}: its condition compares with {sorted(constants)}, "
                "not with one constant"
            )
        return -(-constants.pop() // self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """Increment of the state element that the condition reads; 1 where the body does not show it."""
        condition, body = (self.computations[loop.attribute(key)] for key in ("condition", "body"))
        reads, by_name = [x for x in condition if x.opcode == "get-tuple-element"], {x.name: x for x in body}
        if len(reads) != 1 or not body or body[-1].opcode != "tuple":
            return 1
        counter = by_name.get(body[-1].operands[int(reads[0].attribute("index"))])
        if counter is None or counter.opcode != "add":
            return 1
        added = (by_name[name] for name in counter.operands if name in by_name and by_name[name].opcode == "constant")
        return next((int(one.rest.partition(")")[0]) for one in added), 1)


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


def parse(text: str) -> Module:
    """Parse ``compiled.as_text()``.

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
            current.append(Instruction(match[1], match[2], match[3], match[4], current))
    if not entry:
        raise ValueError("this text is no HLO module: it has no ENTRY computation")
    header = text.partition("\n")[0]
    name = re.match(r"HloModule ([\w.\-]+)", header)
    counts = (re.search(rf"\b{key}=(\d+)", header) for key in ("replica_count", "num_partitions"))
    return Module(name[1] if name else "", computations, entry, math.prod(int(match[1]) for match in counts if match))


type Calls = tuple[Instruction, ...]
"""The calls that lead to an instruction from the entry, and last the instruction itself."""
type Loops = tuple[int, ...]
"""Trips of the loops around an instruction, outermost first."""


def walk[T](module: Module, make: Callable[[Calls, Loops], T | None], weight: Callable[[T], float]) -> list[T]:
    """Collect the results of ``make`` over all executed instructions, in the order of the text.

    A computation that is called twice counts twice. Of a conditional's branches the heaviest counts.

    Args:
      make: called with each executed instruction; None means nothing to collect here, so look inside.
      weight: of a result, to compare branches.

    Raises:
      ValueError: when a loop around a result has no constant number of trips, or a conditional no branches.
    """

    def inside(name: str, outer: Calls, loops: Loops) -> list[T]:
        found: list[T] = []
        for instruction in module.computations[name]:
            stack = (*outer, instruction)
            called = functools.partial(inside, outer=stack, loops=loops)
            if (result := make(stack, loops)) is not None:
                found.append(result)
            elif instruction.opcode == "while":
                body = instruction.attribute("body")
                if called(body):  # the number of trips matters only where something is counted
                    found += inside(body, stack, (*loops, module.trips(instruction)))
            elif instruction.opcode == "conditional":
                if not instruction.called:
                    raise ValueError(f"HLO: conditional {instruction.name} has no branches")
                found += max(map(called, instruction.called), key=lambda branch: sum(map(weight, branch)))
            elif not instruction.opcode.endswith(("-update", "-done")):  # their start has run it
                found += [one for computation in instruction.called for one in called(computation)]
        return found

    return inside(module.entry, (), ())


def num_bytes(type_: str) -> int:
    """Size of an array type, or of all arrays in a tuple: ``(f32[8,16]{1,0}, bf16[4])`` has 520 bytes."""
    return sum(sizes(type_))


def sizes(type_: str) -> list[int]:
    """Bytes of every array in a type; a token has none."""
    return [-(-math.prod(shape) * _bits(dtype) // 8) for dtype, shape in arrays(type_)]


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and dimensions of every array in a type."""
    return [(dtype, tuple(map(int, re.findall(r"\d+", dims)))) for dtype, dims in _ARRAY.findall(type_)]
