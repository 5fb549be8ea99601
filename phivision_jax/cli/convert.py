"""The command line: ``python -m convert to-jax | to-hf | verify | inspect``.

Exit codes: 0 done, 1 `verify` found a difference, 2 refused or failed (with a line that says why, on stderr), 130
interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from phivision_jax.convert import jobs
from phivision_jax.convert import verify as report
from phivision_jax.io.storage import location

type Dtype = Literal["keep", "float32", "bfloat16"]
type Place = Annotated[str, tyro.conf.arg(metavar="PATH|gs://…")]


def to_jax(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[HF_DIR] OUT")],
    decoder: Place | None = None,
    vision: Place | None = None,
    dtype: Dtype = "keep",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Convert a Hugging Face directory to a checkpoint of ours: `to-jax HF_DIR OUT`.

    Or compose a start for training out of two: `to-jax OUT --decoder PHI4_DIR --vision SIGLIP2_DIR`, with a projector
    that was never trained.

    Args:
        paths: The Hugging Face directory (not with --decoder and --vision) and the checkpoint to write.
        decoder: A text-only Phi-4 directory.
        vision: A SigLIP-2 directory.
        dtype: What to store weights as. "keep" keeps every tensor's own and every bit.
        seed: Of the fresh projector, with --decoder and --vision.
        overwrite: Replace OUT if it exists, once the new one is complete.
    """
    if (decoder is None) != (vision is None):
        raise ValueError("--decoder and --vision go together")
    if len(paths) != (2 if decoder is None else 1):
        raise ValueError("give HF_DIR and OUT, or OUT alone with --decoder and --vision")
    places = [location(path) for path in paths]
    if decoder is None or vision is None:
        jobs.to_jax(places[0], places[1], dtype, overwrite)
    else:
        jobs.compose(location(decoder), location(vision), places[0], dtype, overwrite, seed)


def to_hf(
    checkpoint: tyro.conf.Positional[Place],
    out: tyro.conf.Positional[Place],
    like: Place | None = None,
    dtype: Dtype = "keep",
    max_shard_size: float = 5.0,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Convert a checkpoint of ours to a Hugging Face directory.

    Args:
        checkpoint: A checkpoint, or a training run (then its newest step).
        out: The directory to write.
        like: Write the shards, headers, index and every other file as this Hugging Face directory has them, so that an
            unchanged model comes back byte for byte.
        dtype: What to store weights as. "keep" keeps every tensor's own and every bit.
        max_shard_size: In GB (not used with --like).
        overwrite: Replace OUT if it exists, once the new one is complete.
        force: Write even what config.json cannot express; Hugging Face code will then compute something else.
    """
    if max_shard_size <= 0:
        raise ValueError(f"--max-shard-size must be positive, not {max_shard_size}")
    theirs = None if like is None else location(like)
    jobs.to_hf(location(checkpoint), location(out), theirs, dtype, int(max_shard_size * 1e9), overwrite, force)


def verify(a: tyro.conf.Positional[Place], b: tyro.conf.Positional[Place]) -> None:
    """Compare two checkpoints of either kind, tensor by tensor; between two Hugging Face directories every file too.

    Exits with 1 when they differ.

    Args:
        a: A checkpoint of ours or a Hugging Face directory.
        b: Another.
    """
    if not report.verify(location(a), location(b)):
        sys.exit(1)


def inspect(path: tyro.conf.Positional[Place], json: bool = False) -> None:
    """Print the configuration and the tensors of a checkpoint of either kind.

    Args:
        path: A checkpoint of ours or a Hugging Face directory.
        json: As one JSON object.
    """
    report.inspect(location(path), json)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (``argv`` instead of the process's own arguments, for tests)."""
    signal.signal(signal.SIGTERM, _interrupt)
    commands: dict[str, Callable[..., Any]] = {"to-jax": to_jax, "to-hf": to_hf, "verify": verify, "inspect": inspect}
    description = (
        "Move weights between Hugging Face safetensors and phivision_jax checkpoints, bit for bit. Every directory may "
        "be a URL, gs://bucket/folder: what is read streams from it, what is written is made on this machine first, in "
        "PHIVISION_SCRATCH (default: with the temporary files), and uploaded."
    )
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            args=argv,
            prog="python -m convert",
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        # TensorStore appends lines of its own source code's places to its messages.
        sys.exit(_fail(f"error: {str(error).splitlines()[0]}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; nothing was left behind", 130))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
