"""Modelled step time: arithmetic by hand, and the fit against the committed numbers."""

import dataclasses
import json

import numpy as np
import pytest

from phivision_jax.cli.load_config import load_config
from phivision_jax.config import LoraConfig, ModelConfig
from phivision_jax.hardware.flops import Workload, step_flops
from phivision_jax.hardware.topology import CHIPS, parse_topology
from phivision_jax.models import remat
from phivision_jax.preflight.model import chip_work, modelled_step, roofline
from phivision_jax.preflight.model.chip_work import RECOMPUTE, Stack, executed_work, head, optimizer, visited_pairs
from phivision_jax.preflight.model.roofline import StepTime, Work, step_time
from phivision_jax.training.device_layout import resolve_for
from phivision_jax.training.run_config import DataConfig, OptimConfig, ResolvedConfig
from tests.support import published_runs
from tests.support.batches import TINY
from tests.support.published_runs import RESULTS, mesh_of

DOCUMENT = json.loads((RESULTS / "roofline_rows.json").read_text())
ROWS = DOCUMENT["rows"]
REPORT = json.loads((RESULTS / "roofline.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Time.


def test_step_time():
    # v5e: 197 TFLOP/s, 819 GB/s, 400 GB/s over ICI in both directions, 3.125 GB/s over DCN.
    work = Work(197e12, 197e12 / 3, 819e9, 200e9, 600e9, 3.125e9, 6.25e9)
    time = step_time(work, "v5e", 0.5)
    assert time == StepTime(
        matmul=pytest.approx(2.0),
        attention=pytest.approx(1.0),
        hbm=pytest.approx(1.0),
        ici_exposed=pytest.approx(1.0 + 3.0 - 2.0),  # half of four seconds hides two of three
        dcn_exposed=pytest.approx(1.0 + 0.0),  # two seconds hide
    )
    assert time.seconds == pytest.approx(7.0)
    assert step_time(Work(197e12), "v5e").seconds == pytest.approx(1 / roofline.EFFICIENCY["v5e"])


@pytest.mark.parametrize("field", ["peak_bf16_flops", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth"])
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_step_time_is_monotonic(monkeypatch, generation, field):
    rng = np.random.default_rng(0)
    for _ in range(50):
        work = Work(*(10 ** rng.uniform(8, [15, 14, 12, 12, 12, 11, 11])))
        chip = CHIPS[generation]
        before = step_time(work, generation).seconds
        faster = dataclasses.replace(chip, **{field: getattr(chip, field) * rng.uniform(1, 3)})
        with monkeypatch.context() as patch:
            patch.setitem(CHIPS, generation, faster)
            assert step_time(work, generation).seconds <= before * (1 + 1e-12)
        for part in dataclasses.fields(Work):
            more = dataclasses.replace(work, **{part.name: 2 * getattr(work, part.name)})
            assert step_time(more, generation).seconds >= before * (1 - 1e-12)


def test_step_time_unpublished():
    with pytest.raises(ValueError, match="no published runs to fit v4 to; times are modelled for v5e, v5p, v6e"):
        step_time(Work(1.0), "v4")
    with pytest.raises(ValueError, match="ICI bandwidth of v4"):
        step_time(Work(ici_bytes_overlapped=1.0), "v4", 0.5)
    assert step_time(Work(275e12), "v4", 0.5).seconds == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Executed work.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("blocks", [(4, 4), (4, 8), (8, 2)])
def test_visited_pairs_match_masks(causal, window, blocks):
    length, segments = 32, [7, 12, 6]
    ids = np.concatenate([np.repeat([0, 1, 2], segments), 3 + np.arange(7)])  # padding sees itself only
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    visible = ids[:, None] == ids[None]
    if causal:
        visible &= row >= column
    if window:
        visible &= row - column < window
    tiles = visible.reshape(length // blocks[0], blocks[0], length // blocks[1], blocks[1]).any((1, 3))
    assert visited_pairs(length, segments, *blocks, causal=causal, window=window) == tiles.sum() * blocks[0] * blocks[1]


def test_visited_pairs_of_full_row():
    assert visited_pairs(8192, [8192], 1024, 1024) == 36 * 1024**2
    with pytest.raises(ValueError, match="segments of 11 tokens do not fit a row of 10"):
        visited_pairs(10, [5, 6], 5, 5)


STACK = Stack(
    layers=3,
    width=10,
    mlp=20,
    heads=4,
    kv_heads=2,
    head_dim=5,
    gated=True,
    tokens=7,
    attention=(2 * 100, 5 * 200),
    recompute=RECOMPUTE["full"],
)
# Products of a layer: 10 · (20 + 2 · 10), 20 · 10, 2 · 10 · 20, 20 · 10.
QKV, OUT, GATE_UP, DOWN = 400, 200, 400, 200


def test_stack_work():
    assert STACK.products == {"qkv": QKV, "out": OUT, "gate_up": GATE_UP, "down": DOWN}
    work = STACK.work(mesh_of(), 8)
    assert work.matmul_flops == 3 * 2 * 7 * (3 * 1200 + 1000)
    # Heads of 5 fill the array's 8: two products forward, twice, and five backward.
    assert work.attention_flops == 2 * 32 * (2 * 2 * 100 + 5 * 200)
    assert work.hbm_bytes == 3 * 7 * 4 * (20 * 10 + 4 * 30 + 6 * 20)
    assert work.ici_bytes_exposed == work.ici_bytes_overlapped == work.dcn_bytes_overlapped == 0


@pytest.mark.parametrize(
    ("policy", "products", "forward_kernels", "passes"),
    [
        ("full", QKV + OUT + GATE_UP, 2, 4),
        ("attention", OUT + GATE_UP, 1, 4),
        ("dots", 0, 1, 4),
        ("none", 0, 1, 3),
        ("offload", QKV + OUT + GATE_UP, 2, 4),
        ("offload_attention", OUT + GATE_UP, 1, 4),
    ],
)
def test_stack_recompute(policy, products, forward_kernels, passes):
    work = dataclasses.replace(STACK, recompute=RECOMPUTE[policy]).work(mesh_of(), 1)
    assert work.matmul_flops == 3 * 2 * 7 * (3 * 1200 + products)
    assert work.attention_flops == 2 * 20 * (2 * forward_kernels * 100 + 5 * 200)
    assert work.hbm_bytes == 3 * 7 * passes * 440


def test_recompute_knows_every_policy():
    assert RECOMPUTE.keys() == remat.POLICIES.keys()


def test_stack_frozen():
    frozen = dataclasses.replace(STACK, backward=0.0, trained=0.0).work(mesh_of(fsdp=2), 5)
    assert frozen.matmul_flops == 3 * 2 * 7 * 1200
    assert frozen.attention_flops == 2 * 20 * 2 * 100
    assert frozen.hbm_bytes == 3 * 7 * 440
    assert frozen.ici_bytes_overlapped == 3 * 1200 * 2 / 2  # gathered once
    passed = dataclasses.replace(STACK, backward=1.0, trained=0.0).work(mesh_of(fsdp=2), 5)
    assert passed.ici_bytes_overlapped == 2 * frozen.ici_bytes_overlapped
    assert passed.matmul_flops == 3 * 2 * 7 * (2 * 1200 + 1000)


def test_stack_communication():
    weights = 3 * 1200 * 2
    shared = STACK.work(mesh_of(data=2, fsdp=4, slice=5), 5)
    # Two gathers and a scatter of three quarters; a quarter summed over two replicas, and over five slices.
    assert shared.ici_bytes_overlapped == pytest.approx(weights * (3 * 3 / 4 + 2 * 1 / 4 * 1 / 2))
    assert shared.dcn_bytes_overlapped == pytest.approx(weights * 2 * 1 / 4 * 4 / 5)
    assert shared.ici_bytes_exposed == 0
    # Two sums forward, two backward, one of the recompute, of a group's 28 tokens.
    tensor = STACK.work(mesh_of(tensor=4), 5)
    assert tensor.ici_bytes_exposed == pytest.approx(3 * 5 * 2 * 28 * 10 * 2 * 3 / 4)
    assert tensor.hbm_bytes == 3 * 7 * 4 * (4 * 200 + 240)
    assert dataclasses.replace(STACK, residual_split=True).work(mesh_of(tensor=4), 5).hbm_bytes == 3 * 7 * 4 * 440
    # Keys and values of two tokens' worth each, gathered forward, again, and summed backward.
    context = STACK.work(mesh_of(context=2), 5)
    assert context.ici_bytes_exposed == pytest.approx(3 * 3 * 2 * 14 * 10 * 2 / 2)
    assert context.ici_bytes_overlapped == pytest.approx(weights * 2 / 2)


def test_head_and_optimizer():
    assert head(30, 10, 7, mesh_of()).matmul_flops == 2 * 7 * 300 * 4
    assert head(30, 10, 7, mesh_of(), again=False) == Work(2 * 7 * 300 * 3, hbm_bytes=24 * 7 * 30)
    assert head(30, 10, 7, mesh_of(), backward=0).matmul_flops == 2 * 7 * 300
    assert head(30, 10, 7, mesh_of(fsdp=2)).ici_bytes_overlapped == 600 * 3 / 2
    assert optimizer(100, mesh_of(data=3, fsdp=5)).hbm_bytes == 28 * 20
    assert optimizer(100, mesh_of(fsdp=5), moment_bytes=2).hbm_bytes == 20 * 20


# ---------------------------------------------------------------------------------------------------------------------
# A step of our model.


def executed(examples=(100, 156), images=(60, 60), num_patches=128, optim=None, **changes):
    data = DataConfig(batch_rows=8, length=256, num_patches=num_patches)
    cfg = ResolvedConfig(TINY, data, optim or OptimConfig(), mesh=mesh_of(), remat="full", vision_remat="full")
    return executed_work(dataclasses.replace(cfg, **changes), "v5e", examples, images)


def test_executed_work_without_recompute_is_model_flops():
    none = {"remat": "none", "vision_remat": "none"}
    work = executed(**none)
    parts = step_flops(TINY, Workload(8 * 256, 0, 8 * 128, 0, 8 * 128)).parts
    products = sum(cost.total for cost in parts.values()) + parts["head"].forward  # the loss's logits, twice
    assert work.matmul_flops == pytest.approx(products, rel=0.01)
    split = executed(mesh=mesh_of(data=2, fsdp=4), **none)
    assert split.matmul_flops == pytest.approx(work.matmul_flops / 8)


@pytest.mark.parametrize("targets", ["decoder/layers/.*_proj", "."])
def test_executed_work_of_adapters_is_model_flops(targets):
    """Frozen kernels have no gradient of their own: close to two thirds of a full training's products."""
    lora = LoraConfig(rank=2, targets=targets)
    work = executed(lora=lora, remat="none", vision_remat="none")
    parts = step_flops(TINY, Workload(8 * 256, 0, 8 * 128, 0, 8 * 128), lora=lora).parts
    products = sum(cost.total for cost in parts.values()) + parts["head"].forward
    assert work.matmul_flops == pytest.approx(products, rel=0.01)
    full = executed(remat="none", vision_remat="none")
    assert work.matmul_flops < 0.9 * full.matmul_flops and work.hbm_bytes < full.hbm_bytes


@pytest.mark.parametrize("name", ["v5litepod-16", "v5p-8", "v6e-8"])
def test_products_of_the_compiled_program_with_adapters_are_those_implied(name):
    compiled = json.loads((RESULTS / f"hardware/lora_{name}.json").read_text())["matmul_flops_compiled"]
    where = parse_topology(name)
    cfg = load_config("configs/finetune.py", ["lora.rank=16"])
    cfg = resolve_for(cfg, where.chip.device_kind, where.devices, where.slices)
    found = modelled_step.speed(cfg, where, modelled_step.Mix.of_recipe(cfg), None)
    assert compiled / found["matmul_flops_implied"] == pytest.approx(1, abs=0.005)


def test_modelled_mfu_of_adapters_counts_no_gradient_of_kernels():
    cfg = ResolvedConfig(ModelConfig(), DataConfig(), mesh=mesh_of(fsdp=8), remat="full", vision_remat="full")
    where = parse_topology("v6e-8")
    mix = modelled_step.Mix.of_recipe(cfg)
    full = modelled_step.speed(cfg, where, mix, None)
    adapters = modelled_step.speed(dataclasses.replace(cfg, lora=LoraConfig(rank=16)), where, mix, None)
    assert 0.6 < adapters["flops_per_step"] / full["flops_per_step"] < 0.7
    assert adapters["flops_per_step_by_part"]["vision"] < 0.4 * full["flops_per_step_by_part"]["vision"]
    assert 0.7 < adapters["matmul_flops_implied"] / full["matmul_flops_implied"] < 0.75


def test_executed_work_counts_padding():
    assert executed(examples=[100]).matmul_flops == executed().matmul_flops


def test_executed_work_text_only():
    text = executed(num_patches=0, images=())
    assert text.matmul_flops == executed(num_patches=0).matmul_flops < executed().matmul_flops
    assert text.attention_flops < executed().attention_flops


def test_executed_work_frozen_parts():
    all_trained, tower = executed(), executed(optim=OptimConfig(lr_rules=(("vision", 0.0),)))
    rules = (("projector", 1.0), (".", 0.0))
    projector = executed(optim=OptimConfig(lr_rules=rules))
    assert projector.matmul_flops < tower.matmul_flops < all_trained.matmul_flops
    count = step_flops(TINY, Workload(8 * 256, 0, 8 * 128, 0, 8 * 128)).parts
    lost = all_trained.matmul_flops - tower.matmul_flops
    again = count["vision"].forward  # an upper bound: neither the patch embedding nor a block's last product
    assert count["vision"].backward < lost < count["vision"].backward + again
    # The optimizer moves 28 bytes per trained parameter, 20 with moments in bf16.
    C, D = 24, 32
    weights = C * D + D + D * D + D
    assert chip_work._weights(TINY, rules, LoraConfig())[0].total() == weights
    smaller = executed(optim=OptimConfig(lr_rules=rules, moment_dtype="bfloat16"))
    assert projector.hbm_bytes - smaller.hbm_bytes == pytest.approx(8 * weights)


def test_stack_matches_compiler_count():
    # XLA's own count for one more layer at T = 8,192 with full recompute, without the kernel.
    decoder = ModelConfig().decoder
    stack = Stack(1, 5120, 17_920, 40, 10, 128, True, 8192, (0, 0), RECOMPUTE["full"])
    assert decoder.hidden_size == 5120
    assert stack.work(mesh_of(), 128).matmul_flops == pytest.approx(2.084e13, rel=1e-3)


def test_blocks_match_kernel():
    splash = pytest.importorskip("phivision_jax.models.attention.splash", exc_type=ImportError)
    for b in splash.BLOCKS.values():
        assert {b.block_q, b.block_kv, b.block_q_dkv, b.block_kv_dkv} == {chip_work.BLOCK}
    b = splash.SMALL_BLOCKS
    assert {b.block_q, b.block_kv, b.block_q_dkv, b.block_kv_dkv} == {chip_work.VISION_BLOCK}


# ---------------------------------------------------------------------------------------------------------------------
# The published runs.


def test_published_halves_follow_rule():
    for generation in published_runs.GENERATIONS:
        rows = [row for row in ROWS if row["generation"] == generation]
        rows.sort(key=lambda row: row["parameters"])
        assert [row["half"] for row in rows] == (["fit", "held out"] * len(rows))[: len(rows)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['generation']}-{row['name']}")
def test_published_run_is_consistent(row):
    m = row["model"]
    heads, kv = m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"]
    layer = m["width"] * (2 * heads + 2 * kv + (3 if m["gated"] else 2) * m["mlp"])
    assert row["parameters"] == m["layers"] * layer + (1 if m["tied"] else 2) * m["vocab"] * m["width"]
    assert row["fsdp"] * row["tensor"] == row["chips"]
    published = row["published"]
    peak = CHIPS[row["generation"]].peak_bf16_flops
    assert published["mfu"] == pytest.approx(published["tflops"] * 1e12 / peak, rel=0.005)
    if tokens := published["tokens_per_second_per_chip"]:
        # Our shapes and their count of FLOPs give the published figure.
        per_token = published_runs.counted_flops(row) / (row["rows_per_chip"] * row["length"])
        tolerance = 0.015 if row["generation"] == "v5p" else 1e-4  # that one is "approx. 692"
        assert per_token * tokens == pytest.approx(published["tflops"] * 1e12, rel=tolerance)


def test_fit_matches_committed():
    assert published_runs.fit_generations(ROWS) == roofline.EFFICIENCY == REPORT["efficiency"]
    results = published_runs.evaluate(ROWS, roofline.EFFICIENCY)
    assert results == REPORT["rows"]
    assert published_runs.errors(results) == REPORT["errors"]


def test_fit_ignores_held_out_half():
    other = [{**r, "published": {**r["published"], "mfu": 0.1}} if r["half"] == "held out" else r for r in ROWS]
    assert published_runs.fit_generations(other) == roofline.EFFICIENCY
    held_out = [row["error"] for row in REPORT["rows"] if row["half"] == "held out"]
    assert REPORT["errors"]["held out, all"]["mean"] == pytest.approx(np.mean(np.abs(held_out)), abs=1e-4)


def test_our_model_matches_committed():
    assert published_runs.our_model(roofline.EFFICIENCY) == REPORT["ours"]


def test_docs_match_committed():
    text = (RESULTS.parent / "roofline.md").read_text()
    for name in published_runs.SLICES:
        with_images, alone = (
            [100 * REPORT["ours"][f"{name}, {kind}, {policy}"]["modelled_mfu"] for policy in published_runs.POLICIES]
            for kind in ("text and images", "text")
        )
        cells = [f"{a:.1f} % ({b:.1f})" for a, b in zip(with_images, alone, strict=True)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    for generation, efficiency in roofline.EFFICIENCY.items():
        fit, held_out = (REPORT["errors"][f"{half}, {generation}"] for half in ("fit", "held out"))
        cells = [f"{100 * error['mean']:.1f} %, {100 * error['largest']:.1f} %" for error in (fit, held_out)]
        assert f"| {generation} | {efficiency:.3f} | {' | '.join(cells)} |" in text
