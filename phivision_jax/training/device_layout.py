"""Choose mesh, remat policies and microbatches where a configuration leaves them open ("auto", 0, −1).

    fsdp          groups of devices that share one replica of the parameters: as small as memory allows
    context       1, unless a row has more tokens than a device processes at a time, or the rows of a step do not divide
                  over the devices: 448 rows on 256 chips are 7 for each of 64 groups of 4 that share a row
    microbatches  as few as keep a device within the tokens that it processes at a time
    remat         as little recompute as then fits

Device limits come from ``hardware/layouts.py``.
"""

import dataclasses
from collections.abc import Sequence

import jax

from phivision_jax.config import ModelConfig
from phivision_jax.hardware.layouts import LAYOUTS, OTHER
from phivision_jax.sharding import num_slices
from phivision_jax.training.run_config import MeshConfig, ResolvedConfig, RunConfig


def resolve(cfg: RunConfig, devices: Sequence[jax.Device]) -> ResolvedConfig:
    """Close everything that the configuration leaves open, for these devices, attached or described."""
    return resolve_for(cfg, devices[0].device_kind, len(devices), num_slices(devices) or 1)


def resolve_for(cfg: RunConfig, device_kind: str, num_devices: int, slices: int = 1) -> ResolvedConfig:
    """``resolve`` for a number of devices of a kind, as JAX names it."""
    layouts, mesh = LAYOUTS.get(device_kind, OTHER), cfg.mesh
    context = mesh.context if mesh.context > 0 else _context(cfg, layouts[-1].tokens, num_devices // mesh.tensor)
    in_row = cfg.data.length // context
    layout = next((layout for layout in layouts if layout.tokens >= in_row), layouts[-1])
    mesh = MeshConfig(**dataclasses.replace(mesh, context=context).sizes(num_devices, slices, layout.fsdp))
    closed = {
        "model": cfg.model_over(ModelConfig()),
        "mesh": mesh,
        "remat": layout.remat if cfg.remat == "auto" else cfg.remat,
        "vision_remat": layout.vision_remat if cfg.vision_remat == "auto" else cfg.vision_remat,
        "microbatches": cfg.microbatches or _microbatches(cfg, mesh, layout.tokens),
    }
    return ResolvedConfig(**(vars(cfg.in_steps()) | closed))


def _context(cfg: RunConfig, tokens: int, devices: int) -> int:
    """The smallest power of two along which everything divides; 1 if none does (the step then reports what fails)."""
    data = cfg.data
    for context in (1, 2, 4, 8, 16):
        divides = not (devices % context or data.length % context or data.vision_rows % context)
        if divides and data.length // context <= tokens and data.batch_rows % (devices // context) == 0:
            return context
    return 1


def _microbatches(cfg: RunConfig, mesh: MeshConfig, tokens: int) -> int:
    rows = max(cfg.data.batch_rows // (mesh.slice * mesh.data * mesh.fsdp), 1)
    length = cfg.data.length // mesh.context
    return next((n for n in range(1, rows + 1) if rows % n == 0 and rows // n * length <= tokens), rows)
