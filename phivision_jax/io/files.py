"""Files of a directory of unknown origin: they must be in it, and errors name them."""

import os
from pathlib import Path

import numpy as np

from phivision_jax.io.messages import shorten


def read_array(path: Path, dtype: str, *shape: int | None) -> np.ndarray:
    """The array in a file; it stays on disk (memory-mapped) until used.

    Args:
      dtype: that it must have.
      shape: that it must have; None for any length.

    Raises:
      ValueError: for a file with anything else.
      OSError: when it is missing or cannot be read.
    """
    try:
        array = np.load(path, "r")
        found, wanted = array.shape, tuple(n if k is None else k for n, k in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or found != wanted:
            raise ValueError(f"it has {array.dtype} {list(found)}, not {np.dtype(dtype)} {list(wanted)}")
    except OSError:
        raise
    except Exception as error:  # parsing a damaged header can raise anything
        raise ValueError(f"{path} is damaged: {shorten(str(error))}; make or copy its directory again") from None
    return array


def locate(directory: Path, name: str) -> Path:
    """The path of a file in a directory.

    Raises:
      ValueError: for a name or a link that leads elsewhere.
    """
    path = directory / name
    sound = name.isprintable() and len(name) < 256
    if not sound or os.path.realpath(path) != f"{os.path.realpath(directory)}/{name}":
        problem = "is no file of this directory, or is a link: copy the directory with its files (cp -rL)"
        raise ValueError(f"{directory}: {shorten(name)} {problem}")
    return path
