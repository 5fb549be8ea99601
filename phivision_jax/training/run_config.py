"""Everything a training run depends on, as frozen dataclasses; ``configs/*.py`` state decisions over these defaults.

``phivision train --config=FILE --help`` prints the text below each field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from phivision_jax import config
from phivision_jax.batch import RowShape
from phivision_jax.config import LoraConfig, ModelConfig
from phivision_jax.io.messages import shorten
from phivision_jax.rows import row_shape
from phivision_jax.sharding import FSDP_GROUP, MeshAxes, default_sizes

POSITIVE = {"batch_rows", "length", "vision_rows", "num_patches", "epochs", "eval_batch", "max_new_tokens"}
POSITIVE |= {"validate_batches", "keep_checkpoints"}
"""Settings that cannot be 0; none can be negative, but those of the mesh."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model to train. Settings that are None come from the checkpoint ``init_from``, or else the released model.

    The architecture (groups vision, projector and decoder, with the fields that ``config.py`` explains) cannot differ
    from the checkpoint's; the other settings can.
    """

    vision: config.VisionConfig | None = None
    projector: config.ProjectorConfig | None = None
    decoder: config.DecoderConfig | None = None
    image_attention: config.ImageAttention | None = None
    """Attention between the tokens of one image: "causal" (the released code) or "bidirectional" (its model card)."""
    image_layout: str | None = None
    """Name of the image layout, as registered in ``images/layout.py``."""
    min_patches: int | None = None
    """Images are resized to at least this many patches."""
    max_patches: int | None = None
    """Images are resized to at most this many patches."""
    tile_size: int | None = None
    """Side of a tile in pixels, for tiled image layouts."""
    max_image_tokens: int | None = None
    """Most vision tokens of an image, for tiled image layouts; None: the report's cap for that strategy."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, and how it is packed: B rows of T tokens, each with R vision rows of P patches."""

    path: str = ""
    """Training data: a dataset directory (``phivision data import``), or a mixture of several (.toml)."""
    stage: str = ""
    """Train on this stage of the mixture only; empty for all stages, one after the other."""
    replay_path: str = ""
    """Dataset directory to mix into ``path``, so that the model forgets less; needs ``replay_share``."""
    replay_share: float = 0.0
    """Share of all examples that come from ``replay_path``; they are added to the passes over ``path``."""
    validation_path: str = ""
    """Dataset directory or mixture (.toml) for the validation loss (``validate_every``); empty for none."""
    validation_share: float = 0.0
    """Share of the records of ``path`` that is held out of training for the validation loss."""
    loss_weights: tuple[tuple[str, float], ...] = ()
    """(regular expression, weight) pairs, like (("^think", 2.0),), for an example's "mode/task", like "think/math".
    The weight of the first match multiplies those of the target tokens. ("^" is needed: "nothink" contains "think".)
    Losses by mode and task, and the validation loss, remain unweighted."""
    eval_path: str = ""
    """Dataset directory for scoring generated answers (``eval_every``); empty for none."""
    batch_rows: int = 8
    """B: rows of one step over all hosts; ``microbatches`` splits them where memory is short."""
    length: int = 8192
    """T: tokens per row, text and images."""
    vision_rows: int = 1
    """R: vision rows per row; an image is never split between two vision rows."""
    num_patches: int = 7168
    """P: patches per vision row."""
    epochs: int = 1
    """Passes over the data, unless a mixture states its own; ``optim.steps`` may end training earlier."""
    on_overflow: Literal["drop", "resize", "error"] = "drop"
    """Records too large for a row: "drop" omits and lists them, "resize" reduces their images, "error" ends the run."""
    max_bad: float = 0.01
    """Stop training when more than this share of the examples cannot be decoded."""
    plan: str = ""
    """Directory of a plan that ``phivision data plan`` made with these settings; empty: the run makes its own."""
    seed: int = 0
    """Seed for example order and the validation split."""
    num_threads: int = 4
    """Threads per host that decode images."""

    def row_shape(self, model: ModelConfig) -> RowShape:
        """The shape of one row of a batch for this model."""
        return row_shape(model, self.length, self.vision_rows, self.num_patches)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up then cosine decay, clipping by global norm."""

    learning_rate: float = 2e-5
    """Peak learning rate, reached after the warm-up; ``lr_rules`` scale it for parts of the model."""
    steps: int = 0
    """Number of steps; 0 trains to the end of the plan."""
    tokens: int = 0
    """Length of training in tokens (B · T per step), in place of ``steps``; 0 trains to the end of the plan."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    warmup_tokens: int = 0
    """Warm-up in tokens, in place of ``warmup_steps``."""
    final_lr_ratio: float = 0.0
    """Learning rate of the last step, as a fraction of the peak."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Epsilon added to sqrt(v)."""
    weight_decay: float = 0.0
    """Weight decay of linear kernels; norms, biases and embeddings have none."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradients; larger ones are scaled down to it."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which both moments are stored; bfloat16 halves optimizer memory and needs b2 <= 0.99."""
    lr_rules: tuple[tuple[str, float], ...] = ()
    """(regular expression, multiplier) pairs for the paths of parameters, like ``vision/layers/mlp/fc1/kernel``.
    The first match scales the learning rate of a parameter; without a match it is not scaled. 0 freezes the parameter:
    it has no gradient and no optimizer state. (("projector", 1.0), (".", 0.0)) trains the projector only."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Skipped updates: those with a non-finite loss or gradient, and loss spikes."""

    spike: float = 8.0
    """Skip an update whose loss exceeds the running mean of accepted losses by this many standard deviations; 0: skip
    no spikes."""
    warmup: int = 100
    """Number of accepted updates before spikes are detected."""
    patience: int = 8
    """Stop training after this many skipped updates in a row."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis (``sharding.py`` describes the axes); −1 is chosen automatically.

    If ``data`` and ``fsdp`` are both −1, fsdp is the largest size that divides the devices, up to a limit for each kind
    of device (``hardware/layouts.py``), and data is the number of such groups.
    """

    slice: int = -1
    """Number of TPU slices."""
    data: int = -1
    """Number of replicas of the model in a slice."""
    fsdp: int = -1
    """Devices that shard a replica's parameters; each has rows of its own."""
    tensor: int = 1
    """Devices that shard every matrix product."""
    context: int = -1
    """Devices that share a row; mostly 1 if chosen automatically (``training/device_layout.py``)."""

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 1 and (size != -1 or axis == "tensor"):
                raise ValueError(f"mesh.{axis} is {size}; give a positive size" + ", or -1" * (axis != "tensor"))

    def sizes(self, num_devices: int, slices: int = 1, fsdp_group: int = FSDP_GROUP) -> dict[str, int]:
        """Axis sizes without −1; if both are open, data and fsdp form groups of at most ``fsdp_group`` devices.

        Raises:
          ValueError: when the sizes do not divide the devices.
        """
        slices, context = slices if self.slice == -1 else self.slice, max(self.context, 1)
        if self.data == -1 and self.fsdp == -1:
            return default_sizes(num_devices, slices, self.tensor, context, fsdp_group)
        sizes = dataclasses.asdict(self) | {"slice": slices, "context": context}
        if open_axes := [axis for axis, size in sizes.items() if size == -1]:
            rest = math.prod(size for size in sizes.values() if size != -1)
            sizes[open_axes[0]] = max(num_devices // rest, 1)
        return sizes


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run. Automatic values are chosen once the devices and the checkpoint are known."""

    model: ModelSettings | ModelConfig = ModelSettings()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    guard: GuardConfig = GuardConfig()
    mesh: MeshConfig = MeshConfig()
    sharding_rules: tuple[tuple[str, str], ...] = ()
    """(logical axis, mesh axes) pairs that replace rules of ``sharding.RULES``, like (("kv_heads", ""),). Several mesh
    axes are separated by commas; none replicates the logical axis."""
    init_from: str = ""
    """Starting checkpoint: one of this project, a run, a Hugging Face directory or id. Empty: random weights; the
    architecture is then given in ``model.vision`` and ``model.decoder``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation; parameters and optimizer state are float32."""
    remat: str = "auto"
    """Policy of ``models/remat.py``: values that a decoder layer keeps for its backward pass; "auto": automatic."""
    vision_remat: str = "auto"
    """Policy of ``models/remat.py`` for the vision layers; "auto": automatic."""
    microbatches: int = 0
    """Sequential parts of a step, each with an equal share of the rows, to divide the memory of activations;
    0: automatic."""
    seed: int = 0
    """Seed for parameters that no checkpoint provides."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep; with 2 or more, a run can continue although the newest is damaged."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0 for none."""
    keep_best: str = ""
    """Also keep the checkpoint with the highest value of this metric ("eval/accuracy"), or with a leading minus the
    lowest ("-validation/loss"); empty for none. Checkpoints that lack the metric are not compared."""
    eval_every: int = 0
    """Steps between evaluations on ``data.eval_path`` and ``eval_benchmarks``; 0 for none. The last step always has
    one."""
    eval_examples: int = 1000
    """Number of examples of ``data.eval_path`` that an evaluation scores, a random sample; 0 for all."""
    eval_benchmarks: str = ""
    """Benchmarks that an evaluation asks, separated by commas, as ``phivision eval --benchmarks`` takes them."""
    eval_benchmark_data: str = ""
    """Directories of their data, separated by commas, as ``phivision eval --benchmark-data`` takes them."""
    eval_benchmark_examples: int = 100
    """Number of items of each benchmark that an evaluation scores, a random sample; 0 for all."""
    eval_batch: int = 64
    """Number of questions that an evaluation answers at a time."""
    max_new_tokens: int = 8
    """Maximum length of a generated answer, in tokens."""
    samples: int = 4
    """Number of generated answers to show in TensorBoard, with their images."""
    validate_every: int = 0
    """Steps between measurements of the validation loss; 0 for none. The last step always has one."""
    validate_batches: int = 16
    """Maximum number of batches for one measurement of the validation loss."""
    wandb: str = ""
    """Weights & Biases project to log to in addition; empty for none."""
    profile: str = ""
    """Steps to trace with ``jax.profiler``, like "100:103"; empty for none."""
    slow_step: float = 0.0
    """Trace three steps after a step that takes more than this many times the median, once per start; 0: never."""
    step_timeout_s: float = 600.0
    """Seconds without progress, once the step is compiled, after which the process reports where it hangs and exits."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested dicts, with lengths in tokens turned into steps.

        Raises:
          ValueError: for an unknown field or a wrong value, as ``config.dataclass_from_dict``.
        """
        return config.dataclass_from_dict(cls, values).in_steps()

    @property
    def evaluates(self) -> bool:
        """True if generated answers are scored."""
        return bool(self.data.eval_path or self.eval_benchmarks)

    @property
    def rules(self) -> dict[str, MeshAxes]:
        """``sharding_rules`` as ``sharding.override_rules`` takes them."""
        return {axis: tuple(filter(None, mesh_axes.split(","))) or None for axis, mesh_axes in self.sharding_rules}

    def in_steps(self) -> Self:
        """Turn ``optim.tokens`` and ``optim.warmup_tokens`` into steps of B · T tokens, rounded.

        Raises:
          ValueError: when both steps and tokens are given, or a number out of range.
        """
        for where in ("", "data.", "optim.", "lora.", "guard."):
            for name, value in vars(getattr(self, where[:-1], self)).items():
                least = 1 if name in POSITIVE else 0
                if type(value) in (int, float) and not least <= value < 2**53:
                    raise ValueError(f"{where}{name} is {shorten(value)}; give a number of at least {least}")
        optim, step_tokens = self.optim, self.data.batch_rows * self.data.length
        if optim.steps and optim.tokens:
            raise ValueError(f"optim.steps={optim.steps} excludes optim.tokens={optim.tokens}; set one of them to 0")
        steps = max(1, round(optim.tokens / step_tokens)) if optim.tokens else optim.steps
        warmup = round(optim.warmup_tokens / step_tokens) if optim.warmup_tokens else optim.warmup_steps
        optim = dataclasses.replace(optim, steps=steps, tokens=0, warmup_steps=warmup, warmup_tokens=0)
        return dataclasses.replace(self, optim=optim)

    def model_over(self, base: ModelConfig) -> ModelConfig:
        """``base`` with everything that ``model`` gives."""
        given = {name: value for name, value in vars(self.model).items() if value is not None}
        return dataclasses.replace(base, **given)

    def with_checkpoint(self, found: ModelConfig, where: str) -> RunConfig:
        """Complete ``model`` from the checkpoint that training starts from.

        Args:
          found: the checkpoint's model.
          where: the checkpoint, for errors.

        Raises:
          ValueError: when ``model`` describes another architecture; names the first field that differs.
        """
        for part in ("vision", "projector", "decoder"):
            ours, theirs = getattr(self.model, part), getattr(found, part)
            for name, value in (vars(ours) if ours else {}).items():
                if value != (other := getattr(theirs, name)):
                    raise ValueError(f"model.{part}.{name} is {value}, but {where} has {other}; omit model.{part}")
        return dataclasses.replace(self, model=self.model_over(found))


@dataclasses.dataclass(frozen=True)
class ResolvedConfig(RunConfig):
    """A ``RunConfig`` without open or automatic values (``device_layout.resolve``)."""

    model: ModelConfig = ModelConfig()
