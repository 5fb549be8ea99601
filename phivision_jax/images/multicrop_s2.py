"""Multi-crop with S²: squares of 1,536 pixels, each by S² at 384, 768 and 1,536 pixels.

The report states the crop and the cap of 2,048 tokens. A crop has 576 tokens (patch 16) of three scales. There is no
compression: an average over areas has 16 features, four times as many with interpolation after it. Instead an image has
at most the 3 crops whose tokens fit the cap, and a larger one shrinks.
"""

from phivision_jax.images.layout import register_layout
from phivision_jax.images.s2 import SquaresS2


@register_layout("multicrop_s2")
class MultiCropS2(SquaresS2):
    """Crops of 4x4 tiles, whose scales are the complete crop, its quarters and its own resolution."""

    merge = (3, 16)
    report_cap = 2048
    sides = (1, 2, 4)
