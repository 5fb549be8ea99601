"""The matrix products that a compiled program runs: how many FLOPs, where, how often.

Read beside ``flops.py``, which counts what a step needs, this shows what the program computes besides: recompute,
padding, a product that the compiler runs twice. TPU programs write every product as a ``convolution``, most of them
inside fusions; kernels (custom calls) are opaque and not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from phivision_jax.preflight.hlo import Instruction, Module, arrays, parse


@dataclasses.dataclass(frozen=True)
class Matmul:
    """One product on one device."""

    name: str
    flops: float
    """Of one run: 2 · elements of the result · terms summed for each."""
    loops: tuple[int, ...]
    """Trips of the loops around it, outermost first."""
    source: str
    """The compiler's ``op_name``: the path of JAX transformations and calls; empty where it keeps none."""

    @property
    def total_flops(self) -> float:
        return self.flops * math.prod(self.loops)


def matmul_flops(hlo: str) -> float:
    """FLOPs of all products per device, in one run of the program.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      ValueError: as ``matmuls`` does.
    """
    return sum(matmul.total_flops for matmul in matmuls(hlo))


def matmuls(hlo: str) -> list[Matmul]:
    """Every product that the program runs, in the order of the text; those of a computation called twice, twice.

    Of a conditional's branches the one with most FLOPs is taken.

    Raises:
      ValueError: when the text has no entry computation, a loop around a product has no constant number of trips, or a
        conditional no branches.
    """
    module = parse(hlo)
    return list(_walk(module, module.entry, (), ""))


def _walk(module: Module, at: str, loops: tuple[int, ...], source: str) -> Iterator[Matmul]:
    types = {instruction.name: instruction.type for instruction in module.computations[at]}
    for instruction in module.computations[at]:
        # A clone of a product inside a fusion may have lost its own metadata, while the fusion kept it.
        match = re.search(r'op_name="([^"]*)"', instruction.rest)
        here = match[1] if match else source
        if instruction.opcode in ("dot", "convolution"):
            yield Matmul(instruction.name, _flops(instruction, types), loops, here)
        elif instruction.opcode == "while":
            body = instruction.attribute("body")
            if any(_walk(module, body, loops, here)):  # trips matter only where something is counted
                yield from _walk(module, body, (*loops, module.trips(instruction)), here)
        elif instruction.opcode == "conditional":
            branches = (list(_walk(module, branch, loops, here)) for branch in instruction.branches)
            yield from max(branches, key=lambda inside: sum(matmul.total_flops for matmul in inside))
        elif not instruction.opcode.endswith(("-update", "-done")):  # these name again what their start has run
            for called in instruction.called:
                yield from _walk(module, called, loops, here)


def _flops(product: Instruction, types: dict[str, str]) -> float:
    out = _shape(product.type)
    left, right = (_shape(types[name]) for name in product.operands[:2])
    if product.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        summed = math.prod(left[int(dim)] for dim in match[1].split(",") if dim) if match else 1
        return 2.0 * math.prod(out) * summed
    return 2.0 * _pairs(product, left, right, out)


def _pairs(product: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Multiplications of a convolution: what a window would read of padding or of holes is not counted.

    ``dim_labels=0bf_0oi->0bf`` names the axes: batch and features, output and input features of the kernel, and each
    spatial axis by its number. TPU writes a batched product as a spatial axis on which the window is as wide as the
    input, so that every result sees one true pair and padding else.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    if labels is None:
        raise ValueError(f"HLO: the convolution {product.name} states no dim_labels")
    size_in, size_kernel, size_out = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    # Groups of features or of the batch need no word here: the kernel's input features are those of one group.
    total = float(size_out["b"] * size_out["f"] * size_kernel["i"])
    window = _window(product.rest)
    for i, axis in enumerate(sorted(label for label in size_out if label.isdigit())):
        field = {key: values[i] for key, values in window.items()}
        total *= _taps(size_in[axis], size_kernel[axis], size_out[axis], field)
    return total


def _window(rest: str) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", rest)
    fields = match[1].split() if match else []
    return {key: value.split("x") for key, value in (field.split("=") for field in fields)}


def _taps(size: int, kernel: int, out: int, field: dict[str, str]) -> int:
    """Pairs (result, tap of the kernel) along one axis whose input is there and not a hole."""
    stride, dilate, spread = (int(field.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(field.get("pad", "0_0").split("_")[0])
    length = (size - 1) * spread + 1
    count = 0
    for tap in range(kernel):
        # Results o whose position o · stride + tap · dilate − low lies in the input, and on no hole.
        first = tap * dilate - low
        lowest = max(0, -(first // stride))
        highest = min(out - 1, (length - 1 - first) // stride)
        if spread == 1:
            count += max(0, highest - lowest + 1)
        else:
            count += sum((o * stride + first) % spread == 0 for o in range(lowest, highest + 1))
    return count


def _shape(type_: str) -> tuple[int, ...]:
    return arrays(type_)[0][1]
