"""Modelled time and MFU of a compiled step; nothing here is measured.

The program has the products and collectives, ``hardware/flops.py`` counts the useful part, and the roofline
(``roofline.py``, ``docs/roofline.md``) turns the program's work into seconds. The contents of a row are the recipe's
means, since no data is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.hardware.topology import Topology
from phivision_jax.preflight.collectives import DCN_KINDS
from phivision_jax.preflight.model import chip_work, roofline
from phivision_jax.training.run_config import ResolvedConfig

FILLED = 0.99
"""Share of a row that is not padding; packing leaves under 1 % (``docs/results/packing.json``)."""

IMAGE_SHARE = 0.71
"""Share of an example's tokens that are image tokens: 1,830 beside 745 text tokens in the recipe's mix."""


class Mix(NamedTuple):
    """A typical example: its tokens, of which ``patches`` are those of its one image."""

    tokens: int
    patches: int

    @classmethod
    def of_recipe(cls, cfg: ResolvedConfig) -> Mix:
        """Means of the recipe's stages: 700 tokens in rows of 2,048, 3,000 in 8,192, 3,750 in longer ones."""
        length = cfg.data.length
        tokens = min(700 if length <= 2048 else 3000 if length <= 8192 else 3750, length)
        patches = round(tokens * IMAGE_SHARE) if cfg.data.num_patches else 0
        return cls(tokens, min(patches, cfg.model.max_patches))


def workload(cfg: ResolvedConfig, mix: Mix) -> Workload:
    """Useful work of a step."""
    examples = cfg.data.batch_rows * round(cfg.data.length * FILLED) / mix.tokens
    bidirectional = cfg.model.image_attention == "bidirectional"
    return Workload.of_examples(examples, mix.tokens, [mix.patches] if mix.patches else [], bidirectional=bidirectional)


def executed(cfg: ResolvedConfig, generation: str, mix: Mix) -> roofline.Work:
    """Work of a chip in a step by our own count, without a compiled program."""
    shape = cfg.data.row_shape(cfg.model)
    in_row = round(shape.length * FILLED / mix.tokens * mix.patches / shape.vision_rows)
    images = _packed(min(in_row, shape.num_patches), mix.patches) if mix.patches else []
    # The last example is cut to fill the row, as packing does with examples of all sizes.
    return chip_work.executed_work(cfg, generation, _packed(round(shape.length * FILLED), mix.tokens), images)


def compiled_work(counted: roofline.Work, facts: Mapping[str, Any]) -> roofline.Work:
    """``counted`` with the products and collectives of a compiled program."""
    sent = dict.fromkeys((f.name for f in dataclasses.fields(counted) if f.name.startswith(("ici_", "dcn_"))), 0.0)
    for one in facts["collectives"]:
        link, when = "dcn" if one["kind"] in DCN_KINDS else "ici", "overlapped" if one["overlapped"] else "exposed"
        sent[f"{link}_bytes_{when}"] += one["wire_bytes"]
    return dataclasses.replace(counted, matmul_flops=facts["matmul_flops"], **sent)


def speed(cfg: ResolvedConfig, where: Topology, mix: Mix, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Modelled figures of a step, from the compiled program's facts or, without facts, from our own count."""
    counted = executed(cfg, where.generation, mix)
    time = roofline.step_time(compiled_work(counted, facts) if facts else counted, where.generation)
    per_step = workload(cfg, mix)
    useful = step_flops(cfg.model, per_step, cfg.optim.lr_rules, cfg.lora)
    images = per_step.patches / mix.patches if mix.patches else 0.0
    tokens = per_step.tokens / time.seconds
    return {
        "modelled_step_seconds": time.seconds,
        "modelled_parts_seconds": dataclasses.asdict(time),
        "modelled_mfu": mfu(useful.total, time.seconds, where.chips, where.chip.peak_bf16_flops),
        "modelled_tokens_per_second": tokens,
        "modelled_tokens_per_second_per_chip": tokens / where.chips,
        "modelled_images_per_second_per_host": images / time.seconds / where.hosts,
        "flops_per_step": useful.total,
        "flops_per_step_by_part": {name: cost.total for name, cost in useful.parts.items()},
        "matmul_flops_implied": counted.matmul_flops * where.chips,
        "tokens_per_step": per_step.tokens,
        "example_tokens": mix.tokens,
        "example_patches": mix.patches,
    }


def _packed(filled: int, size: int) -> list[int]:
    complete, rest = divmod(filled, size)
    return [size] * complete + [rest] * (rest > 0)
