"""Count the vision FLOPs of an image under each strategy: those of a compiled program, and those of hardware/flops.py.

python -m benchmarks.strategy_flops            # compiles 18 forward passes without weights: half a minute
python -m benchmarks.strategy_flops --tables   # only rewrites the table of docs/image_strategies.md

The program makes the vision tokens of one image with the 5B proxy. Each tile has a vision row of its own, and all
scores of a row are computed at once: kernels are opaque to the count, and a loop over blocks has no constant length.
"""

from __future__ import annotations

import importlib
import json
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from benchmarks.preflight_ablations import PAGE, VARIANTS
from benchmarks.tables import fill, markdown
from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.cli.load_config import load_config
from phivision_jax.config import ModelConfig
from phivision_jax.hardware.flops import Workload, step_flops
from phivision_jax.images.layout import ImageSize, make_layout
from phivision_jax.models import phivision
from phivision_jax.preflight import hlo
from phivision_jax.preflight.matmuls import matmul_flops
from tests.support.paths import ROOT

RESULT = ROOT / "docs/results/strategy_flops.json"
IMAGES = ((640, 480), (1280, 720), (2560, 1440))
VISION = ("vision", "vision_attention", "projector")


def model_of(variant: str) -> ModelConfig:
    """The 5B proxy with this strategy."""
    return load_config(f"{ROOT}/configs/ablations/resolution.py:{variant}").model_over(ModelConfig())


def counted(config: ModelConfig, size: ImageSize) -> dict[str, float]:
    """Forward FLOPs of the parts that make vision tokens, by our count."""
    pairs = sum((rows * columns) ** 2 for rows, columns in size.grids)
    parts = step_flops(config, Workload(0, 0, size.patches, pairs, size.tokens)).parts
    return {part: parts[part].forward for part in VISION}


def compiled(config: ModelConfig, size: ImageSize, merge: tuple[int, int] | None) -> float:
    """FLOPs of the matrix products in the compiled program, for an image whose tiles are all of one size."""
    (tile,) = {rows * columns for rows, columns in size.grids}
    shape = RowShape(1, len(size.grids), tile, (size.tokens, *merge) if merge else None)
    graphdef, state = phivision.abstract(config, dtype=jnp.bfloat16)
    # The package exports the function under the module's name.
    attend = importlib.import_module("phivision_jax.models.attention.attend")
    with mock.patch.object(attend, "PLAIN_QUERIES", tile):
        tokens = jax.jit(lambda params, batch: phivision.merge(graphdef, params).vision_tokens(batch))
        lowered = tokens.lower(nnx.to_pure_dict(state), batch_spec(1, shape, config.vision.patch_dim))
        program = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    return matmul_flops(hlo.parse(program or ""))


def measure(variant: str, width: int, height: int) -> dict[str, Any]:
    """Counts of one strategy and one image."""
    config = model_of(variant)
    layout = make_layout(config)
    size = layout.measure(width, height)
    sizes = {"tiles": len(size.grids), "patches": size.patches, "tokens": size.tokens}
    ours, program = counted(config, size), compiled(config, size, layout.merge)
    return {"variant": variant, "image": [width, height], **sizes, "counted": ours, "compiled": program}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table with a line per image and strategy; GFLOP are 1e9."""
    head = ["image", "variant", "tiles", "patches", "tokens", "GFLOP per image, compiled", "counted"]
    head += ["compiled / counted", "of it attention", "GFLOP per token"]
    return markdown(head, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    ours, program = sum(row["counted"].values()), row["compiled"]
    attention, image = row["counted"]["vision_attention"] / ours, "{}x{}".format(*row["image"])
    sizes = (f"{row[name]:,}" for name in ("tiles", "patches", "tokens"))
    numbers = f"{program / 1e9:,.0f}", f"{ours / 1e9:,.0f}", f"{program / ours:.3f}", f"{attention:.0%}"
    return image, row["variant"], *sizes, *numbers, f"{program / row['tokens'] / 1e9:.2f}"


def main(tables: bool = False) -> None:
    """Count, and write docs/results/strategy_flops.json and the table of docs/image_strategies.md.

    Args:
        tables: Only write the table, from the committed results.
    """
    if not tables:
        jax.config.update("jax_platforms", "cpu")
        rows = [measure(variant, *image) for image in IMAGES for variant in VARIANTS]
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), "flops", table(json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    tyro.cli(main)
