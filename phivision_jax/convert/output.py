"""Directories that appear whole or not at all.

Output is written to ``OUT.tmp-<random>`` beside its destination, flushed to disk, and renamed as the last act. Whatever
happens before (an error, Ctrl-C, SIGKILL, a power cut), nothing stands at OUT that was not finished. The writer holds
a lock on its directory that dies with it, so the next run can tell an abandoned one and clears it away.

For a URL it is written on this machine (``storage.scratch``) and uploaded when it is complete (``uploaded``). A bucket
cannot rename a directory in one act; but an object appears whole, so the file that makes it a checkpoint goes last. The
object ``OUT.uploading`` beside it stands from before the first to after the last: what an upload left that was cut
short is told from somebody's files by it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from phivision_jax.checkpoint.layout import ORBAX_MARK
from phivision_jax.io import storage
from phivision_jax.io.storage import Location

MARKS = ("config.json", "meta/metadata")
"""The file without which nobody takes a directory for a checkpoint: of Hugging Face's kind, of ours."""


@contextmanager
def staged(
    out: Path, overwrite: bool = False, sources: Sequence[Location] = (), say: Callable[[str], None] = print
) -> Iterator[Path]:
    """A fresh directory that becomes ``out`` when the block ends without an exception, and is removed otherwise.

    Raises:
      ValueError: when ``out`` exists and ``overwrite`` is not given. With it, ``out`` is replaced after success, but
        only if it is a checkpoint of either kind and no source lies in it.
    """
    if os.path.lexists(out):
        _check_replaceable(out, any((out / mark).is_file() for mark in MARKS), overwrite, sources)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _tmp(out, say) as tmp:
        yield tmp
        flush(tmp)
        if os.path.lexists(out):
            if not overwrite:
                raise ValueError(f"{out} appeared meanwhile; not replacing it")
            # Not a tmp name: killed between the two renames, the old checkpoint is still there for its owner to find.
            replaced = out.parent / f"{out.name}.old-{secrets.token_hex(4)}"
            out.rename(replaced)
            tmp.rename(out)
            shutil.rmtree(replaced)
        else:
            tmp.rename(out)
        _flush_entry(out.parent)


def _check_replaceable(out: Location, is_checkpoint: bool, overwrite: bool, sources: Sequence[Location]) -> None:
    """Raises ValueError when what stands at ``out`` must stay."""
    if not overwrite:
        raise ValueError(f"{out} exists already; choose another destination or pass --overwrite")
    if not is_checkpoint:
        raise ValueError(f"{out} exists and is not a checkpoint; --overwrite does not replace it")
    for source in sources:
        if resolved(source).is_relative_to(resolved(out)):
            raise ValueError(f"{out} holds the source {source}; choose another destination")


def resolved(path: Location) -> Location:
    return path.resolve() if isinstance(path, Path) else path


@contextmanager
def _tmp(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """``<out>.tmp-<random>``, ours while we hold its lock and removed at the end; those that were left go first."""
    for left in out.parent.glob(f"{out.name}.tmp-*"):
        if abandoned(left):
            say(f"removing {left}, left by a conversion that was interrupted")
            shutil.rmtree(left)
    tmp, lock = out.parent / f"{out.name}.tmp-{secrets.token_hex(4)}", None
    try:
        tmp.mkdir()
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp
    finally:
        _remove(tmp)
        if lock is not None:
            os.close(lock)


def _remove(directory: Path, seconds: float = 5.0) -> None:
    """Remove a directory into which writes of TensorStore's own threads may still be on their way."""
    until = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < until:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


def abandoned(directory: Path) -> bool:
    """Whether the process that made this tmp directory is gone."""
    with suppress(OSError):
        file = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(file)
    return False


def flush(directory: Path) -> None:
    """Everything below, on disk: a rename must not become durable before what it names."""
    for root, _, files in os.walk(directory):
        for name in files:
            _flush_entry(Path(root, name))
        _flush_entry(Path(root))


def _flush_entry(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def uploaded(
    out: Location, overwrite: bool = False, sources: Sequence[Location] = (), say: Callable[[str], None] = print
) -> Iterator[Path]:
    """Where on this machine to write what becomes ``out``: itself, unless it is a URL.

    For a URL, a place on this machine, uploaded when the block ends without an exception. An upload that fails is
    removed again. With ``overwrite`` a checkpoint at the URL stays until the new one is complete on this machine. One
    conversion at a time may write to a URL: a bucket knows no locks, and what looks abandoned is removed.

    Raises:
      ValueError: as ``staged``; or when the URL is a whole bucket, or another conversion wrote there meanwhile.
      StorageError: when the bucket does not answer.
    """
    if isinstance(out, Path):
        yield out
        return
    if "/" not in str(out).removeprefix(storage.REMOTE):
        raise ValueError(f"{out} is a whole bucket; give a folder in it")
    claim, present = out.with_name(f"{out.name}.uploading"), storage.files(out)
    if present and not any(mark in present for mark in MARKS) and claim.exists():
        say(f"removing {len(present)} files at {out}, left by an upload that was interrupted")
        storage.remove(out)
    elif present or out.exists():
        _check_replaceable(out, any(mark in present for mark in MARKS), overwrite, sources)
    storage.scratch().mkdir(parents=True, exist_ok=True)
    with _tmp(storage.scratch() / "convert", say) as tmp:
        yield tmp / out.name
        with storage.wrap_storage_errors(out):
            _upload(tmp / out.name, out, overwrite, claim, say)


def _upload(source: Path, out: Location, overwrite: bool, claim: Location, say: Callable[[str], None]) -> None:
    new, old, token = storage.files(source), storage.files(out), secrets.token_hex(8)
    if old and not overwrite:
        raise ValueError(f"{out} appeared meanwhile; not replacing it")
    total, began = sum(new.values()), time.perf_counter()
    say(f"uploading {len(new)} files to {out}")
    marks = [name for name in new if name in MARKS]
    late = [name for name in new if PurePosixPath(name).name == ORBAX_MARK]
    try:
        claim.write_text(token)
        # The old checkpoint's mark first: without it the rest is taken for nothing while it goes.
        for name in (name for name in old if name in MARKS):
            (out / name).unlink()
        storage.remove(out)
        storage.upload(source, out, [name for name in new if name not in (*marks, *late)], "upload")
        storage.upload(source, out, late)
        if not _holds(claim, token) or storage.files(out) != {name: new[name] for name in new if name not in marks}:
            raise ValueError(f"{out}: what is there is not what was uploaded; does another conversion write there?")
        storage.upload(source, out, marks)
    except BaseException:
        _withdraw(out, claim, token, say)
        raise
    claim.unlink()
    seconds = time.perf_counter() - began
    say(f"upload: {human(total)} in {seconds:.1f} s, {total / seconds / 1e6:.0f} MB/s")


def _withdraw(out: Location, claim: Location, token: str, say: Callable[[str], None]) -> None:
    """Remove what was uploaded, its mark first; nothing if the place is another's by now."""
    try:
        if not _holds(claim, token):
            return
        for mark in MARKS:
            (out / mark).unlink(missing_ok=True)
        storage.remove(out)
        claim.unlink()
    except Exception:  # what went wrong before is what the user is told
        say(f"what was uploaded to {out} could not be removed; the next conversion to it does that")


def _holds(file: Location, content: str) -> bool:
    try:
        return file.read_text() == content
    except FileNotFoundError:
        return False


def free_bytes(path: Path) -> int:
    """Free space on the file system that ``path`` will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(needed: int, out: Location) -> None:
    """Raises ValueError when ``needed`` bytes do not fit where ``out`` is written."""
    where = out if isinstance(out, Path) else storage.scratch()
    if needed > (free := free_bytes(where)):
        hint = "" if where is out else f" ({where}, where it is written first; set {storage.SCRATCH} to a larger disk)"
        raise ValueError(f"{out}: needs {human(needed)}, but only {human(free)} are free there{hint}")


def copy_file(source: Location, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        shutil.copyfile(source, target)
    else:
        storage.download(source.parent, target.parent, [source.name])


def human(count: float) -> str:
    """1536 → ``1.5 kB``; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"
