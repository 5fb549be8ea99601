"""How many FLOPs a training step needs: our own count, from lengths alone, the numerator of every MFU we print.

Compilers do not know: XLA counts the body of a loop once, a kernel not at all, and padding, masked scores and recompute
as if they were work. Here a step costs what the model's definition asks for, and not more:

    matrix products    2 · rows · inputs · outputs, for rows that are not padding
    attention          2 · 2 · N · H FLOPs per (query, key) pair that the mask lets through: scores, then values
        decoder        Σ over examples n(n + 1)/2, and with image_attention="bidirectional" n(n − 1)/2 more per image
        vision tower   Σ over images n²
    backward           of y = x · W: once more for W if W trains, once more for x if x depends on anything that trains;
                       of attention: likewise for q, k and v, and for the scores if q or k needs them

so everything trained is 3 × forward; a frozen tower before the first trainable parameter is 1 ×; a frozen decoder after
a trained projector is 2 ×. Recompute (remat) is the policy's price, not the model's, and stays out. So do norms,
activations, RoPE, softmax, the resizing of position embeddings, merging and the optimizer: no matrix units, under 1 %.

The released model, everything trained, in GFLOP (``tests/preflight/test_flops.py`` derives each again):

    text column     84.9     6 · (40 · (5120 · 128 · (2 · 40 + 2 · 10) + 3 · 5120 · 17920) + 100352 · 5120)
      attention      3.7     at an example's length of 3,000, halved by the causal mask
    patch            2.4     6 · (26 · (4 · 1152² + 2 · 1152 · 4304) + 768 · 1152)
      attention      1.3     at 3,600 patches per image
    vision token     0.2     6 · (1152 · 5120 + 5120²)

With adapters (LoRA) kernels are frozen, and x · A · B counts as two products more, forward and backward.

The head counts at every text column, weighted by the loss or not, as it does in published figures, also where
``training/loss.py`` skips it. An image's columns are text columns too. Backward work is decided per parameter for the
whole batch: where the decoder is frozen, an example without images could skip its backward pass, and is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from phivision_jax.config import ImageAttention, LoraConfig, ModelConfig
from phivision_jax.data.plan.packing import Lengths


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is in a step, padding left out. Sums over all rows of the global batch; a mean step may hold fractions."""

    columns: float
    """Text columns, image columns included."""
    pairs: float
    """(query, key) pairs of the decoder's attention."""
    patches: float
    patch_pairs: float
    """(query, key) pairs of the vision tower's attention."""
    vision_tokens: float
    """What the projector is applied to: the patches, unless a ``merge_index`` makes fewer of them."""

    @classmethod
    def of_lengths(
        cls,
        lengths: Lengths,
        examples: np.ndarray | None = None,
        *,
        image_attention: ImageAttention = "causal",
        vision_tokens: float | None = None,
    ) -> Workload:
        """The work of these examples, packed in any way: attention never leaves an example or an image.

        Args:
          lengths: as a plan has them.
          examples: [n] numbers into ``lengths``, those of a step, say; default: all.
          vision_tokens: in all, where features are merged; default: one per patch. With merging, an image is in the
            decoder as many columns as it has vision tokens, so "bidirectional" cannot be counted from patches.

        Raises:
          ValueError: for "bidirectional" attention together with ``vision_tokens``.
        """
        if vision_tokens is not None and image_attention == "bidirectional":
            raise ValueError("image_attention='bidirectional' needs an image's columns, and vision_tokens merges them")
        chosen = np.arange(len(lengths.columns)) if examples is None else np.asarray(examples)
        columns = lengths.columns[chosen].astype(np.int64)
        # Running sums over the images turn "of the images of example i" into a difference.
        images = lengths.image_patches.astype(np.int64)
        ends, starts = lengths.offsets[chosen + 1], lengths.offsets[chosen]

        def over_images(values: np.ndarray) -> int:
            sums = np.concatenate([[0], np.cumsum(values)])
            return int((sums[ends] - sums[starts]).sum())

        patches = over_images(images)
        pairs = int((columns * (columns + 1) // 2).sum())
        if image_attention == "bidirectional":
            pairs += over_images(images * (images - 1) // 2)
        return cls(
            columns=int(columns.sum()),
            pairs=pairs,
            patches=patches,
            patch_pairs=over_images(images**2),
            vision_tokens=patches if vision_tokens is None else vision_tokens,
        )

    @classmethod
    def of_means(
        cls, examples: float, columns: float, image_patches: Sequence[float] = (), *, bidirectional: bool = False
    ) -> Workload:
        """The work of ``examples`` examples that are all alike: the least, since attention grows with squares.

        Args:
          columns: of one example, image columns included.
          image_patches: patches of each image of one example.
        """
        inside = sum(n * (n - 1) / 2 for n in image_patches) if bidirectional else 0.0
        patches = examples * sum(image_patches)
        return cls(
            columns=examples * columns,
            pairs=examples * (columns * (columns + 1) / 2 + inside),
            patches=patches,
            patch_pairs=examples * sum(n**2 for n in image_patches),
            vision_tokens=patches,
        )


@dataclasses.dataclass
class Cost:
    """FLOPs of one part of the model."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, over the whole global batch, by part."""

    vision: Cost
    """Matrix products of the tower, patch embedding included."""
    vision_attention: Cost
    projector: Cost
    decoder: Cost
    """Matrix products of the layers."""
    decoder_attention: Cost
    head: Cost

    @property
    def forward(self) -> float:
        return sum(cost.forward for cost in self.parts.values())

    @property
    def total(self) -> float:
        return sum(cost.total for cost in self.parts.values())

    @property
    def parts(self) -> dict[str, Cost]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def mfu(flops: float, seconds: float, chips: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of the chips' peak that a step's own work takes up.

    Args:
      flops: of one step over the global batch (``StepFlops.total``).
      seconds: of one step.
      peak_flops: of one chip, per second (``Topology.peak_bf16_flops``).

    Raises:
      ValueError: for a duration, a number of chips or a peak that is not positive.
    """
    if seconds <= 0 or chips <= 0 or peak_flops <= 0:
        raise ValueError(f"MFU needs positive seconds, chips and peak, not {seconds}, {chips}, {peak_flops}")
    return flops / (seconds * chips * peak_flops)


def step_flops(
    config: ModelConfig,
    work: Workload,
    lr_rules: Sequence[tuple[str, float]] = (),
    lora: LoraConfig | None = None,
) -> StepFlops:
    """FLOPs of one training step.

    Args:
      lr_rules: as in ``OptimConfig``; what they scale by 0 is frozen.
      lora: with a rank, adapters alone train.
    """
    lora = lora or LoraConfig()

    def is_trainable(path: str) -> bool:
        if lora.rank and not path.endswith(("/lora_a", "/lora_b")):
            return False
        return next((m for pattern, m in lr_rules if re.search(pattern, path)), 1.0) != 0.0

    count = _Count(is_trainable, lora)
    vision, decoder = config.vision, config.decoder

    # x: does anything before this point train? Gradients flow back only as far as that.
    x = count.linear("vision", "vision/patch_embedding", False, work.patches, vision.patch_dim, vision.hidden_size)
    x |= count.trains("vision/position_embedding", "embedding")
    # Only the first layer may stand behind nothing that trains, so it is counted apart.
    for layers in (1, vision.num_active_layers - 1):
        x = _vision_layers(count, config, layers * work.patches, layers * work.patch_pairs, x)

    width = config.projector.merge_size * vision.hidden_size
    x = count.linear("projector", "projector/fc1", x, work.vision_tokens, width, decoder.hidden_size)
    x = count.linear("projector", "projector/fc2", x, work.vision_tokens, decoder.hidden_size, decoder.hidden_size)

    x = x and work.vision_tokens > 0
    x |= count.trains("decoder/embed_tokens", "embedding")
    for layers in (1, decoder.num_layers - 1):
        x = _decoder_layers(count, config, layers * work.columns, layers * work.pairs, x)
    x |= count.trains("decoder/norm", "scale")
    count.linear("head", "decoder/lm_head", x, work.columns, decoder.hidden_size, decoder.vocab_size, bias=False)
    return StepFlops(**count.costs)


def _vision_layers(count: _Count, config: ModelConfig, patches: float, pairs: float, x: bool) -> bool:
    """Blocks whose patches and pairs add up to these. Returns what ``x`` is behind them."""
    C, F, at = config.vision.hidden_size, config.vision.intermediate_size, "vision/layers"
    y = x or count.trains(f"{at}/layer_norm1", "scale", "bias")
    q, k, v = (
        count.linear("vision", f"{at}/self_attn/{name}", y, patches, C, C) for name in ("q_proj", "k_proj", "v_proj")
    )
    y = count.attention("vision_attention", q, k, v, pairs, C)
    x |= count.linear("vision", f"{at}/self_attn/out_proj", y, patches, C, C)
    y = x or count.trains(f"{at}/layer_norm2", "scale", "bias")
    y = count.linear("vision", f"{at}/mlp/fc1", y, patches, C, F)
    return x | count.linear("vision", f"{at}/mlp/fc2", y, patches, F, C)


def _decoder_layers(count: _Count, config: ModelConfig, columns: float, pairs: float, x: bool) -> bool:
    """Layers whose columns and pairs add up to these. Returns what ``x`` is behind them."""
    cfg, at = config.decoder, "decoder/layers"
    D, F, NH, KH = cfg.hidden_size, cfg.intermediate_size, cfg.hidden_size, cfg.num_kv_heads * cfg.head_dim
    y = x or count.trains(f"{at}/input_layernorm", "scale")
    q = count.linear("decoder", f"{at}/self_attn/q_proj", y, columns, D, NH, bias=False)
    k = count.linear("decoder", f"{at}/self_attn/k_proj", y, columns, D, KH, bias=False)
    v = count.linear("decoder", f"{at}/self_attn/v_proj", y, columns, D, KH, bias=False)
    y = count.attention("decoder_attention", q, k, v, pairs, NH)
    x |= count.linear("decoder", f"{at}/self_attn/o_proj", y, columns, NH, D, bias=False)
    y = x or count.trains(f"{at}/post_attention_layernorm", "scale")
    gate = count.linear("decoder", f"{at}/mlp/gate_proj", y, columns, D, F, bias=False)
    up = count.linear("decoder", f"{at}/mlp/up_proj", y, columns, D, F, bias=False)
    return x | count.linear("decoder", f"{at}/mlp/down_proj", gate or up, columns, F, D, bias=False)


class _Count:
    """Adds up the forward and backward FLOPs of products; each product says whether gradients flow through it."""

    def __init__(self, is_trainable: Callable[[str], bool], lora: LoraConfig) -> None:
        self.is_trainable, self.lora = is_trainable, lora
        self.costs = {field.name: Cost() for field in dataclasses.fields(StepFlops)}

    def trains(self, module: str, *leaves: str) -> bool:
        return any(self.is_trainable(f"{module}/{leaf}") for leaf in leaves)

    def linear(
        self, part: str, module: str, x: bool, rows: float, inputs: int, outputs: int, bias: bool = True
    ) -> bool:
        """y = x · kernel (+ bias), where ``x`` says whether x needs a gradient. Returns whether y does."""
        product, kernel = 2.0 * rows * inputs * outputs, self.trains(module, "kernel")
        self.costs[part].forward += product
        self.costs[part].backward += product * (x + kernel)
        y = x or kernel or (bias and self.trains(module, "bias"))
        if self.lora.rank and re.search(self.lora.targets, module):
            down, up = (2.0 * rows * self.lora.rank * width for width in (inputs, outputs))
            a, b = self.trains(module, "lora_a"), self.trains(module, "lora_b")
            self.costs[part].forward += down + up
            self.costs[part].backward += down * (x + a) + up * ((x or a) + b)
            y = y or a or b
        return y

    def attention(self, part: str, q: bool, k: bool, v: bool, pairs: float, width: int) -> bool:
        """softmax(q · k) · v over query heads of ``width`` in all. Returns whether the result needs a gradient."""
        product, scores = 2.0 * pairs * width, q or k
        self.costs[part].forward += 2 * product
        self.costs[part].backward += product * (q + k + scores + v)
        return scores or v
