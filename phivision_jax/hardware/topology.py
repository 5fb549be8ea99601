"""TPU slices by name, without a TPU: what XLA and Cloud call them, and what their chips can do.

XLA names a slice by its shape in chips (``v5p:4x4x8``). Cloud names the same slice by a count, of TensorCores for v4
and v5p, which have two to a chip (``v5p-256``), of chips for v5e and v6e (``v5litepod-256``, ``v6e-256``).

    name             shape     chips   devices   hosts
    v5p-256          4x4x8     128     128       32 of 4 chips
    v4-256           4x4x8     128     256       32 of 4 chips       one JAX device per TensorCore, not per chip
    v5litepod-256    16x16     256     256       64 of 4 chips
    v6e-8            2x4       8       8         1 of 8 chips

A host here is a virtual machine with one JAX process, the thing that reads data. It has 4 chips on v4 and v5p. On v5e
and v6e a slice of up to 8 chips is one host, and larger ones are hosts of 4: two such share a physical machine of 8,
and Cloud's tables count both kinds.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Rates are per chip and second, in FLOPs or bytes; 1 GB is 1e9 bytes."""

    device_kind: str
    """As JAX calls it."""
    cloud_prefix: str
    cores_in_cloud_name: int
    """What the number of a Cloud name counts, per chip."""
    devices: int
    """JAX devices per chip."""
    shapes: tuple[str, ...]
    """The slices that have a Cloud name, smallest first; the number of chips tells them apart."""
    max_chips: int
    """Of one slice."""
    hbm_bytes: int
    """What a program may use, all devices of the chip together: less than what is sold, since some is reserved."""
    peak_bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float | None
    """Between the chips of a slice: all links of a chip, both directions. None: not in Google's documents."""
    dcn_bandwidth: float | None
    """Between slices, one direction. None: not in Google's documents."""


# Rates: "Key specifications" of docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e}, read in 2026; those pages also hold
# the tables of shapes. hbm_bytes: the limit that the TPU compiler states when a program does not fit ("of 15.75G hbm").
_CUBES = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"]
_SQUARES = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
CHIPS = {
    "v4": Chip(
        device_kind="TPU v4",
        cloud_prefix="v4",
        cores_in_cloud_name=2,
        devices=2,
        shapes=tuple(_CUBES),
        max_chips=4096,
        hbm_bytes=int(2 * 15.25 * GIB),  # the compiler's limit is per device
        peak_bf16_flops=275e12,
        hbm_bandwidth=1200e9,
        ici_bandwidth=None,
        dcn_bandwidth=None,
    ),
    "v5e": Chip(
        device_kind="TPU v5 lite",
        cloud_prefix="v5litepod",
        cores_in_cloud_name=1,
        devices=1,
        shapes=tuple(_SQUARES),
        max_chips=256,
        hbm_bytes=int(15.75 * GIB),
        peak_bf16_flops=197e12,
        hbm_bandwidth=819e9,
        ici_bandwidth=400e9,
        dcn_bandwidth=6.4e12 / 8 / 256,  # 6.4 Tbit/s per pod of 256
    ),
    "v5p": Chip(
        device_kind="TPU v5",
        cloud_prefix="v5p",
        cores_in_cloud_name=2,
        devices=1,
        shapes=(*_CUBES, "16x16x24"),
        max_chips=6144,
        hbm_bytes=int(95.74 * GIB),
        peak_bf16_flops=459e12,
        hbm_bandwidth=2765e9,
        ici_bandwidth=1200e9,
        dcn_bandwidth=50e9 / 8,  # 50 Gbit/s per chip
    ),
    "v6e": Chip(
        device_kind="TPU v6 lite",
        cloud_prefix="v6e",
        cores_in_cloud_name=1,
        devices=1,
        shapes=tuple(_SQUARES),
        max_chips=256,
        hbm_bytes=int(31.25 * GIB),
        peak_bf16_flops=918e12,
        hbm_bandwidth=1600e9,  # the page once said 1640
        ici_bandwidth=800e9,
        dcn_bandwidth=25.6e12 / 8 / 256,  # 25.6 Tbit/s per pod of 256
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices. Counts are over all slices; rates and bytes as in ``Chip``, per chip."""

    generation: str
    xla_name: str
    """Of one slice, as ``jax.experimental.topologies.get_topology_desc`` takes it (with ``num_slices=slices``)."""
    cloud_name: str | None
    """Of one slice; None for a shape that Cloud takes only as a shape."""
    shape: tuple[int, ...]
    """Of one slice, in chips."""
    slices: int
    chips: int
    devices: int
    hosts: int
    chips_per_host: int
    hbm_bytes_per_chip: int
    peak_bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float | None
    dcn_bandwidth: float | None

    @property
    def device_kind(self) -> str:
        """As JAX calls its devices."""
        return CHIPS[self.generation].device_kind

    @property
    def hbm_bytes_per_device(self) -> int:
        """What one compiled program, which runs on one device, may use."""
        return self.hbm_bytes_per_chip * self.chips // self.devices

    def __str__(self) -> str:
        """``v5p:4x4x8 (v5p-256): 128 chips, 32 hosts of 4``, and how many slices when there are several."""
        name = self.xla_name + (f" ({self.cloud_name})" if self.cloud_name else "")
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{several}{name}: {_plural(self.chips, 'chip')}, {_plural(self.hosts, 'host')} of {self.chips_per_host}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The slice that a name stands for, XLA's (``v5p:4x4x8``) or Cloud's (``v5p-256``).

    Raises:
      ValueError: for a generation, shape or count that does not exist, naming the nearest that does; for less than one
        slice.
    """
    if slices < 1:
        raise ValueError(f"slices must be at least 1, not {slices}")
    if match := re.fullmatch(r"(\w+):(\d{1,6}(?:x\d{1,6}){1,3})", name):
        generation, shape = _shape_of_xla_name(name, *match.groups())
    elif match := re.fullmatch(r"(\w+)-(\d{1,9})", name):
        generation, shape = _shape_of_cloud_name(name, match[1], int(match[2]))
    else:
        raise ValueError(f"topology {name!r} is not a name like v5p:4x4x8 or v5p-256{_similar(name)}")
    chip, chips = CHIPS[generation], math.prod(shape)
    text = "x".join(map(str, shape))
    chips_per_host = chips if len(shape) == 2 and chips <= 8 else 4
    return Topology(
        generation=generation,
        xla_name=f"{generation}:{text}",
        cloud_name=_cloud_name(generation, text) if text in chip.shapes else None,
        shape=shape,
        slices=slices,
        chips=chips * slices,
        devices=chips * slices * chip.devices,
        hosts=chips * slices // chips_per_host,
        chips_per_host=chips_per_host,
        hbm_bytes_per_chip=chip.hbm_bytes,
        peak_bf16_flops=chip.peak_bf16_flops,
        hbm_bandwidth=chip.hbm_bandwidth,
        ici_bandwidth=chip.ici_bandwidth,
        dcn_bandwidth=chip.dcn_bandwidth,
    )


def _shape_of_xla_name(name: str, generation: str, text: str) -> tuple[str, tuple[int, ...]]:
    if generation not in CHIPS:
        raise ValueError(f"topology {name!r}: {generation!r} is none of {', '.join(CHIPS)}{_similar(name)}")
    chip, shape = CHIPS[generation], _parse(text)
    chips = math.prod(shape)
    # From 4x4x4 on, v4 and v5p are built of cubes of that size, laid out in any way.
    of_cubes = len(shape) == 3 == len(_parse(chip.shapes[0])) and all(side and side % 4 == 0 for side in shape)
    if text not in chip.shapes and not (of_cubes and chips <= chip.max_chips):
        nearest = _nearest(generation, chips)
        raise ValueError(
            f"topology {name!r}: {generation} has no slice of shape {text}; the nearest is {generation}:{nearest} "
            f"({_plural(math.prod(_parse(nearest)), 'chip')})"
        )
    return generation, shape


def _shape_of_cloud_name(name: str, prefix: str, count: int) -> tuple[str, tuple[int, ...]]:
    by_prefix = {chip.cloud_prefix: generation for generation, chip in CHIPS.items()}
    generation = by_prefix.get(prefix, prefix)
    if generation not in CHIPS:
        raise ValueError(f"topology {name!r}: {prefix!r} is none of {', '.join(by_prefix)}{_similar(name)}")
    chip = CHIPS[generation]
    nearest = _nearest(generation, count / chip.cores_in_cloud_name)
    if name != _cloud_name(generation, nearest):
        counted = "TensorCores, two to a chip" if chip.cores_in_cloud_name == 2 else "chips"
        raise ValueError(
            f"topology {name!r} is not in Cloud's table (the number counts {counted}); the nearest is "
            f"{_cloud_name(generation, nearest)}, which is {generation}:{nearest}. Other slices have names by shape"
        )
    return generation, _parse(nearest)


def _parse(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def _cloud_name(generation: str, shape: str) -> str:
    chip = CHIPS[generation]
    return f"{chip.cloud_prefix}-{math.prod(_parse(shape)) * chip.cores_in_cloud_name}"


def _nearest(generation: str, chips: float) -> str:
    """The named shape whose number of chips is closest."""
    return min(CHIPS[generation].shapes, key=lambda shape: abs(math.prod(_parse(shape)) - chips))


def _similar(name: str) -> str:
    known = [n for g, chip in CHIPS.items() for shape in chip.shapes for n in (f"{g}:{shape}", _cloud_name(g, shape))]
    return f"; the nearest is {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
