"""Adapters (LoRA) in a checkpoint of a run, merged into their kernels block by block.

    at (layer, rows):   kernel [L, in…, out…]  +  alpha / rank · lora_a [L, in…, rank] · lora_b [L, rank, out…]

The arrays of an adapter are small but A · B is as large as the kernel, so it is computed for one run of rows at a time.
Sums and products are in fp32, as in training, in whatever dtype the kernel is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from phivision_jax.convert.mapping import Leaf, Shape
from phivision_jax.io.storage import Location

_A, _B = "lora_a", "lora_b"  # as in models/lora.py, which imports JAX
type Read = Callable[[str, tuple[int | slice, ...]], np.ndarray]
"""Reads a region of the array with this path."""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint; ``kernels`` is empty if it has none."""

    rank: int
    alpha: float
    kernels: frozenset[str]
    """Paths of the leaves that have an adapter."""

    @classmethod
    def find(cls, checkpoint: Location, meta: Mapping[str, Any], paths: Iterable[str]) -> Adapters:
        """The adapters among the arrays of a checkpoint.

        Raises:
          ValueError: when there are some, and the metadata does not state their rank and alpha.
        """
        named = [path.rpartition("/") for path in paths]
        kernels = frozenset(f"{module}/kernel" for module, _, name in named if name in (_A, _B))
        lora = (meta.get("run") or {}).get("lora") or {}
        if kernels and not {"rank", "alpha"} <= lora.keys():
            raise ValueError(
                f"{checkpoint}: {min(kernels)} has an adapter, but meta/metadata lacks the run's lora (rank, alpha)"
            )
        return cls(lora.get("rank", 0), lora.get("alpha", 0.0), kernels)

    def __str__(self) -> str:
        return f"adapters of rank {self.rank}, alpha {self.alpha:g}, on {len(self.kernels)} kernels"

    def shapes(self, leaf: Leaf) -> dict[str, Shape]:
        """Paths and shapes of the arrays of this leaf's adapter; empty if it has none."""
        if leaf.path not in self.kernels or not leaf.is_linear:
            return {}
        layers, inputs = leaf.shape[: leaf.stacked], leaf.layer_shape[: leaf.row_axis]
        a, b = _paths(leaf)
        return {a: (*layers, *inputs, self.rank), b: (*layers, self.rank, *leaf.layer_shape[leaf.row_axis :])}

    def merge(self, kernel: np.ndarray, leaf: Leaf, layer: int, rows: range, read: Read) -> np.ndarray:
        """Add the adapter of ``leaf``, if there is one, to rows [n, in] of its kernel."""
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
