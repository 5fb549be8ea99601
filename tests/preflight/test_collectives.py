"""Collectives of programs whose answer is known by construction: compiled for eight CPU devices, and TPU text."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from phivision_jax import sharding
from phivision_jax.preflight import hlo
from phivision_jax.preflight.collectives import Collective, axes_of, wire_bytes
from phivision_jax.preflight.collectives import collectives as collectives_of


def collectives(text):
    return collectives_of(hlo.parse(text))


def found(f, *args, **mesh_shape):
    """(kind, bytes, loops) of each collective of ``f`` on arrays given as (shape, dtype, axes)."""
    mesh = sharding.make_mesh(mesh_shape)
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec(*axes))) for s, d, axes in args]
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*args).compile().as_text()
    return sorted((c.kind, c.result_bytes, c.loops) for c in collectives(text))


def per_device(f):
    """``f`` of one device's rows, so that only ``f`` sends anything."""
    return jax.shard_map(f, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)


def test_collectives_none():
    assert found(lambda x: x * 2, ((8, 4), jnp.float32, ("fsdp",)), fsdp=8) == []


def test_collectives_outside_loops():
    x = ((16, 4), jnp.float32, ("fsdp",))
    assert found(per_device(lambda x: jax.lax.psum(x, "fsdp")), x, fsdp=8) == [("all-reduce", 2 * 4 * 4, ())]


def test_collectives_in_scan():
    def f(weights, x):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, PartitionSpec())), None

        return jax.lax.scan(body, x, weights)[0]

    weights, x = ((5, 16, 16), jnp.float32, (None, "fsdp")), ((8, 16), jnp.float32, ())
    assert found(f, weights, x, fsdp=8) == [("all-gather", 16 * 16 * 4, (5,))]


def test_collectives_in_nested_loops():
    def f(x):  # [2, 4] of each device
        def inner(x, _):
            return jnp.tanh(jax.lax.psum(x, "tensor")), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, None, length=3)[0]
            return x * jax.lax.all_gather(jnp.tanh(x), "fsdp").sum(), None

        return jax.lax.scan(outer, x, None, length=7)[0]

    assert found(per_device(f), ((8, 4), jnp.float32, ("fsdp",)), fsdp=4, tensor=2) == [
        ("all-gather", 8 * 4 * 4, (7,)),
        ("all-reduce", 2 * 4 * 4, (7, 3)),
    ]


def test_collectives_counter_starts_at_two():
    def f(x):
        def body(state):
            return state[0] + 1, jnp.tanh(jax.lax.psum(state[1], "fsdp"))

        return jax.lax.while_loop(lambda state: state[0] < 9, body, (2, x))[1]

    assert found(per_device(f), ((8, 4), jnp.float32, ("fsdp",)), fsdp=8) == [("all-reduce", 4 * 4, (7,))]


# Forms that the TPU compiler writes: a layout with tiles, a reduce-scatter as a fusion around an all-reduce, an
# asynchronous gather of two arrays, an asynchronous call named by its start and its end, trips only as the constant of
# the condition, a computation called by two.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

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


def test_collectives_of_tpu_program():
    by_four, pair, everyone = ((0, 2, 4, 6),), ((0, 1), (1, 0)), (tuple(range(8)),)
    assert collectives(TPU) == [
        Collective("all-gather", "ag", 16 * 8 * 2 + 16, (40,), everyone),
        Collective("reduce-scatter", "fusion.47", 16 * 32 * 4, (40,), by_four),
        Collective("collective-permute", "permute", 16, (), pair),
        Collective("reduce-scatter", "last", 16 * 32 * 4, (), by_four),
    ]
    assert [c.times for c in collectives(TPU)] == [40, 40, 1, 1]


def test_collectives_conditional_takes_heaviest_branch():
    """On four devices a reduce-scatter sends three times its result, an all-gather three quarters."""
    text = "HloModule m, num_partitions=4\n\n"
    for i, (kind, n) in enumerate([("all-gather", 16), ("reduce-scatter", 8), ("all-gather", 16)]):
        text += f"%branch{i} (x: f32[4]) -> f32[{n}] {{\n  %x = f32[4] parameter(0)\n"
        text += f"  ROOT %c{i} = f32[{n}] {kind}(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}\n}}\n\n"
    text += """ENTRY %main (p: s32[], x: f32[4]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[4] parameter(1)
  ROOT %c = f32[8] conditional(%p, %x, %x, %x), branch_computations={%branch0, %branch1, %branch2}
}
"""
    assert [(c.name, c.result_bytes, c.loops) for c in collectives(text)] == [("c1", 32, ())]


def test_collectives_uncountable_loop():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("HloModule empty")
    with pytest.raises(ValueError, match=r"trips of loop while.25: .* with \[\], not with one constant"):
        collectives(TPU.replace("constant(40)", "parameter(1)"))
    # A loop without collectives may have any number of trips.
    assert len(collectives(TPU.replace("constant(40)", "parameter(1)").replace("body=%body.1", "body=%add.clone"))) == 2


def groups(text, devices=8):
    hlo = f"""HloModule jit_f, is_scheduled=true, num_partitions={devices}

ENTRY %main (x: f32[4]) -> f32[4] {{
  ROOT %one = f32[4]{{0}} {text}, metadata={{op_name="a=b"}}
}}
"""
    [one] = collectives(hlo)
    return one


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        # [2,2,2] with axes (1, 0, 2): 0 1 4 5 2 3 6 7
        ("all-gather(%x), replica_groups=[2,4]<=[2,2,2]T(1,0,2), dimensions={0}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        (
            "all-gather(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("all-reduce(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("all-reduce(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x=y", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The first two of fsdp's four, and the two below those.
        ("all-reduce(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("all-reduce(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("all-reduce(%x), replica_groups={}, to_apply=%add", (tuple(range(8)),)),
        ("all-reduce(%x), to_apply=%add", (tuple(range(8)),)),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,0}}", ((0, 1), (1, 2), (2, 0))),
    ],
)
def test_groups_known_formats(text, wanted):
    assert groups(text).groups == wanted


def test_groups_unknown_format():
    with pytest.raises(ValueError, match="one has device groups in an unknown format: elsewhere"):
        groups("all-reduce(%x), replica_groups=elsewhere, to_apply=%add")


def test_axes_of():
    def axes(pairs, **mesh_shape):
        return axes_of(Collective("all-reduce", "one", 4, (), pairs), mesh_shape)

    assert axes(((0, 1, 2, 3), (4, 5, 6, 7)), data=2, fsdp=4, tensor=1) == ("fsdp",)
    assert axes(((0, 4), (1, 5), (2, 6), (3, 7)), data=2, fsdp=4) == ("data",)
    assert axes((tuple(range(8)),), data=2, fsdp=4) == ("data", "fsdp")
    assert axes(((0, 1, 4, 5), (2, 3, 6, 7)), data=2, fsdp=2, tensor=2) == ("data", "tensor")
    assert axes(((0, 2), (1, 3)), data=2, fsdp=4) == ("fsdp",)  # half of an axis is along it too
    assert axes(((0, 1), (1, 2), (2, 3), (3, 4)), data=2, fsdp=4) == ("data", "fsdp")  # the last pair turns a corner
    assert axes(((0,), (1,)), data=2, fsdp=4) == ()
    with pytest.raises(ValueError, match=r"one has device 8, but the mesh \{'data': 8\} does not"):
        axes(((0, 8),), data=8)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 3, 6, 1, 4]])
@pytest.mark.parametrize("along", [("data",), ("fsdp",), ("data", "tensor"), ("fsdp", "tensor")])
def test_axes_of_any_device_order(order, along):
    """JAX hands the compiler the order of ``mesh.devices.flat``, whatever ids the devices have."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, [jax.devices()[i] for i in order])
    all_axes = PartitionSpec(("data", "fsdp", "tensor"))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=all_axes, out_specs=all_axes, check_vma=False)
    def f(x):
        return jax.lax.all_gather(jax.lax.psum(x, along), along).sum(0)

    text = f.lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile().as_text()
    assert {axes_of(c, mesh.shape) for c in collectives(text)} == {along}


def test_wire_bytes():
    def wire(kind, groups=((0, 1, 2, 3), (4, 5, 6, 7))):
        return wire_bytes(Collective(kind, "one", 1000, (), groups))

    assert wire("all-gather") == wire("all-to-all") == 750
    assert wire("reduce-scatter") == 3000  # of 4000 it keeps a quarter
    assert wire("all-reduce") == 1500
    assert wire("collective-permute", ((0, 1), (1, 0))) == 1000
    assert wire("all-reduce", ((0,), (1,))) == 0
    assert wire("send", ((0, 8),)) == 1000
    assert wire("recv", ((0, 8),)) == 0


# Starts and their ends with other instructions between, some of which hide a collective.
SCHEDULE = """HloModule jit_f, is_scheduled=true, num_partitions=4

%product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  ROOT %dot.1 = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%gathers (c: f32[64]) -> f32[256] {
  ROOT %sparse = f32[256]{0} all-gather(%c), replica_groups={}, dimensions={0}
}

ENTRY %main (p: f32[64], q: bf16[8,8]) -> f32[256] {
  %start = (f32[64]{0}, f32[256]{0}) all-gather-start(%p), replica_groups={}, dimensions={0}
  BEFORE
  %done = f32[256]{0} all-gather-done(%start)
  %call-start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gathers
  EARLY
  %update = ((f32[64]{0}), f32[256]{0}) call-update(%call-start, %p)
  LATE
  ROOT %call-done = f32[256]{0} call-done(%update)
}
"""


def overlapped(before="", early="", late=""):
    text = SCHEDULE.replace("BEFORE", before).replace("EARLY", early).replace("LATE", late)
    return tuple(c.overlapped for c in collectives(text))


def test_overlapped():
    product = "%f = bf16[8,8]{1,0} fusion(%q, %q), kind=kOutput, calls=%product"
    kernel = '%k = bf16[8]{0} custom-call(%q), custom_call_target="tpu_custom_call"'
    assert overlapped() == (False, False)
    assert overlapped(before=product, late=product) == (True, True)
    assert overlapped(before=kernel, late=kernel) == (True, True)
    # The operands of the call came after it: what ran before hid nothing.
    assert overlapped(early=product) == (False, False)
    # Moving and naming is not computing, however large.
    for idle in ("copy(%p)", "bitcast(%p)", "iota(), iota_dimension=0", "copy-start(%p)", "all-reduce(%p)"):
        other = idle.startswith("all-reduce")
        found = overlapped(before=f"%i = f32[4096]{{0}} {idle}")
        assert found == ((False,) * 3 if other else (False, False)), idle
    # Other work counts by its results: the gather's are 1024 bytes.
    small, enough = "%s = f32[255]{0} multiply(%p, %p)", "%s = f32[256]{0} multiply(%p, %p)"
    assert overlapped(before=small, late=enough) == (False, True)


# A megascale exchange: send and recv of one rendezvous, each with its end.
SLICES = """HloModule jit_f, is_scheduled=true, num_partitions=4

%product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  ROOT %dot.1 = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (p: f32[64], q: bf16[8,8]) -> f32[64] {
  %send.5 = (f32[64]{0}, u32[]{:S(2)}, token[]) send(%p, %t), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %send-done.5 = token[] send-done(%send.5), channel_id=2, is_host_transfer=true
  MEANWHILE
  %recv.5 = (f32[64]{0}, u32[]{:S(2)}, token[]) recv(%t), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %recv-done.5 = (f32[64]{0}, token[]) recv-done(%recv.5), channel_id=1, is_host_transfer=true
  %host = (f32[9]{0}, u32[], token[]) send(%p, %t), channel_id=3, is_host_transfer=true
  ROOT %x = f32[64]{0} get-tuple-element(%recv-done.5), index=0
}
""".replace(
    "ATTRIBUTES",
    'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_collectives_between_slices():
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    alone = [
        Collective("send", "send.5", 256, (), pairs),
        Collective("recv", "recv.5", 256, (), pairs),
    ]  # and not the host's own transfer
    assert collectives(SLICES.replace("MEANWHILE", "")) == alone
    assert axes_of(alone[0], {"slice": 2, "data": 2, "fsdp": 2}) == ("slice",)
    product = "%f = bf16[8,8]{1,0} fusion(%q, %q), kind=kOutput, calls=%product"
    assert collectives(SLICES.replace("MEANWHILE", product)) == [dataclasses.replace(c, overlapped=True) for c in alone]
    with pytest.raises(ValueError, match=r"send.5 crosses slices, but names them in an unknown format"):
        collectives(SLICES.replace("{1,2}x", "everywhere x"))


# One gather in steps, each step with the full result; the second gather starts inside the first one's product.
CHAIN = """HloModule jit_f, is_scheduled=true, num_partitions=4

%start (a: f32[64]) -> f32[256] {
  ROOT %ag.1 = f32[256]{0} all-gather(%a), replica_groups={}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.7 (b: f32[64], c: bf16[8,8]) -> (f32[256], f32[512], bf16[8,8]) {
  %ag.2 = f32[256]{0} all-gather(%b), replica_groups={}, frontend_attributes={chain_id="0"}
  %other.1 = f32[512]{0} all-gather(%b), replica_groups={}, frontend_attributes={chain_id="1"}
  %conv = bf16[8,8]{1,0} convolution(%c, %c), dim_labels=bf_io->bf
  ROOT %t = (f32[256]{0}, f32[512]{0}, bf16[8,8]{1,0}) tuple(%ag.2, %other.1, %conv)
}

%done (d: f32[64]) -> f32[256] {
  ROOT %ag.3 = f32[256]{0} all-gather(%d), replica_groups={}, frontend_attributes={chain_id="0"}
}

%other_done (e: f32[64]) -> f32[512] {
  ROOT %other.2 = f32[512]{0} all-gather(%e), replica_groups={}, frontend_attributes={chain_id="1"}
}

ENTRY %main (p: f32[64], q: bf16[8,8]) -> f32[256] {
  %async-collective-start = f32[256]{0} fusion(%p), kind=kCustom, calls=%start
  %fusion.7 = (f32[256]{0}, f32[512]{0}, bf16[8,8]{1,0}) fusion(%p, %q), calls=%async_collective_fusion.7
  %async-collective-done.1 = f32[512]{0} fusion(%p), kind=kCustom, calls=%other_done
  ROOT %async-collective-done = f32[256]{0} fusion(%p), kind=kCustom, calls=%done
}
"""


def test_collectives_chain_counts_once():
    everyone = (tuple(range(4)),)
    assert collectives(CHAIN) == [
        Collective("all-gather", "ag.1", 1024, (), everyone, overlapped=True),
        Collective("all-gather", "other.1", 2048, (), everyone, overlapped=False),
    ]
    assert not any(c.overlapped for c in collectives(CHAIN.replace("convolution(%c, %c)", "add(%c, %c)")))
