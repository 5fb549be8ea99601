"""What a device keeps and how much it takes at a time, where a configuration leaves that open ("auto", 0, −1).

A mesh, remat policies and microbatches follow from the devices' memory and from sizes that must divide:

    fsdp          groups of devices that share one copy of the parameters: as small as memory allows
    context       1, unless a row is more than a device takes at a time, or the rows of a step do not divide over the
                  devices: 448 rows on 256 chips are 7 for each of 64 groups of 4 that share a row
    microbatches  as few as keep a device's columns within what it takes at a time
    remat         as little recompute as then fits

The table is made for the released model (15B, fp32 AdamW) and was checked with the TPU compiler
(``docs/preflight.md``); a smaller model fits all the more. ``phivision preflight --search`` looks for a better one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from phivision_jax.sharding import num_slices
from phivision_jax.training.run_config import MeshConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one kind of device can hold of the released model."""

    fsdp: int
    """Largest group that shares one copy of the parameters."""
    columns: int
    """Most text columns at a time on a device."""
    remat: str
    vision_remat: str


# By device kind, as JAX calls them; the first whose columns take a row (or its part along context) is used.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "TPU v5 lite": (Layout(64, 8192, "offload_attention", "offload_attention"),),  # v5e
    "TPU v5": (Layout(32, 8192, "dots", "attention"), Layout(32, 32_768, "full", "full")),  # v5p
    # v6e: the SparseCores gather over one ring of the torus, 16 chips, while products run; over 32 they do not.
    "TPU v6 lite": (Layout(16, 8192, "offload_attention", "attention"),),
}
OTHER = (Layout(32, 1 << 30, "full", "full"),)


def resolve(cfg: RunConfig, devices: Sequence[jax.Device]) -> RunConfig:
    """The configuration with nothing left open, for these devices (which need not be here)."""
    return resolve_for(cfg, devices[0].device_kind, len(devices), num_slices(devices) or 1)


def resolve_for(cfg: RunConfig, device_kind: str, num_devices: int, slices: int = 1) -> RunConfig:
    """``resolve``, for so many devices of a kind, as JAX calls it."""
    layouts, mesh = LAYOUTS.get(device_kind, OTHER), cfg.mesh
    context = mesh.context if mesh.context > 0 else _context(cfg, layouts[-1].columns, num_devices // mesh.tensor)
    at_least = cfg.data.length // context
    layout = next((layout for layout in layouts if layout.columns >= at_least), layouts[-1])
    if mesh.data == -1 and mesh.fsdp == -1:
        rest = num_devices // ((slices if mesh.slice == -1 else mesh.slice) * mesh.tensor * context) or 1
        mesh = dataclasses.replace(mesh, fsdp=next(n for n in range(min(rest, layout.fsdp), 0, -1) if rest % n == 0))
    mesh = MeshConfig(**dataclasses.replace(mesh, context=context).sizes(num_devices, slices))
    return dataclasses.replace(
        cfg,
        mesh=mesh,
        remat=layout.remat if cfg.remat == "auto" else cfg.remat,
        vision_remat=layout.vision_remat if cfg.vision_remat == "auto" else cfg.vision_remat,
        microbatches=cfg.microbatches or _microbatches(cfg, mesh, layout.columns),
    )


def _context(cfg: RunConfig, columns: int, devices: int) -> int:
    """The smallest power of two along which everything divides; 1 if none does, and the step says what does not."""
    data = cfg.data
    for context in (1, 2, 4, 8, 16):
        divides = not (devices % context or data.length % context or data.vision_rows % context)
        if divides and data.length // context <= columns and data.batch_rows % (devices // context) == 0:
            return context
    return 1


def _microbatches(cfg: RunConfig, mesh: MeshConfig, columns: int) -> int:
    rows = max(cfg.data.batch_rows // (mesh.slice * mesh.data * mesh.fsdp), 1)
    length = cfg.data.length // mesh.context
    return next((n for n in range(1, rows + 1) if rows % n == 0 and rows // n * length <= columns), rows)
