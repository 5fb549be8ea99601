"""TPU slices by name: their XLA and Cloud names, sizes, and the memory and rates of their chips.

XLA names a slice by its shape in chips (``v5p:4x4x8``). Cloud names the same slice by a count: of TensorCores for v4,
v5p and TPU7x, which have two per chip (``v5p-256``), of chips for v5e and v6e (``v5litepod-256``, ``v6e-256``).

    name             shape     chips   devices   hosts
    v5p-256          4x4x8     128     128       32 of 4 chips
    v4-256           4x4x8     128     128       32 of 4 chips
    tpu7x-256        4x4x8     128     256       32 of 4 chips       one JAX device per TensorCore, not per chip
    v5litepod-256    16x16     256     256       64 of 4 chips
    v6e-8            2x4       8       8         1 of 8 chips

A host is a virtual machine with one JAX process, which reads data. It has 4 chips on v4, v5p and TPU7x. On v5e and v6e
a slice of up to 8 chips is one host, and larger slices have hosts of 4: two of those share a physical machine of 8, and
Cloud's tables count both kinds.
"""

import dataclasses
import difflib
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of one generation. Rates are per chip and second, in FLOPs or bytes; 1 GB is 1e9 bytes."""

    device_kind: str
    """JAX's name of its devices."""
    cloud_prefix: str
    cores_in_cloud_name: int
    """Units that the number in a Cloud name counts, per chip."""
    devices: int
    """JAX devices per chip."""
    shapes: tuple[str, ...]
    """Shapes that have a Cloud name, smallest first; no two have the same number of chips, and the last
    is the largest slice."""
    hbm_bytes: int
    """Memory that a program may use, all devices of the chip together; the rest of the chip's HBM is reserved."""
    peak_bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float | None
    """Bandwidth within a slice: all links of a chip, both directions; None where Google publishes none."""
    dcn_bandwidth: float | None
    """Bandwidth between slices, one direction; None where Google publishes none."""
    host_bytes: float
    """The chip's share of its host's memory."""


# Rates, shapes, RAM: docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}, read in 2026.
# hbm_bytes: the limit in the TPU compiler's message when a program does not fit ("of 15.75G hbm"), times devices.
# hbm_bandwidth of v6e: an earlier version of the page has 1640 GB/s.
# dcn_bandwidth: v5p has 50 Gbit/s per chip, tpu7x 100; a pod of 256 v5e has 6.4 Tbit/s, one of v6e 25.6.
# host_bytes: a host of 4 chips has 407 GB (v4), 192 (v5e), 448 (v5p), 720 (v6e), 960 (tpu7x).
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# JAX kind, Cloud name, its cores, devices, shapes, HBM bytes, bf16 FLOP/s, bandwidths of HBM, ICI and DCN, RAM.
CHIPS = {
    "v4": Chip("TPU v4", "v4", 2, 1, _3D, int(30.75 * GIB), 275e12, 1200e9, None, None, 101.75e9),
    "v5e": Chip("TPU v5 lite", "v5litepod", 1, 1, _2D, int(15.75 * GIB), 197e12, 819e9, 400e9, 3.125e9, 48e9),
    "v5p": Chip("TPU v5", "v5p", 2, 1, (*_3D, "16x16x24"), int(95.74 * GIB), 459e12, 2765e9, 1200e9, 6.25e9, 112e9),
    "v6e": Chip("TPU v6 lite", "v6e", 1, 1, _2D, int(31.25 * GIB), 918e12, 1600e9, 800e9, 12.5e9, 180e9),
    "tpu7x": Chip("TPU7x", "tpu7x", 2, 2, (*_3D, "16x24x24"), int(189.5 * GIB), 2307e12, 7380e9, 1200e9, 12.5e9, 240e9),
}
"""By generation."""
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_GPU = re.compile(r"gpu|cuda|nvidia|rtx|^(\d+x)?(g?[abhlt]\d{1,3}|gh200|v100|mi\d{3})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices. Counts are over all slices."""

    generation: str
    """A key of ``CHIPS``."""
    shape: str
    """Chips along each dimension of one slice: ``4x4x8``."""
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def xla_name(self) -> str:
        """Name of one slice for ``jax.experimental.topologies.get_topology_desc`` (with ``num_slices=slices``)."""
        return f"{self.generation}:{self.shape}"

    @property
    def cloud_name(self) -> str | None:
        """Name of one slice; None for a shape that has none."""
        return _cloud_name(self.chip, self.shape) if self.shape in self.chip.shapes else None

    @property
    def chips(self) -> int:
        return _chips(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def chips_per_host(self) -> int:
        chips = _chips(self.shape)
        return chips if chips <= 8 and self.shape.count("x") == 1 else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    def __str__(self) -> str:
        """``v5p:4x4x8 (v5p-256): 128 chips, 32 hosts of 4``, preceded by the number of slices if there are several."""
        name = self.xla_name + (f" ({self.cloud_name})" if self.cloud_name else "")
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{several}{name}: {_plural(self.chips, 'chip')}, {_plural(self.hosts, 'host')} of {self.chips_per_host}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parse the name of a slice: XLA's (``v5p:4x4x8``), Cloud's (``v5p-256``), or as users write them (``v5e-8``).

    Raises:
      ValueError: for a generation, shape or count that does not exist, with the nearest that does; for ``slices`` < 1.
    """
    if slices < 1:
        raise ValueError(f"slices must be at least 1, not {slices}")
    written = name.strip().lower().removeprefix("tpu-")
    if _GPU.search(written):
        raise ValueError(f"topology {name!r} names a GPU; preflight compiles for TPU slices only, such as v6e-8")
    match = re.fullmatch(r"(\w+)(?:[:-](\d{1,6}(?:x\d{1,6}){1,3})|-(\d{1,9}))", written)
    if match is None:
        raise ValueError(f"topology {name!r} is not a name like v5p:4x4x8 or v5p-256{_similar(name)}")
    family, shape, count = match.groups()
    generation = ALIASES.get(family, family)
    if generation not in CHIPS:
        raise ValueError(f"topology {name!r}: {family!r} is none of {', '.join(CHIPS)}{_similar(name)}")
    chip = CHIPS[generation]
    size = _chips(shape) if shape else int(count) / chip.cores_in_cloud_name
    nearest = min(chip.shapes, key=lambda named: abs(_chips(named) - size))
    if shape is None:
        if size == _chips(nearest):
            return Topology(generation, nearest, slices)
        counted = "TensorCores, two per chip" if chip.cores_in_cloud_name == 2 else "chips"
        raise ValueError(
            f"topology {name!r} is not in Cloud's table (the number counts {counted}); the nearest is "
            f"{_cloud_name(chip, nearest)}, which is {generation}:{nearest}. Other slices have names by shape"
        )
    # From 4x4x4 on, slices of v4, v5p and TPU7x are any arrangement of cubes of that size.
    largest = chip.shapes[-1]
    of_cubes = shape.count("x") == largest.count("x") == 2 and all(int(side) % 4 == 0 for side in shape.split("x"))
    if shape in chip.shapes or (of_cubes and 0 < size <= _chips(largest)):
        return Topology(generation, shape, slices)
    raise ValueError(
        f"topology {name!r}: {generation} has no slice of shape {shape}; the nearest is {generation}:{nearest} "
        f"({_plural(_chips(nearest), 'chip')})"
    )


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _cloud_name(chip: Chip, shape: str) -> str:
    return f"{chip.cloud_prefix}-{_chips(shape) * chip.cores_in_cloud_name}"


def _similar(name: str) -> str:
    slices = (Topology(generation, shape) for generation, chip in CHIPS.items() for shape in chip.shapes)
    known = [name for one in slices for name in (one.xla_name, str(one.cloud_name))]
    return f"; the nearest is {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
