"""Mesh axes, and the one table that maps logical axis names to them.

Models name what an axis *is* ("embed", "heads"); this file alone decides on which mesh axes it is split:

    slice     replicas of everything, one per slice of a multi-slice job; only gradients cross the network between them
    data      replicas of the parameters within a slice, each with its own rows
    fsdp      also splits rows, and shards every parameter: gathered for a layer, freed after it
    tensor    attention heads, the MLP's hidden width and the vocabulary
    context   the positions of a row, and its vision rows

A row's images are on the same devices as its text: nothing of a row crosses ``slice``, ``data`` or ``fsdp``.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from phivision_jax.batch import Batch
from phivision_jax.config import ModelConfig

MESH_AXES = ("slice", "data", "fsdp", "tensor", "context")

type MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
    # activations
    "batch": ("slice", "data", "fsdp"),
    "replica": ("slice", "data"),  # the rows of all devices that share one replica of the parameters
    "slots": ("slice", "data", "fsdp"),  # sequences that are generated: their part of the cache
    "length": "context",
    "width": None,  # of hidden states
    "vision_rows": "context",
    # parameters: fsdp along the widths, tensor along what a layer fans out to
    "embed": "fsdp",
    "patch_embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",  # ten of them: a tensor axis larger than 2 needs None here, so that every device has all ten
    "vocab": "tensor",
    "projector": "tensor",
    "patch_mlp": "tensor",
    "patch_heads": "tensor",
    "head_dim": None,
    "layer": None,
    "lora": None,  # the rank of an adapter
}
"""The default rules; ``override_rules`` changes some of them for one run."""

FSDP_GROUP = 32
"""Most devices that share one replica of the parameters when a mesh does not specify it. In larger groups the TPU
compiler turned reduce-scatters into all-reduces of entire layers (v5p: 128, v5e, v6e: 256), or padded widths (64: 80
to 96)."""

GENERATION_TENSOR = 2
"""Shards of the heads where weights are only read: there are ten KV heads."""
WEIGHTS_SHARE = 0.55
"""Largest share of a device's memory for the weights of a model that generates; a larger cache takes more prompts."""

_overrides = jax.make_user_context(())  # (logical axis, mesh axes) pairs; part of jit's cache key


def override_rules(rules: Mapping[str, MeshAxes]) -> AbstractContextManager[None]:
    """``with override_rules({"kv_heads": None}):`` replaces rules for everything that is placed or traced inside.

    Rules decide only where arrays are: results do not depend on them beyond rounding.

    Raises:
      ValueError: for a logical or a mesh axis that does not exist.
    """
    for axis, mesh_axes in rules.items():
        _check_axis(axis)
        if unknown := set(names_of(mesh_axes)) - set(MESH_AXES):
            raise ValueError(f"rule {axis!r}: mesh axis {min(unknown)!r} does not exist; choose {', '.join(MESH_AXES)}")
    return _overrides(tuple(sorted({**dict(_overrides.value), **rules}.items())))


def generation_rules(config: ModelConfig, mesh: Mesh | AbstractMesh) -> AbstractContextManager[None]:
    """The rules for weights that are only read: heads that do not divide over their mesh axes are replicated."""
    decoder, vision = config.decoder, config.vision
    heads = {"kv_heads": decoder.num_kv_heads, "heads": decoder.num_heads, "patch_heads": vision.num_heads}
    return override_rules({axis: None for axis, size in heads.items() if size % num_shards(mesh, axis)})


def rule(axis: str) -> MeshAxes:
    """The mesh axes over which a logical axis is split."""
    return dict(_overrides.value).get(axis, RULES[axis])


def dividing_rules(axes: Sequence[str | None], sizes: Sequence[int]) -> list[MeshAxes]:
    """The rules of these axes on the mesh in force; None for an axis whose size they do not divide."""
    return [rule(a) if a and size % axis_size(a) == 0 else None for a, size in zip(axes, sizes, strict=True)]


def default_sizes(
    num_devices: int, slices: int = 1, tensor: int = 1, context: int = 1, fsdp_group: int = FSDP_GROUP
) -> dict[str, int]:
    """Sizes of all mesh axes: groups of at most ``fsdp_group`` devices along fsdp, replicas along data.

    Raises:
      ValueError: when slices, tensor and context do not divide the devices.
    """
    rest, more = divmod(num_devices, slices * tensor * context)
    if more:
        wanted = f"slice {slices} x tensor {tensor} x context {context}"
        raise ValueError(f"{num_devices} devices do not divide into {wanted}; choose sizes whose product divides them")
    fsdp = next(n for n in range(min(rest, fsdp_group), 0, -1) if rest % n == 0)
    return {"slice": slices, "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}


def generation_sizes(params: nnx.State, itemsize: int, num_devices: int, device_bytes: float | None) -> dict[str, int]:
    """Sizes of the mesh axes for generation: as few shards of the weights as leave room for the cache.

    Every axis divides what it shards. Further devices hold replicas with prompts of their own; one of an odd number of
    devices that cannot hold the weights is left out.

    Args:
      params: abstract parameters with their logical axes, as for ``param_shardings``.
      itemsize: bytes of a value, unless the parameter's own dtype is narrower.
      device_bytes: memory of a device; None, for unknown: as many shards as possible.
    """
    common = {"fsdp": 0, "tensor": 0}
    weights = sum(min(itemsize, leaf.dtype.itemsize) * leaf.size for leaf in jax.tree.leaves(params))
    for _, variable in nnx.to_flat_state(params):
        for axis, dim in zip(variable.get_metadata()["out_sharding"], variable.get_value().shape, strict=True):
            for name in names_of(rule(axis)) if axis else ():
                common[name] = math.gcd(common.get(name, 0), dim)
    tensor = math.gcd(GENERATION_TENSOR, common["tensor"], num_devices)
    rest = num_devices // tensor
    groups = [n for n in range(1, FSDP_GROUP + 1) if rest % n == 0 and common["fsdp"] % n == 0]
    room = WEIGHTS_SHARE * (device_bytes or 0)
    fsdp = next((n for n in groups if weights / (tensor * n) <= room), groups[-1])
    if device_bytes and num_devices % 2 and num_devices > 1 and weights / (tensor * fsdp) > room:
        return generation_sizes(params, itemsize, num_devices - 1, device_bytes)
    return {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the five axes.

    Devices of one TPU slice (``slice_index``) stay together. On devices without slices the axis ``slice`` groups
    neighbours, so that a multi-slice job can be tried on one machine.

    Args:
      shape: sizes of axes, 1 for those not named; default: ``default_sizes``.
      devices: default: all of them.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices, an axis does not exist, or ``slice`` is not
        the number of slices that the devices are in.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = num_slices(devices)
    shape = dict(shape or default_sizes(len(devices), slices or 1))
    if unknown := set(shape) - set(MESH_AXES):
        raise ValueError(f"mesh axis {min(unknown)!r} does not exist; the axes are {', '.join(MESH_AXES)}")
    sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    if min(sizes) < 1:
        raise ValueError(f"mesh axis {MESH_AXES[sizes.index(min(sizes))]} is {min(sizes)}; sizes are at least 1")
    if np.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
        raise ValueError(f"mesh {wanted or 'of 1'} needs {np.prod(sizes)} devices, but there are {len(devices)}")
    if slices is not None and slices != sizes[0]:
        raise ValueError(f"mesh axis slice is {sizes[0]}, but the devices are in {slices} slices; set slice={slices}")
    # A group of 32 in a slice of 16x16 is two rows of its torus: an axis must be allowed to split.
    split: dict[str, Any] = {"allow_split_physical_axes": True}
    if slices is None or slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (slices, 1, 1, 1, 1), devices, **split)
    # JAX's default is Explicit axes, under which an fsdp embedding lookup is an error; the rules here are for Auto.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh of several devices, or of absent ones, that these arrays are on; None on one device."""
    leaf = jax.tree.leaves(params)[0]
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    absent = isinstance(leaf, jax.ShapeDtypeStruct)
    return mesh if isinstance(mesh, Mesh) and (mesh.size > 1 or absent) else None


def num_slices(devices: Sequence[jax.Device]) -> int | None:
    """The number of TPU slices that the devices are in; None for devices without slices."""
    found = {getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"}
    return len(found) if found and None not in found else None


def target_device() -> jax.Device | AbstractDevice:
    """The chip being compiled for: a device (or a description of one) of the mesh in force, else JAX's first."""
    mesh = jax.sharding.get_abstract_mesh()
    return (None if mesh.empty else mesh.abstract_device) or jax.devices()[0]


def partition_spec(axes: Sequence[str | None], array: str = "") -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Args:
      array: what the array is, for errors: a parameter's path, for example.

    Raises:
      ValueError: for a logical axis that has no rule, or two that share a mesh axis.
    """
    where = f"{array}: " if array else ""
    users: dict[str, str] = {}
    for axis in filter(None, axes):
        _check_axis(axis, where)
        for mesh_axis in names_of(rule(axis)):
            if first := users.get(mesh_axis):
                raise ValueError(
                    f"{where}logical axes {first!r} and {axis!r} both map to mesh axis {mesh_axis!r} (sharding.RULES: "
                    f"{first!r} is {rule(first)!r}, {axis!r} is {rule(axis)!r}); one array's axes need different "
                    "mesh axes: map one of them to another, or to None"
                )
            users[mesh_axis] = axis
    return PartitionSpec(*(None if axis is None else rule(axis) for axis in axes))


def _check_axis(axis: str, where: str = "") -> None:
    if axis not in RULES:
        raise ValueError(f"{where}logical axis {axis!r} has no rule; sharding.RULES has {', '.join(RULES)}")


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """A rule's mesh axes as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding by logical names; does nothing when no mesh is in force (``jax.set_mesh``)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def axis_size(axis: str) -> int:
    """The number of shards of a logical axis on the mesh in force (``jax.set_mesh``); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_shards(mesh, axis)


def num_shards(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """The number of shards into which a mesh splits a logical axis."""
    return int(np.prod([mesh.shape[name] for name in names_of(rule(axis))]))


def abstract(tree: Any, shardings: Any, dtype: DTypeLike | None = None) -> Any:
    """The arrays of ``tree`` as ``jax.ShapeDtypeStruct`` with these shardings: what a program is compiled for.

    Args:
      shardings: a tree like ``tree``, or one sharding for all of its arrays.
      dtype: of all arrays of floating point; default: each its own.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def placed(x: Any, on: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if dtype is not None and floating else x.dtype, sharding=on)

    return jax.tree.map(placed, tree, shardings)


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
        for dim, axis in zip(shape, axes, strict=True):
            if axis and dim % (n := num_shards(mesh, axis)):
                raise ValueError(
                    f"{name}: its axis {axis!r} of {dim} does not divide over mesh axes {names_of(rule(axis))} "
                    f"({n} devices); choose a mesh that divides it, or replicate it: sharding_rules=(({axis!r}, ''),)"
                )
        return NamedSharding(mesh, spec)

    flat = {path: sharding(path, variable) for path, variable in nnx.to_flat_state(params)}
    return nnx.traversals.unflatten_mapping(flat)


_VISION_FIELDS = ("patches", "patch_segments", "patch_coords", "patch_grid")
AXES_OF_FIELD = dict.fromkeys(_VISION_FIELDS, "vision_rows") | {"merge_index": None, "merge_weight": None}
"""The logical name of the second axis of a Batch's fields; "length" for fields not named here."""

SETTINGS = {"batch": "data.batch_rows", "length": "data.length", "vision_rows": "data.vision_rows"}


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """The sharding of every leaf of a Batch: rows alike for text and vision, positions and vision rows by ``context``.

    Raises:
      ValueError: when rows, positions or vision rows do not divide over the mesh, naming the setting and the rule.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        field = path[-1].name
        axes = ("batch", AXES_OF_FIELD.get(field, "length"))
        for dim, axis in zip(leaf.shape, axes, strict=False):
            if axis and dim % (n := num_shards(mesh, axis)):
                raise ValueError(
                    f"{SETTINGS[axis]} is {dim}, which does not divide over mesh axes {names_of(rule(axis))} "
                    f"({n} shards: the rule of {axis!r}, for {field}); take a multiple of {n}, or another mesh"
                )
        return NamedSharding(mesh, partition_spec(axes, field))

    return jax.tree.map_with_path(sharding, batch)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Split rows only: for batches whose positions need not divide, like prompts."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
