"""The released processor's normalization of pixels, as a reference for what the model computes on the device."""

import numpy as np


def normalize(patches: np.ndarray) -> np.ndarray:
    """u8 pixels as f32 values in −1…1, bit for bit as the released processor computes them; any shape.

    It scales by 1/255 in float64, rounds to float32, then takes (x − 0.5) / 0.5 there: 256 values, so a table.
    """
    return NORMALIZED[patches]


NORMALIZED = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
