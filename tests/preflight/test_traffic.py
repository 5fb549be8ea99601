"""Bytes that a program moves, and its large copies, on programs written by hand and on the real one for a TPU."""

import importlib.util

import pytest

from phivision_jax.cli.load_config import load_config
from phivision_jax.hardware.topology import parse_topology
from phivision_jax.preflight import generation, hlo, traffic
from phivision_jax.preflight.compiling import generate_facts, run_worker
from phivision_jax.training.device_layout import resolve_for

# Five trips over a stack of layers: a fusion slices its layer and returns a product in on-chip memory; another one
# updates a row of a cache in place. A conditional copies one of two things.
PROGRAM = """HloModule jit_decode, replica_count=1, num_partitions=1

%inner (i0: f32[5,100,10], i1: s32[]) -> f32[1,100,10] {
  %i0 = f32[5,100,10]{2,1,0} parameter(0)
  %i1 = s32[] parameter(1)
  %same = f32[5,100,10]{2,1,0} bitcast(%i0)
  ROOT %cut = f32[1,100,10]{2,1,0} dynamic-slice(%same, %i1, %i1, %i1), dynamic_slice_sizes={1,100,10}
}

%cast (c0: f32[10]) -> f32[10] {
  %c0 = f32[10]{0} parameter(0)
  ROOT %again = f32[10]{0} bitcast(%c0)
}

%product (p0: f32[5,100,10], p1: s32[], p2: f32[10]) -> f32[100] {
  %p0 = f32[5,100,10]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[10]{0} parameter(2)
  %layer = f32[1,100,10]{2,1,0} fusion(%p0, %p1), kind=kLoop, calls=%inner
  %x = f32[10]{0} fusion(%p2), kind=kLoop, calls=%cast
  ROOT %y = f32[100]{0} convolution(%layer, %x), dim_labels=bf_io->bf
}

%update (u0: f32[5,100], u1: f32[1,100], u2: s32[]) -> f32[5,100] {
  %u0 = f32[5,100]{1,0} parameter(0)
  %u1 = f32[1,100]{1,0} parameter(1)
  %u2 = s32[] parameter(2)
  ROOT %put = f32[5,100]{1,0} dynamic-update-slice(%u0, %u1, %u2, %u2)
}

%condition (s0: (s32[], f32[5,100,10], f32[10], f32[5,100])) -> pred[] {
  %s0 = (s32[], f32[5,100,10], f32[10], f32[5,100]) parameter(0)
  %at = s32[] get-tuple-element(%s0), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%at, %end), direction=LT
}

%body (b0: (s32[], f32[5,100,10], f32[10], f32[5,100])) -> (s32[], f32[5,100,10], f32[10], f32[5,100]) {
  %b0 = (s32[], f32[5,100,10], f32[10], f32[5,100]) parameter(0)
  %i = s32[] get-tuple-element(%b0), index=0
  %w = f32[5,100,10]{2,1,0} get-tuple-element(%b0), index=1
  %h = f32[10]{0} get-tuple-element(%b0), index=2
  %cache = f32[5,100]{1,0} get-tuple-element(%b0), index=3
  %one = s32[] constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %y1 = f32[100]{0:S(1)} fusion(%w, %next, %h), kind=kOutput, calls=%product
  %row = f32[1,100]{1,0:S(1)} bitcast(%y1)
  %kept = f32[5,100]{1,0} fusion(%cache, %row, %next), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[5,100,10], f32[10], f32[5,100]) tuple(%next, %w, %h, %kept)
}

%costly (q0: f32[5,100,10]) -> f32[5,100,10] {
  %q0 = f32[5,100,10]{2,1,0} parameter(0)
  ROOT %moved = f32[5,100,10]{1,2,0} copy(%q0)
}

%cheap (r0: f32[5,100,10]) -> f32[5,100,10] {
  ROOT %r0 = f32[5,100,10]{2,1,0} parameter(0)
}

ENTRY %main (w: f32[5,100,10], h: f32[10], cache: f32[5,100], some: pred[]) -> (f32[5,100], f32[5,100,10]) {
  %w.1 = f32[5,100,10]{2,1,0} parameter(0)
  %h.1 = f32[10]{0} parameter(1)
  %cache.1 = f32[5,100]{1,0} parameter(2)
  %some = pred[] parameter(3)
  %zero = s32[] constant(0)
  %start = (f32[10]{0:S(1)}, f32[10]{0}, u32[]) copy-start(%h.1)
  %done = f32[10]{0} copy-done(%start)
  %state = (s32[], f32[5,100,10], f32[10], f32[5,100]) tuple(%zero, %w.1, %done, %cache.1)
  %loop = (s32[], f32[5,100,10], f32[10], f32[5,100]) while(%state), condition=%condition, body=%body
  %after = f32[5,100]{1,0} get-tuple-element(%loop), index=3
  %either = f32[5,100,10]{2,1,0} conditional(%some, %w.1, %w.1), branch_computations={%costly, %cheap}
  ROOT %all = (f32[5,100], f32[5,100,10]) tuple(%after, %either)
}
"""


def test_moved_bytes():
    # Per trip: two operands of the counter; a layer [100, 10] and the input [10]; a row of 100 that is written.
    trip = 2 * 4 + 4 * (100 * 10 + 10) + 4 * 100
    started = 2 * 4 * 10  # "done" reads and writes HBM here
    assert traffic.moved_bytes(hlo.parse(PROGRAM)) == 5 * trip + started
    spilled = PROGRAM.replace("f32[100]{0:S(1)}", "f32[100]{0}").replace("f32[1,100]{1,0:S(1)}", "f32[1,100]{1,0}")
    assert traffic.moved_bytes(hlo.parse(spilled)) == 5 * (trip + 2 * 400) + started


def test_large_results():
    module = hlo.parse(PROGRAM)
    assert traffic.large_results(module, 20_001) == []
    # Both branches are looked at, and the update in place of 2,000 bytes writes 400.
    assert traffic.large_results(module, 2_000) == ["copy moved f32[5,100,10]{1,2,0}"]
    copied = PROGRAM.replace(" %kept = f32[5,100]{1,0} fusion(%cache, %row, %next), kind=kLoop, calls=%update",
                             " %kept = f32[5,100]{1,0} copy(%cache)")  # fmt: skip
    assert "copy kept f32[5,100]{1,0}" in traffic.large_results(hlo.parse(copied), 2_000)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux on x86-64")
@pytest.mark.parametrize(
    ("topology", "slots", "weights", "cache"),
    [
        ("v5e:2x2", 64, None, "bfloat16"),
        ("v6e:1x1", 64, "int8", "int8"),
        ("v5p:2x2x1", 64, None, "bfloat16"),
    ],
)
def test_decoding_copies_nothing_and_reads_everything_once(topology, slots, weights, cache):
    """Two layers at full width, compiled with the effort of real runs: at low effort, scores are held too."""
    where = parse_topology(topology)
    cfg = load_config("configs/finetune.py", ("model.decoder.num_layers=2", "model.vision.num_layers=3"))
    cfg = resolve_for(cfg, where.chip.device_kind, where.devices)
    plan = generation.plan(cfg, where, 4096, slots, weights, cache)
    split = {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}, "slots_per_device": 32}
    split["read_weights_bytes_per_device"] = plan["read_weights_bytes_per_device"] / 2
    plan |= split if where.devices == 4 else {}
    facts = run_worker(topology, generate_facts, cfg, where, plan, "decode", False, shown=False)
    assert facts["fits"] and facts["copies"] == []
    # Weights that are gathered, read twice or converted in memory would show here, and so would slices of the cache.
    bound = plan["read_weights_bytes_per_device"] + plan["slots_per_device"] * 4096 * plan["cache_bytes_per_token"]
    assert facts["moved_bytes"] < 1.2 * bound
    assert facts["wire_bytes"] < 0.05 * bound
    assert facts["temporary_bytes"] < 0.1 * facts["memory"]["cache"]
