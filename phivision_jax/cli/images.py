"""``phivision images …``: how image strategies see an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

STRATEGIES = ("naflex:2048", "naflex:3600", "multicrop", "multicrop_s2", "dynamic_s2")
"""The strategies that the report compares."""


def compare(
    image: Annotated[Positional[Path], arg(metavar="IMAGE")],
    /,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    strategies: Annotated[tuple[str, ...], arg(metavar="NAME[:CAP]...")] = STRATEGIES,
    patch_size: int = 16,
    tile_size: int = 384,
) -> None:
    """Show image strategies side by side in one figure: tiles, patches, tokens, and a detail as the encoder sees it.

    Args:
        image: Image file.
        out: PNG to write; default: IMAGE with -strategies.png at the end of its name, in the current directory.
        strategies: Layouts to compare, each with the most tokens of an image after a colon, if not the report's.
        patch_size: Side of a patch in pixels.
        tile_size: Side of a tile in pixels (patches of 14 pixels: 378).
    """
    import dataclasses

    from phivision_jax.config import ModelConfig, VisionConfig
    from phivision_jax.data.view.strategies import Cost, comparison
    from phivision_jax.images.decode import open_image
    from phivision_jax.images.layout import make_layout, with_layout
    from phivision_jax.io.html import Section, Table, print_sections

    if not strategies:
        raise ValueError("--strategies: name at least one")
    out = out or Path(f"{image.stem}-strategies.png")
    if out.suffix != ".png":
        raise ValueError(f"--out {out}: compare writes a PNG; give a name that ends in .png")
    config = ModelConfig(vision=dataclasses.replace(VisionConfig(), patch_size=patch_size), tile_size=tile_size)
    layouts = [(name, make_layout(with_layout(config, name))) for name in strategies]
    opened = open_image(image)
    header = ("strategy", "tokens", "patches", "tiles", "resized to", "aspect ratio", "pixels per token")
    rows = []
    for name, layout in layouts:
        cost = Cost.measure(layout, *opened.size)
        counts = (f"{cost.tokens:,}", f"{cost.patches:,}", f"{cost.tiles}", "×".join(map(str, cost.resized)))
        rows.append((name, *counts, f"{cost.stretch - 1:+.1%}", f"{cost.pixels_per_token:,.0f}"))
    note = "aspect ratio: its change by resizing; pixels per token: of the image as given"
    print_sections([Section(f"{image}: {opened.width}×{opened.height} pixels", note, table=Table(header, rows))])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(comparison(opened, layouts).png)
    print(f"wrote {out}")


COMMANDS = (compare,)
"""In the order of ``phivision images --help``."""
