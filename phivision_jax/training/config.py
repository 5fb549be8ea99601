"""One run, as frozen dataclasses. ``configs/*.py`` state decisions over these defaults; ml_collections ends there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from phivision_jax.config import ModelConfig, dataclass_from_dict


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is packed: B rows of T columns, each with R vision rows of P patches."""

    path: str = ""
    """What to train on: a dataset directory (``phivision data import``), or a mixture of several (.toml)."""
    stage: str = ""
    """Only this stage of the mixture; empty: all of them, one after the other."""
    eval_path: str = ""
    """Dataset directory to score answers on; empty for none."""
    batch_rows: int = 8
    """B, over all hosts."""
    length: int = 8192
    """T."""
    vision_rows: int = 1
    """R."""
    num_patches: int = 7168
    """P."""
    epochs: int = 1
    """Passes over the data, where a mixture says nothing else; training is as long as ``optim.steps`` says."""
    on_overflow: Literal["drop", "resize", "error"] = "drop"
    """Records that no row takes: left out and named, given fewer patches where that helps, or an error."""
    max_bad: float = 0.01
    """Training stops when more than this share of the examples cannot be decoded."""
    plan: str = ""
    """Directory of a plan made beforehand (``phivision data plan``) with these settings; empty: made at the start."""
    seed: int = 0
    num_threads: int = 4
    """Threads that decode images on each host."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up then cosine decay, clipping by global norm.

    ``lr_rules`` are (regular expression, multiplier) pairs tried in order on a parameter's path, like
    ``vision/layers/mlp/fc1/kernel``; the first that matches anywhere scales the learning rate, and 0 freezes: no
    gradient is computed and no optimizer state kept. Stage 1, say: (("projector", 1.0), (".", 0.0)).
    """

    learning_rate: float = 2e-5
    steps: int = 0
    """0: to the end of the plan."""
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to kernels of linear layers only: no norms, biases, embeddings."""
    clip_norm: float = 1.0
    lr_rules: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; −1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes with −1 resolved.

        Raises:
          ValueError: when more than one axis is −1.
        """
        sizes = dataclasses.asdict(self)
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise ValueError(f"mesh axes {', '.join(open_axes)} are all -1; at most one can take what is left")
        if open_axes:
            rest = math.prod(size for size in sizes.values() if size != -1)
            sizes[open_axes[0]] = max(num_devices // rest, 1)
        return sizes


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""
    """Checkpoint (ours or a Hugging Face directory) to start from; empty for random weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation; parameters and optimizer state are fp32."""
    remat: str = "full"
    """What a layer keeps for its backward pass (``models/remat.py``)."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    eval_every: int = 0
    """Steps between evaluations during training; 0 for none. One always follows the last step."""
    eval_examples: int = 1000
    """How many examples of ``data.eval_path`` those score (an even sample)."""
    eval_batch: int = 64
    max_new_tokens: int = 8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From nested plain dicts; a misspelt field is an error that names the nearest one."""
        return dataclass_from_dict(cls, values)
