"""Collectives of a compiled program: kind, size, number of runs, device groups, and overlap with computation.

The TPU compiler writes four forms that need care:

    all-reduce-scatter           a reduce-scatter is a fusion of this name around a full all-reduce, of which it keeps a
                                 slice: counted as a reduce-scatter with the bytes of the slice
    call-start … call-done       the SparseCore runs a computation that holds the collective
    async_collective_fusion      one collective in steps, the first in a fusion of its own, others inside fusions that
                                 compute: all have its ``chain_id`` and its full result, and count as one
    send, recv to the host       between slices: the runtime on the hosts (megascale) does the rest over DCN. Each slice
                                 has its own program, whose other collectives number the devices of one slice

A collective is ``overlapped`` when the device computes while it is in flight:

    start          from here, or from the last *-update, which may bring the operands later
      fusion       a matrix product or a kernel, by itself or inside a fusion, call, loop or conditional: overlapped
      fusion       other work counts by the bytes of its results: overlapped when those add up to the collective's own
    done

A send is in flight until its recv is done. A chain is overlapped when a product or a kernel runs between its first and
its last step. All other collectives are synchronous. ``overlapped`` does not mean that *all* of the time is hidden: the
product may be shorter than the gather.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from phivision_jax.preflight.hlo import Calls, Instruction, Loops, Module, num_bytes, sizes, walk

SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
}
"""By kind: bytes that each of n devices sends for a byte of its result, by the best algorithm on a ring."""
DCN_KINDS = ("send", "recv")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction that moves data between devices."""

    kind: str
    """One of ``SENT`` within a slice, of ``DCN_KINDS`` between slices."""
    name: str
    result_bytes: int
    """Size of the result on one device, of one run; for a send, of its operand."""
    loops: tuple[int, ...]
    """Trips of the loops around it, outermost first."""
    groups: Groups = ()
    """Devices that exchange data, by position in ``mesh.devices.flat``; (source, target) pairs of a permute."""
    overlapped: bool = False
    """Computation runs at the same time; see the module's docstring."""

    @property
    def times(self) -> int:
        """Number of runs in one run of the program."""
        return math.prod(self.loops)


def collectives(module: Module) -> list[Collective]:
    """List every collective that the program runs, in the order of the text.

    Of a conditional's branches the one that sends the most bytes counts.

    Raises:
      ValueError: when a loop around a collective has no constant number of trips, or device groups have an unknown
        format.
    """
    chains: dict[str | int, list[tuple[Calls, Collective]]] = {}
    for step in walk(module, functools.partial(_step, module), weight=lambda step: wire_bytes(step[1]) * step[1].times):
        chains.setdefault(step[0][-1].attribute("chain_id", "") or len(chains), []).append(step)
    return [
        dataclasses.replace(steps[0][1], overlapped=steps[0][1].overlapped or _chain_overlaps(module, steps))
        for steps in chains.values()
    ]


def axes_of(collective: Collective, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which data moves, in the mesh's order: those on which devices of one group differ.

    A group need not span an axis: a permute pairs neighbours, and a collective within a slice covers only its part of
    an axis that crosses slices.

    Args:
      mesh_shape: all axes and sizes, outermost first (``mesh.shape``); slices must be outermost.

    Raises:
      ValueError: when a group has a device that the mesh does not have.
    """
    devices, shape = np.array(collective.groups), tuple(mesh_shape.values())
    if devices.max(initial=0) >= math.prod(shape):
        raise ValueError(f"{collective.name} has device {devices.max()}, but the mesh {dict(mesh_shape)} does not")
    coordinates = np.unravel_index(devices, shape)
    return tuple(name for name, along in zip(mesh_shape, coordinates, strict=True) if (along != along[:, :1]).any())


def wire_bytes(collective: Collective) -> float:
    """Bytes that each device sends in one run: as in ``SENT``; all of a send's, and none of a recv's."""
    n = max(map(len, collective.groups), default=1)
    factor = SENT[collective.kind](n) if collective.kind in SENT else collective.kind == "send"
    return collective.result_bytes * float(factor)


def _step(module: Module, stack: Calls, loops: Loops) -> tuple[Calls, Collective] | None:
    *callers, instruction = stack
    kind = instruction.opcode.removesuffix("-start")
    if kind not in SENT and not (kind in DCN_KINDS and "_xla_megascale_transfer_type" in instruction.rest):
        return None
    groups = (_groups if kind in SENT else _slices)(instruction, module.devices)
    # Types are (operands, results, …) of a start, (data, context, token) of send and recv.
    found, count = sizes(instruction.type), len(instruction.operands)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        found = found[count : 2 * count] or found
    size, name = sum(found[:-2] if kind in DCN_KINDS else found), instruction.name
    for caller in callers:
        if any(called.startswith("all-reduce-scatter") for called in caller.called):
            kind, name, size = "reduce-scatter", caller.name, num_bytes(caller.type)
    # An asynchronous call around it decides, if there is one.
    start = next((caller for caller in callers if caller.opcode.endswith("-start")), instruction)
    return stack, Collective(kind, name, size, loops, groups, _overlaps(module, start, size))


def _chain_overlaps(module: Module, steps: list[tuple[Calls, Collective]]) -> bool:
    """Report whether a product runs between the steps of a chain, in the innermost computation that holds both."""
    for (one, _), (other, _) in itertools.pairwise(steps):
        first, second = next((a, b) for a, b in zip(one, other, strict=False) if a is not b)
        begin, end = map(first.computation.index, (first, second))
        if any(_multiplies(module, x) for x in first.computation[begin + 1 : end + 1]):
            return True
    return False


# Opcodes that take next to no time, or none of the cores that compute.
_IDLE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|iota|(copy|slice|after-all|partition-id).*|.*-done"
)


def _overlaps(module: Module, start: Instruction, size: int) -> bool:
    """Report whether enough computation is scheduled while the collective that starts here is in flight."""
    others = [x for x in _in_flight(start) if not (_IDLE.fullmatch(x.opcode) or x.opcode in (*SENT, *DCN_KINDS))]
    return any(_multiplies(module, x) for x in others) or sum(num_bytes(x.type) for x in others) >= size


def _in_flight(start: Instruction) -> list[Instruction]:
    """Instructions between a start and its done; none for a synchronous instruction."""
    instructions, i = start.computation, start.computation.index(start)
    if start.opcode in DCN_KINDS:  # one exchange: its send, recv and their ends name the same rendezvous
        keys = [x.opcode in DCN_KINDS and x.attribute("_xla_host_transfer_rendezvous", "") for x in instructions]
        exchange = [j for j, key in enumerate(keys) if key and key == keys[i]]
        names = {instructions[j].name for j in exchange}
        dones = [j for j, x in enumerate(instructions) if x.opcode == "recv-done" and names & set(x.operands)]
        return instructions[min(exchange, default=i) + 1 : max(dones, default=i)]
    if not start.opcode.endswith("-start"):
        return []
    latest, begin = start.name, i
    for j, instruction in enumerate(instructions[i + 1 :], i + 1):
        if instruction.opcode.endswith(("-update", "-done")) and latest in instruction.operands:
            if instruction.opcode.endswith("-done"):
                return instructions[begin + 1 : j]
            latest, begin = instruction.name, j
    return []


def _multiplies(module: Module, instruction: Instruction) -> bool:
    """Report whether this is or calls a matrix product or a kernel."""
    if instruction.opcode in ("dot", "convolution"):
        return True
    if instruction.opcode == "custom-call":
        return "tpu_custom_call" in instruction.rest
    called = [*instruction.called, *([instruction.attribute("body")] if instruction.opcode == "while" else [])]
    return any(_multiplies(module, x) for name in called for x in module.computations.get(name, []))


def _groups(instruction: Instruction, devices: int) -> Groups:
    """Device groups in any of HLO's formats; none, or an empty list, means all devices together."""
    match = re.search(r"\b(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)", instruction.rest)
    text = match[1] if match else "{}"
    if text == "{}":
        groups = np.arange(devices)[None]
    elif re.fullmatch(r"\{\{[\d,{}]*\}\}", text):  # {{0,1},{2,3}}
        groups = np.array([list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)])
    elif match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [4,32]<=[4,8,4]T(1,0,2)
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in match.groups())
        groups = np.arange(math.prod(dims or ())).reshape(dims).transpose(order).reshape(shape)
    elif match := re.fullmatch(r"mesh\[(.*)\] \{(.*)\}", text):  # mesh['data'=4,'fsdp'=32] {'fsdp'}
        axes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", match[1])}
        first = ids = np.arange(math.prod(axes.values()))
        strides, members = dict(zip(axes, len(ids) // np.cumprod(list(axes.values())), strict=True)), 1
        # Part of an axis is 'fsdp':(2)4, those 4 below its first 2.
        for name, above, part in re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", match[2]):
            count = int(part or axes[name])
            stride = strides[name] * axes[name] // (int(above or 1) * count)
            first, members = first - ids // stride % count * stride, members * count
        groups = np.argsort(first, kind="stable").reshape(-1, members)
    else:
        raise ValueError(f"HLO: {instruction.name} has device groups in an unknown format: {text}")
    return tuple(map(tuple, groups.tolist()))


def _slices(instruction: Instruction, devices: int) -> Groups:
    """Each device with its peers in other slices, from ``_xla_megascale_target="{1,2}x{0:127}"`` (slices from 1)."""
    match = re.match(r"\{([\d,]+)\}x", instruction.attribute("_xla_megascale_target", ""))
    if match is None:
        raise ValueError(f"HLO: {instruction.name} crosses slices, but names them in an unknown format")
    slices = [int(number) - 1 for number in match[1].split(",")]
    return tuple(tuple(number * devices + device for number in slices) for device in range(devices))
