"""The pieces both towers are made of. Each parameter is declared once: shape, logical axes and initialiser together.

Axis legend, for every einsum, rearrangement and shape comment of the models, the loss and attention:

    B  batch row          T  query position    S  key position    M  vision token      R  vision row    P  patch
    D  model width        F  MLP width         V  vocabulary      C  vision width      L  layer
    N  query head         K  key head          G  N/K             H  head dimension

Lower case is for parts of an axis or a few things of a kind: t, s, v a block of T, S, V; u the shards of V; n, k the
features of a vision token in a merge table and their terms; g groups of examples in metrics.

Compute follows the dtype of the activations: a parameter is cast where it is used; norms and angles are fp32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, truncated_normal

from phivision_jax.models.elementwise import layer_norm, rms_norm
from phivision_jax.models.few_rows import are_single, project_few, project_single
from phivision_jax.models.remat import PRODUCT

ONES, ZEROS = jax.nn.initializers.ones, jax.nn.initializers.zeros


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer) -> nnx.Param:
    """One parameter with the *logical* names of its axes; ``sharding.py`` alone maps those to a mesh."""
    # Without eager_sharding=False, building a model outside a mesh raises.
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def project(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """x [..., *in] · kernel [*in, *out] = [..., *out], contracting the last ``n`` axes of x; reverse mode only.

    The gradients are those of autodiff, but the kernel's is computed as xᵀ · dy: autodiff's (dyᵀ · x)ᵀ is much slower
    on CPUs.
    """
    return checkpoint_name(_project(x, kernel, n), PRODUCT)


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
    """A linear layer, declared by its contraction: ``Linear("BTD,DNH->BTNH", (D, N, H), ("embed", "heads", …))``.

    The kernel's contracted axes come first, and last in x; x may have other leading axes than those named. With
    adapters (``adapt``) the result is x · W + alpha / rank · (x · A) · B; Hu et al. 2021, arXiv 2106.09685, §4.1. A
    kernel in int8 has a scale per output channel (``models/int8.py``).

    Args:
      equation: "x,kernel->y", as for einsum.
      shape, axes: sizes and logical names of the kernel's axes.
      init_scale: of the initial weights, whose standard deviation is init_scale / √fan_in.

    Raises:
      ValueError: for an equation that contracts in another way.
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_scale: float = 0.0
    scale: nnx.Param | None = None
    outputs_first: bool = False
    """True if the kernel is [*out, *in] (``put_outputs_first``)."""

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        x, kernel = equation.partition("->")[0].split(",")
        self.num_inputs = n = len(set(x) & set(kernel))
        if len(kernel) != len(shape) or equation != f"{x[:-n]}{kernel[:n]},{kernel}->{x[:-n]}{kernel[n:]}":
            raise ValueError(f"{equation!r} does not contract the last axes of x with the first of a kernel {shape}")
        init = truncated_normal(init_scale / math.sqrt(math.prod(shape[:n])))
        self.kernel = param(rngs, shape, axes, init)
        self.bias = param(rngs, shape[n:], axes[n:], ZEROS) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        n, kernel = self.num_inputs, self.kernel[...]
        if self.outputs_first:
            y = project_few(x, kernel.astype(x.dtype), n)
        elif are_single(math.prod(x.shape[:-n]), kernel.dtype, x.dtype):
            y = project_single(x, kernel, n)
        else:
            y = project(x, kernel.astype(x.dtype), n)
        if self.scale is not None:
            y = y * self.scale[...].astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            # A · B is never formed: it would be as large as the kernel.
            narrow = project(x, self.lora_a[...].astype(x.dtype), n)
            y = y + self.lora_scale * project(narrow, self.lora_b[...].astype(x.dtype), 1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def put_outputs_first(self) -> None:
        """Store the kernel as [*out, *in], for products of few rows on CPUs."""
        self.kernel.set_value(jnp.moveaxis(self.kernel[...], range(self.num_inputs), range(-self.num_inputs, 0)))
        self.outputs_first = True

    def adapt(self, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        """Add a low-rank adapter that changes nothing yet: A [in…, rank] is random, B [rank, out…] zero.

        For a kernel that is stacked over layers, A and B are stacked too. A is uniform in ±1/√in, as in the paper's
        own code and in PEFT, so that learning rates carry over.
        """
        shape, axes = self.kernel.get_value().shape, self.kernel.get_metadata()["out_sharding"]
        layers = axes.count("layer")
        n = layers + self.num_inputs
        init = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=range(layers, n), batch_axis=range(layers)
        )
        self.lora_a = param(rngs, (*shape[:n], rank), (*axes[:n], "lora"), init)
        self.lora_b = param(rngs, (*shape[:layers], rank, *shape[n:]), (*axes[:layers], "lora", *axes[n:]), ZEROS)
        self.lora_scale = alpha / rank


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, axis: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = param(rngs, (dim,), (axis,), ONES)
        self.bias = param(rngs, (dim,), (axis,), ZEROS)

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, axis: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = param(rngs, (dim,), (axis,), ONES)

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Radians per position of each pair of a head's elements, [H/2] f32; the released model's are equal in every bit.

    One unit in the last place puts an angle up to 2e-3 rad off at position 32,767. The powers are rounded to fp32 from
    fp64, as those of JAX and NumPy in fp32 are one unit off for some exponents and on some processors.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, each [..., H/2] in fp32.

    bf16 would not do: rounded inverse frequencies put the angle 0.11 rad off at position 64, 14.7 rad at 8,192.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, N, H] by angles [B, T, H/2]; element i is paired with i + H/2, not with its neighbour."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def stack[M: nnx.Module](make: Callable[[nnx.Rngs], M], num_layers: int, rngs: nnx.Rngs) -> M:
    """``num_layers`` modules in one, every parameter with a leading "layer" axis, to be scanned over."""
    # Without the "layer" entry the specs of the unstacked axes would silently shift left by one.
    return nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layer"})(rngs.split(num_layers))


def residual_scale(num_layers: int) -> float:
    """``init_scale`` of the layers that write into the residual stream: their sum over the depth has unit variance."""
    return (2 * num_layers) ** -0.5
