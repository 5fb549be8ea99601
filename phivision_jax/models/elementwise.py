"""Norms and activations with hand-written gradients, which keep only the inputs and the statistics of norms.

Autodiff keeps the operands of every operation inside: for silu(gate) · up that is five arrays of width F instead of
two, written by the forward pass and read by the backward pass.

    function      kept                              gradient
    rms_norm      x; 1/rms per token                n = x/rms:          dx = (dn − n · mean(dn · n)) / rms
    layer_norm    x; mean and 1/std per token       n = (x − mean)/std: dx = (dn − mean(dn) − n · mean(dn · n)) / std
    swiglu        gate, up                          silu' = σ + silu · (1 − σ)
    gelu          x                                 of 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))

Norms (Zhang and Sennrich 2019; Ba et al. 2016) and all gradients are computed in fp32; results have the dtype of the
inputs. Differentiable in reverse mode only, and not inside a ``shard_map`` with ``check_vma``, where the gradients of
replicated scales would have to be summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """x / √(mean(x²) + eps) · scale."""
    return _rms_forward(x, scale, eps)[0]


def _rms_forward(x, scale, eps):
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * inverse * scale).astype(x.dtype), (x, inverse, scale)


def _rms_backward(eps, kept, dy):
    x, inverse, scale = kept
    dy, n = dy.astype(jnp.float32), x.astype(jnp.float32) * inverse
    dn = dy * scale
    dx = inverse * (dn - n * (dn * n).mean(-1, keepdims=True))
    return dx.astype(x.dtype), _over_tokens(dy * n).astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float
) -> Float[Array, "*B C"]:
    """(x − mean(x)) / √(variance(x) + eps) · scale + bias."""
    return _layer_forward(x, scale, bias, eps)[0]


def _layer_forward(x, scale, bias, eps):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    y = y - mean
    inverse = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * inverse * scale + bias).astype(x.dtype), (x, mean, inverse, scale, bias)


def _layer_backward(eps, kept, dy):
    x, mean, inverse, scale, bias = kept
    dy, n = dy.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    dn = dy * scale
    dx = inverse * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    return dx.astype(x.dtype), _over_tokens(dy * n).astype(scale.dtype), _over_tokens(dy).astype(bias.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) · up (Shazeer 2020)."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(kept, dy):
    gate, up, dy32 = (x.astype(jnp.float32) for x in (*kept, dy))
    sigma = jax.nn.sigmoid(gate)
    silu = gate * sigma
    d_gate = dy32 * up * (sigma + silu * (1 - sigma))
    return _materialise((d_gate.astype(kept[0].dtype), (dy32 * silu).astype(kept[1].dtype)))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """GELU in its tanh form, ``gelu_pytorch_tanh`` (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(kept, dy):
    x, c = kept.astype(jnp.float32), math.sqrt(2 / math.pi)
    t = jnp.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    return _materialise(((dy.astype(jnp.float32) * slope).astype(kept.dtype),))


gelu.defvjp(_gelu_forward, _gelu_backward)


def _materialise[T](gradients: T) -> T:
    """Keep CPUs from fusing these gradients into the transposes that read them, which would recompute each element."""
    return jax.lax.platform_dependent(gradients, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _over_tokens(x: Float[Array, "*B D"]) -> Float[Array, " D"]:
    return x.sum(range(x.ndim - 1))
