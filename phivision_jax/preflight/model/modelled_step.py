"""From what the compiler made of a step to how long it would take: modelled, never measured.

The program says what is multiplied and what is sent; the model's definition says how much of that is useful; the
roofline (``roofline.py``, ``docs/roofline.md``) turns the former into seconds. What is in a row is taken from the
recipe's means, since no data is read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.hardware.topology import Topology
from phivision_jax.preflight.model import roofline
from phivision_jax.training.run_config import RunConfig

FILLED = 0.99
"""Of a row's columns: what packing leaves as padding is under 1 % (``docs/results/packing.json``)."""

IMAGE_SHARE = 0.71
"""Patches among an example's columns: 1,830 beside 745 text tokens (DESIGN's mix)."""

RECIPE_TOKENS = 200e9


@dataclasses.dataclass(frozen=True)
class Mix:
    """The typical example: its columns, and how many of them are patches of its one image."""

    columns: int
    patches: int

    @classmethod
    def of_recipe(cls, cfg: RunConfig) -> Mix:
        """Means of the recipe's stages: 700 tokens in rows of 2,048, 3,000 in 8,192, 3,750 in longer ones."""
        length = cfg.data.length
        columns = min(700 if length <= 2048 else 3000 if length <= 8192 else 3750, length)
        patches = round(columns * IMAGE_SHARE) if cfg.data.num_patches else 0
        return cls(columns, min(patches, cfg.model.max_patches))

    def row(self, length: int) -> list[int]:
        """Examples of a row, the last one cut to fill it: what packing reaches with examples of all sizes."""
        return _packed(round(length * FILLED), self.columns)


def workload(cfg: RunConfig, mix: Mix) -> Workload:
    """The useful work of a step."""
    examples = cfg.data.batch_rows * round(cfg.data.length * FILLED) / mix.columns
    bidirectional = cfg.model.image_attention == "bidirectional"
    return Workload.of_examples(
        examples, mix.columns, [mix.patches] if mix.patches else [], bidirectional=bidirectional
    )


def executed(cfg: RunConfig, generation: str, mix: Mix) -> roofline.Work:
    """What a chip does in a step by our own count, before a compiler is asked."""
    data, mesh = cfg.data, cfg.mesh
    split = roofline.Split(mesh.data, mesh.fsdp, mesh.tensor, mesh.context, mesh.slice)
    in_row = round(data.length * FILLED / mix.columns * mix.patches / data.vision_rows)
    images = _packed(min(in_row, data.num_patches), mix.patches) if mix.patches else []
    return roofline.executed_work(
        cfg.model,
        generation,
        split,
        rows=data.batch_rows,
        length=data.length,
        examples=mix.row(data.length),
        vision_rows=data.vision_rows if data.num_patches else 0,
        num_patches=data.num_patches,
        images=images,
        vision_recompute=roofline.RECOMPUTE[cfg.vision_remat],
        decoder_recompute=roofline.RECOMPUTE[cfg.remat],
        lr_rules=cfg.optim.lr_rules,
        moment_bytes=2 if cfg.optim.moment_dtype == "bfloat16" else 4,
    )


def compiled_work(counted: roofline.Work, facts: Mapping[str, Any]) -> roofline.Work:
    """``executed``, with products and collectives as the program has them."""
    sent = {True: 0.0, False: 0.0}
    between = dict(sent)
    for one in facts["collectives"]:
        (between if one["kind"] in ("send", "recv") else sent)[one["overlapped"]] += one["wire_bytes"]
    return dataclasses.replace(
        counted,
        matmul_flops=facts["matmul_flops"],
        ici_bytes_exposed=sent[False],
        ici_bytes_overlapped=sent[True],
        dcn_bytes_exposed=between[False],
        dcn_bytes_overlapped=between[True],
    )


def speed(cfg: RunConfig, where: Topology, mix: Mix, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Modelled figures of a step: of the compiled program, or (without facts) of our count alone."""
    counted = executed(cfg, where.generation, mix)
    work = counted if facts is None else compiled_work(counted, facts)
    time = roofline.step_time(work, where.generation)
    useful, per_step = step_flops(cfg.model, workload(cfg, mix), cfg.optim.lr_rules), workload(cfg, mix)
    images = per_step.patches / mix.patches if mix.patches else 0.0
    tokens = per_step.tokens / time.seconds
    return {
        "modelled_step_seconds": time.seconds,
        "modelled_parts_seconds": dataclasses.asdict(time),
        "modelled_mfu": mfu(useful.total, time.seconds, where.chips, where.peak_bf16_flops),
        "modelled_tokens_per_second": tokens,
        "modelled_tokens_per_second_per_chip": tokens / where.chips,
        "modelled_chip_hours_of_recipe": RECIPE_TOKENS / tokens * where.chips / 3600,
        "modelled_images_per_second_per_host": images / time.seconds / where.hosts,
        "flops_per_step": useful.total,
        "flops_per_step_by_part": {name: cost.total for name, cost in useful.parts.items()},
        "matmul_flops_implied": counted.matmul_flops * where.chips,
        "tokens_per_step": per_step.tokens,
        "example_columns": mix.columns,
        "example_patches": mix.patches,
    }


def _packed(filled: int, size: int) -> list[int]:
    whole, rest = divmod(filled, size)
    return [size] * whole + [rest] * (rest > 0)
