"""Mesh axes and the one table that maps logical axis names to them.

Models name what an axis *is* ("embed", "heads"); this file alone says where it lives. Changing the parallelism is
editing ``RULES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phivision_jax.batch import Batch

MESH_AXES = ("data", "fsdp", "tensor", "context")

type MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    # parameters: fsdp along the widths, tensor along what a layer fans out to
    "embed": "fsdp",
    "patch_embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "projector": "tensor",
    "patch_mlp": "tensor",
    "patch_heads": "tensor",
    "head_dim": None,
    "layer": None,
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the four axes; those not named have size 1, and fsdp takes all devices when nothing is named.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices, or an axis does not exist.
    """
    devices = jax.devices() if devices is None else devices
    shape = dict(shape or {"fsdp": len(devices)})
    if unknown := set(shape) - set(MESH_AXES):
        raise ValueError(f"mesh axis {sorted(unknown)[0]!r} does not exist; the axes are {', '.join(MESH_AXES)}")
    sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    if np.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
        raise ValueError(f"mesh {wanted or 'of 1'} needs {np.prod(sizes)} devices, but there are {len(devices)}")
    # JAX's default is Explicit axes, under which an fsdp embedding lookup is an error; the rules here are for Auto.
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names to a PartitionSpec.

    Raises:
      ValueError: for a name that ``RULES`` does not have.
    """
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule; sharding.RULES has {', '.join(RULES)}")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding by logical names; does nothing outside a mesh (``jax.set_mesh``)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def axis_size(axis: str) -> int:
    """Into how many parts a logical axis is split on the mesh in force (``jax.set_mesh``); 1 without one."""
    mesh, names = jax.sharding.get_abstract_mesh(), RULES[axis]
    if mesh.empty or names is None:
        return 1
    return int(np.prod([mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)]))


def param_shardings(params: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter, as nested plain dicts.

    Args:
      params: abstract or real parameters with their logical axes (``models.phivision.abstract``).

    Raises:
      ValueError: when a dimension does not divide by its mesh axes, naming parameter, axis and sizes.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> NamedSharding:
        axes, shape = variable.get_metadata()["out_sharding"], variable.get_value().shape
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        if len(axes) != len(shape):
            raise ValueError(f"{name}: shape {shape} but logical axes {axes}")
        spec = partition_spec(axes)
        for dim, axis, mesh_axes in zip(shape, axes, spec, strict=True):
            names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
            parts = int(np.prod([mesh.shape[n] for n in names]))
            if dim % parts:
                raise ValueError(
                    f"{name}: its axis {axis!r} of {dim} does not divide over mesh axes {names} ({parts} devices); "
                    f"choose a mesh that divides it, or map {axis!r} to None in sharding.RULES"
                )
        return NamedSharding(mesh, spec)

    flat = {path: sharding(path, variable) for path, variable in nnx.to_flat_state(params)}
    return nnx.traversals.unflatten_mapping(flat)


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Every leaf of a Batch is split by rows, text and vision alike: a row's images live where its text does."""
    return jax.tree.map(lambda _: NamedSharding(mesh, partition_spec(("batch",))), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
