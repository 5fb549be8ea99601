"""``phivision convert to-jax | to-hf | verify | inspect``, also ``python -m convert``.

Exit codes: 0 done, 1 ``verify`` found a difference, 2 refused or failed (with the reason on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

from phivision_jax.io.storage import location

type Dtype = Literal["keep", "float32", "bfloat16"]
type Place = Annotated[str, tyro.conf.arg(metavar="PATH|gs://…")]

FAILURE = 2


def to_jax(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[HF_DIR] OUT")],
    decoder: Place | None = None,
    vision: Place | None = None,
    dtype: Dtype = "keep",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face directory to a checkpoint of this project: `to-jax HF_DIR OUT`.

    Or compose a checkpoint to train from: `to-jax OUT --decoder PHI4_DIR --vision SIGLIP2_DIR`, with a fresh projector.

    Args:
        paths: The Hugging Face directory (omitted with --decoder and --vision) and the checkpoint to write. A gs:// URL
            is written to PHIVISION_SCRATCH first (default: the temporary directory) and uploaded when complete.
        decoder: A text-only Phi-4 directory.
        vision: A SigLIP-2 directory.
        dtype: The dtype to store weights in. "keep" keeps the dtype and every bit of each tensor.
        seed: Seed of the fresh projector, with --decoder and --vision.
        overwrite: Replace OUT if it exists, once the new checkpoint is complete.
    """
    from phivision_jax.convert import jobs

    if (decoder is None) != (vision is None):
        raise ValueError("--decoder and --vision go together")
    if len(paths) != (2 if decoder is None else 1):
        raise ValueError("give HF_DIR and OUT, or OUT alone with --decoder and --vision")
    *source, out = map(location, paths)
    if decoder is None or vision is None:
        jobs.to_jax(source[0], out, dtype, overwrite)
    else:
        jobs.compose(location(decoder), location(vision), out, dtype, overwrite, seed)


def to_hf(
    checkpoint: tyro.conf.Positional[Place],
    out: tyro.conf.Positional[Place],
    like: Place | None = None,
    dtype: Dtype = "keep",
    max_shard_size: float = 5.0,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Convert a checkpoint of this project to a Hugging Face directory.

    Args:
        checkpoint: A checkpoint, or a run (then its newest step).
        out: The directory to write. A gs:// URL is written to PHIVISION_SCRATCH first (default: the temporary
            directory) and uploaded when complete.
        like: Reproduce the shards, headers, index and other files of this Hugging Face directory, so that an unchanged
            model comes back byte for byte.
        dtype: The dtype to store weights in. "keep" keeps the dtype and every bit of each tensor.
        max_shard_size: Largest size of a shard in GB (not used with --like).
        overwrite: Replace OUT if it exists, once the new directory is complete.
        force: Also write a model that config.json cannot express; Hugging Face code will compute something else.
    """
    from phivision_jax.convert import jobs

    if max_shard_size <= 0:
        raise ValueError(f"--max-shard-size must be positive, not {max_shard_size}")
    original = None if like is None else location(like)
    jobs.to_hf(location(checkpoint), location(out), original, dtype, int(max_shard_size * 1e9), overwrite, force)


def verify(a: tyro.conf.Positional[Place], b: tyro.conf.Positional[Place]) -> None:
    """Compare two checkpoints of either kind, tensor by tensor, and two Hugging Face directories also file by file.

    Exits with 1 when they differ.

    Args:
        a: A checkpoint of this project or a Hugging Face directory.
        b: Another one.
    """
    from phivision_jax.convert import verify as checks

    if not checks.verify(location(a), location(b)):
        sys.exit(1)


def inspect(path: tyro.conf.Positional[Place], json: bool = False) -> None:
    """Print the configuration and the tensors of a checkpoint of either kind.

    Args:
        path: A checkpoint of this project or a Hugging Face directory.
        json: Print one JSON object.
    """
    from phivision_jax.convert import verify as checks

    checks.inspect(location(path), json)


COMMANDS: dict[str, Callable[..., Any]] = {"to-jax": to_jax, "to-hf": to_hf, "verify": verify, "inspect": inspect}
