"""The directory that a conversion writes, which appears completely or not at all.

On disk it is written beside its destination and renamed at the end (``io/atomic.py``). For a bucket it is written on
this machine (``storage.scratch``) and uploaded when it is complete. A bucket cannot rename a directory in one act, but
an object appears completely, so the file that makes the directory a checkpoint goes last. The object ``OUT.uploading``
beside it exists from before the first to after the last: it distinguishes an interrupted upload from a user's files.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rich.filesize import decimal

from phivision_jax.checkpoint.layout import COMMAND, ORBAX_MARK
from phivision_jax.io import atomic, storage
from phivision_jax.io.storage import Location

MARKS = ("config.json", "meta/metadata", "adapter_config.json")
"""The files without which a directory is not a checkpoint: of a Hugging Face one, of ours, and of PEFT."""


@contextmanager
def new_checkpoint(
    out: Location, overwrite: bool, sources: Sequence[Location], log: Callable[[str], None]
) -> Iterator[Path]:
    """Yield an empty directory on this machine that becomes ``out`` when the block ends without an exception.

    Only one conversion at a time may write to a URL: a bucket has no locks, so what looks abandoned is removed.

    Args:
      overwrite: replace a checkpoint at ``out``, once the new one is complete.
      sources: what the conversion reads, which ``out`` must not contain.

    Raises:
      ValueError: when ``out`` exists and may not be replaced, or is a bucket's top.
      FileExistsError: when another conversion wrote there meanwhile.
      StorageError: when the bucket does not answer.
    """
    if isinstance(out, Path):
        if os.path.lexists(out):
            _check_replaceable(out, [mark for mark in (*MARKS, COMMAND) if (out / mark).is_file()], overwrite, sources)
        with atomic.new_directory(out, replace=overwrite, log=log) as directory:
            yield directory
        return
    if "/" not in str(out).removeprefix(storage.REMOTE):
        raise ValueError(f"{out} is the top of a bucket; give a folder in it")
    claim, present = out.with_name(f"{out.name}.uploading"), storage.files(out)
    if present and not set(MARKS) & set(present) and claim.exists():
        log(f"removing {len(present)} files at {out}, left by an interrupted upload")
        storage.remove(out)
    elif present or out.exists():
        _check_replaceable(out, present, overwrite, sources)
    storage.scratch().mkdir(parents=True, exist_ok=True)
    with atomic.temporary_directory(storage.scratch() / "convert", log) as directory:
        yield directory
        with storage.wrap_storage_errors(out):
            _upload(directory, out, overwrite, claim, log)


def _check_replaceable(out: Location, present: Collection[str], overwrite: bool, sources: Sequence[Location]) -> None:
    """Raises ValueError unless ``out``, which holds these files, is a checkpoint to overwrite and holds no source."""
    if not overwrite:
        raise ValueError(f"{out} exists already; choose another destination or pass --overwrite")
    if not set(MARKS) & set(present) or COMMAND in present:
        raise ValueError(f"{out} exists and is not a checkpoint; --overwrite does not replace it")
    for source in sources:
        if resolved(source).is_relative_to(resolved(out)):
            raise ValueError(f"{out} holds the source {source}; choose another destination")


def resolved(path: Location) -> Location:
    return path.resolve() if isinstance(path, Path) else path


def _upload(source: Path, out: Location, overwrite: bool, claim: Location, log: Callable[[str], None]) -> None:
    new, old, token = storage.files(source), storage.files(out), secrets.token_hex(8)
    if old and not overwrite:
        raise FileExistsError(f"{out} appeared meanwhile; not replacing it")
    log(f"uploading {len(new)} files to {out}")
    marks = [name for name in new if name in MARKS]
    late = [name for name in new if PurePosixPath(name).name == ORBAX_MARK]
    try:
        claim.write_text(token)
        _remove(out)
        storage.upload(source, out, [name for name in new if name not in (*marks, *late)], "upload")
        storage.upload(source, out, late)
        if not _holds(claim, token) or storage.files(out) != {name: new[name] for name in new if name not in marks}:
            raise FileExistsError(f"{out} does not hold what was uploaded; is another conversion writing there?")
        storage.upload(source, out, marks)
    except BaseException:
        _withdraw(out, claim, token, log)
        raise
    claim.unlink()


def _withdraw(out: Location, claim: Location, token: str, log: Callable[[str], None]) -> None:
    """Remove what was uploaded; nothing if the claim is another conversion's by now."""
    try:
        if _holds(claim, token):
            _remove(out)
            claim.unlink()
    except Exception:  # the user sees the error that led here
        log(f"what was uploaded to {out} could not be removed; the next conversion to it does that")


def _remove(out: Location) -> None:
    """Remove a checkpoint, its mark first: without it the rest is no checkpoint while it is removed."""
    for mark in MARKS:
        (out / mark).unlink(missing_ok=True)
    storage.remove(out)


def _holds(file: Location, content: str) -> bool:
    try:
        return file.read_text() == content
    except FileNotFoundError:
        return False


def require_space(needed: int, out: Location) -> None:
    """Raises ValueError when ``needed`` bytes do not fit where ``out`` is written."""
    where = out.absolute() if isinstance(out, Path) else storage.scratch()
    free = shutil.disk_usage(next(path for path in (where, *where.parents) if path.exists())).free
    if needed > free:
        hint = "" if isinstance(out, Path) else f" on {where}; set {storage.SCRATCH} to a directory on a larger disk"
        raise ValueError(f"{out}: needs {decimal(needed)}, but only {decimal(free)} are free{hint}")
