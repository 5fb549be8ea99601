"""Write cases/strategies.npz: tokens of the tiled image strategies, computed in PyTorch from the published algorithms.

    torch-env/bin/python tests/golden/make_strategies.py            # needs torch and pillow
    torch-env/bin/python tests/golden/make_strategies.py --check    # recompute and compare

S² follows github.com/bfshi/scaling_on_scales: features of the tiles of each scale are stitched, resized with
``interpolate(mode="area")`` to the first scale and concatenated by channels. Dynamic-S² follows github.com/NVlabs/VILA:
resized to the last scale, then 2x2 features side by side, odd sides padded with zeros. The sizes of the resized image
and of its grids are written here by hand. Each scale of a crop is resized by Pillow's bicubic filter on u8, then cut.

The encoder is a random linear layer and a tanh; it adds the mean of a tile, so that features depend on their tile.
Prints how far u8 tiles and tokens are from resizing in floating point, as the published code does (without
antialiasing), and with antialiasing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

HERE = Path(__file__).parent
IMAGE, FILE = HERE / "pixels/chart_333x777.png", HERE / "cases/strategies.npz"
WIDTH, PATCH = 4, 4


class Case(NamedTuple):
    """Sizes in pixels; grids as rows and columns."""

    tile: int
    canvas: tuple[int, int]
    """Width and height of the resized image."""
    corners: list[tuple[int, int]]
    """Left and top of each crop on it."""
    crop: tuple[int, int]
    """Width and height of a crop."""
    scales: list[tuple[int, int]]
    """Rows and columns of tiles of each scale of a crop."""
    to: tuple[int, int]
    """Rows and columns to which features are resized."""
    mode: str = "area"
    block: int = 1


CASES = {
    "s2": Case(16, (48, 48), [(0, 0)], (48, 48), [(1, 1), (2, 2), (3, 3)], (4, 4)),
    # 333x777 to 64x149: three crops of 64 pixels, 85 pixels for two steps.
    "multicrop_s2": Case(
        16, (64, 149), [(0, 0), (0, 42), (0, 85)], (64, 64), [(1, 1), (2, 2), (4, 4)], (4, 4)
    ),
    "dynamic_s2": Case(16, (32, 80), [(0, 0)], (32, 80), [(1, 1), (2, 2), (5, 2)], (20, 8), block=2),
    # Tiles of 3x3 features: the stitched 15x6 have an odd side.
    "dynamic_s2_odd": Case(12, (24, 60), [(0, 0)], (24, 60), [(1, 1), (2, 2), (5, 2)], (15, 6), block=2),
    # 333x777 to 43x100: 15 crops of 20 pixels, whose 5x5 features become 3x3.
    "multicrop": Case(
        20, (43, 100), [(x, 20 * r) for r in range(5) for x in (0, 11, 23)], (20, 20), [(1, 1)], (3, 3), "bilinear"
    ),
}  # fmt: skip


def split(pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[C, H, W] cut into tiles [rows · columns, C, h, w], row by row."""
    return torch.cat([torch.stack(row.chunk(columns, 2)) for row in pixels.chunk(rows, 1)])


def stitch(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of ``split``."""
    lines = [torch.cat(list(tiles[r * columns : (r + 1) * columns]), 2) for r in range(rows)]
    return torch.cat(lines, 1)


def encode(tiles: torch.Tensor) -> torch.Tensor:
    """Features [n, WIDTH, h, w] of tiles [n, 3, H, W] in 0…255."""
    kernel = torch.randn(WIDTH, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(5)) / 4
    features = torch.nn.functional.conv2d(tiles / 127.5 - 1, kernel, stride=PATCH)
    return torch.tanh(features + features.mean((2, 3), keepdim=True))


def merged(features: list[torch.Tensor], case: Case) -> torch.Tensor:
    """Tokens [n, channels] of one crop, from the features of the tiles of each scale."""
    stitched = [stitch(f, *grid) for f, grid in zip(features, case.scales, strict=True)]
    resized = torch.cat([interpolate(x[None], size=case.to, mode=case.mode)[0] for x in stitched])
    b = case.block
    resized = pad(resized, (0, -case.to[1] % b, 0, -case.to[0] % b))
    c, h, w = resized.shape
    blocks = resized.reshape(c, h // b, b, w // b, b).permute(1, 3, 2, 4, 0)  # rows, columns, p, q, channels
    return blocks.reshape(h // b * (w // b), b * b * c)


def tiles_of(case: Case, image: Image.Image, resize: str) -> list[list[torch.Tensor]]:
    """Tiles of each crop and scale, [n, 3, tile, tile] in 0…255; ``resize``: "u8", "float" or "antialiased"."""
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()
    found = []
    for left, top in case.corners:
        scales = []
        for rows, columns in case.scales:
            width, height = columns * case.tile, rows * case.tile
            if resize == "u8":
                edges = left, top, left + case.crop[0], top + case.crop[1]
                box = [edge * image.size[i % 2] / case.canvas[i % 2] for i, edge in enumerate(edges)]
                part = image.resize((width, height), Image.Resampling.BICUBIC, box)
                scaled = torch.tensor(np.asarray(part)).permute(2, 0, 1).float()
            else:  # of one crop: the complete image
                how = {"mode": "bicubic", "antialias": resize == "antialiased"}
                scaled = interpolate(pixels[None], size=(height, width), **how)[0].clamp(0, 255)
            scales.append(split(scaled, rows, columns))
        found.append(scales)
    return found


def compute() -> dict[str, np.ndarray]:
    image, arrays = Image.open(IMAGE).convert("RGB"), {}
    for name, case in CASES.items():
        crops = tiles_of(case, image, "u8")
        features = [[encode(tiles) for tiles in scales] for scales in crops]
        tokens = torch.cat([merged(scales, case) for scales in features])
        arrays[f"{name}_tiles"] = torch.cat([t for s in crops for t in s]).permute(0, 2, 3, 1).byte().numpy()
        flat = [f.flatten(2).transpose(1, 2).reshape(-1, WIDTH) for scales in features for f in scales]
        arrays[f"{name}_features"], arrays[f"{name}_tokens"] = torch.cat(flat).numpy(), tokens.numpy()
        for resize in ("float", "antialiased") if len(crops) == 1 else ():
            other = tiles_of(case, image, resize)
            levels = torch.cat([(a - b).abs().flatten() for a, b in zip(crops[0], other[0], strict=True)])
            changed = merged([encode(t) for t in other[0]], case)
            error = (tokens - changed).norm() / tokens.norm()
            pixels = f"pixels differ by {levels.mean():.2f} of 255 on average, {levels.max():.1f} at most"
            print(f"{name}: u8 and {resize} bicubic: {pixels}; tokens by {error:.2%} (relative norm)")
    return arrays


def main() -> None:
    torch.set_num_threads(1)
    arrays = compute()
    if "--check" in sys.argv:
        stored = np.load(FILE)
        for name, array in arrays.items():
            np.testing.assert_allclose(array.astype(float), stored[name].astype(float), atol=1e-5, err_msg=name)
        print(f"{FILE.name}: {len(arrays)} arrays are as stored")
    else:
        np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
