"""``phivision convert to-jax | to-hf | verify | inspect``, also ``python -m convert``.

Exit codes: 0 done, 1 ``verify`` found a difference, 2 refused or failed (with the reason on stderr), 130 interrupted.
"""

import re
import sys
from typing import Annotated, Literal

import tyro

from phivision_jax.io.storage import location

type Dtype = Literal["keep", "float32", "bfloat16"]

FAILURE = 2


def to_jax(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[HF_DIR] OUT")],
    decoder: Annotated[str | None, tyro.conf.arg(metavar="PHI4_DIR")] = None,
    vision: Annotated[str | None, tyro.conf.arg(metavar="SIGLIP2_DIR")] = None,
    dtype: Dtype = "keep",
    seed: int = 0,
    layout: str = "naflex",
    merge_size: int = 1,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face directory to a checkpoint of this project: `to-jax HF_DIR OUT`.

    Or compose a checkpoint to train from, with a randomly initialized projector:
    `to-jax OUT --decoder PHI4_DIR --vision SIGLIP2_DIR`.

    All directories may be in a bucket (gs://…). Output for a bucket is written to PHIVISION_SCRATCH first (default: the
    temporary directory) and uploaded when complete.

    Args:
        paths: Hugging Face directory to convert (omitted with --decoder and --vision), and checkpoint to write.
        decoder: Hugging Face directory of a text-only Phi-4 model.
        vision: Hugging Face directory of a SigLIP-2 model.
        dtype: Dtype in which weights are stored; keep: each tensor's own, bit for bit.
        seed: Seed of the random projector, with --decoder and --vision.
        layout: Image layout, with --decoder and --vision: naflex, or a layout of tiles for a fixed-resolution encoder.
        merge_size: Number of features that the layout joins to one vision token, with --decoder and --vision.
        overwrite: Replace OUT if it exists, once the new checkpoint is complete.
    """
    from phivision_jax.convert import jobs

    if (decoder is None) != (vision is None) or len(paths) != (2 if decoder is None else 1):
        raise ValueError("give HF_DIR and OUT, or OUT alone with --decoder and --vision")
    *source, out = map(location, paths)
    if source and not source[0].is_dir() and re.fullmatch(r"[\w-]+/[\w.-]+", paths[0]):
        remedy = f"for the weights of that name, hf download {paths[0]} --local-dir {source[0].name}"
        raise ValueError(f"{paths[0]} is not a directory; {remedy}, and give that directory")
    if decoder is None or vision is None:
        jobs.to_jax(source[0], out, dtype, overwrite)
    else:
        jobs.compose(location(decoder), location(vision), out, dtype, overwrite, seed, (layout, merge_size))


def to_hf(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")],
    like: Annotated[str | None, tyro.conf.arg(metavar="HF_DIR")] = None,
    dtype: Dtype = "keep",
    max_shard_size: float = 5.0,
    overwrite: bool = False,
    force: bool = False,
    adapters_only: bool = False,
) -> None:
    """Convert a checkpoint of this project to a Hugging Face directory.

    All directories may be in a bucket (gs://…). Output for a bucket is written to PHIVISION_SCRATCH first (default: the
    temporary directory) and uploaded when complete.

    Args:
        checkpoint: Checkpoint of this project, or a run, whose newest checkpoint is converted.
        out: Hugging Face directory to write.
        like: Hugging Face directory whose shards, headers, index and other files are reproduced, remote code included.
            An unchanged model then has the same files, byte for byte.
        dtype: Dtype in which weights are stored; keep: each tensor's own, bit for bit.
        max_shard_size: Largest size of a shard in GB (not used with --like).
        overwrite: Replace OUT if it exists, once the new directory is complete.
        force: Write the model even if config.json cannot express it; Hugging Face code then computes something else.
        adapters_only: Write the LoRA adapters of a run alone, in PEFT's format and in float32, instead of the model
            with the adapters merged.
    """
    from phivision_jax.convert import jobs

    if not 0 < max_shard_size < 1e9:
        raise ValueError(f"--max-shard-size is a positive number of GB, not {max_shard_size}")
    if adapters_only and (like is not None or dtype != "keep"):
        raise ValueError("--adapters-only does not go with --like and --dtype")
    if adapters_only:
        return jobs.to_peft(location(checkpoint), location(out), overwrite)
    original = None if like is None else location(like)
    jobs.to_hf(location(checkpoint), location(out), original, dtype, int(max_shard_size * 1e9), overwrite, force)


def verify(
    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FIRST")],
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SECOND")],
) -> None:
    """Compare two checkpoints tensor by tensor, and two Hugging Face directories also file by file.

    The exit code is 1 when they differ.

    Args:
        a: Checkpoint of this project, run or Hugging Face directory (each may be gs://…).
        b: Checkpoint to compare with it, of any of these kinds.
    """
    from phivision_jax.convert import verify as checks

    if not checks.verify(location(a), location(b)):
        sys.exit(1)


def inspect(
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")], json: bool = False
) -> None:
    """Print the configuration and the tensors of a checkpoint.

    Args:
        path: Checkpoint of this project, run or Hugging Face directory (each may be gs://…).
        json: Print one JSON object instead of tables.
    """
    from phivision_jax.convert import verify as checks

    checks.inspect(location(path), json)


COMMANDS = (to_jax, to_hf, verify, inspect)
