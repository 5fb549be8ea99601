"""One run, as frozen dataclasses. ``configs/*.py`` state decisions over these defaults; ml_collections ends there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from phivision_jax.batch import RowShape
from phivision_jax.config import LoraConfig, ModelConfig, dataclass_from_dict
from phivision_jax.rows import row_shape
from phivision_jax.sharding import MeshAxes, default_sizes


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it is packed: B rows of T columns, each with R vision rows of P patches."""

    path: str = ""
    """What to train on: a dataset directory (``phivision data import``), or a mixture of several (.toml)."""
    stage: str = ""
    """Only this stage of the mixture; empty: all of them, one after the other."""
    replay_path: str = ""
    """Dataset directory to rehearse beside ``path``, so that what the starting checkpoint knew is kept."""
    replay_share: float = 0.0
    """Share of the examples drawn from ``replay_path``; they come on top of the passes over ``path``."""
    validation_path: str = ""
    """Dataset directory or mixture (.toml) whose loss is taken every ``validate_every`` steps; empty for none."""
    validation_share: float = 0.0
    """Share of the records of ``path`` that are kept out of training for the same purpose."""
    loss_weights: tuple[tuple[str, float], ...] = ()
    """(regular expression, weight) pairs tried in order on an example's mode and task, like "think/math"; the first
    that matches anywhere multiplies the weights of its target tokens ("^think" is what thinks: "nothink" has "think" in
    it). The loss is then the weighted mean; the losses
    by mode and task, and the validation loss, stay plain means."""
    eval_path: str = ""
    """Dataset directory to score answers on; empty for none."""
    batch_rows: int = 8
    """B, rows of a step over all hosts; more than fit at a time are taken in ``microbatches``."""
    length: int = 8192
    """T, columns of a row: text tokens and one for each patch."""
    vision_rows: int = 1
    """R, vision rows of a row; each takes whole images."""
    num_patches: int = 7168
    """P, patches of a vision row."""
    epochs: int = 1
    """Passes over the data, where a mixture says nothing else; training is as long as ``optim.steps`` says."""
    on_overflow: Literal["drop", "resize", "error"] = "drop"
    """Records that no row takes: left out and named, given fewer patches where that helps, or an error."""
    max_bad: float = 0.01
    """Training stops when more than this share of the examples cannot be decoded."""
    plan: str = ""
    """Directory of a plan made beforehand (``phivision data plan``) with these settings; empty: made at the start."""
    seed: int = 0
    """Of the order of the examples, and of which are kept out for validation."""
    num_threads: int = 4
    """Threads that decode images on each host."""

    def row_shape(self, model: ModelConfig) -> RowShape:
        """The shape of one row of a batch for this model."""
        return row_shape(model, self.length, self.vision_rows, self.num_patches)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up then cosine decay, clipping by global norm.

    ``lr_rules`` are (regular expression, multiplier) pairs tried in order on a parameter's path, like
    ``vision/layers/mlp/fc1/kernel``; the first that matches anywhere scales the learning rate, and 0 freezes: no
    gradient is computed and no optimizer state kept. Stage 1, say: (("projector", 1.0), (".", 0.0)).
    """

    learning_rate: float = 2e-5
    """At its highest, after the warm-up; ``lr_rules`` multiply it for parts of the model."""
    steps: int = 0
    """Length of the training. 0: to the end of the plan."""
    tokens: int = 0
    """Length of the training in tokens, where ``steps`` is 0; a step counts B · T. 0: to the end of the plan."""
    warmup_steps: int = 100
    """Over which the learning rate rises from 0."""
    warmup_tokens: int = 0
    """Warm-up in tokens, instead of ``warmup_steps``."""
    final_lr_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    b1: float = 0.9
    """Adam's decay of the mean of gradients."""
    b2: float = 0.95
    """Adam's decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of these."""
    weight_decay: float = 0.0
    """Applied to kernels of linear layers only: no norms, biases, embeddings."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm over everything that trains."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of both moments as they are kept; bfloat16 halves the optimizer's memory and needs b2 <= 0.99."""
    lr_rules: tuple[tuple[str, float], ...] = ()
    """(regular expression, multiplier) pairs, as above; where none matches, and where there are none: 1."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Steps that are not taken: a loss or gradient that is not finite, or a loss far above those before it."""

    spike: float = 8.0
    """A loss is a spike where it exceeds the running mean of accepted losses by so many of their standard deviations;
    0: no loss is."""
    warmup: int = 100
    """Accepted steps before the first spike can be told."""
    patience: int = 8
    """Training stops after so many steps in a row that were not taken."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (``sharding.py`` says what each is for).

    −1 takes what is left. Left to themselves, fsdp is groups of at most 32 devices and data the copies beyond.
    """

    slice: int = -1
    """As many as the devices are in."""
    data: int = -1
    """Copies of the model."""
    fsdp: int = -1
    """Devices that share a copy's parameters and take rows of their own."""
    tensor: int = 1
    """Devices that share every matrix product."""
    context: int = -1
    """Devices that share a row; left open: as ``training/device_layout.py`` has it, mostly 1."""

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 1 and (size != -1 or axis == "tensor"):
                raise ValueError(f"mesh.{axis} is {size}; give a positive size" + ", or -1" * (axis != "tensor"))

    def sizes(self, num_devices: int, slices: int = 1) -> dict[str, int]:
        """Axis sizes with −1 resolved.

        Raises:
          ValueError: for a −1 that nothing resolves; when what is given does not divide the devices.
        """
        slices, context = slices if self.slice == -1 else self.slice, max(self.context, 1)
        if self.data == -1 and self.fsdp == -1:
            return default_sizes(num_devices, slices, self.tensor, context)
        sizes = dataclasses.asdict(self) | {"slice": slices, "context": context}
        if open_axes := [axis for axis, size in sizes.items() if size == -1]:
            rest = math.prod(size for size in sizes.values() if size != -1)
            sizes[open_axes[0]] = max(num_devices // rest, 1)
        return sizes


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    guard: GuardConfig = GuardConfig()
    mesh: MeshConfig = MeshConfig()
    sharding_rules: tuple[tuple[str, str], ...] = ()
    """(logical axis, mesh axes) pairs that replace rules of ``sharding.RULES``, like (("kv_heads", ""),): no mesh axis
    replicates, several are separated by commas."""
    init_from: str = ""
    """Checkpoint (ours or a Hugging Face directory) to start from; empty for random weights."""
    model_from: Literal["config", "init_from"] = "config"
    """Whose architecture is trained: ``model``'s, which ``init_from`` must have too, or that of ``init_from``,
    whatever it is; of ``model`` then only settings (image_attention, image_layout, min_patches, max_patches) other than
    their defaults count."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation; parameters and optimizer state are fp32."""
    remat: str = "auto"
    """What a decoder layer keeps for its backward pass (``models/remat.py``); "auto": what the devices hold."""
    vision_remat: str = "auto"
    """What a vision block keeps."""
    microbatches: int = 0
    """Parts into which the rows of a step are cut, one after the other: as many times less memory for activations.
    0: as many as the devices need (``training/device_layout.py``)."""
    seed: int = 0
    """Of the parameters that no checkpoint gives."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one always follows the last step."""
    keep_checkpoints: int = 3
    """The last so many; a damaged one falls back to the one before."""
    keep_every: int = 0
    """Steps that are multiples of this keep their checkpoints as well; 0 for none."""
    keep_best: str = ""
    """The checkpoint with the highest value of this metric ("eval/accuracy"), or with a minus in front the lowest
    ("-loss"), is kept as well; empty for none. Steps whose checkpoint has no such value do not count."""
    eval_every: int = 0
    """Steps between evaluations during training; 0 for none. One always follows the last step."""
    eval_examples: int = 1000
    """How many examples of ``data.eval_path`` those score (an even sample)."""
    eval_batch: int = 64
    """Questions answered at a time."""
    max_new_tokens: int = 8
    """Where such an answer ends at the latest."""
    samples: int = 4
    """How many of those answers go to TensorBoard with their pictures."""
    validate_every: int = 0
    """Steps between measurements of the validation loss; 0 for none. One always follows the last step."""
    validate_batches: int = 16
    """Most batches that such a measurement takes."""
    wandb: str = ""
    """Project of Weights & Biases to log to as well; empty for none."""
    profile: str = ""
    """Steps to trace with ``jax.profiler``, like "100:103"; empty for none."""
    slow_step: float = 0.0
    """A step that takes so many times the median has the next three traced, once; 0 for never."""
    step_timeout_s: float = 600.0
    """Training stops with a message where nothing has happened for so long after compilation."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From nested plain dicts, tokens as steps; a misspelt field is an error that names the nearest one."""
        return dataclass_from_dict(cls, values).in_steps()

    @property
    def rules(self) -> dict[str, MeshAxes]:
        """``sharding_rules`` as ``sharding.override_rules`` takes them."""
        return {axis: tuple(filter(None, mesh_axes.split(","))) or None for axis, mesh_axes in self.sharding_rules}

    def in_steps(self) -> RunConfig:
        """With ``optim.tokens`` and ``optim.warmup_tokens`` as steps of B · T tokens, rounded.

        Raises:
          ValueError: for both steps and tokens, and for less than none of anything.
        """
        optim, step = self.optim, self.data.batch_rows * self.data.length
        for name in ("steps", "tokens", "warmup_steps", "warmup_tokens"):
            if (value := getattr(optim, name)) < 0:
                raise ValueError(f"optim.{name} is {value}; it cannot be negative")
        if optim.steps and optim.tokens:
            raise ValueError(
                f"optim.steps={optim.steps} and optim.tokens={optim.tokens} both say how long training is; set one to 0"
            )
        changes: dict[str, Any] = {"tokens": 0, "warmup_tokens": 0}
        if optim.tokens:
            changes["steps"] = max(1, round(optim.tokens / step))
        if optim.warmup_tokens:
            changes["warmup_steps"] = round(optim.warmup_tokens / step)
        return dataclasses.replace(self, optim=dataclasses.replace(optim, **changes))

    def with_model(self, found: ModelConfig, where: str) -> RunConfig:
        """With the model to train: that of the checkpoint ``where``, which is ``found``, as ``model_from`` says.

        Raises:
          ValueError: when ``model`` asks for another architecture; names the first field.
        """
        follow, released = self.model_from == "init_from", ModelConfig()
        for part in ("vision", "projector", "decoder"):
            ours, theirs, default = (getattr(model, part) for model in (self.model, found, released))
            for name in (field.name for field in dataclasses.fields(ours)):
                here, there = getattr(ours, name), getattr(theirs, name)
                if here != there and not (follow and here == getattr(default, name)):
                    what = "leave model as it is" if follow else "model_from='init_from' takes the checkpoint's"
                    raise ValueError(
                        f"{where} holds another model than the configuration: model.{part}.{name} is {there} there, "
                        f"{here} here; {what}"
                    )
        names = ("image_attention", "image_layout", "min_patches", "max_patches")
        settings = {name: getattr(self.model, name) for name in names}
        if follow:
            settings = {name: value for name, value in settings.items() if value != getattr(released, name)}
        return dataclasses.replace(self, model=dataclasses.replace(found, **settings))
