"""The report's first experiment: five ways in which an image becomes tokens, on the 5B proxy.

    python train.py --config=configs/ablations/resolution.py:dynamic_s2 --run=runs/dynamic_s2 \
        --config.data.path=MIXTURE.toml
    phivision preflight --config=configs/ablations/resolution.py:multicrop --topology=v5p:4x4x4

    variant        image layout        cap      encoder (SigLIP-2 So400m, patch 16)
    dynamic_s2     dynamic_s2        3,096      fixed resolution, 384
    multicrop      multicrop         3,096      fixed resolution, 384
    multicrop_s2   multicrop_s2      2,048      fixed resolution, 384
    dynamic_2048   naflex            2,048      NaFlex
    dynamic_3600   naflex            3,600      NaFlex; the released model's, and the winner in the report
    early_fusion   naflex            3,600      none: not in the report

Strategies and caps are the report's (arXiv 2603.03975); docs/image_strategies.md has what it left open. Variants differ
in nothing but the vision side and the patches of a row, which hold one image of the largest size. The fixed-resolution
tower has patches of 16 pixels as well, so that a tile shows as much of the image per feature as NaFlex does.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from phivision_jax.config import EARLY_FUSION, FIXED, ModelConfig, VisionConfig
from phivision_jax.images.layout import with_layout

STRATEGIES = {
    "dynamic_s2": ("dynamic_s2", 3096),
    "multicrop": ("multicrop", 3096),
    "multicrop_s2": ("multicrop_s2", 2048),
    "dynamic_2048": ("naflex", 2048),
    "dynamic_3600": ("naflex", 3600),
    "early_fusion": ("naflex", 3600),
}


def model_for(variant: str, base: ModelConfig, tile_side: int, part: int = 1) -> ModelConfig:
    """The model of a variant.

    Args:
      base: a NaFlex model, which has everything else.
      tile_side: patches along a side of a tile.
      part: caps are divided by this.

    Raises:
      ValueError: for an unknown variant.
    """
    if variant not in STRATEGIES:
        raise ValueError(f"the variants are {', '.join(STRATEGIES)}, not {variant!r}")
    layout, cap = STRATEGIES[variant]
    vision = base.vision
    if layout != "naflex":
        vision = dataclasses.replace(vision, encoder=FIXED, num_positions=tile_side**2)
    if variant == "early_fusion":
        sizes = {"patch_size": vision.patch_size, "num_positions": vision.num_positions}
        vision = VisionConfig(EARLY_FUSION, hidden_size=base.decoder.hidden_size, **sizes)
    model = dataclasses.replace(base, vision=vision, image_layout=layout, tile_size=tile_side * vision.patch_size)
    return with_layout(model, f"{layout}:{cap // part}")


def get_config(variant: str = "dynamic_3600") -> ConfigDict:
    proxy = runpy.run_path(str(Path(__file__).parents[1] / "proxy_5b.py"))
    c = proxy["get_config"]()
    model = model_for(variant, ModelConfig(decoder=proxy["DECODER"]), tile_side=24)
    c.model.update(dataclasses.asdict(model))
    c.data.num_patches = -(-model.max_patches // 128) * 128  # blocks of the attention kernel
    return c
