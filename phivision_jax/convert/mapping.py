"""The table of Hugging Face tensors and our parameters: the only place that knows both names.

There is one ``Leaf`` per array of ours. Hugging Face stores a linear layer as [out, in] and fuses q|k|v and gate|up
along ``out``; we store [in…, out…], unfused, stacked over layers. So a layer of a leaf is a contiguous run of *rows* of
one Hugging Face tensor, and runs of rows are the unit of all reading, rearranging and writing in this package:

    model.layers.3.self_attn.qkv_proj.weight  [(N+2K)·H, D]          decoder/layers/self_attn/…
      rows      0 …     N·H   ──────── "(N H) D -> D N H" ────────►   q_proj/kernel [L, D, N, H]  at layer 3
      rows    N·H … (N+K)·H   ──────── "(K H) D -> D K H" ────────►   k_proj/kernel [L, D, K, H]  at layer 3
      rows (N+K)·H … (N+2K)·H ──────── "(K H) D -> D K H" ────────►   v_proj/kernel [L, D, K, H]  at layer 3

Axis letters are those of ``models/layers.py``, and E numbers of a patch (y rows, x columns, c colors), S entries of the
position table, J 3·C, O C as outputs, M inputs of the projector.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from einops import rearrange

from phivision_jax.config import FIXED, DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.io.messages import shorten

type Shape = tuple[int, ...]
type Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A row of the table: an array of ours, and the rows of Hugging Face tensors that it consists of."""

    path: str
    """Path of the array in our tree: ``decoder/layers/mlp/up_proj/kernel``."""
    names: tuple[str, ...]
    """Names of the Hugging Face tensors: one per layer, or a single one when the leaf is not stacked."""
    axes: str
    """Axes of a tensor's rows, and of one layer of ours: "(N H) D -> D N H". Both sides may merge axes; the one of ours
    that holds the rows is single."""
    sizes: Sizes = dataclasses.field(repr=False)
    """Sizes of these axes, and possibly of others."""
    start: int = 0
    """The leaf's first row in a fused tensor."""
    stacked: bool = False
    """True if our array has a leading layer axis."""

    @functools.cached_property
    def their_axes(self) -> list[list[str]]:
        """Each axis of theirs as the letters that it merges: [["N", "H"], ["D"]]."""
        return _groups(self.axes.split(" -> ")[0])

    @functools.cached_property
    def our_axes(self) -> list[list[str]]:
        """The same for one layer of ours: [["D"], ["N"], ["H"]]."""
        return _groups(self.axes.split(" -> ")[1])

    def _size(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    @property
    def layer_shape(self) -> Shape:
        """The shape of ours without the layer axis."""
        return tuple(map(self._size, self.our_axes))

    @property
    def shape(self) -> Shape:
        return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

    @property
    def num_rows(self) -> int:
        return self._size(self.their_axes[0])

    @property
    def row_shape(self) -> Shape:
        """The shape of one row of theirs."""
        return tuple(self._size(axes) for axes in self.their_axes[1:])

    @property
    def row_axis(self) -> int:
        """The axis of ``layer_shape`` along which a run of rows is a slice; 0 unless it is a kernel [in…, out…]."""
        return self.our_axes.index(self.their_axes[0][:1])

    @property
    def rows_per_index(self) -> int:
        """Rows of theirs at one index of that axis: H where ours is [N, H]."""
        return self._size(self.their_axes[0][1:])

    def region(self, layers: range, rows: range) -> tuple[slice, ...]:
        """The part of our array in which these layers and rows are stored."""
        inside = [slice(None)] * self.row_axis
        inside.append(slice(rows.start // self.rows_per_index, rows.stop // self.rows_per_index))
        return (slice(layers.start, layers.stop), *inside) if self.stacked else tuple(inside)

    def to_ours(self, block: np.ndarray) -> np.ndarray:
        """Rearrange rows of theirs [n, …] into our axes (a view): a layer, or a part of it along ``row_axis``."""
        return rearrange(block, self.axes, **self._sizes_in_rows)

    def to_theirs(self, block: np.ndarray) -> np.ndarray:
        """The inverse of ``to_ours``."""
        return rearrange(block, " -> ".join(reversed(self.axes.split(" -> "))), **self._sizes_in_rows)

    @functools.cached_property
    def _sizes_in_rows(self) -> dict[str, int]:
        """Sizes of all axes but the one along which a run of rows is cut."""
        return {axis: self.sizes[axis] for group in self.our_axes for axis in group if axis != self.their_axes[0][0]}


def _groups(axes: str) -> list[list[str]]:
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", axes)]


# ---------------------------------------------------------------------------------------------------------------------
# The table: Hugging Face tensor, our array, axes. "*" is both of weight (our kernel or scale) and bias. The rows of
# arrays that share a tensor follow each other.

type _Rows = tuple[tuple[str, str, str], ...]

_DECODER_LAYER: _Rows = (
    ("input_layernorm.weight", "input_layernorm/scale", "D -> D"),
    ("self_attn.qkv_proj.weight", "self_attn/q_proj/kernel", "(N H) D -> D N H"),
    ("self_attn.qkv_proj.weight", "self_attn/k_proj/kernel", "(K H) D -> D K H"),
    ("self_attn.qkv_proj.weight", "self_attn/v_proj/kernel", "(K H) D -> D K H"),
    ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "D (N H) -> N H D"),
    ("post_attention_layernorm.weight", "post_attention_layernorm/scale", "D -> D"),
    ("mlp.gate_up_proj.weight", "mlp/gate_proj/kernel", "F D -> D F"),
    ("mlp.gate_up_proj.weight", "mlp/up_proj/kernel", "F D -> D F"),
    ("mlp.down_proj.weight", "mlp/down_proj/kernel", "D F -> F D"),
)
_EMBED: _Rows = (("model.embed_tokens.weight", "embed_tokens/embedding", "V D -> V D"),)
_HEAD: _Rows = (("model.norm.weight", "norm/scale", "D -> D"), ("lm_head.weight", "lm_head/kernel", "V D -> V D"))

_PATCH_LINEAR: _Rows = (("patch_embedding.*", "patch_embedding/*", "C E -> E C"),)
# Of a fixed-resolution encoder it is a convolution without overlap: the same product, with the colors outermost.
_PATCH_CONVOLUTION: _Rows = (("patch_embedding.*", "patch_embedding/*", "C c y x -> (y x c) C"),)
_POSITIONS: _Rows = (("position_embedding.weight", "position_embedding/embedding", "S C -> S C"),)
_VISION_LAYER: _Rows = (
    ("layer_norm1.*", "layer_norm1/*", "C -> C"),
    ("self_attn.q_proj.*", "self_attn/q_proj/*", "(N H) C -> C N H"),
    ("self_attn.k_proj.*", "self_attn/k_proj/*", "(N H) C -> C N H"),
    ("self_attn.v_proj.*", "self_attn/v_proj/*", "(N H) C -> C N H"),
    ("self_attn.out_proj.*", "self_attn/out_proj/*", "C (N H) -> N H C"),
    ("layer_norm2.*", "layer_norm2/*", "C -> C"),
    ("mlp.fc1.*", "mlp/fc1/*", "F C -> C F"),
    ("mlp.fc2.*", "mlp/fc2/*", "C F -> F C"),
)
_VISION_HEAD: _Rows = (
    ("post_layernorm.*", "post_layernorm/*", "C -> C"),
    ("head.probe", "head/probe", "I T C -> I T C"),
    ("head.attention.in_proj_weight", "head/attention/in_proj/kernel", "J C -> C J"),
    ("head.attention.in_proj_bias", "head/attention/in_proj/bias", "J -> J"),
    ("head.attention.out_proj.*", "head/attention/out_proj/*", "O C -> C O"),
    ("head.layernorm.*", "head/layernorm/*", "C -> C"),
    ("head.mlp.fc1.*", "head/mlp/fc1/*", "F C -> C F"),
    ("head.mlp.fc2.*", "head/mlp/fc2/*", "C F -> F C"),
)
# The GELU between the layers is mm_projector.1 and has no tensors.
_PROJECTOR: _Rows = (("0.*", "fc1/*", "F M -> M F"), ("2.*", "fc2/*", "D F -> F D"))


def _leaves(rows: _Rows, sizes: Sizes, theirs: str, ours: str, num_layers: int | None = None) -> list[Leaf]:
    """The leaves of these rows, below two prefixes; stacked over layers if there is a number of them."""
    leaves: list[Leaf] = []
    filled: Counter[str] = Counter()

    def add(name: str, path: str, axes: str) -> None:
        names = tuple((theirs + name).format(i) for i in range(num_layers or 1))
        leaves.append(Leaf(ours + path, names, axes, sizes, filled[name], num_layers is not None))
        filled[name] += leaves[-1].num_rows

    for name, path, axes in rows:
        add(name.replace("*", "weight"), path.replace("*", "kernel" if " " in axes.split(" -> ")[0] else "scale"), axes)
        if name.endswith("*"):
            outputs = " ".join(leaves[-1].their_axes[0])
            add(name.replace("*", "bias"), path.replace("*", "bias"), f"({outputs}) -> {outputs}")
    return leaves


def decoder_leaves(c: DecoderConfig) -> list[Leaf]:
    """The decoder: 243 tensors in the released model, and all tensors of a text-only Phi-4."""
    sizes = {"V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size}
    sizes |= {"N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    return [
        *_leaves(_EMBED, sizes, "", "decoder/"),
        *_leaves(_DECODER_LAYER, sizes, "model.layers.{}.", "decoder/layers/", c.num_layers),
        *_leaves(_HEAD, sizes, "", "decoder/"),
    ]


def vision_leaves(c: VisionConfig, prefix: str = "model.vision_tower.vision_tower.vision_model") -> list[Leaf]:
    """The encoder, 448 tensors in the released model: the blocks that run, then ``vision_tail``, which never does.

    Early fusion has only the embeddings; their names are ours, since no Hugging Face model has such a part.
    """
    C, blocks = c.hidden_size, f"{prefix}.encoder.layers."
    sizes = {"C": C, "F": c.intermediate_size, "N": c.num_heads, "H": c.head_dim}
    sizes |= {"E": c.patch_dim, "S": c.num_positions, "J": 3 * C, "O": C, "I": 1, "T": 1}
    sizes |= {"y": c.patch_size, "x": c.patch_size, "c": 3}
    patches = _PATCH_CONVOLUTION if c.encoder == FIXED else _PATCH_LINEAR
    embeddings = _leaves(patches + _POSITIONS, sizes, f"{prefix}.embeddings.", "vision/")
    if not c.has_blocks:
        return embeddings
    return [
        *embeddings,
        *_leaves(_VISION_LAYER, sizes, blocks + "{}.", "vision/layers/", c.num_active_layers),
        *_leaves(_VISION_LAYER, sizes, f"{blocks}{c.num_layers - 1}.", "vision_tail/layer/"),
        *_leaves(_VISION_HEAD, sizes, f"{prefix}.", "vision_tail/"),
    ]


def projector_leaves(c: ModelConfig) -> list[Leaf]:
    """The projector: 4 tensors, or none in early fusion."""
    if not c.vision.has_blocks:
        return []
    D = c.decoder.hidden_size
    sizes = {"M": c.projector.merge_size * c.vision.hidden_size, "F": D, "D": D}
    return _leaves(_PROJECTOR, sizes, "model.mm_projector.", "projector/")


def model_leaves(config: ModelConfig) -> list[Leaf]:
    """The released model: 695 tensors."""
    return decoder_leaves(config.decoder) + vision_leaves(config.vision) + projector_leaves(config)


SIGLIP2_PREFIX = "vision_model"
"""Prefix of the vision tensors in a SigLIP-2 checkpoint."""
SIGLIP2_UNUSED = ("text_model.", "logit_scale", "logit_bias")
"""Prefixes of its other tensors, the text tower and the scalars of the loss, which this model does not have."""


# ---------------------------------------------------------------------------------------------------------------------
# Uses of the table.


def hf_shapes(leaves: Iterable[Leaf]) -> dict[str, Shape]:
    """Names and shapes of the Hugging Face tensors, in table order, fused ones complete."""
    return {name: (leaf.start + leaf.num_rows, *leaf.row_shape) for leaf in leaves for name in leaf.names}


def check(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Require the same names and shapes.

    Raises:
      ValueError: naming a few of those that are missing, extra or mis-shaped.
    """
    both = [name for name in expected if name in found]
    faults = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "mis-shaped": [f"{n} {[*found[n]]} (expected {[*expected[n]]})" for n in both if found[n] != expected[n]],
    }
    listed = []
    for fault, names in faults.items():
        more = f" … and {len(names) - 4} more" if len(names) > 4 else ""
        listed += [f"{len(names)} {fault}: {', '.join(map(shorten, names[:4]))}{more}"] if names else []
    if listed:
        raise ValueError(f"{where}: {'; '.join(listed)}")
