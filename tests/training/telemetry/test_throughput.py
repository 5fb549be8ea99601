"""The work of a batch, counted on the devices, and rates from it, by hand."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from phivision_jax.hardware import flops
from phivision_jax.hardware.flops import Workload
from phivision_jax.training.run_config import DataConfig, OptimConfig, ResolvedConfig
from phivision_jax.training.telemetry.throughput import Throughput, batch_work, memory, peak_flops
from tests.support.batches import EXAMPLES, TINY, random_rows

ROWS = [EXAMPLES[:3], EXAMPLES[3:5], [], EXAMPLES[5:]]
GRIDS = [grid for row in ROWS for _, grids in row for grid in grids]


def make_batch(mode, vision_rows=2):
    config = dataclasses.replace(TINY, image_attention=mode)
    return random_rows(np.random.default_rng(0), config, ROWS, length=96, num_patches=24, vision_rows=vision_rows)


def work_of(batch):
    return {name: float(value) for name, value in jax.jit(batch_work)(batch).items()}


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_batch_work_counts_what_the_masks_allow(mode):
    batch = make_batch(mode)
    index = np.arange(96)
    segments, ends = batch.segment_ids, batch.span_end
    same = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    mask = same & (index <= ends[:, :, None])
    patches = batch.patch_segments
    patch_mask = (patches[..., :, None] == patches[..., None, :]) & (patches > 0)[..., None]
    areas = [h * w for h, w in GRIDS]
    assert work_of(batch) == {
        "tokens": sum(text for row in ROWS for text, _ in row) + sum(areas),
        "pairs": mask.sum(),
        "patches": sum(areas),
        "patch_pairs": patch_mask.sum(),
        "vision_tokens": sum(areas),
        "images": len(GRIDS),
    }
    assert patch_mask.sum() == sum(area**2 for area in areas)


def test_batch_work_counts_merged_tokens():
    batch = make_batch("causal")
    # Two tokens fewer: two vision tokens that two patches each were merged into.
    indices = np.argwhere(batch.vision_index >= 0)[:2]
    batch.vision_index[tuple(indices.T)] = -1
    work = work_of(batch)
    assert (work["vision_tokens"], work["patches"]) == (
        sum(h * w for h, w in GRIDS) - 2,
        sum(h * w for h, w in GRIDS),
    )


def test_batch_work_pairs_beyond_int32():
    T = 1 << 16
    one = np.ones((2, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), one.shape)
    batch = make_batch("causal")._replace(
        tokens=one, segment_ids=one, positions=positions, span_end=positions, vision_index=-one
    )
    assert work_of(batch)["pairs"] == pytest.approx(2 * T * (T + 1) / 2, rel=1e-6)  # 4.3e9


# ---------------------------------------------------------------------------------------------------------------------


def chip(kind, *, process=0, coords=None, slice_index=0, **stats):
    device = SimpleNamespace(device_kind=kind, process_index=process, id=object(), memory_stats=lambda: stats or None)
    if coords is not None:
        device.coords, device.slice_index = coords, slice_index
    return device


def test_peak_flops():
    v5p = [chip("TPU v5", coords=(x, y, 0), slice_index=s) for x in (0, 1) for y in (0, 1) for s in (0, 1)]
    assert peak_flops(v5p) == 8 * 459e12
    # Two devices a chip, and one a chip: the same chips.
    cores = [chip("TPU v4", coords=(x, 0, 0)) for x in (0, 0, 1, 1)]
    assert peak_flops(cores) == peak_flops(cores[::2]) == 2 * 275e12
    assert peak_flops([chip("NVIDIA H200"), chip("NVIDIA H100 80GB HBM3")]) == 2 * 989e12
    assert peak_flops([chip("NVIDIA H200"), chip("cpu")]) is None
    assert peak_flops(jax.devices()) is None or jax.default_backend() != "cpu"


def test_memory_of_the_fullest_device():
    gib = 2**30
    full = [
        chip("x", bytes_in_use=3 * gib, peak_bytes_in_use=5 * gib),
        chip("x", bytes_in_use=gib, peak_bytes_in_use=7 * gib),
    ]
    assert memory(full) == {"hbm_gib": 3.0, "hbm_peak_gib": 7.0}
    assert memory([chip("cpu")]) == {}
    assert memory([chip("x", bytes_in_use=gib)]) == {"hbm_gib": 1.0}


def test_throughput_row_by_hand():
    cfg = ResolvedConfig(
        model=TINY,
        data=DataConfig(batch_rows=4, length=96, vision_rows=2, num_patches=24),
        optim=OptimConfig(lr_rules=(("projector", 1.0), (".", 0.0))),
    )
    devices = [chip("TPU v5", coords=(i, 0, 0), process=i, bytes_in_use=2**30 * (i + 1)) for i in range(2)]
    throughput = Throughput(cfg, devices)
    full, empty = make_batch("causal"), jax.tree.map(np.zeros_like, make_batch("causal"))
    empty.vision_index[...] = -1
    throughput.add(jax.jit(batch_work)(full))
    throughput.add(jax.jit(batch_work)(empty))
    row = throughput.row(0.25)  # two steps of a quarter of a second, one of them empty
    tokens, patches = 65 + sum(h * w for h, w in GRIDS), sum(h * w for h, w in GRIDS)
    work = work_of(full)
    images = work.pop("images")
    assert row["tokens"] == tokens / 2 and row["tokens_per_s"] == tokens / 2 / 0.25
    assert row["images"] == images / 2 and row["images_per_s"] == images / 2 / 0.25
    assert row["text_padding"] == pytest.approx(1 - tokens / (2 * 4 * 96))
    assert row["patch_padding"] == pytest.approx(1 - patches / (2 * 4 * 2 * 24))
    assert row["hbm_gib"] == 1.0  # the other device belongs to another process
    # FLOPs depend on what trains: here only the projector.
    count = flops.step_flops(TINY, Workload(**work), cfg.optim.lr_rules).total
    assert row["mfu"] == pytest.approx(count / 2 / (0.25 * 2 * 459e12))
    everything = Throughput(dataclasses.replace(cfg, optim=OptimConfig()), devices)
    everything.add(jax.jit(batch_work)(full))
    assert everything.row(0.125)["mfu"] / row["mfu"] > 4
    # The next row starts from zero; a CPU has no MFU and no HBM.
    throughput.add(jax.jit(batch_work)(full))
    assert throughput.row(1.0)["tokens"] == tokens
    on_cpu = Throughput(cfg, jax.devices("cpu"))
    on_cpu.add(jax.jit(batch_work)(full))
    assert not {"mfu", "hbm_gib", "hbm_peak_gib"} & on_cpu.row(1.0).keys()
