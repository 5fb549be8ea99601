"""Read an array of unknown origin from a ``.npy`` file: every error names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phivision_jax.io.messages import shorten


def read_array(path: Path, dtype: str, columns: int | None = None) -> np.ndarray:
    """The array in a file; it stays on disk (memory-mapped) until used.

    Args:
      dtype: that it must have.
      columns: None for [n], else [n, columns].

    Raises:
      ValueError: for a file with anything else.
      OSError: when it is missing or cannot be read.
    """
    try:
        array = np.load(path, "r")
    except OSError:
        raise
    except Exception as error:  # parsing a damaged header can raise anything
        raise ValueError(f"{path} is not an array: {shorten(str(error))}; copy its directory again") from None
    found = (str(array.dtype), array.shape) if isinstance(array, np.ndarray) else ("several arrays", ())
    if (found[0], len(found[1]), found[1][1:]) != (str(np.dtype(dtype)), 1 + bool(columns), (columns,) * bool(columns)):
        raise ValueError(f"{path} has {found[0]} {list(found[1])}, not the {np.dtype(dtype)} array that belongs there")
    return array
