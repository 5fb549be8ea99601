"""Tokens and images per second, MFU and device memory, from the contents of the batches.

The work of a step is counted inside it (``batch_work``), where the batch is the global one and contains every row once.
Hosts could not add it up: several may encode the same row, and each sees only its own. ``docs/training.md`` has every
name and formula.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.hardware.topology import CHIPS, GIB
from phivision_jax.training.run_config import ResolvedConfig

PEAK_BF16_FLOPS = {
    # Dense: half of the 1,979 TFLOPS "with sparsity" of NVIDIA's data sheets of H100 (SXM) and H200 (SXM).
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    **{chip.device_kind: chip.peak_bf16_flops for chip in CHIPS.values()},
}
"""FLOPs per second of one chip, by JAX's device kind."""


def batch_work(batch: Batch) -> dict[str, jax.Array]:
    """Count the contents of a batch, without padding; for use inside the jitted step.

    Returns:
      Scalars: the fields of ``flops.Workload``, and ``images`` (tiles, where images are cut into them). Pairs are fp32,
      exact to 1e-6; everything else is i32.
    """
    text, patch = batch.segment_ids > 0, batch.patch_segments > 0
    # Positions restart at 0 in each example: index − position is where it begins, span_end where attention ends.
    starts = jnp.arange(batch.tokens.shape[1]) - batch.positions
    attended = jnp.where(text, batch.span_end - starts + 1, 0)
    # An image's patches fill its grid, and each attends to all of them.
    grid = jnp.where(patch, batch.patch_grid[..., 0] * batch.patch_grid[..., 1], 0)
    return {
        "tokens": text.sum(dtype=jnp.int32),
        "pairs": attended.astype(jnp.float32).sum(),
        "patches": patch.sum(dtype=jnp.int32),
        "patch_pairs": grid.astype(jnp.float32).sum(),
        "vision_tokens": (batch.vision_index >= 0).sum(dtype=jnp.int32),
        "images": batch.patch_segments.max(-1, initial=0).sum(dtype=jnp.int32),
    }


def peak_flops(devices: Sequence[Any]) -> float | None:
    """bf16 FLOPs per second of all these devices; None if the peak of any is not documented (CPUs).

    Peaks are per chip. Two devices with the same coordinates are the two cores of one chip (TPU v4 without megacore).
    """
    chips = {(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))): d.device_kind for d in devices}
    peaks = [PEAK_BF16_FLOPS.get(kind) for kind in chips.values()]
    return None if None in peaks else float(sum(peak for peak in peaks if peak))


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """``hbm_gib`` in use and its maximum since the start (``hbm_peak_gib``), of the fullest of these devices.

    Empty where devices do not report it (CPUs).
    """
    stats = [device.memory_stats() or {} for device in devices]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    found = {name: [one[key] for one in stats if key in one] for name, key in names.items()}
    return {name: max(sizes) / GIB for name, sizes in found.items() if sizes}


class Throughput:
    """Sum up the work of steps and turn it into rates.

    Args:
      cfg: model, batch shape and trainable parameters.
      devices: of the mesh, including those of other processes.
    """

    def __init__(self, cfg: ResolvedConfig, devices: Sequence[Any]) -> None:
        self._cfg, self._peak = cfg, peak_flops(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        self._works: list[dict[str, jax.Array]] = []

    def add(self, work: dict[str, jax.Array]) -> None:
        """Add the ``batch_work`` of a step, without waiting for the devices."""
        self._works.append(work)

    def row(self, step_s: float) -> dict[str, float]:
        """Metrics of the steps since the last row; there has to be one.

        Args:
          step_s: seconds per step (``time/step_s``).

        Returns:
          ``tokens`` and ``images`` per step; ``tokens_per_s``, ``images_per_s``; ``text_padding``, ``patch_padding`` as
          shares; ``mfu`` as a share, where the chips' peak is documented; ``memory``.
        """
        works = jax.device_get(self._works)
        mean = {name: float(np.mean([work[name] for work in works], dtype=np.float64)) for name in works[0]}
        self._works = []
        images, data, cfg = mean.pop("images"), self._cfg.data, self._cfg
        patches = data.batch_rows * data.row_shape(cfg.model).total_patches
        row = {
            "tokens": mean["tokens"],
            "images": images,
            "tokens_per_s": mean["tokens"] / step_s,
            "images_per_s": images / step_s,
            "text_padding": 1 - mean["tokens"] / (data.batch_rows * data.length),
            "patch_padding": 1 - mean["patches"] / patches if patches else 0.0,
        }
        if self._peak:
            flops = step_flops(cfg.model, Workload(**mean), cfg.optim.lr_rules, cfg.lora).total
            row["mfu"] = mfu(flops, step_s, 1, self._peak)
        return row | memory(self._local)
