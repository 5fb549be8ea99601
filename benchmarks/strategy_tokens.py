"""Tokens of every image strategy for 10,000 random sizes, and the share of its cap that an image uses.

    python benchmarks/strategy_tokens.py                 # measures; writes docs/results and the table of the page
    python benchmarks/strategy_tokens.py --table-only    # only writes the table, from the committed numbers

Widths are log-normal around 735 pixels, heights follow with aspect ratios around 1.2, 64 to 4,000 pixels: the images of
``packing.py``. The second half are screens: twelve common sizes of desktops, laptops, tablets and telephones, in equal
numbers. Sizes alone decide tokens, so no image is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.tables import fill, markdown
from phivision_jax.config import ModelConfig
from phivision_jax.images.layout import make_layout, with_layout

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "docs/results/strategy_tokens.json", ROOT / "docs/image_strategies.md"
COUNT = 10_000
STRATEGIES = {
    "dynamic resolution, 2,048": "naflex:2048",
    "dynamic resolution, 3,600": "naflex:3600",
    "multi-crop": "multicrop",
    "multi-crop with S²": "multicrop_s2",
    "Dynamic-S²": "dynamic_s2",
}
SCREENS = (
    *((1280, 720), (1366, 768), (1440, 900), (1920, 1080), (2560, 1440), (3840, 2160), (1280, 1024)),
    *((1024, 1366), (820, 1180), (390, 844), (1080, 1920), (1080, 2400)),
)


def sizes_of(kind: str) -> np.ndarray:
    """[I, 2] widths and heights in pixels."""
    if kind == "screens":
        return np.resize(np.array(SCREENS), (COUNT // 2, 2))
    rng = np.random.default_rng(0)
    width = rng.lognormal(6.6, 0.55, COUNT // 2).clip(100, 4000).astype(int)
    height = (width * rng.lognormal(-0.2, 0.35, len(width))).clip(64, 4000).astype(int)
    return np.stack([width, height], axis=1)


def measure() -> dict[str, Any]:
    """Numbers of each strategy and kind of images."""
    kinds = {kind: sizes_of(kind) for kind in ("images", "screens")}
    rows = []
    for title, strategy in STRATEGIES.items():
        config = with_layout(ModelConfig(), strategy)
        layout = make_layout(config)
        cap = int(getattr(layout, "cap", config.max_patches))
        for kind, sizes in kinds.items():
            patches, tokens = layout.measure_all(sizes)
            row = {"strategy": title, "kind": kind, "cap": cap, "mean": tokens.mean(), "p95": np.percentile(tokens, 95)}
            row |= {"largest": int(tokens.max()), "share": tokens.mean() / cap, "patches": patches.mean()}
            rows.append(row | {"below_half": float((tokens < cap / 2).mean())})
    return {"count": COUNT, "seed": 0, "rows": rows}


def table(found: dict[str, Any]) -> str:
    head = ("strategy", "sizes", "cap", "tokens, mean", "p95", "largest", "share of the cap", "below half of it",
            "patches, mean")  # fmt: skip
    lines = [
        (
            *(row["strategy"], row["kind"], f"{row['cap']:,}", f"{row['mean']:,.0f}", f"{row['p95']:,.0f}"),
            *(f"{row['largest']:,}", f"{row['share']:.0%}", f"{row['below_half']:.0%} of images"),
            f"{row['patches']:,.0f}",
        )
        for row in found["rows"]
    ]
    return markdown(head, lines)


def main(table_only: bool = False) -> None:
    """Write the numbers and the table of docs/image_strategies.md.

    Args:
        table_only: Only write the table.
    """
    if not table_only:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    shown = table(json.loads(RESULT.read_text()))
    PAGE.write_text(fill(PAGE.read_text(), "strategy tokens", shown), encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    tyro.cli(main)
