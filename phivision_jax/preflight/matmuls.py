"""FLOPs of the matrix products in a compiled program.

Compared with the model FLOPs of ``hardware/flops.py``, this shows what a program computes on top: recompute, padding, a
product that the compiler runs twice. TPU programs write every product as a ``convolution``, mostly inside fusions;
kernels (custom calls) are opaque and not counted.
"""

import math
import re

import numpy as np

from phivision_jax.preflight.hlo import Calls, Instruction, Loops, Module, arrays, walk


def matmul_flops(module: Module) -> float:
    """FLOPs of all products per device in one run of the program; of a conditional's branches the heaviest counts.

    Raises:
      ValueError: when a loop around a product has no constant number of trips, or a product has an unknown format.
    """

    def make(calls: Calls, loops: Loops) -> float | None:
        return _flops(calls[-1]) * math.prod(loops) if calls[-1].opcode in ("dot", "convolution") else None

    return sum(walk(module, make, weight=lambda flops: flops))


def _flops(product: Instruction) -> float:
    shapes = {x.name: arrays(x.type)[0][1] for x in product.computation if x.name in (product.name, *product.operands)}
    out, left, right = (shapes[name] for name in (product.name, *product.operands[:2]))
    if product.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        summed = math.prod(left[int(dim)] for dim in match[1].split(",") if dim) if match else 1
        return 2.0 * math.prod(out) * summed
    return 2.0 * _pairs(product, left, right, out)


def _pairs(product: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Multiplications of a convolution, without those with padding or dilation zeros.

    ``dim_labels=0bf_0oi->0bf`` names the axes: batch and features, output and input features of the kernel, and each
    spatial axis by its number. TPU programs write a batched product as a spatial axis on which the window is as wide as
    the input, so that every result has one real pair and otherwise padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    if labels is None:
        raise ValueError(f"HLO: convolution {product.name} has no dim_labels")
    size_in, size_kernel, size_out = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    # Feature and batch groups are covered: the kernel has the input features of one group.
    total = float(size_out["b"] * size_out["f"] * size_kernel["i"])
    found = re.search(r"window=\{([^}]*)\}", product.rest)
    window = re.findall(r"(\w+)=(\S+)", found[1] if found else "")
    for i, axis in enumerate(sorted(label for label in size_out if label.isdigit())):
        field = {key: values.split("x")[i] for key, values in window}
        total *= _taps(size_in[axis], size_kernel[axis], size_out[axis], field)
    return total


def _taps(size: int, kernel: int, out: int, field: dict[str, str]) -> int:
    """Pairs (result, kernel tap) along one axis that read an element of the input."""
    stride, dilate, spread = (int(field.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(field.get("pad", "0_0").split("_")[0])
    # Result o reads position o · stride + tap · dilate − low: padding, a zero between elements, or an element.
    first = np.arange(out) * stride - low
    reads = (first + tap * dilate for tap in range(kernel))
    length = (size - 1) * spread + 1
    return sum(int(((read >= 0) & (read < length) & (read % spread == 0)).sum()) for read in reads)
