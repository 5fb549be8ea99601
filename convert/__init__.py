"""Weights between Hugging Face safetensors and our checkpoints, bit for bit. ``python -m convert --help``."""

from __future__ import annotations

from convert.load import load_hf_params
from convert.mapping import abstract_params, hf_tensors, tree_from_hf

__all__ = ["abstract_params", "hf_tensors", "load_hf_params", "tree_from_hf"]
