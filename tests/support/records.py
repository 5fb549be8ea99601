"""A small model configuration, made-up records with real PNG images, and a dataset of bare lengths for planning."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.plan.example_order import Pool
from phivision_jax.data.records import Record
from phivision_jax.data.store.dataset import Index
from phivision_jax.images.layout import make_layout

# Patches of 8x8 pixels, so a 64x64 image is 64 patches and a 24x16 one is 2 rows of 3.
CONFIG = ModelConfig(
    vision=VisionConfig(
        patch_size=8, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_positions=16
    ),
    decoder=DecoderConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        bos_token_id=0, eos_token_id=508, pad_token_id=509,
    ),
    min_patches=4,
    max_patches=64,
)  # fmt: skip


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_record(i: int, sizes: tuple[tuple[int, int], ...] = ((24, 16),), **fields) -> Record:
    question = "<image>" * len(sizes) + "is there a " + "red " * (i % 7) + "shape?"
    return Record(
        **{
            "id": f"r{i:03d}",
            "source": "made-up",
            "images": tuple(png(w, h, seed=i) for w, h in sizes),
            "messages": ({"role": "user", "content": question}, {"role": "assistant", "content": "yes"}),
            "mode": "nothink",
        }
        | fields
    )


def mixed_records(n: int) -> list[Record]:
    """Text alone, one image of four sizes, two images."""
    kinds = [(), ((24, 16),), ((64, 64),), ((16, 40),), ((24, 16), (32, 32)), ((8, 8),)]
    return [make_record(i, kinds[i % len(kinds)]) for i in range(n)]


# The part of a processor that planning uses.
BARE_PROCESSOR: Any = SimpleNamespace(
    config=CONFIG,
    layout=make_layout(CONFIG),
    fingerprint="p" * 64,
    text_fingerprint="t" * 64,
)


class BareDataset:
    """Lengths without records: the part of a dataset that a plan uses."""

    def __init__(
        self, text_tokens: list[int], image_sizes: list[list[tuple[int, int]]], modes: np.ndarray | None = None
    ) -> None:
        self.index = Index(
            text_tokens=np.asarray(text_tokens, np.int32),
            image_offsets=np.cumsum([0, *map(len, image_sizes)], dtype=np.int64),
            image_sizes=np.asarray([s for sizes in image_sizes for s in sizes], np.int32).reshape(-1, 2),
            modes=np.zeros(len(text_tokens), np.int8) if modes is None else modes.astype(np.int8),
            tasks=np.zeros(len(text_tokens), np.uint8),
        )
        self.directory, self.hash, self.manifest = Path("bare"), "0" * 64, {"text": BARE_PROCESSOR.text_fingerprint}

    def __len__(self) -> int:
        return len(self.index.text_tokens)

    def __getitem__(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(id=f"r{i}")


def join_pools(pools: list[Pool]) -> tuple[Pool, np.ndarray]:
    """One pool of several sources' records, and the number of each record in its source."""
    arrays = {name: np.concatenate([getattr(pool, name) for pool in pools]) for name in ("tokens", "modes", "tasks")}
    sizes = [len(pool.tokens) for pool in pools]
    pool = Pool(np.repeat(np.arange(len(pools)), sizes), **arrays)
    return pool, np.concatenate([np.arange(size) for size in sizes])
