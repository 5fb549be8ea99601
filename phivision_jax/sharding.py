"""Mesh axes and the one table that maps logical axis names to them.

Models name what an axis *is* ("embed", "heads"); this file alone says where it lives. Changing the parallelism is
editing ``RULES``.

    slice     copies of everything in the slices of a multi-slice job; only gradients cross the network between them
    data      copies of the parameters within a slice, each with rows of its own
    fsdp      rows too, and every parameter cut into as many parts: gathered for a layer, gone after it
    tensor    heads, the FFN's width and the vocabulary
    context   the columns of a row, and its vision rows

A row's images live where its text does: nothing of a row crosses ``slice``, ``data`` or ``fsdp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phivision_jax.batch import Batch

MESH_AXES = ("slice", "data", "fsdp", "tensor", "context")

type MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # activations
    "batch": ("slice", "data", "fsdp"),
    "copy": ("slice", "data"),  # rows of all devices that share one copy of the parameters
    "length": "context",
    "vision_rows": "context",
    # parameters: fsdp along the widths, tensor along what a layer fans out to
    "embed": "fsdp",
    "patch_embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",  # ten of them: tensor over 2 needs None here, and every device then keeps all ten
    "vocab": "tensor",
    "projector": "tensor",
    "patch_mlp": "tensor",
    "patch_heads": "tensor",
    "head_dim": None,
    "layer": None,
    "lora": None,  # the rank of an adapter
}

FSDP_GROUP = 32
"""Most devices that share one copy of the parameters, where a mesh does not say. In larger groups the TPU compiler
turned reduce-scatters into all-reduces of whole layers (v5p: 128, v5e, v6e: 256), or padded widths (64: 80 to 96)."""


def default_sizes(num_devices: int, slices: int = 1, tensor: int = 1, context: int = 1) -> dict[str, int]:
    """Sizes of all axes: groups of at most ``FSDP_GROUP`` devices along fsdp, copies along data.

    Raises:
      ValueError: when slices, tensor and context do not divide the devices.
    """
    fixed = slices * tensor * context
    if num_devices % fixed:
        raise ValueError(
            f"{num_devices} devices do not divide into slice {slices} x tensor {tensor} x context {context}; "
            "choose sizes whose product divides them"
        )
    rest = num_devices // fixed
    fsdp = next(n for n in range(min(rest, FSDP_GROUP), 0, -1) if rest % n == 0)
    return {"slice": slices, "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the five axes; those not named have size 1, and ``default_sizes`` decides when nothing is named.

    Devices of one slice (``slice_index``, on TPUs) stay together. On devices that know no slices, the axis ``slice`` is
    made of neighbours, so that a job of several slices can be tried on one machine.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices, an axis does not exist, or ``slice`` is not
        the number of slices that the devices are in.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = num_slices(devices)
    shape = dict(shape or default_sizes(len(devices), slices or 1))
    if unknown := set(shape) - set(MESH_AXES):
        raise ValueError(f"mesh axis {sorted(unknown)[0]!r} does not exist; the axes are {', '.join(MESH_AXES)}")
    sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    if np.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
        raise ValueError(f"mesh {wanted or 'of 1'} needs {np.prod(sizes)} devices, but there are {len(devices)}")
    if slices is not None and slices != sizes[0]:
        raise ValueError(f"mesh axis slice is {sizes[0]}, but the devices are in {slices} slices; set slice={slices}")
    # JAX's default is Explicit axes, under which an fsdp embedding lookup is an error; the rules here are for Auto.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    # A group of 32 in a slice of 16x16 is two rows of its torus: an axis must be allowed to split.
    split: dict[str, Any] = {"allow_split_physical_axes": True}
    if slices is None or slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (slices, 1, 1, 1, 1), devices, **split)
    return Mesh(grid, MESH_AXES, axis_types=auto)


def num_slices(devices: Sequence[jax.Device]) -> int | None:
    """How many TPU slices the devices are in; None where devices know no slices."""
    found = {getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"}
    return len(found) if found and None not in found else None


def partition_spec(axes: Sequence[str | None], what: str = "") -> PartitionSpec:
    """Logical axis names to a PartitionSpec.

    Args:
      what: named in errors: a parameter's path, say.

    Raises:
      ValueError: for a name that ``RULES`` does not have, or two names that share a mesh axis.
    """
    where = f"{what}: " if what else ""
    taken: dict[str, str] = {}
    for axis in axes:
        if axis is None:
            continue
        if axis not in RULES:
            raise ValueError(f"{where}logical axis {axis!r} has no rule; sharding.RULES has {', '.join(RULES)}")
        for mesh_axis in names_of(RULES[axis]):
            if mesh_axis in taken:
                first = taken[mesh_axis]
                raise ValueError(
                    f"{where}logical axes {first!r} and {axis!r} both map to mesh axis {mesh_axis!r} (sharding.RULES: "
                    f"{first!r} is {RULES[first]!r}, {axis!r} is {RULES[axis]!r}); one array's axes need different "
                    "mesh axes: map one of them to another, or to None"
                )
            taken[mesh_axis] = axis
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """A rule's mesh axes as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding by logical names; does nothing outside a mesh (``jax.set_mesh``)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def axis_size(axis: str) -> int:
    """Into how many parts a logical axis is split on the mesh in force (``jax.set_mesh``); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else parts(mesh, RULES[axis])


def parts(mesh: Mesh | jax.sharding.AbstractMesh, axes: MeshAxes) -> int:
    """Into how many parts these mesh axes split an array's axis."""
    return int(np.prod([mesh.shape[name] for name in names_of(axes)]))


def param_shardings(params: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter, as nested plain dicts.

    Args:
      params: abstract or real parameters with their logical axes (``models.phivision.abstract``).

    Raises:
      ValueError: when a dimension does not divide by its mesh axes, naming parameter, axis and sizes; and as
        ``partition_spec``.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> NamedSharding:
        axes, shape = variable.get_metadata()["out_sharding"], variable.get_value().shape
        name = "/".join(str(getattr(part, "key", part)) for part in path)
        if len(axes) != len(shape):
            raise ValueError(f"{name}: shape {shape} but logical axes {axes}")
        spec = partition_spec(axes, name)
        for dim, axis, mesh_axes in zip(shape, axes, spec, strict=True):
            if dim % (n := parts(mesh, mesh_axes)):
                raise ValueError(
                    f"{name}: its axis {axis!r} of {dim} does not divide over mesh axes {names_of(mesh_axes)} "
                    f"({n} devices); choose a mesh that divides it, or map {axis!r} to None in sharding.RULES"
                )
        return NamedSharding(mesh, spec)

    flat = {path: sharding(path, variable) for path, variable in nnx.to_flat_state(params)}
    return nnx.traversals.unflatten_mapping(flat)


_VISION_FIELDS = ("patches", "patch_segments", "patch_coords", "patch_grid")
AXES_OF_FIELD = dict.fromkeys(_VISION_FIELDS, "vision_rows") | {"merge_index": None, "merge_weight": None}
"""What the second axis of a Batch's field is; "length" for those not named."""

SETTINGS = {"batch": "data.batch_rows", "length": "data.length", "vision_rows": "data.vision_rows"}


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Every leaf of a Batch is split by rows, text and vision alike; along ``context`` by columns and vision rows.

    Raises:
      ValueError: when rows, columns or vision rows do not divide over the mesh, naming the field and the rule.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        field = path[-1].name
        axes = ("batch", AXES_OF_FIELD.get(field, "length"))
        spec = partition_spec(axes, field)
        for dim, axis, mesh_axes in zip(leaf.shape, axes, spec, strict=False):
            if dim % (n := parts(mesh, mesh_axes)):
                raise ValueError(
                    f"{SETTINGS[axis or '']} is {dim}, which does not divide over mesh axes {names_of(mesh_axes)} "
                    f"({n} parts: the rule of {axis!r}, for {field}); take a multiple of {n}, or another mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, batch)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows alone are split: for batches whose columns need not divide, like prompts."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
