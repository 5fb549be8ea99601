"""Model FLOPs of a training step, counted from its lengths alone: the numerator of every MFU.

Compilers do not know this number: XLA counts the body of a loop once and a kernel not at all, and takes padding, masked
scores and recompute for work. Here a step costs what the model's definition requires and no more:

    matrix products    2 · tokens · inputs · outputs, without padding
    attention          2 · 2 · N · H FLOPs per (query, key) pair that the mask admits: scores, then values
        decoder        Σ over examples n(n + 1)/2, and with image_attention="bidirectional" n(n − 1)/2 more per image
        vision tower   Σ over tiles n²; an image is one tile unless its layout cuts it
    backward           of y = x · W: once more for W if W trains, once more for x if x depends on a trained parameter;
                       of attention: the same for q, k and v, and for the scores if q or k needs a gradient

A fully trained model therefore costs 3 × forward, a frozen tower before the first trainable parameter 1 ×, and a frozen
decoder after a trained projector 2 ×. Recompute (remat) is a cost of the policy, not of the model, and is excluded. So
are norms, activations, RoPE, softmax, the resizing of position embeddings, merging and the optimizer: they use no
matrix units and are under 1 %.

The released model, fully trained, in GFLOP (``tests/hardware/test_flops.py`` derives each number):

    token           84.9     6 · (40 · (5120 · 128 · (2 · 40 + 2 · 10) + 3 · 5120 · 17920) + 100352 · 5120)
      attention      3.7     at an example's length of 3,000, halved by the causal mask
    patch            2.4     6 · (26 · (4 · 1152² + 2 · 1152 · 4304) + 768 · 1152)
      attention      1.3     at 3,600 patches per image
    vision token     0.2     6 · (1152 · 5120 + 5120²)

Early fusion (``models/early_fusion.py``) has the product of its patches alone: no layers, no projector.

With LoRA the kernels are frozen, and x · A · B counts as two more products, forward and backward.

The head counts at every token, weighted by the loss or not, as in published figures, even where ``training/loss.py``
skips it. Backward work is decided per parameter for all of the batch: with a frozen decoder, an example without images
could skip its backward pass but is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from phivision_jax.config import DecoderConfig, LoraConfig, ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """Contents of a step without padding, summed over the global batch; a mean step may hold fractions."""

    tokens: float
    """Tokens of the decoder, those of images included."""
    pairs: float
    """(query, key) pairs of the decoder's attention."""
    patches: float
    """Patches that the vision tower encodes."""
    patch_pairs: float
    """(query, key) pairs of the vision tower's attention."""
    vision_tokens: float
    """Tokens that the projector makes of the patches: one per patch, unless the image layout merges some."""

    @classmethod
    def of_examples(
        cls, count: float, tokens: float, image_patches: Sequence[float] = (), *, bidirectional: bool = False
    ) -> Workload:
        """The work of ``count`` equal examples: a lower bound for their mean, since attention grows with squares.

        Args:
          tokens: of one example, those of its images included.
          image_patches: patches of each image of one example; each patch is one token.
          bidirectional: an image's tokens see each other.
        """
        inside = sum(n * (n - 1) / 2 for n in image_patches) if bidirectional else 0.0
        pairs = tokens * (tokens + 1) / 2 + inside
        patches, patch_pairs = sum(image_patches), sum(n**2 for n in image_patches)
        return cls(count * tokens, count * pairs, count * patches, count * patch_pairs, count * patches)


@dataclasses.dataclass
class Cost:
    """FLOPs of one part of the model."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


PARTS = ("vision", "vision_attention", "projector", "decoder", "decoder_attention", "head")


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the global batch."""

    parts: dict[str, Cost]
    """By ``PARTS`` of the model; "vision" and "decoder" are the matrix products of their layers."""

    @property
    def forward(self) -> float:
        return sum(cost.forward for cost in self.parts.values())

    @property
    def total(self) -> float:
        return sum(cost.total for cost in self.parts.values())


def mfu(flops: float, seconds: float, chips: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of the chips' peak that the model's own work takes.

    Args:
      flops: of one step over the global batch (``StepFlops.total``).
      seconds: duration of one step.
      peak_flops: of one chip, per second (``Chip.peak_bf16_flops``).

    Raises:
      ValueError: for a duration, number of chips or peak that is not positive.
    """
    if seconds <= 0 or chips <= 0 or peak_flops <= 0:
        raise ValueError(f"MFU needs positive seconds, chips and peak, not {seconds}, {chips}, {peak_flops}")
    return flops / (seconds * chips * peak_flops)


def step_flops(
    config: ModelConfig, work: Workload, lr_rules: Sequence[tuple[str, float]] = (), lora: LoraConfig | None = None
) -> StepFlops:
    """FLOPs of one training step.

    Args:
      lr_rules: as in ``OptimConfig``; parameters scaled by 0 are frozen.
      lora: with a rank, only the adapters train.
    """
    count = _Count(lr_rules, lora or LoraConfig())
    vision, decoder = config.vision, config.decoder

    # x: whether the activations at this point need a gradient, which is whether anything before it trains.
    x = count.linear("vision", "vision/patch_embedding", False, work.patches, vision.patch_dim, vision.hidden_size)
    x |= count.trains("vision/position_embedding", "embedding")
    # Only the input of the first layer may need no gradient, so that layer is counted apart.
    for layers in (1, vision.num_active_layers - 1) if vision.has_blocks else ():
        x = _layers(count, "vision", vision, layers * work.patches, layers * work.patch_pairs, x)

    if vision.has_blocks:
        width = config.projector.merge_size * vision.hidden_size
        x = count.linear("projector", "projector/fc1", x, work.vision_tokens, width, decoder.hidden_size)
        x = count.linear("projector", "projector/fc2", x, work.vision_tokens, decoder.hidden_size, decoder.hidden_size)

    x = x and work.vision_tokens > 0
    x |= count.trains("decoder/embed_tokens", "embedding")
    for layers in (1, decoder.num_layers - 1):
        x = _layers(count, "decoder", decoder, layers * work.tokens, layers * work.pairs, x)
    x |= count.trains("decoder/norm", "scale")
    count.linear("head", "decoder/lm_head", x, work.tokens, decoder.hidden_size, decoder.vocab_size, bias=False)
    return StepFlops(count.costs)


# Norms, the product behind attention, those before the MLP's activation and the one behind it.
_VISION_LAYER = (("layer_norm1", "layer_norm2"), "out_proj", ("fc1",), "fc2")
_DECODER_LAYER = (("input_layernorm", "post_attention_layernorm"), "o_proj", ("gate_proj", "up_proj"), "down_proj")


def _layers(count: _Count, part: str, sizes: DecoderConfig | VisionConfig, rows: float, pairs: float, x: bool) -> bool:
    """Count layers that process these rows and pairs in total; return whether their output needs a gradient."""
    D, F, bias = sizes.hidden_size, sizes.intermediate_size, isinstance(sizes, VisionConfig)
    KV = D if isinstance(sizes, VisionConfig) else sizes.num_kv_heads * sizes.head_dim
    norms, out, before, behind = _VISION_LAYER if bias else _DECODER_LAYER

    def linear(module: str, x: bool, inputs: int, outputs: int) -> bool:
        return count.linear(part, f"{part}/layers/{module}", x, rows, inputs, outputs, bias)

    def norm(name: str, x: bool) -> bool:
        return x or count.trains(f"{part}/layers/{name}", "scale", *["bias"] * bias)

    y = norm(norms[0], x)
    q, k, v = (linear(f"self_attn/{name}_proj", y, D, width) for name, width in (("q", D), ("k", KV), ("v", KV)))
    x |= linear(f"self_attn/{out}", count.attention(f"{part}_attention", q, k, v, pairs, D), D, D)
    y = norm(norms[1], x)
    hidden = [linear(f"mlp/{name}", y, D, F) for name in before]
    return x | linear(f"mlp/{behind}", any(hidden), F, D)


class _Count:
    """Sum of the forward and backward FLOPs of products, by part of the model."""

    def __init__(self, lr_rules: Sequence[tuple[str, float]], lora: LoraConfig) -> None:
        self.lr_rules, self.lora = lr_rules, lora
        self.costs = {part: Cost() for part in PARTS}

    def trains(self, module: str, *leaves: str) -> bool:
        """True if any of a module's parameters trains."""
        paths = [f"{module}/{leaf}" for leaf in leaves if not self.lora.rank or leaf in ("lora_a", "lora_b")]
        return any(next((m for pattern, m in self.lr_rules if re.search(pattern, path)), 1.0) for path in paths)

    def linear(self, part: str, layer: str, x: bool, rows: float, inputs: int, outputs: int, bias: bool = True) -> bool:
        """Count y = x · kernel (+ bias); ``x`` is whether x needs a gradient. Return whether y does."""
        product, kernel = 2.0 * rows * inputs * outputs, self.trains(layer, "kernel")
        self.costs[part].forward += product
        self.costs[part].backward += product * (x + kernel)
        y = x or kernel or (bias and self.trains(layer, "bias"))
        if self.lora.rank and re.search(self.lora.targets, layer):
            down, up = (2.0 * rows * self.lora.rank * width for width in (inputs, outputs))
            a, b = self.trains(layer, "lora_a"), self.trains(layer, "lora_b")
            self.costs[part].forward += down + up
            self.costs[part].backward += down * (x + a) + up * ((x or a) + b)
            y = y or a or b
        return y

    def attention(self, part: str, q: bool, k: bool, v: bool, pairs: float, width: int) -> bool:
        """Count softmax(q · k) · v over query heads of total ``width``; return whether the result needs a gradient."""
        product, scores = 2.0 * pairs * width, q or k
        self.costs[part].forward += 2 * product
        self.costs[part].backward += product * (q + k + scores + v)
        return scores or v
