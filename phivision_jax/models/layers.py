"""The pieces both towers are made of. Each parameter is declared once: shape, logical axes and initialiser together.

Axis legend, used in every einsum and shape comment of the models:

    B batch row     T query position   S key position   N query heads   K kv heads    G N/K        H head dim
    D model dim     F ffn dim          V vocab          L layers        R vision rows P patches    M vision tokens
    I images        C channels (the vision width)

Compute follows the dtype of the activations: a parameter is cast where it is used, norms and angles work in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from phivision_jax.models.elementwise import layer_norm, rms_norm
from phivision_jax.models.remat import PRODUCT, name

ONES, ZEROS = jax.nn.initializers.ones, jax.nn.initializers.zeros


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer) -> nnx.Param:
    """One parameter with the *logical* names of its axes; ``sharding.py`` alone maps those to a mesh."""
    # Without eager_sharding=False, building a model outside a mesh raises.
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def truncated_normal(stddev: float) -> Initializer:
    return jax.nn.initializers.truncated_normal(stddev)


def project(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """x [..., *in] · kernel [*in, *out] = [..., *out], summed over the last ``n`` axes of x. In reverse mode only.

    The gradients are those of autodiff but for one order: it makes the kernel's as (dyᵀ · x)ᵀ, which XLA computes on
    CPUs much more slowly than xᵀ · dy.
    """
    return name(_project(x, kernel, n), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=n)


def _project_forward(x: jax.Array, kernel: jax.Array, n: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(x, kernel, n), (x, kernel)


def _project_backward(n: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    batch = range(x.ndim - n)
    dx = jax.lax.dot_general(dy, kernel, ((range(len(batch), dy.ndim), range(n, kernel.ndim)), ((), ())))
    return dx, jax.lax.dot_general(x, dy, ((batch, batch), ((), ())))


_project.defvjp(_project_forward, _project_backward)


class Linear(nnx.Module):
    """y = x · kernel (+ bias), contracting the last ``len(inputs)`` axes of x: heads keep axes of their own.

    With adapters (``adapt``) also + alpha / rank · (x · A) · B; Hu et al. 2021, arXiv 2106.09685, §4.1.
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_scale: float = 0.0

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        self.num_inputs = len(inputs)
        # LeCun: variance 1/fan_in keeps the scale of activations; residual outputs shrink it by their depth.
        init = truncated_normal(init_scale / math.sqrt(math.prod(inputs)))
        self.kernel = param(rngs, (*inputs, *outputs), axes, init)
        self.bias = param(rngs, outputs, axes[self.num_inputs :], ZEROS) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        n = self.num_inputs
        y = project(x, self.kernel[...].astype(x.dtype), n)
        if self.lora_a is not None and self.lora_b is not None:
            # Never A · B: that would be as large as the kernel.
            narrow = project(x, self.lora_a[...].astype(x.dtype), n)
            y = y + self.lora_scale * project(narrow, self.lora_b[...].astype(x.dtype), 1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def adapt(self, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        """Add a low-rank adapter that changes nothing yet: A [in…, rank] is drawn, B [rank, out…] is zero.

        Where the kernel is stacked over layers, both are too. A is uniform in ±1/√in, as in the paper's own code and
        in PEFT, so that learning rates found there serve here.
        """
        shape, axes = self.kernel.get_value().shape, self.kernel.get_metadata()["out_sharding"]
        layers = axes.count("layer")
        n = layers + self.num_inputs
        draw = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=range(layers, n), batch_axis=range(layers)
        )
        self.lora_a = param(rngs, (*shape[:n], rank), (*axes[:n], "lora"), draw)
        self.lora_b = param(rngs, (*shape[:layers], rank, *shape[n:]), (*axes[:layers], "lora", *axes[n:]), ZEROS)
        self.lora_scale = alpha / rank


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, axis: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = param(rngs, (dim,), (axis,), ONES)
        self.bias = param(rngs, (dim,), (axis,), ZEROS)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, axis: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = param(rngs, (dim,), (axis,), ONES)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each [..., H/2] in fp32.

    fp32 matters: inverse frequencies rounded to bf16 put the angle 0.11 rad off at position 64, 14.7 rad at 8,192.
    """
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, N, H] by angles [B, T, H/2]; the halves of H are the pairs (not neighbours)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def stack[M: nnx.Module](make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """``num_layers`` modules in one, every parameter with a leading "layer" axis, to be scanned over."""
    # The "layer" entry matters: without it the specs of the unstacked axes would shift left by one, in silence.
    return nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layer"})(rngs.split(num_layers))
