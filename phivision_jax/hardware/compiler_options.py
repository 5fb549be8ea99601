"""Options of the TPU compiler by kind of chip, each with its reason. Other platforms compile with XLA's defaults.

Without them the chip waits for every gather of weights. They were chosen with ``phivision preflight``, which reports
the computation that overlaps each collective; none has been timed on a chip.
"""

from jax.sharding import Mesh

# v5e has no SparseCore: a gather is split into steps that are fused with the matrix products around it. For other chips
# the compiler does not fuse gathers.
_FUSED = {
    "xla_enable_async_all_gather": "true",  # without it there is nothing to fuse
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",  # weights: nearly all bytes that a step receives
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",  # one product is too short for one gather
    "xla_tpu_overlap_compute_collective_tc": "true",  # lets the scheduler count on it
}

# v5p and v6e: the SparseCores, idle otherwise, run the collectives while the TensorCore computes.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",  # a group of 32 is two-dimensional
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",  # shows them in profiles
    "xla_tpu_use_tc_device_shape_on_sc": "true",  # the arrays stay in the TensorCore's layout: no copies
    "xla_sc_disable_megacore_partitioning": "true",  # a collective is one core's, not half of each
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",  # the two ways exclude each other
}

OPTIONS: dict[str, dict[str, str]] = {"TPU v5 lite": _FUSED, "TPU v5": _SPARSE_CORE, "TPU v6 lite": _SPARSE_CORE}
"""By JAX's device kind."""

LOW_EFFORT = {
    "optimization_level": "O0",
    "xla_sc_backend_opt_level": "O2",  # the lowest it accepts; the SparseCores' programs take half of the time
    "xla_jf_vliw_scheduler": "false",  # packs instructions in order: a tenth of the time
}
"""Added to a chip's own options for programs that are analysed but never run. Memory, products and collectives are
nearly those of the default."""


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Options for ``lowered.compile`` on the devices of this mesh."""
    device = mesh.devices.flat[0]
    return OPTIONS.get(device.device_kind, {}) if device.platform == "tpu" else {}
