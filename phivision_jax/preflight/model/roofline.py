"""Roofline model of a step's time, behind every time and MFU that is called *modelled*.

    seconds = matmul FLOPs / (peak · e)  +  attention FLOPs / (peak · e · 2/3)  +  HBM bytes / HBM bandwidth
              + per kind of link: exposed communication, and overlapped communication beyond half of the time so far

``e``, the only fitted number of a generation, comes from published runs of other models (``EFFICIENCY``). The rest is
counted in ``chip_work.py``: the work that a chip executes, recompute and padding included, unlike
``hardware/flops.py``, which counts what the model requires. MFU is the latter over these seconds. ``docs/roofline.md``
has every constant's source and the error on held-out runs.
"""

from __future__ import annotations

import dataclasses

from phivision_jax.hardware.topology import CHIPS

# Fitted by benchmarks/roofline.py; a test compares the table with docs/results/roofline.json.
EFFICIENCY = {"v5e": 0.8117, "v5p": 0.8278, "v6e": 0.7668}
"""Share of the peak that matrix products reach."""

ATTENTION_RATIO = 2 / 3
"""Efficiency of the attention kernel relative to matrix products, besides the array's idle part. Not fitted."""

OVERLAP = 0.5
"""Share of the compute time under which asynchronous communication may hide. Not fitted."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Work and traffic of one chip in one step."""

    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    """FLOPs of the visited blocks, heads padded to the matrix unit's width."""
    hbm_bytes: float = 0.0
    """Traffic of all operations but matrix products and attention."""
    ici_bytes_exposed: float = 0.0
    """Received from chips of the slice while the chip waits."""
    ici_bytes_overlapped: float = 0.0
    """Received while it may compute."""
    dcn_bytes_exposed: float = 0.0
    dcn_bytes_overlapped: float = 0.0

    def __add__(self, other: Work) -> Work:
        a, b = dataclasses.astuple(self), dataclasses.astuple(other)
        return Work(*(x + y for x, y in zip(a, b, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Modelled seconds of one step by part; the parts do not overlap."""

    matmul: float
    attention: float
    hbm: float
    ici_exposed: float
    dcn_exposed: float

    @property
    def seconds(self) -> float:
        return sum(dataclasses.astuple(self))


def step_time(work: Work, generation: str, efficiency: float | None = None) -> StepTime:
    """Modelled time of a chip's work.

    Args:
      generation: a key of ``CHIPS``.
      efficiency: of matrix products; default: the fitted one.

    Raises:
      ValueError: for a generation without a fitted efficiency, or a link without a published bandwidth.
    """
    chip = CHIPS[generation]
    efficiency = efficiency or EFFICIENCY.get(generation)
    if efficiency is None:
        raise ValueError(f"no published runs to fit {generation} to; times are modelled for {', '.join(EFFICIENCY)}")
    matmul = work.matmul_flops / (chip.peak_bf16_flops * efficiency)
    attention = work.attention_flops / (chip.peak_bf16_flops * efficiency * ATTENTION_RATIO)
    hbm = work.hbm_bytes / chip.hbm_bandwidth
    hidden = OVERLAP * (matmul + attention + hbm)

    def exposed(name: str, waited: float, overlapped: float, bandwidth: float | None) -> float:
        if waited + overlapped == 0:
            return 0.0
        if bandwidth is None:
            raise ValueError(f"the {name} bandwidth of {generation} is not published: this step has no modelled time")
        return waited / bandwidth + max(0.0, overlapped / bandwidth - hidden)

    # Google publishes the sum of all links in both directions; a byte on the wire is counted where it arrives.
    received = None if chip.ici_bandwidth is None else chip.ici_bandwidth / 2
    ici = exposed("ICI", work.ici_bytes_exposed, work.ici_bytes_overlapped, received)
    dcn = exposed("DCN", work.dcn_bytes_exposed, work.dcn_bytes_overlapped, chip.dcn_bandwidth)
    return StepTime(matmul, attention, hbm, ici, dcn)
