"""Bytes that a compiled program moves between HBM and a chip's cores, and the large values that it copies.

Every instruction outside a fusion reads its operands and writes its results. Some move less than their types suggest:
a slice reads what it returns, an update in place writes what it updates, and values in on-chip memory (``S(1)`` in
their layout) are not in HBM. Fusions slice and update too, so their operands and results are followed inside. Padding
of layouts is not counted.
"""

import math
import re

from phivision_jax.preflight import hlo
from phivision_jax.preflight.hlo import Calls, Instruction, Loops, Module, num_bytes, walk

_ELSEWHERE = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(\d+\)\}")
"""An array that is not in HBM."""
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")


def moved_bytes(module: Module) -> int:
    """Bytes of one run of the program; of a conditional, those of the branch that moves least."""
    return sum(-size for size in walk(module, lambda calls, loops: _moved(module, calls, loops), weight=float))


def large_results(module: Module, least: int) -> list[str]:
    """Instructions that write at least this many bytes to HBM at once, each once; updates in place write little."""
    found: dict[str, None] = {}

    def look(calls: Calls, loops: Loops) -> bool | None:
        x = calls[-1]
        if (sizes := _written(module, x)) is not None and max(sizes, default=0) >= least:
            found[f"{x.opcode} {x.name} {x.type}"] = None
        return None if sizes is None else False

    walk(module, look, weight=float)
    return list(found)


def _moved(module: Module, calls: Calls, loops: Loops) -> int | None:
    """The bytes negated, so that ``walk`` takes the branch with the fewest."""
    x = calls[-1]
    written = _written(module, x)
    return None if written is None else -math.prod(loops) * (sum(written) + _read(module, x))


def _written(module: Module, x: Instruction) -> list[int] | None:
    """Bytes of each array of the result; None for an instruction whose computations are looked at instead."""
    if x.opcode in ("while", "conditional", "call"):
        return None
    if x.opcode in ("tuple", "get-tuple-element", "bitcast") or x.opcode.endswith("-start") or not x.operands:
        return []  # nothing is moved yet, or at all: a buffer of its own is a custom call without operands
    inside = _results(module, x)
    return [0 if _ELSEWHERE.match(one) else size for one, size in zip(_ARRAY.findall(x.type), inside, strict=True)]


def _results(module: Module, x: Instruction) -> list[int]:
    by_name = {one.name: one for one in x.computation}
    if x.opcode == "dynamic-update-slice":
        return [num_bytes(by_name[x.operands[1]].type)]
    if x.opcode == "fusion":
        return _results(module, module.computations[x.called[0]][-1])
    if x.opcode in ("tuple", "bitcast"):
        return [size for name in x.operands for size in _results(module, by_name[name])]
    return hlo.sizes(x.type)


def _read(module: Module, x: Instruction) -> int:
    by_name, total = {one.name: one for one in x.computation}, 0
    if not (written := _written(module, x)) and written is not None:
        return 0
    source = by_name[x.operands[0]] if x.opcode.endswith("-done") else x  # what has been started
    for i, name in enumerate(source.operands):
        if name in by_name and not _ELSEWHERE.match(by_name[name].type):
            size = num_bytes(x.type) if x is not source else num_bytes(by_name[name].type)
            total += min(size, _used(module, source, i, size))
    return total


def _used(module: Module, x: Instruction, index: int, size: int, outer: Calls = ()) -> int:
    """Bytes that an instruction, inside the fusions ``outer``, reads of its operand ``index``, which has ``size``."""
    if x.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
        return num_bytes(x.type)
    if x.opcode == "dynamic-update-slice" and index == 0:
        return 0
    if outer and x.opcode in ("bitcast", "copy"):
        return _by_users(module, x, size, outer)
    if x.opcode == "fusion":
        inside = module.computations[x.called[0]]
        parameters = (one for one in inside if one.opcode == "parameter")
        return sum(_by_users(module, one, size, (*outer, x)) for one in parameters if one.rest.startswith(f"{index})"))
    return size


def _by_users(module: Module, x: Instruction, size: int, outer: Calls) -> int:
    if x is x.computation[-1]:  # what a fusion inside another one returns
        return _by_users(module, outer[-1], size, outer[:-1]) if len(outer) > 1 else size
    users = ((one, i) for one in x.computation for i, name in enumerate(one.operands) if name == x.name)
    return min(size, sum(_used(module, one, i, size, outer) for one, i in users))
