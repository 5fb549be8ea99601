"""Layouts of the released model by kind of device: group size, tokens at a time, remat policies.

``training/device_layout.py`` closes what a configuration leaves open with these tables. They are made for the released
model (15B, fp32 AdamW) and were checked with the TPU compiler (``docs/preflight.md``); a smaller model needs less
memory. ``phivision preflight --search`` looks for a better layout.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """Limits and remat policies for one kind of device."""

    fsdp: int
    """Largest group of devices that shares one replica of the parameters."""
    tokens: int
    """Most tokens that a device processes at a time."""
    remat: str
    """Policy of the decoder (``models/remat.py``)."""
    vision_remat: str
    """Policy of the vision tower."""


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "TPU v4": (Layout(32, 8192, "full", "full"),),
    "TPU v5 lite": (Layout(64, 8192, "offload_attention", "offload_attention"),),  # v5e
    "TPU v5": (Layout(32, 8192, "dots", "attention"), Layout(32, 32_768, "full", "full")),  # v5p
    # v6e: the SparseCores gather over one ring of the torus, 16 chips, while products run; over 32 they do not.
    "TPU v6 lite": (Layout(16, 8192, "offload_attention", "attention"),),
}
"""By JAX's device kind. The first layout whose ``tokens`` hold a row (or its share along ``context``) is used."""

OTHER = (Layout(32, 1 << 30, "full", "full"),)
"""For all other devices."""
