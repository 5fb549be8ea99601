"""The tables: which Hugging Face tensor is which leaf of our parameter tree. The only place that knows both names.

One `Leaf` per array of ours. Hugging Face stores a linear layer as [out, in] and fuses q|k|v and gate|up along `out`;
we store [in…, out…], unfused, stacked over layers. So every leaf, in every layer, is a contiguous run of *rows* of one
Hugging Face tensor, and that run is the unit in which everything here is read, turned and written:

    model.layers.3.self_attn.qkv_proj.weight  [(N+2K)·H, D]          decoder/layers/self_attn/…
      rows      0 …     N·H   ─────────────── transposed ──────────►   q_proj/kernel [L, D, N, H]  at layer 3
      rows    N·H … (N+K)·H   ─────────────── transposed ──────────►   k_proj/kernel [L, D, K, H]  at layer 3
      rows (N+K)·H … (N+2K)·H ─────────────── transposed ──────────►   v_proj/kernel [L, D, K, H]  at layer 3

Letters are the project's axis legend; C is the vision width, D the decoder's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig

type Shape = tuple[int, ...]
type Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One row of the table: an array of ours and the rows of Hugging Face tensors that it is made of."""

    path: str
    """Ours: ``decoder/layers/mlp/up_proj/kernel``."""
    names: tuple[str, ...]
    """Theirs: one tensor per layer, or a single one when the leaf is not stacked."""
    rows: Shape
    """Our axes that are their rows (the outputs of a linear layer)."""
    rest: Shape = ()
    """Our other axes (the inputs of a linear layer)."""
    transposed: bool = False
    """A kernel: theirs [rows, rest], ours [rest…, rows…]. Otherwise both are [rows…, rest…]."""
    start: int = 0
    """The first of our rows in a fused tensor."""
    stacked: bool = False
    """Whether our array has a leading layer axis."""

    @property
    def layer_shape(self) -> Shape:
        """The shape of ours without the layer axis."""
        return self.rest + self.rows if self.transposed else self.rows + self.rest

    @property
    def shape(self) -> Shape:
        return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

    @property
    def num_rows(self) -> int:
        return math.prod(self.rows)

    @property
    def row_shape(self) -> Shape:
        """One row of theirs."""
        return (math.prod(self.rest),) if self.transposed else self.rest

    @property
    def row_axis(self) -> int:
        """The axis of ``layer_shape`` that a run of their rows cuts."""
        return len(self.rest) if self.transposed else 0

    @property
    def rows_per_index(self) -> int:
        """Their rows under one index of that axis: H where ours is [N, H]."""
        return math.prod(self.rows[1:])

    def to_ours(self, block: np.ndarray) -> np.ndarray:
        """Their rows [n, …] in our axes (a view): the whole of a layer, or a run of it along ``row_axis``."""
        rows = (len(block) // self.rows_per_index, *self.rows[1:])
        return block.T.reshape(*self.rest, *rows) if self.transposed else block.reshape(*rows, *self.rest)

    def to_theirs(self, block: np.ndarray) -> np.ndarray:
        """The inverse of ``to_ours``."""
        if self.transposed:
            return block.reshape(math.prod(self.rest), -1).T
        return block.reshape(-1, *self.row_shape)


# ---------------------------------------------------------------------------------------------------------------------
# The rows. A "{}" in a name is the layer.


def _linear(name: str, path: str, inputs: Shape, outputs: Shape, start: int = 0, bias: bool = True) -> list[Leaf]:
    weight = Leaf(f"{path}/kernel", (f"{name}.weight",), outputs, inputs, transposed=True, start=start)
    return [weight, Leaf(f"{path}/bias", (f"{name}.bias",), outputs)] if bias else [weight]


def _fused(name: str, parts: Iterable[tuple[str, Shape, Shape]]) -> list[Leaf]:
    """Linear layers without bias that share one tensor, their rows one after the other."""
    leaves: list[Leaf] = []
    for path, inputs, outputs in parts:
        leaves += _linear(name, path, inputs, outputs, sum(leaf.num_rows for leaf in leaves), bias=False)
    return leaves


def _norm(name: str, path: str, width: int, bias: bool = True) -> list[Leaf]:
    scale = Leaf(f"{path}/scale", (f"{name}.weight",), (width,))
    return [scale, Leaf(f"{path}/bias", (f"{name}.bias",), (width,))] if bias else [scale]


def _stack(leaves: Iterable[Leaf], num_layers: int) -> list[Leaf]:
    def of(leaf: Leaf) -> Leaf:
        return dataclasses.replace(leaf, names=tuple(leaf.names[0].format(i) for i in range(num_layers)), stacked=True)

    return [of(leaf) for leaf in leaves]


def decoder_leaves(c: DecoderConfig) -> list[Leaf]:
    """243 tensors in the released model. Also all of a text-only Phi-4."""
    V, D, F, N, K, H = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    theirs, ours = "model.layers.{}", "decoder/layers"
    qkv = [("q_proj", (D,), (N, H)), ("k_proj", (D,), (K, H)), ("v_proj", (D,), (K, H))]
    layer = [
        *_norm(f"{theirs}.input_layernorm", f"{ours}/input_layernorm", D, bias=False),
        *_fused(f"{theirs}.self_attn.qkv_proj", [(f"{ours}/self_attn/{name}", i, o) for name, i, o in qkv]),
        *_linear(f"{theirs}.self_attn.o_proj", f"{ours}/self_attn/o_proj", (N, H), (D,), bias=False),
        *_norm(f"{theirs}.post_attention_layernorm", f"{ours}/post_attention_layernorm", D, bias=False),
        *_fused(
            f"{theirs}.mlp.gate_up_proj", [(f"{ours}/mlp/{name}", (D,), (F,)) for name in ("gate_proj", "up_proj")]
        ),
        *_linear(f"{theirs}.mlp.down_proj", f"{ours}/mlp/down_proj", (F,), (D,), bias=False),
    ]
    return [
        Leaf("decoder/embed_tokens/embedding", ("model.embed_tokens.weight",), (V,), (D,)),
        *_stack(layer, c.num_layers),
        *_norm("model.norm", "decoder/norm", D, bias=False),
        Leaf("decoder/lm_head/kernel", ("lm_head.weight",), (V,), (D,)),
    ]


def _vision_layer(c: VisionConfig, theirs: str, ours: str) -> list[Leaf]:
    C, F, N, H = c.hidden_size, c.intermediate_size, c.num_heads, c.head_dim
    qkv = (
        _linear(f"{theirs}.self_attn.{x}", f"{ours}/self_attn/{x}", (C,), (N, H))
        for x in ("q_proj", "k_proj", "v_proj")
    )
    return [
        *_norm(f"{theirs}.layer_norm1", f"{ours}/layer_norm1", C),
        *(leaf for leaves in qkv for leaf in leaves),
        *_linear(f"{theirs}.self_attn.out_proj", f"{ours}/self_attn/out_proj", (N, H), (C,)),
        *_norm(f"{theirs}.layer_norm2", f"{ours}/layer_norm2", C),
        *_linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1", (C,), (F,)),
        *_linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2", (F,), (C,)),
    ]


def vision_leaves(c: VisionConfig, prefix: str = "model.vision_tower.vision_tower.vision_model") -> list[Leaf]:
    """448 tensors in the released model: the blocks that run, then ``vision_tail``, which never does."""
    C, F = c.hidden_size, c.intermediate_size
    blocks, tail, head = f"{prefix}.encoder.layers", "vision_tail", f"{prefix}.head"
    patch, position = f"{prefix}.embeddings.patch_embedding", f"{prefix}.embeddings.position_embedding"
    return [
        *_linear(patch, "vision/patch_embedding", (c.patch_dim,), (C,)),
        Leaf("vision/position_embedding/embedding", (f"{position}.weight",), (c.num_positions,), (C,)),
        *_stack(_vision_layer(c, blocks + ".{}", "vision/layers"), c.num_active_layers),
        *_vision_layer(c, f"{blocks}.{c.num_layers - 1}", f"{tail}/layer"),
        *_norm(f"{prefix}.post_layernorm", f"{tail}/post_layernorm", C),
        Leaf(f"{tail}/head/probe", (f"{head}.probe",), (1,), (1, C)),
        Leaf(f"{tail}/head/attention/in_proj/kernel", (f"{head}.attention.in_proj_weight",), (3 * C,), (C,), True),
        Leaf(f"{tail}/head/attention/in_proj/bias", (f"{head}.attention.in_proj_bias",), (3 * C,)),
        *_linear(f"{head}.attention.out_proj", f"{tail}/head/attention/out_proj", (C,), (C,)),
        *_norm(f"{head}.layernorm", f"{tail}/head/layernorm", C),
        *_linear(f"{head}.mlp.fc1", f"{tail}/head/mlp/fc1", (C,), (F,)),
        *_linear(f"{head}.mlp.fc2", f"{tail}/head/mlp/fc2", (F,), (C,)),
    ]


def projector_leaves(c: ModelConfig) -> list[Leaf]:
    """4 tensors. The 1 of ``mm_projector.1`` is the GELU between them."""
    C, D, G = c.vision.hidden_size, c.decoder.hidden_size, c.projector.merge_size
    fc1 = _linear("model.mm_projector.0", "projector/fc1", (G * C,), (D,))
    return [*fc1, *_linear("model.mm_projector.2", "projector/fc2", (D,), (D,))]


def model_leaves(config: ModelConfig) -> list[Leaf]:
    """The released model: 695 tensors."""
    return decoder_leaves(config.decoder) + vision_leaves(config.vision) + projector_leaves(config)


SIGLIP2_PREFIX = "vision_model"
"""A SigLIP-2 checkpoint of its own has the vision tensors under this prefix …"""
SIGLIP2_UNUSED = ("text_model.", "logit_scale", "logit_bias")
"""… and besides them its text tower and the scalars of its loss, which have no place here."""


# ---------------------------------------------------------------------------------------------------------------------
# What follows from a table.


def hf_shapes(leaves: Iterable[Leaf]) -> dict[str, Shape]:
    """Their tensors and shapes, in table order, fused ones put together."""
    shapes: dict[str, Shape] = {}
    for leaf in leaves:
        for name in leaf.names:
            before = shapes[name][0] if name in shapes else 0
            if before != leaf.start:
                raise AssertionError(f"{leaf.path} starts at row {leaf.start} of {name}, not at {before}")
            shapes[name] = (before + leaf.num_rows, *leaf.row_shape)
    return shapes


def check(have: Mapping[str, Shape], want: Mapping[str, Shape], where: str) -> None:
    """Strict accounting: the same names and the same shapes, or an error that lists the difference on one line.

    Raises:
      ValueError: naming what is missing, extra or mis-shaped, each list cut after a few.
    """

    def listed(what: str, names: Iterable[str]) -> str:
        names = list(names)
        more = f" … and {len(names) - 4} more" if len(names) > 4 else ""
        return f"{len(names)} {what}: {', '.join(names[:4])}{more}"

    shaped = (f"{n} {list(have[n])} (expected {list(want[n])})" for n in want if n in have and have[n] != want[n])
    faults = {"missing": [n for n in want if n not in have], "extra": [n for n in have if n not in want]}
    faults["mis-shaped"] = list(shaped)
    if any(faults.values()):
        raise ValueError(f"{where}: " + "; ".join(listed(what, names) for what, names in faults.items() if names))


def _nest(flat: Iterable[tuple[str, Any]]) -> Tree:
    tree: Tree = {}
    for path, value in flat:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("decoder/norm/scale", array)`` … of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def build_tree(make: Callable[[Leaf], Any], config: ModelConfig, vision_tail: bool) -> Tree:
    """The nested dict of ``make(leaf)``, with or without the part that never runs."""
    leaves = (leaf for leaf in model_leaves(config) if vision_tail or not leaf.path.startswith("vision_tail/"))
    return _nest((leaf.path, make(leaf)) for leaf in leaves)


def abstract_params(config: ModelConfig, dtype: Any = None, *, vision_tail: bool = True) -> Tree:
    """The parameter tree of a checkpoint as ``jax.ShapeDtypeStruct`` (float32 by default); allocates nothing."""
    import jax  # here and not above: the converter itself has no use for jax

    return build_tree(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or np.float32), config, vision_tail)


def tree_from_hf(get_tensor: Callable[[str], np.ndarray], config: ModelConfig, *, vision_tail: bool = False) -> Tree:
    """Our parameter tree, in NumPy, from their tensors by name: for small models and for tests.

    Raises:
      ValueError: when a tensor has another shape than the table says.
    """
    want = hf_shapes(model_leaves(config))

    def rows(leaf: Leaf, name: str) -> np.ndarray:
        tensor = np.asarray(get_tensor(name))
        check({name: tensor.shape}, {name: want[name]}, "tree_from_hf")
        return leaf.to_ours(tensor[leaf.start : leaf.start + leaf.num_rows])

    def make(leaf: Leaf) -> np.ndarray:
        layers = [rows(leaf, name) for name in leaf.names]
        return np.stack(layers) if leaf.stacked else np.ascontiguousarray(layers[0])

    return build_tree(make, config, vision_tail)


def hf_tensors(params: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, name by name in table order, from our tree (or gradients, which have its shape).

    ``vision_tail`` may be absent, as it is from a model and its gradients; its tensors are then left out.

    Raises:
      ValueError: when the tree has other leaves or shapes than the table says.
    """
    flat = dict(flatten(params))
    leaves = [
        leaf for leaf in model_leaves(config) if "vision_tail" in params or not leaf.path.startswith("vision_tail/")
    ]
    have = {path: tuple(array.shape) for path, array in flat.items()}
    check(have, {leaf.path: leaf.shape for leaf in leaves}, "hf_tensors")
    parts: dict[str, list[tuple[Leaf, int]]] = {}
    for leaf in leaves:
        for layer, name in enumerate(leaf.names):
            parts.setdefault(name, []).append((leaf, layer))
    for name, pieces in parts.items():
        arrays = [flat[leaf.path][layer] if leaf.stacked else flat[leaf.path] for leaf, layer in pieces]
        yield name, np.concatenate([p[0].to_theirs(np.asarray(a)) for p, a in zip(pieces, arrays, strict=True)])
