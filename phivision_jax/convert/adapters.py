"""Adapters (LoRA) of a training's checkpoint, merged into their kernels block by block.

    at (layer, rows):   kernel [L, in…, out…]  +  alpha / rank · lora_a [L, in…, rank] · lora_b [L, rank, out…]

An adapter's arrays are small, A · B is as large as the kernel: so it is made for one run of rows at a time. Sums and
products are in fp32, like training's, whatever the kernel is stored as.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from phivision_jax.convert.mapping import Leaf, Shape
from phivision_jax.io.storage import Location

_A, _B = "lora_a", "lora_b"  # as models/lora.py has them, which imports JAX
type Read = Callable[[str, tuple[int | slice, ...]], np.ndarray]
"""A region of the array of this path."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What a run's metadata says of its adapters, and which kernels have one."""

    rank: int
    alpha: float
    kernels: frozenset[str]
    """Paths of leaves."""

    @classmethod
    def find(cls, checkpoint: Location, meta: Mapping[str, Any], paths: Iterable[str]) -> Adapters | None:
        """Those among a checkpoint's arrays; None when there are none.

        Raises:
          ValueError: when there are some, and the metadata do not say how they count.
        """
        named = [path.rpartition("/") for path in paths]
        kernels = frozenset(f"{module}/kernel" for module, _, name in named if name in (_A, _B))
        if not kernels:
            return None
        lora = (meta.get("run") or {}).get("lora")
        if not isinstance(lora, Mapping) or not {"rank", "alpha"} <= lora.keys():
            raise ValueError(
                f"{checkpoint}: {min(kernels)} has an adapter, but meta/metadata lacks the run's lora (rank, alpha)"
            )
        return cls(lora["rank"], lora["alpha"], kernels)

    def __str__(self) -> str:
        return f"adapters of rank {self.rank}, alpha {self.alpha:g}, on {len(self.kernels)} kernels"

    def shapes(self, leaf: Leaf) -> dict[str, Shape]:
        """The arrays of this leaf's adapter: none, unless it is the kernel of a linear layer that has one."""
        if leaf.path not in self.kernels or not leaf.is_linear:
            return {}
        layers, inputs = leaf.shape[: leaf.stacked], leaf.layer_shape[: leaf.row_axis]
        a, b = _paths(leaf)
        return {a: (*layers, *inputs, self.rank), b: (*layers, self.rank, *leaf.layer_shape[leaf.row_axis :])}

    def merge(self, kernel: np.ndarray, leaf: Leaf, layer: int, rows: range, read: Read) -> np.ndarray:
        """``kernel``, their rows [n, in] of ``leaf``, with the adapter's share; as it is where there is no adapter."""
        if leaf.path not in self.kernels:
            return kernel
        path_a, path_b = _paths(leaf)
        at_layer = (layer,) if leaf.stacked else ()
        at_rows = slice(rows.start // leaf.rows_per_index, rows.stop // leaf.rows_per_index)
        a = read(path_a, at_layer).reshape(-1, self.rank).astype(np.float32)  # [in, rank]
        b = read(path_b, (*at_layer, slice(None), at_rows)).reshape(self.rank, -1).astype(np.float32)  # [rank, n]
        merged = b.T @ a.T
        merged *= np.float32(self.alpha / self.rank)
        merged += kernel
        return merged.astype(kernel.dtype, copy=False)


def _paths(leaf: Leaf) -> tuple[str, str]:
    module = leaf.path.removesuffix("/kernel")
    return f"{module}/{_A}", f"{module}/{_B}"
