"""The collectives of a compiled program: what kind, how large, how often, among whom, and whether anything runs beside.

Four forms of the TPU compiler need knowing:

    all-reduce-scatter           a reduce-scatter is a fusion of this name, which holds an all-reduce of the whole and
                                 keeps a slice of it: counted as a reduce-scatter with the bytes of the slice
    call-start … call-done       the SparseCore runs a computation that holds the collective
    async_collective_fusion      one collective in steps, the first in a fusion of its own, others inside fusions that
                                 compute: all have its ``chain_id`` and its whole result, and count as one
    send, recv to the host       between slices: the runtime on the hosts (megascale) does the rest over DCN. Each slice
                                 runs a program of its own, whose other collectives number the devices of one slice

A collective is ``overlapped`` when the device has something else to do while it is in flight:

    start          from here, or from the last *-update, which may bring the operands later
      fusion       a matrix product or a kernel, by itself or inside a fusion, call, loop or conditional: overlapped
      fusion       other work counts by the bytes of its results: overlapped when those add up to the collective's own
    done

A send is in flight until its recv is done. A chain is overlapped when a product or a kernel runs between its first and
its last step. Everything else is synchronous. Whether *all* of the time is hidden is not said: a short product may
stand beside a long gather.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from phivision_jax.preflight.hlo import Instruction, Module, elements, num_bytes, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
DCN_KINDS = ("send", "recv")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str
    """One of ``KINDS``, within a slice; or of ``DCN_KINDS``, between slices."""
    name: str
    result_bytes: int
    """Of its result on one device, once; of a send, what it sends."""
    loops: tuple[int, ...]
    """Trips of the loops around it, outermost first."""
    groups: Groups = ()
    """Devices that exchange data, by their position in ``mesh.devices.flat``; of a permute, (source, target) pairs."""
    overlapped: bool = False
    """Whether computation runs meanwhile; see the module's docstring."""

    @property
    def times(self) -> int:
        """How often it runs in one run of the program."""
        return math.prod(self.loops)

    @property
    def total_bytes(self) -> int:
        return self.result_bytes * self.times


def collectives(hlo: str) -> list[Collective]:
    """Every collective that the program runs, in the order of the text; those of a computation called twice, twice.

    Of a conditional's branches the one that sends most bytes is taken.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      ValueError: when the text has no entry computation, a loop around a collective has no constant number of trips, or
        groups of devices are written in a way not known here.
    """
    module = parse(hlo)
    return [collective for collective, _ in _walk(module, module.entry, (), False)]


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes of results per device over one run of the program, of each kind that occurs."""
    totals: dict[str, int] = {}
    for collective in found:
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.total_bytes
    return totals


def largest(found: Iterable[Collective]) -> Collective | None:
    """The one with the most bytes in a single result; None of none."""
    return max(found, key=lambda collective: collective.result_bytes, default=None)


def axes_of(collective: Collective, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which data moves: those on which devices of one group differ. In the mesh's order.

    A group need not span an axis: a permute pairs neighbours, and of an axis that crosses slices the collectives within
    a slice hold a part.

    Args:
      mesh_shape: all axes and sizes, outermost first (``mesh.shape``); slices must be outermost.

    Raises:
      ValueError: when the groups name a device that the mesh does not have.
    """
    sizes, found = list(mesh_shape.values()), set()
    for group in collective.groups:
        if max(group) >= math.prod(sizes):
            raise ValueError(f"{collective.name} has device {max(group)}, but the mesh {dict(mesh_shape)} does not")
        coordinates = [_unravel(device, sizes) for device in group]
        found |= {axis for axis, seen in enumerate(zip(*coordinates, strict=True)) if len(set(seen)) > 1}
    return tuple(name for axis, name in enumerate(mesh_shape) if axis in found)


def wire_bytes(collective: Collective) -> float:
    """Bytes that each device sends, one run, by the best algorithm on a ring of n devices.

    all-gather and all-to-all r(n−1)/n, reduce-scatter r(n−1), all-reduce 2r(n−1)/n, for a result of r; a permute, a
    broadcast and a send r; a recv none, since the send counts.
    """
    n = max(map(len, collective.groups), default=1)
    factor = {
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
        "reduce-scatter": n - 1,
        "recv": 0,
    }
    return collective.result_bytes * factor.get(collective.kind, 1.0)


def _walk(module: Module, at: str, loops: tuple[int, ...], overlapped: bool) -> Iterator[tuple[Collective, str]]:
    """Collectives, each with the chain of steps that it belongs to, if any."""
    instructions = module.computations[at]
    seen: set[str] = set()
    for i in range(len(instructions)):
        for collective, chain in _of_one(module, instructions, i, loops, overlapped):
            if not chain:
                yield collective, chain
            elif chain not in seen:
                beside = collective.overlapped or _chain_overlaps(module, instructions[i + 1 :], chain)
                yield dataclasses.replace(collective, overlapped=beside), chain
            seen.add(chain)


def _of_one(
    module: Module, instructions: list[Instruction], i: int, loops: tuple[int, ...], overlapped: bool
) -> Iterator[tuple[Collective, str]]:
    instruction, kind = instructions[i], instructions[i].opcode.removesuffix("-start")
    size = _result_bytes(instruction)
    if kind in KINDS or (kind in DCN_KINDS and "_xla_megascale_transfer_type" in instruction.rest):
        beside = overlapped or _overlaps(module, instructions, i, size)
        groups = (_groups if kind in KINDS else _slices)(instruction, module.devices)
        yield Collective(kind, instruction.name, size, loops, groups, beside), _chain(instruction)
    elif kind == "while":
        body = instruction.attribute("body")
        # Trips matter only where something is counted.
        if any(_walk(module, body, loops, overlapped)):
            yield from _walk(module, body, (*loops, module.trips(instruction)), overlapped)
    elif kind == "conditional":
        branches = (list(_walk(module, branch, loops, overlapped)) for branch in instruction.branches)
        yield from max(branches, key=lambda inside: sum(wire_bytes(c) * c.times for c, _ in inside))
    elif not instruction.opcode.endswith(("-update", "-done")):  # these name again what their start has run
        for called in instruction.called:
            inside = list(_walk(module, called, loops, overlapped))
            if inside and called.startswith("all-reduce-scatter"):
                whole, chain = inside[0]
                inside = [(_scattered(whole, instruction.name, size), chain)]
            if inside and instruction.opcode.endswith("-start"):
                beside = overlapped or _overlaps(module, instructions, i, sum(c.result_bytes for c, _ in inside))
                inside = [(dataclasses.replace(c, overlapped=beside), chain) for c, chain in inside]
            yield from inside


def _scattered(whole: Collective, name: str, size: int) -> Collective:
    return dataclasses.replace(whole, kind="reduce-scatter", name=name, result_bytes=size)


def _chain(instruction: Instruction) -> str:
    match = re.search(r'\bchain_id="(\w+)"', instruction.rest)
    return match[1] if match else ""


def _chain_overlaps(module: Module, later: list[Instruction], chain: str) -> bool:
    """Whether a product runs up to the last of the ``later`` instructions that hold a step of this chain."""
    steps = [j for j, x in enumerate(later) if _holds(module, x, chain)]
    return any(_multiplies(module, x) for x in later[: max(steps, default=-1) + 1])


def _holds(module: Module, instruction: Instruction, chain: str) -> bool:
    return _chain(instruction) == chain or any(
        _holds(module, x, chain) for name in instruction.called for x in module.computations.get(name, [])
    )


def _result_bytes(instruction: Instruction) -> int:
    """An all-gather-start or collective-permute-start gives (operands, results, …), a send or recv (data, …)."""
    parts = elements(instruction.type)
    if instruction.opcode in ("all-gather-start", "collective-permute-start") and len(parts) > 1:
        return num_bytes(parts[1])
    return num_bytes(parts[0] if instruction.opcode in DCN_KINDS else instruction.type)


# What takes no time worth naming, or none of the cores that compute.
_IDLE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|iota|(copy|slice|after-all|partition-id).*|.*-done"
)


def _overlaps(module: Module, instructions: list[Instruction], i: int, size: int) -> bool:
    """Whether enough computation is scheduled while the collective that starts at ``i`` is in flight."""
    between = _in_flight(instructions, i)
    others = [x for x in between if not _IDLE.fullmatch(x.opcode)]
    others = [x for x in others if x.opcode not in (*KINDS, *DCN_KINDS)]
    return any(_multiplies(module, x) for x in others) or sum(num_bytes(x.type) for x in others) >= size


def _in_flight(instructions: list[Instruction], i: int) -> list[Instruction]:
    """What is scheduled between the start at ``i`` and its done; nothing for a synchronous instruction."""
    opcode = instructions[i].opcode
    if opcode in DCN_KINDS:  # one exchange: its send, recv and their ends name the same rendezvous
        key = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instructions[i].rest)
        exchange = [j for j, x in enumerate(instructions) if x.opcode in DCN_KINDS and key and key[0] in x.rest]
        names = {instructions[j].name for j in exchange}
        dones = [j for j, x in enumerate(instructions) if x.opcode == "recv-done" and names & set(x.operands)]
        return instructions[min(exchange, default=i) + 1 : max(dones, default=i)]
    if not opcode.endswith("-start"):
        return []
    at, begin = instructions[i].name, i
    for j, instruction in enumerate(instructions[i + 1 :], i + 1):
        if instruction.opcode.endswith(("-update", "-done")) and at in instruction.operands:
            if instruction.opcode.endswith("-done"):
                return instructions[begin + 1 : j]
            at, begin = instruction.name, j
    return []


def _multiplies(module: Module, instruction: Instruction) -> bool:
    """Whether this is, or calls, a matrix product or a kernel."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        return "tpu_custom_call" in instruction.rest
    called = [*instruction.called, *([instruction.attribute("body")] if instruction.opcode == "while" else [])]
    return any(_multiplies(module, x) for name in called for x in module.computations.get(name, []))


def _groups(instruction: Instruction, devices: int) -> Groups:
    """In any of HLO's spellings; none, or an empty list, means all devices together."""
    match = re.search(r"\b(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)", instruction.rest)
    text = match[1] if match else "{}"
    if text == "{}":
        return (tuple(range(devices)),)
    if re.fullmatch(r"\{\{[\d,{}]*\}\}", text):  # {{0,1},{2,3}}
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [4,32]<=[4,8,4]T(1,0,2)
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(shape)
        return tuple(map(tuple, ids.tolist()))
    if match := re.fullmatch(r"mesh\[(.*)\] \{(.*)\}", text):  # mesh['data'=4,'fsdp'=32] {'fsdp'}
        axes = re.findall(r"'(.*?)'=(\d+)", match[1])
        # Part of an axis is 'fsdp':(2)4, those 4 below its first 2.
        return _mesh_groups(axes, re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", match[2]))
    raise ValueError(f"HLO: {instruction.name} groups its devices in a way not known here: {text}")


def _mesh_groups(axes: list[tuple[str, str]], chosen: list[tuple[str, str, str]]) -> Groups:
    sizes: dict[str, int] = {}
    strides: dict[str, int] = {}
    total = 1
    for name, size in reversed(axes):
        sizes[name], strides[name] = int(size), total
        total *= int(size)
    digits = []  # (stride, size) of what varies within a group
    for name, above, part in chosen:
        count = int(part or sizes[name])
        digits.append((strides[name] * sizes[name] // (int(above or 1) * count), count))
    groups: dict[int, list[int]] = {}
    for device in range(total):
        first = device - sum(device // stride % size * stride for stride, size in digits)
        groups.setdefault(first, []).append(device)
    return tuple(map(tuple, groups.values()))


def _slices(instruction: Instruction, devices: int) -> Groups:
    """A device and its like of every slice, from ``_xla_megascale_target="{1,2}x{0:127}"``: slices from 1, devices."""
    match = re.search(r'_xla_megascale_target="\{([\d,]+)\}x', instruction.rest)
    if match is None:
        raise ValueError(f"HLO: {instruction.name} crosses slices, but does not say which in a way known here")
    slices = [int(number) - 1 for number in match[1].split(",")]
    return tuple(tuple(number * devices + device for number in slices) for device in range(devices))


def _unravel(device: int, sizes: list[int]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(device, sizes)))
