"""Products counted by hand: programs compiled for CPU, and convolutions as the TPU compiler writes products."""

import jax
import jax.numpy as jnp
import pytest

from phivision_jax.preflight import hlo
from phivision_jax.preflight.matmuls import matmul_flops


def flops(f, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return matmul_flops(hlo.parse(jax.jit(f).lower(*args).compile().as_text()))


def test_matmul_flops_scan_gradient():
    L, B, D, F = 3, 8, 16, 32

    def loss(weights, x):
        def body(x, w):
            up, down = w
            return x + jnp.tanh(x @ up) @ down, None

        return jax.lax.scan(body, x, weights)[0].sum()

    shapes = ((L, D, F), (L, F, D)), (B, D)
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s[0], int))
    product = 2 * B * D * F

    def count(f):
        return matmul_flops(hlo.parse(jax.jit(jax.grad(f)).lower(*args).compile().as_text()))

    # Forward two products a layer; backward two for each, the first layer's input included, which a scan cannot skip.
    assert count(loss) == L * 6 * product


def test_matmul_flops_einsums():
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 8, 16), (5, 16, 4)) == 2 * 5 * 8 * 16 * 4
    assert flops(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), (8, 3, 4), (3, 4, 6)) == 2 * 8 * 3 * 4 * 6
    assert flops(lambda a, b: jnp.einsum("i,j->ij", a, b) * 2, (8,), (3,)) in (0, 2 * 8 * 3)  # may be a plain multiply
    assert flops(lambda a, b: a * b, (8,), (8,)) == 0


def convolution(form, left, right, out):
    text = f"""HloModule jit_f, is_scheduled=true

%fused (a: {left}, b: {right}) -> {out} {{
  %a = {left}{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = {right}{{1,0}} parameter(1)
  ROOT %convolution.1 = {out}{{1,0:T(8,128)}} convolution(%a, %b), {form}
}}

%body (p: (s32[], {left})) -> (s32[], {left}) {{
  ROOT %f = {out}{{1,0}} fusion(%x, %y), kind=kOutput, calls=%fused, metadata={{op_name="jit(f)/layer/dot_general"}}
}}

%condition (q: (s32[], {left})) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(40)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main (x: {left}, y: {right}) -> {out} {{
  %kernel = {out}{{1,0}} custom-call(%x, %y), custom_call_target="tpu_custom_call"
  %w = (s32[], {left}) while(%t), condition=%condition, body=%body
  ROOT %g = {out}{{1,0}} get-tuple-element(%w), index=1
}}
"""
    return matmul_flops(hlo.parse(text)) / 40


@pytest.mark.parametrize(
    ("form", "left", "right", "out", "wanted"),
    [
        # Plain products, either operand transposed, the result transposed.
        ("dim_labels=bf_io->bf", "bf16[7,16]", "bf16[16,32]", "f32[7,32]", 2 * 7 * 16 * 32),
        ("dim_labels=bf_oi->bf", "bf16[7,16]", "bf16[32,16]", "f32[7,32]", 2 * 7 * 16 * 32),
        ("dim_labels=fb_io->fb", "bf16[16,7]", "bf16[16,32]", "f32[32,7]", 2 * 7 * 16 * 32),
        # Heads as a window as wide as the input: x [7, heads 5, 4] · w [5, 4, 32], summed over heads and width.
        ("window={size=5}, dim_labels=b0f_0io->bf0", "bf16[7,5,4]", "bf16[5,4,32]", "f32[7,32,1]", 2 * 7 * 5 * 4 * 32),
        # Heads made by a window that slides off a single input: x [7, 16] · w [16, heads 5, 4]; padding is not work.
        (
            "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            "bf16[7,16,1]",
            "bf16[16,5,4]",
            "f32[7,5,4]",
            2 * 7 * 16 * 5 * 4,
        ),
        # One product per head: the kernel's stride leaves each head one partner of its own.
        (
            "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            "bf16[5,7,16]",
            "bf16[5,16,3]",
            "f32[5,7,3]",
            2 * 5 * 7 * 16 * 3,
        ),
        # A true convolution, and one whose features come in two groups of four.
        (
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            "f32[2,6,4]",
            "f32[3,4,8]",
            "f32[2,6,8]",
            2 * 2 * 8 * 4 * 16,
        ),
        (
            "window={size=2 stride=2}, dim_labels=b0f_0io->b0f, feature_group_count=2",
            "f32[2,6,8]",
            "f32[2,4,8]",
            "f32[2,3,8]",
            2 * 2 * 3 * 8 * 4 * 2,
        ),
    ],
)
def test_matmul_flops_tpu_convolutions(form, left, right, out, wanted):
    assert convolution(form, left, right, out) == wanted


def test_matmul_flops_conditional_takes_heaviest_branch():
    x = jnp.ones((4, 8))
    text = jax.jit(lambda x, one: jax.lax.cond(one, lambda: x @ x.T @ x, lambda: x + x[0] @ x.T @ x))
    text = text.lower(x, True).compile().as_text()
    assert matmul_flops(hlo.parse(text)) == 2 * 2 * 4 * 8 * 4
    assert matmul_flops(hlo.parse(_CONDITIONAL)) == 2 * 4 * 8 * 4
    with pytest.raises(ValueError, match="conditional c has no branches"):
        branches = ", true_computation=%few, false_computation=%most"
        matmul_flops(hlo.parse(_CONDITIONAL.replace(branches, "")))


_CONDITIONAL = """\
HloModule test

%few (y: f32[4,4]) -> f32[4,4] {
  %y = f32[4,4]{1,0} parameter(0)
  ROOT %z = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%most (x: f32[4,8]) -> f32[4,4] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (p: pred[], y.1: f32[4,4], x.1: f32[4,8]) -> f32[4,4] {
  %p = pred[] parameter(0)
  %y.1 = f32[4,4]{1,0} parameter(1)
  %x.1 = f32[4,8]{1,0} parameter(2)
  ROOT %c = f32[4,4]{1,0} conditional(%p, %y.1, %x.1), true_computation=%few, false_computation=%most
}
"""


def test_matmul_flops_unknown_format():
    with pytest.raises(ValueError, match=r"convolution\.1 has no dim_labels"):
        convolution("window={size=1}", "bf16[7,16]", "bf16[16,32]", "f32[7,32]")
