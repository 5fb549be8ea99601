"""The work that a chip executes in a training step, recompute and padding included, for the roofline model."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from flax import nnx

from phivision_jax.config import DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from phivision_jax.hardware.flops import Workload, step_flops
from phivision_jax.models import phivision
from phivision_jax.preflight.model.roofline import Work
from phivision_jax.training import optim
from phivision_jax.training.run_config import MeshConfig, OptimConfig, ResolvedConfig

MATRIX_UNIT = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}
"""Width of the systolic array: heads that are narrower leave part of it idle."""

BLOCK = 1024
"""Queries and keys of a block of our attention kernel in the decoder (``splash.py``), forward and backward."""

VISION_BLOCK = 512
"""The same in the vision tower."""

# A layer's last product only enters a sum, so the backward pass never needs it.
_LAYER = frozenset({"elementwise", "qkv", "attention", "out", "gate_up"})
_BEHIND = frozenset({"elementwise", "out", "gate_up"})
RECOMPUTE: dict[str, frozenset[str]] = {
    "full": _LAYER,
    "attention": _BEHIND,
    "dots": frozenset({"elementwise"}),
    "none": frozenset(),
    "offload": _LAYER,
    "offload_attention": _BEHIND,
}
"""Parts of a layer that each policy of ``models/remat.py`` recomputes: products, the attention kernel, the rest.
Copies to the host and back are assumed to be hidden."""

OPTIMIZER_BYTES = 12  # per trained parameter: fp32 gradient and parameter read, parameter written; beside its moments
LOSS_BYTES = 24  # per token and entry of the vocabulary: fp32 logits touched three times forward, three times backward
WIRE = 2  # bytes of a weight or gradient between chips: bf16


def visited_pairs(
    length: int, segments: Sequence[int], block_q: int, block_kv: int, *, causal: bool = True, window: int = 0
) -> int:
    """Pairs in the blocks of a row that a kernel visits; it skips blocks without a visible pair.

    Args:
      segments: lengths of the row's segments in order; the positions after them are padding and see only themselves.
      window: most keys that a query sees, its own included; 0: no limit.

    Raises:
      ValueError: for segments longer than the row.
    """
    if sum(segments) > length:
        raise ValueError(f"segments of {sum(segments)} tokens do not fit a row of {length}")
    sizes = np.array([*segments, *[1] * (length - sum(segments))])
    ends = np.repeat(sizes.cumsum(), sizes) - 1  # last position of each position's segment
    top = np.arange(0, length, block_q)
    bottom = np.minimum(top + block_q, length) - 1
    oldest = np.maximum(ends[top] + 1 - np.repeat(sizes, sizes)[top], top - window + 1 if window else 0)
    newest = bottom if causal else ends[bottom]
    return int((newest // block_kv - oldest // block_kv + 1).sum()) * block_q * block_kv


@dataclasses.dataclass(frozen=True)
class Stack:
    """Equal transformer layers, and a chip's share of their work."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool
    tokens: float
    """Tokens of the chip's share of the step, padding included."""
    attention: tuple[float, float]
    """Pairs of a query and a key in the blocks that the attention kernel visits, for that share and over all layers,
    times the kernel's products: forward and backward."""
    recompute: Collection[str]
    """A value of ``RECOMPUTE``."""
    backward: float = 2.0
    """Ratio of backward to forward FLOPs of the products: 2 where all weights train, 1 where gradients only pass."""
    trained: float = 1.0
    """Share of the weights that have a gradient."""
    residual_split: bool = False
    """Norms and sums are split over ``tensor``; in our model every chip of a group runs all of them."""

    @property
    def products(self) -> dict[str, int]:
        """Parameters of a layer's products, by their names in ``RECOMPUTE``."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": self.width * (q + 2 * kv),
            "out": q * self.width,
            "gate_up": self.width * self.mlp * (2 if self.gated else 1),
            "down": self.mlp * self.width,
        }

    def work(self, mesh: MeshConfig, matrix_unit: int) -> Work:
        layer, returns = self.products, self.backward > 0
        again = frozenset(self.recompute) if returns else frozenset()
        forward = 2 * self.tokens * sum(layer.values())
        products = forward * (1 + self.backward) + 2 * self.tokens * sum(layer[name] for name in again & layer.keys())
        heads_width = self.heads * (-(-self.head_dim // matrix_unit) * matrix_unit)

        copies = 1 if self.residual_split else mesh.tensor
        rotated = (self.heads + self.kv_heads) * self.head_dim
        touched = 20 * self.width * copies + 4 * rotated + (6 if self.gated else 4) * self.mlp
        passes = 1 + 2 * returns + ("elementwise" in again)

        # A sum over a tensor group behind the last product of attention and of the MLP, backward before the first.
        sums = 2 + 2 * returns + ("out" in again) + ("down" in again)
        summed = 2 * self.tokens * mesh.tensor * self.width * WIRE * _others(mesh.tensor)
        kv = 2 * self.tokens * mesh.context * self.kv_heads * self.head_dim * WIRE * _others(mesh.context)
        weights = sum(layer.values()) * WIRE / mesh.tensor
        each = Work(
            matmul_flops=products,
            hbm_bytes=touched * self.tokens * passes,
            ici_bytes_exposed=sums * summed + kv * (1 + returns + ("qkv" in again)),
        )
        moved = _weights_moved(weights, mesh, 1 + returns, self.trained)
        forward_kernel, backward_kernel = self.attention
        kernels = forward_kernel * (1 + ("attention" in again)) + backward_kernel * returns
        return (each + moved) * self.layers + Work(attention_flops=2 * kernels * heads_width)


def head(
    vocab: int, width: int, tokens: float, mesh: MeshConfig, backward: float = 2, trained: float = 1, again: bool = True
) -> Work:
    """Work of the head and the loss for ``tokens`` on this chip.

    Args:
      backward, trained: as in ``Stack``.
      again: the logits are recomputed in the backward pass instead of being kept.
    """
    product, returns = 2 * tokens * width * vocab, backward > 0
    moved = _weights_moved(vocab * width * WIRE / mesh.tensor, mesh, 1 + returns, trained)
    return moved + Work(product * (1 + backward + (again and returns)), hbm_bytes=LOSS_BYTES * tokens * vocab)


def optimizer(parameters: float, mesh: MeshConfig, moment_bytes: int = 4) -> Work:
    """AdamW's traffic for a number of trained parameters, whose two moments are read and written."""
    return Work(hbm_bytes=(OPTIMIZER_BYTES + 4 * moment_bytes) * parameters / (mesh.fsdp * mesh.tensor))


def executed_work(cfg: ResolvedConfig, generation: str, examples: Sequence[int], images: Sequence[int] = ()) -> Work:
    """Work of one chip in a training step of our model.

    Args:
      examples: lengths of the examples in a typical row.
      images: patches of the images in a typical vision row.
    """
    vision, decoder, mesh = cfg.model.vision, cfg.model.decoder, cfg.mesh
    rows, shape, chips = cfg.data.batch_rows, cfg.data.row_shape(cfg.model), math.prod(dataclasses.astuple(cfg.mesh))
    tokens, patches = rows * shape.length, rows * shape.total_patches
    vision_tokens = rows * shape.merge[0] if shape.merge else patches
    # Complete rows, since padding costs time too. Attention is counted by blocks; here one pair represents any number.
    useful = Workload(tokens, 1, patches, min(patches, 1), vision_tokens)
    parts = step_flops(cfg.model, useful, cfg.optim.lr_rules, cfg.lora).parts
    kernels = step_flops(cfg.model, useful).parts
    weights, all_weights = _weights(cfg.model, cfg.optim.lr_rules, cfg.lora)
    trained = {prefix: weights[prefix] / size for prefix, size in all_weights.items()}

    def backward(part: str) -> float:
        """Everything but the forward products of the kernels: with LoRA also those of the adapters."""
        return parts[part].total / kernels[part].forward - 1

    def layers(
        part: str, sizes: DecoderConfig | VisionConfig, num: int, kv_heads: int, tokens: int, pairs: int, remat: str
    ) -> Work:
        """Work of a stack for ``tokens`` of the step, which have ``pairs`` in every layer."""
        visited = pairs * num / chips
        return Stack(
            *(num, sizes.hidden_size, sizes.intermediate_size, sizes.num_heads, kv_heads, sizes.head_dim),
            gated=part == "decoder",
            tokens=tokens / chips,
            attention=(2 * visited, 5 * visited),
            recompute=RECOMPUTE[remat],
            backward=backward(part),
            trained=trained[f"{part}/layers"],
        ).work(mesh, MATRIX_UNIT[generation])

    pairs = rows * visited_pairs(shape.length, examples, BLOCK, BLOCK)
    work = layers("decoder", decoder, decoder.num_layers, decoder.num_kv_heads, tokens, pairs, cfg.remat)
    V, D = decoder.vocab_size, decoder.hidden_size
    work += head(V, D, tokens / chips, mesh, backward("head"), trained["decoder/lm_head"])
    work += _weights_moved(V * D * WIRE / mesh.tensor, mesh, 1, trained["decoder/embed_tokens"])
    if patches:
        if vision.has_blocks:
            in_row = visited_pairs(shape.num_patches, images, VISION_BLOCK, VISION_BLOCK, causal=False)
            num, pairs = vision.num_active_layers, rows * shape.vision_rows * in_row
            work += layers("vision", vision, num, vision.num_heads, patches, pairs, cfg.vision_remat)
        work += Work(matmul_flops=parts["projector" if vision.has_blocks else "vision"].total / chips)
    moment_bytes = 2 if cfg.optim.moment_dtype == "bfloat16" else 4
    return work + optimizer(weights.total(), mesh, moment_bytes)


@functools.cache
def _weights(
    config: ModelConfig, lr_rules: tuple[tuple[str, float], ...], lora: LoraConfig
) -> tuple[Counter[str], Counter[str]]:
    """Trained and all parameters by the first two parts of their paths."""
    params = nnx.to_pure_dict(phivision.abstract(config, lora=lora)[1])
    trainable, frozen = optim.partition(params, OptimConfig(lr_rules=lr_rules))
    trained, total = Counter[str](), Counter[str]()
    for path, leaf in (trainable | frozen).items():
        prefix = "/".join(optim.path_name(path).split("/")[:2])
        trained[prefix] += leaf.size if path in trainable else 0
        total[prefix] += leaf.size
    return trained, total


def _others(parts: int) -> float:
    """Share of a result that comes from the other chips of a group."""
    return (parts - 1) / parts


def _weights_moved(weights: float, mesh: MeshConfig, gathers: int, trained: float) -> Work:
    """Traffic of weights gathered over fsdp and of gradients scattered over fsdp and summed over replicas and slices.

    Args:
      weights: bytes after the gather on a chip of one tensor group.
      gathers: number of gathers per step.
      trained: share of the weights with a gradient.
    """
    shard = weights / mesh.fsdp
    return Work(
        ici_bytes_overlapped=weights * _others(mesh.fsdp) * (gathers + trained)
        + 2 * shard * _others(mesh.data * mesh.context) * trained,
        dcn_bytes_overlapped=2 * shard * _others(mesh.slice) * trained,
    )
