"""How fast a training is: tokens and images per second, MFU, memory of the devices, from what its batches really held.

What a step had to do is counted on the devices, inside the step (``batch_work``): there a batch is the global one,
every row once. Hosts could not add it up by themselves, since several may make the same row and others' rows hold other
examples. ``docs/training.md`` has every name and formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.hardware.topology import CHIPS, GIB
from phivision_jax.training.run_config import RunConfig

PEAK_BF16_FLOPS = {
    # Dense: half of the 1,979 TFLOPS "with sparsity" of NVIDIA's data sheets of H100 (SXM) and H200 (SXM).
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    **{chip.device_kind: chip.peak_bf16_flops for chip in CHIPS.values()},
}
"""FLOPs per second of one chip, by what JAX calls its devices."""
_WORK = "work/"


def batch_work(batch: Batch) -> dict[str, jax.Array]:
    """What a batch holds, padding left out; for use inside the jitted step, where it is the global batch.

    Returns:
      Scalars for the step's metrics: ``work/tokens`` and so on, the fields of ``flops.Workload``, and ``work/images``
      (tiles, where images are cut into them). Pairs are fp32, exact to 1e-6; everything else is i32.
    """
    text, patch = batch.segment_ids > 0, batch.patch_segments > 0
    # Positions restart at 0 in each example, so column − position is where it begins, and span_end where sight ends.
    starts = jnp.arange(batch.tokens.shape[1]) - batch.positions
    seen = jnp.where(text, batch.span_end - starts + 1, 0)
    # An image's patches fill its grid, and each of them sees all of them.
    grid = jnp.where(patch, batch.patch_grid[..., 0] * batch.patch_grid[..., 1], 0)
    work = {
        "tokens": text.sum(dtype=jnp.int32),
        "pairs": seen.astype(jnp.float32).sum(),
        "patches": patch.sum(dtype=jnp.int32),
        "patch_pairs": grid.astype(jnp.float32).sum(),
        # Each lands in one column, merged from several patches or not.
        "vision_tokens": (batch.vision_index >= 0).sum(dtype=jnp.int32),
        "images": batch.patch_segments.max(-1, initial=0).sum(dtype=jnp.int32),
    }
    return {_WORK + name: count for name, count in work.items()}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """bf16 FLOPs per second of all these devices; None where a kind has no documented peak (CPUs).

    Peaks are per chip. Two devices with the same coordinates are the two cores of one chip (TPU v4 without megacore).
    """
    chips = {
        (getattr(device, "slice_index", 0), *device.coords)
        if hasattr(device, "coords")
        else device.id: device.device_kind
        for device in devices
    }
    peaks = [PEAK_BF16_FLOPS.get(kind) for kind in chips.values()]
    return None if None in peaks else float(sum(peak for peak in peaks if peak))


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """``hbm_gib`` in use, and the most that was since the start (``hbm_peak_gib``): of the fullest of these devices.

    Empty where devices do not say (CPUs).
    """
    stats = [found for device in devices if (found := device.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(one[key] for one in stats) / GIB
        for name, key in names.items()
        if stats and all(key in one for one in stats)
    }


class Speed:
    """Adds up what steps had to do, and says how fast they did it.

    Args:
      cfg: of the run; model, batch shape and what trains.
      devices: of the mesh, those of all processes.
    """

    def __init__(self, cfg: RunConfig, devices: Sequence[Any]) -> None:
        self._cfg, self._peak = cfg, peak_flops(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        self._works: list[dict[str, jax.Array]] = []

    def take(self, metrics: dict[str, jax.Array]) -> None:
        """Take ``batch_work`` out of one step's metrics, still on the devices: nothing is waited for."""
        names = [name for name in metrics if name.startswith(_WORK)]
        self._works.append({name.removeprefix(_WORK): metrics.pop(name) for name in names})

    def row(self, step_s: float) -> dict[str, float]:
        """The steps since the row before, for the metrics.

        Args:
          step_s: seconds that one of them took (``time/step_s``).

        Returns:
          ``tokens``, ``images`` per step; ``tokens_per_s``, ``images_per_s``; ``text_padding``, ``patch_padding`` as
          shares; ``mfu`` as a share, where the chips' peak is documented; ``memory``.

        Raises:
          ValueError: when no step was taken.
        """
        if not self._works:
            raise ValueError("no step was taken since the row before")
        works = jax.device_get(self._works)
        mean = {name: float(np.mean([work[name] for work in works], dtype=np.float64)) for name in works[0]}
        self._works = []
        images, data = mean.pop("images"), self._cfg.data
        columns = data.batch_rows * data.length
        patches = data.batch_rows * data.row_shape(self._cfg.model).total_patches
        row = {
            "tokens": mean["tokens"],
            "images": images,
            "tokens_per_s": mean["tokens"] / step_s,
            "images_per_s": images / step_s,
            "text_padding": 1 - mean["tokens"] / columns,
            "patch_padding": 1 - mean["patches"] / patches if patches else 0.0,
        }
        if self._peak:
            cfg = self._cfg
            flops = step_flops(cfg.model, Workload(**mean), cfg.optim.lr_rules, cfg.lora).total
            row["mfu"] = mfu(flops, step_s, 1, self._peak)
        return row | memory(self._local)
