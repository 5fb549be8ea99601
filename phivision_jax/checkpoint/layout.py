"""Layout and metadata of a checkpoint directory, the same for a conversion and for a step of a training run.

    DIR/params/          every parameter, vision_tail included (Orbax: zarr in OCDBT)
    DIR/opt_state/       optimizer state; training only
    DIR/assets/          tokenizer, chat template and the other files of a Hugging Face directory except its weights
    DIR/meta/metadata    JSON, see below

A training run keeps its steps in RUN/checkpoints/:

    1000/             a step
    damaged-001000/   a step that was found damaged
    saved.json        {"step": 1000}: the newest step that was saved completely

Orbax writes a step under a temporary name and renames it at the end, so a directory with a step's name is complete. In
a bucket (``gs://…``), where directories cannot be renamed at once, a step is complete when it holds commit_success.txt,
which is written last. saved.json is written after the step, and without it the checks are only less strict. It makes
the loss of all steps an error rather than a new run, and in a bucket it distinguishes a step that has lost its
commit_success.txt from one that was never finished, which is ignored and which Orbax removes at the next save.

The metadata:

    {"format": 2, "model": …, "step": …, "plan": …, "run": …, "code": …, "metrics": {"loss": 1.5},
     "arrays": {"params/decoder/norm/scale": ["float32", [5120], "5e3f0a9100c2d4e6"], …},   dtype, shape, checksum
     "assets": {"tokenizer.json": "0c77b1d2", …},                                           CRC-32 of the file
     "crc32": "9a3b…"}                                                                      of everything above

They are known before anything is written, so a step never exists without them, and any reader can tell whether what it
reads is what was saved: arrays by ``checksums.py``, which finds the same number on any mesh and while streaming; files
by their CRC. Other files (zarr metadata, OCDBT manifests, Orbax's own records) need no checksum: they only say where
the arrays are, and the arrays themselves are checked.

When a bucket does not answer, every function raises ``StorageError``; this is never taken for damage. Nothing here
imports JAX or Orbax, because the converter uses it.
"""

import contextlib
import json
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import phivision_jax
from phivision_jax.config import ModelConfig, check_types
from phivision_jax.io import atomic, storage
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.io.read_json import parse_json, read_json
from phivision_jax.io.storage import Location, wrap_storage_errors

FORMAT = 2
CHECKPOINTS = "checkpoints"
CONFIG, COMMAND = "config.json", "command.txt"
"""Files of a run with the configuration and the command of its newest start; the second distinguishes its config.json
from one of Hugging Face."""
PARAMS, OPT_STATE, META, ASSETS = "params", "opt_state", "meta", "assets"
METADATA = f"{META}/metadata"
SAVED, DAMAGED = "saved.json", "damaged-"
ORBAX_MARK = "commit_success.txt"
"""Orbax writes this file into every directory of a step in a bucket, last of all at the step's top."""


_Dtype = Literal["float32", "bfloat16", "float16", "float64", "int8", "uint8", "int32", "uint32", "int64", "bool"]
_KEYS: dict[str, Any] = {"model": Mapping[str, Any], "step": int, "assets": Mapping[str, str]}
_KEYS |= dict.fromkeys(("run", "metrics"), Mapping[str, Any] | None)
_KEYS["arrays"] = Mapping[str, tuple[_Dtype, tuple[int, ...], str]]
"""Types of the metadata that are read here; a configuration has its own."""


class DamagedError(ValueError):
    """A checkpoint does not hold what was saved.

    Attributes:
      problem: what is wrong, without the checkpoint's name: "its file meta/metadata is missing".
    """

    def __init__(self, checkpoint: Location, problem: str) -> None:
        super().__init__(f"{checkpoint} is damaged: {problem}; restore it from a copy, or use another step of its run")
        self.problem = problem


class Array(NamedTuple):
    """Metadata of a saved array."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str
    """16 hexadecimal digits, see ``checksums.py``."""


# ---------------------------------------------------------------------------------------------------------------------
# Metadata.


def with_crc(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``meta/metadata``: JSON values, completed by format and CRC."""
    meta = {"format": FORMAT, **meta}
    return {**meta, "crc32": _crc_of_json(meta)}


def read_meta(checkpoint: Location, *, assets: bool = False) -> dict[str, Any]:
    """The verified content of ``meta/metadata``, without its CRC.

    Args:
      assets: also verify the files of ``assets/``.

    Raises:
      DamagedError: when a file is missing or is not what was saved.
      ValueError: when a later version of this program wrote it; for links that leave the checkpoint.
      StorageError: when the bucket does not answer.
    """
    storage.check_links(checkpoint)
    content, meta = _read(checkpoint, METADATA), dict[str, Any]()
    with contextlib.suppress(ValueError):
        meta = parse_json(content, METADATA)
    if meta.pop("crc32", None) != _crc_of_json(meta):
        raise DamagedError(checkpoint, f"its file {METADATA} does not hold what was saved")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {shorten(meta.get('format'))}; this version reads format {FORMAT}")
    check_types(meta, _KEYS, checkpoint / METADATA)
    if assets:
        check_assets(checkpoint, meta)
    return meta


def model_of(checkpoint: Location, meta: Mapping[str, Any]) -> ModelConfig:
    """The model's configuration in the metadata of a checkpoint; raises ValueError for one that is none."""
    with prefix_errors(str(checkpoint / METADATA)):
        return ModelConfig.from_dict(meta["model"])


def arrays_of(meta: Mapping[str, Any], item: str = PARAMS) -> dict[str, Array]:
    """The arrays of an item by their path in it ("decoder/norm/scale")."""
    start = f"{item}/"
    found = {path.removeprefix(start): about for path, about in meta["arrays"].items() if path.startswith(start)}
    return {path: Array(dtype, tuple(shape), checksum) for path, (dtype, shape, checksum) in found.items()}


def crc_of_files(directory: Path) -> dict[str, str]:
    """CRC-32 of every file below a directory, by its relative name."""
    return {name: _crc((directory / name).read_bytes()) for name in storage.files(directory)}


def check_assets(checkpoint: Location, meta: Mapping[str, Any]) -> None:
    """Verify the files of ``assets/``; files that were not saved with the checkpoint are ignored.

    Raises:
      DamagedError: naming the file.
      StorageError: when the bucket does not answer.
    """
    storage.check_names(meta["assets"], checkpoint / ASSETS)
    for name, crc in meta["assets"].items():
        if _crc(_read(checkpoint, f"{ASSETS}/{name}")) != crc:
            raise DamagedError(checkpoint, f"its file {ASSETS}/{name} does not hold what was saved")


def _read(checkpoint: Location, name: str) -> bytes:
    try:
        with wrap_storage_errors(checkpoint):
            return (checkpoint / name).read_bytes()
    except (FileNotFoundError, ValueError):  # the latter for a name with a null character
        raise DamagedError(checkpoint, f"its file {shorten(name)} is missing") from None


def _crc(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def _crc_of_json(values: Mapping[str, Any]) -> str:
    return _crc(json.dumps(values, sort_keys=True).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Directories.


def is_checkpoint(path: Location) -> bool:
    return (path / PARAMS).exists() and (path / METADATA).exists()


def is_committed(step: Location) -> bool:
    """True if Orbax has written a step completely, and for every directory on disk."""
    return not storage.is_remote(step) or (step / ORBAX_MARK).exists()


def find(path: str | Location) -> Location:
    """The checkpoint at ``path``: itself, or the newest step of the training run there.

    Raises:
      ValueError: when there is none.
      StorageError: when the bucket cannot be read.
    """
    path = storage.location(path)
    storage.check(path)
    with wrap_storage_errors(path):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if is_checkpoint(path):
            return path
        for directory in (path, path / CHECKPOINTS):
            children = [child for child in storage.children(directory) if child.name.isdecimal()]
            if steps := [child for child in children if is_checkpoint(child) and is_committed(child)]:
                return max(steps, key=lambda child: int(child.name))
    raise ValueError(f"{path} is no checkpoint (it has no {PARAMS}/ and {METADATA}) and holds no steps of a run")


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a run, in its directory ``checkpoints/``.


def list_steps(directory: Location) -> list[int]:
    """The steps that were saved completely; one that lacks a file is listed, because it is damaged, not absent."""
    children = [child for child in storage.children(directory) if child.name.isdecimal()]
    if not storage.is_remote(directory):
        return [int(child.name) for child in children if child.is_dir()]
    saved = newest_saved(directory) or -1
    with wrap_storage_errors(directory):
        return [int(child.name) for child in children if int(child.name) <= saved or is_committed(child)]


def newest_saved(directory: Location) -> int | None:
    """The newest step that was saved, according to saved.json; None when there is no such record."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        return int(read_json(directory / SAVED)["step"])
    return None


def record_saved(directory: Location, step: int) -> None:
    with wrap_storage_errors(directory):
        atomic.write(directory / SAVED, json.dumps({"step": step}))


def set_aside(directory: Location, step: int) -> str:
    """Rename a damaged step so that neither Orbax nor ``layout.find`` sees it; returns the new name."""
    name = f"{DAMAGED}{step:06d}"
    with wrap_storage_errors(directory):
        while (directory / name).exists():
            name += "+"
        (directory / str(step)).rename(directory / name)
        if not is_committed(directory / name):  # Orbax would remove it
            (directory / name / ORBAX_MARK).write_text("this file was missing when the checkpoint was found damaged\n")
    return name


def code_version() -> str:
    """The version of this program and, in a clone, the commit as git describes it ("0.1.0 a1b2c3d4e5f6-dirty")."""
    root, version = Path(__file__).parents[2], phivision_jax.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # git is not installed, or does not answer
        if (root / ".git").exists():
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
            return f"{version} {commit}".strip()
    return version
