"""Arrays of a checkpoint on devices: their checksums, and restoring them verified."""

import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from phivision_jax.checkpoint.checksums import ROW, difference, mix, rows_and_columns
from phivision_jax.checkpoint.layout import Array, DamagedError
from phivision_jax.distributed.processes import first_error
from phivision_jax.io import storage
from phivision_jax.io.messages import first_line
from phivision_jax.io.storage import Location


@functools.cache
def silence_libraries() -> None:
    """Keep Orbax, asyncio and TensorStore from printing a page for each array that failed: the first error is raised.

    TensorStore's threads report that the event loop of the others has been closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook
    sys.unraisablehook = lambda about: None if str(about.exc_value) == "Event loop is closed" else report(about)


def describe(tree: Any) -> dict[str, Array]:
    """Dtype, shape and checksum of every leaf, by its path ("decoder/embed_tokens/embedding").

    Sharded arrays are summed where they are; 8 bytes per array reach the host.

    Raises:
      ValueError: for elements of 64 bits, naming the array.
    """
    leaves = with_paths(tree)
    for path, leaf in leaves.items():
        if jnp.dtype(leaf.dtype).itemsize > 4:
            raise ValueError(f"{path} is {leaf.dtype}: checksums are for elements of at most 32 bits")
        rows_and_columns(leaf.shape)
    halves = jax.device_get({path: _checksum(leaf) for path, leaf in leaves.items()})
    sums = {path: f"{int(of_rows):08x}{int(of_columns):08x}" for path, (of_rows, of_columns) in halves.items()}
    return {path: Array(jnp.dtype(leaf.dtype).name, tuple(leaf.shape), sums[path]) for path, leaf in leaves.items()}


def with_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both halves of the checksum, uint32."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    words = words.astype(jnp.uint32).reshape(x.shape or (1,))
    rows = jnp.sum(words, axis=-1, dtype=jnp.uint32)
    columns = jnp.sum(words, axis=tuple(range(words.ndim - 1)), dtype=jnp.uint32)
    index = jnp.zeros(rows.shape, jnp.uint32)
    for axis, size in enumerate(rows.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, rows.shape, axis)
    row_terms = mix(rows ^ mix(index ^ np.uint32(ROW)))
    column_terms = mix(columns ^ mix(jnp.arange(columns.size, dtype=jnp.uint32)))
    return jnp.sum(row_terms, dtype=jnp.uint32), jnp.sum(column_terms, dtype=jnp.uint32)


def restore(checkpoint: Location, item: str, target: Any, saved: Mapping[str, Array]) -> Any:
    """Restore those arrays of an item that ``target`` names, and verify them. All processes must call it.

    Args:
      item: ``layout.PARAMS`` or ``layout.OPT_STATE``.
      target: tree of ``jax.ShapeDtypeStruct`` with shardings; shapes and dtypes must be the saved ones.
      saved: of the item's arrays, by path.

    Raises:
      DamagedError: in all processes, when one of them cannot read an array or finds another checksum.
      StorageError: when the bucket does not answer.
    """
    silence_libraries()
    problem = restored = None
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    try:
        # Not through ocp.Checkpointer: it would wait for processes that have failed.
        restored = ocp.PyTreeCheckpointHandler().restore(storage.location(checkpoint) / item, args=args)
    except jax.errors.JaxRuntimeError:  # out of device memory
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        storage.check(checkpoint)
        cause = error.__cause__ or error
        text = f"{error} {cause}".replace("'", '"')
        name = next((f"array {item}/{path}" for path in saved if f'"{path.replace("/", ".")}/' in text), f"{item}/")
        problem = f"its {name} cannot be read: {first_line(cause)}"
    if problem := first_error(problem):
        raise DamagedError(checkpoint, problem)
    names = with_paths(target)
    # Orbax leaves the target's leaf in place of an array that its files no longer list.
    read = {path: leaf for path, leaf in with_paths(restored).items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    found = {f"{item}/{path}": array for path, array in describe(read).items()}
    if problem := first_error(difference({f"{item}/{path}": saved[path] for path in names}, found)):
        raise DamagedError(checkpoint, problem)
    return restored
