"""Collectives of programs whose answer is known by construction, compiled for eight CPU devices; TPU text by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.preflight.hlo import Collective, bytes_by_kind, collectives


def found(f, *args, **mesh_shape):
    """(kind, bytes, loops) of each collective of ``f`` on arrays given as (shape, dtype, axes)."""
    mesh = sharding.make_mesh(mesh_shape)
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec(*axes))) for s, d, axes in args]
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*args).compile().as_text()
    return sorted((c.kind, c.result_bytes, c.loops) for c in collectives(text))


def by_hand(f):
    """``f`` of one device's rows, so that it alone says what is sent."""
    return jax.shard_map(f, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)


def test_no_devices_to_talk_to():
    assert found(lambda x: x * 2, ((8, 4), jnp.float32, ("fsdp",)), fsdp=8) == []


def test_outside_of_loops_everything_runs_once():
    x = ((16, 4), jnp.float32, ("fsdp",))
    assert found(by_hand(lambda x: jax.lax.psum(x, "fsdp")), x, fsdp=8) == [("all-reduce", 2 * 4 * 4, ())]


def test_what_a_scan_gathers_it_gathers_at_every_step():
    def f(weights, x):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, PartitionSpec())), None

        return jax.lax.scan(body, x, weights)[0]

    weights, x = ((5, 16, 16), jnp.float32, (None, "fsdp")), ((8, 16), jnp.float32, ())
    assert found(f, weights, x, fsdp=8) == [("all-gather", 16 * 16 * 4, (5,))]


def test_loops_within_loops_multiply():
    def f(x):  # [2, 4] of each device
        def inner(x, _):
            return jnp.tanh(jax.lax.psum(x, "tensor")), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, None, length=3)[0]
            return x * jax.lax.all_gather(jnp.tanh(x), "fsdp").sum(), None

        return jax.lax.scan(outer, x, None, length=7)[0]

    assert found(by_hand(f), ((8, 4), jnp.float32, ("fsdp",)), fsdp=4, tensor=2) == [
        ("all-gather", 8 * 4 * 4, (7,)),
        ("all-reduce", 2 * 4 * 4, (7, 3)),
    ]


def test_a_counter_need_not_start_at_zero():
    def f(x):
        def body(state):
            return state[0] + 1, jnp.tanh(jax.lax.psum(state[1], "fsdp"))

        return jax.lax.while_loop(lambda state: state[0] < 9, body, (2, x))[1]

    assert found(by_hand(f), ((8, 4), jnp.float32, ("fsdp",)), fsdp=8) == [("all-reduce", 4 * 4, (7,))]


# The shapes of what the TPU compiler writes: a layout with tiles, a reduce-scatter as a fusion around an all-reduce, an
# asynchronous gather of two arrays, an asynchronous call named by its start and its end, trips only as the constant of
# the condition, a computation called by two.
TPU = """HloModule jit_f, is_scheduled=true

%add.clone (x.1: f32[], y.1: f32[]) -> f32[] {
  ROOT %add.3 = f32[]{:T(128)} add(%x.1, %y.1)
}

%all-reduce-scatter.clone.1 (input.2: f32[64,32]) -> f32[16,32] {
  %input.2 = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[64,32]{1,0:T(8,128)} all-reduce(%input.2), replica_groups={{0,2,4,6}}, to_apply=%add.clone
  ROOT %dynamic-slice.31 = f32[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %m, %c), dynamic_slice_sizes={16,32}
}

%called.1 (input.3: f32[4]) -> f32[4] {
  ROOT %permute = f32[4]{0} collective-permute(%input.3), source_target_pairs={{0,1},{1,0}}
}

%body.1 (p: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %constant.41 = s32[]{:T(128)} constant(1)
  %ag = ((bf16[4,8]{1,0:T(8,128)(2,1)}, s8[4]{0}), (bf16[16,8]{1,0}, s8[16]{0})) all-gather-start(%a, %b), channel_id=1
  %ag.done = (bf16[16,8]{1,0}, s8[16]{0}) all-gather-done(%ag)
  %fusion.47 = f32[16,32]{1,0:T(8,128)} fusion(%fusion.46), kind=kCustom, calls=%all-reduce-scatter.clone.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[16,32]{1,0}) tuple(%add.9, %w)
}

%condition.1 (p.2: (s32[], bf16[16,32])) -> pred[] {
  %constant.43 = s32[]{:T(128)} constant(40)
  ROOT %compare.1 = pred[]{:T(512)} compare(%g, %constant.43), direction=LT
}

ENTRY %main.5_spmd (param.5: bf16[16,32]) -> bf16[16,32] {
  %while.25 = (s32[]{:T(128)}, bf16[16,32]{1,0}, /*index=5*/s32[]) while(%t), condition=%condition.1, body=%body.1
  %start = ((f32[4]{0}), f32[4]{0}, u32[]{:S(2)}) async-start(%y), calls=%called.1
  %done = f32[4]{0} async-done(%start), calls=%called.1
  ROOT %last = f32[16,32]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1
}
"""


def test_what_the_tpu_compiler_writes():
    assert collectives(TPU) == [
        Collective("all-gather", "ag", 16 * 8 * 2 + 16, (40,)),
        Collective("reduce-scatter", "fusion.47", 16 * 32 * 4, (40,)),
        Collective("collective-permute", "permute", 16, ()),
        Collective("reduce-scatter", "last", 16 * 32 * 4, ()),
    ]
    assert bytes_by_kind(collectives(TPU)) == {
        "all-gather": 40 * 272,
        "reduce-scatter": 41 * 2048,
        "collective-permute": 16,
    }
    assert [c.times for c in collectives(TPU)] == [40, 40, 1, 1]


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("HloModule empty")
    with pytest.raises(ValueError, match=r"loop while.25 holds collectives, but .* not one constant: \[\]"):
        collectives(TPU.replace("constant(40)", "parameter(1)"))
    # A loop without collectives may run as often as it likes.
    assert len(collectives(TPU.replace("constant(40)", "parameter(1)").replace("body=%body.1", "body=%add.clone"))) == 2
