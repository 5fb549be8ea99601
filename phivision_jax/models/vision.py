"""The vision side of the model: the interface that ``PhiVision`` needs, and the choice of an implementation.

Another encoder, or early fusion (no encoder: features made from the pixels themselves), implements ``VisionSide`` and
gets a name in ``VISION_SIDES``; the projector's input width, merging and splicing follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from phivision_jax.batch import Batch
from phivision_jax.config import VisionConfig
from phivision_jax.models.siglip2 import Siglip2Encoder


class VisionSide(Protocol):
    """An ``nnx.Module`` that turns a batch's patches into features.

    It may read ``patches``, ``patch_segments``, ``patch_coords`` and ``patch_grid``. Features of one image must not
    depend on others; those of padding (segment 0) are finite and never used. P is at least 1.
    """

    width: int
    """C, the channels of a feature: the projector's input is ``projector.merge_size`` of them."""

    def __call__(self, batch: Batch) -> Float[Array, "B R P C"]: ...


VISION_SIDES: dict[str, Callable[..., VisionSide]] = {"siglip2": Siglip2Encoder}
"""Implementations by ``VisionConfig.encoder``, constructed like ``make_vision_side``."""


def make_vision_side(cfg: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, remat: str) -> VisionSide:
    """The vision side that a configuration asks for, with random weights.

    Args:
      dtype: of the computation and the features.
      remat: policy of its layers (``models/remat.py``).

    Raises:
      ValueError: for an encoder without an entry in ``VISION_SIDES``.
    """
    if cfg.encoder not in VISION_SIDES:
        raise ValueError(f"vision.encoder {cfg.encoder!r} does not exist; choose one of {', '.join(VISION_SIDES)}")
    return VISION_SIDES[cfg.encoder](cfg, rngs=rngs, dtype=dtype, remat=remat)
