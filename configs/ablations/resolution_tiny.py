"""The variants of ``configs/ablations/resolution.py`` on the small model of ``configs/tiny.py``.

    python train.py --config=configs/ablations/resolution_tiny.py:multicrop --run=runs/tiny_multicrop

1,500 steps take 2 to 12 minutes on two cores, the most with multicrop_s2.
Tiles have 4x4 patches of 8 pixels instead of 24x24 of 16, and caps are a 36th of the report's, as a tile's tokens are.
A tile of 32 pixels is half as wide as an image of easy-VQA.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig

TILE_SIDE = 4


def get_config(variant: str = "dynamic_3600") -> ConfigDict:
    here = Path(__file__).parent
    c = runpy.run_path(str(here.parent / "tiny.py"))["get_config"]()
    # A table of 8x8 positions: one for each patch of an image of 64 pixels, see configs/tiny.py.
    vision = VisionConfig(**{**c.model.vision.to_dict(), "num_positions": 64})
    base = ModelConfig(vision=vision, decoder=DecoderConfig(**c.model.decoder.to_dict()), min_patches=4)
    model_for = runpy.run_path(str(here / "resolution.py"))["model_for"]
    model = model_for(variant, base, TILE_SIDE, part=(24 // TILE_SIDE) ** 2)
    c.model.update(dataclasses.asdict(model))
    # A row has one image of the largest size, and two conversations about images of 64 pixels.
    c.data.update(length=256, num_patches=max(model.max_patches, 128))
    c.optim.steps = 1500
    return c
