"""Work of ``step.py``: two small models, random tokens and pixels, and batches of them for both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from phivision_jax.batch import Batch, RowShape
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.plan.packing import Lengths, pack
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import Example, expand, fill_rows
from phivision_jax.text.constants import IGNORE, IMAGE_TOKEN
from phivision_jax.training.run_config import OptimConfig


def _model(vision: VisionConfig, **decoder: Any) -> ModelConfig:
    ids: dict[str, Any] = {"vocab_size": 8192, "bos_token_id": 8189, "eos_token_id": 8190, "pad_token_id": 8191}
    return ModelConfig(
        vision=vision, decoder=DecoderConfig(num_layers=4, **ids, **decoder), min_patches=16, max_patches=448
    )


MODELS = {
    "the released model's proportions": _model(
        VisionConfig(hidden_size=144, intermediate_size=538, num_layers=5, num_heads=2),
        hidden_size=512,
        intermediate_size=1792,
        num_heads=4,
        num_kv_heads=1,
    ),
    "heads of 32": _model(
        VisionConfig(hidden_size=256, intermediate_size=1024, num_layers=5, num_heads=4),
        hidden_size=512,
        intermediate_size=1408,
        num_heads=16,
        num_kv_heads=4,
    ),
}
"""Models by name. The first keeps what does not shrink with a model: heads of 128 (72 in the tower), four per KV head,
and feed-forward layers of the released relative width. The second has four times as many heads, so that attention is a
larger part of its work than in any large model. The head is a fifth of the products here and 3 % in the released model,
so savings of the loss (``training/loss.py``) count for more here."""

MODEL = MODELS["the released model's proportions"]
"""The model whose vocabulary, patches and limits define the work; they are equal in all models."""

OPTIMIZER = OptimConfig(warmup_steps=0, final_lr_ratio=1.0, weight_decay=0.1, clip_norm=1.0)

T, PATCHES = 1024, 896
"""Tokens of a row and patches of its vision row: an eighth of the recipe's."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An example before its images are laid out, the source of both sides' batches."""

    ids: list[int]
    """Token ids, with −200 for an image."""
    labels: list[int]
    images: list[PatchedImage]

    def laid_out(self) -> Example:
        return expand(self.ids, self.images, self.labels)

    @property
    def tokens(self) -> int:
        return len(self.ids) - len(self.images) + self.patches

    @property
    def patches(self) -> int:
        return sum(len(image.patches) for image in self.images)


@dataclasses.dataclass(frozen=True)
class Work:
    """The same items as batches for each side."""

    ours: list[Batch]
    peer: list[dict[str, np.ndarray]]


def make_item(rng: np.random.Generator, text: int, grids: Sequence[tuple[int, int]]) -> Item:
    """An example of images and ``text`` random tokens, of which the second half has a loss."""
    words = rng.integers(1, MODEL.decoder.bos_token_id, text).tolist()
    ids = [IMAGE_TOKEN] * len(grids) + words
    labels = [IGNORE] * (len(grids) + text // 2) + words[text // 2 :]
    patch_dim = MODEL.vision.patch_dim
    images = [PatchedImage(rng.integers(0, 256, (h * w, patch_dim), np.uint8), ((h, w),)) for h, w in grids]
    return Item(ids, labels, images)


def mixed_items(rng: np.random.Generator, count: int) -> list[Item]:
    """The mix of ``benchmarks/packing.py`` with lengths divided by eight, and image sides by its square root."""
    items: list[Item] = []
    while len(items) < count:
        kind = rng.choice(3, p=[0.15, 0.75, 0.10])
        text = int(rng.lognormal(6.8, 0.9) if kind == 0 else rng.lognormal(6.0, 1.0)) * T // 8192
        grids = []
        for _ in range((0, 1, rng.integers(2, 4))[kind]):
            patches = np.clip(rng.lognormal(7.4, 0.7) * T / 8192, MODEL.min_patches, MODEL.max_patches)
            height = max(1, round(float(patches * rng.lognormal(-0.2, 0.35)) ** 0.5))
            grids.append((height, max(1, int(patches) // height)))
        item = make_item(rng, max(text, 4), grids)
        if item.tokens <= T and item.patches <= PATCHES:
            items.append(item)
    return items


def our_batch(rows: Sequence[Sequence[Item]], length: int, patches: int) -> Batch:
    return fill_rows(
        [[item.laid_out() for item in row] for row in rows],
        RowShape(length, 1, patches),
        MODEL,
    )


def peer_batch(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """The arrays of a transformers collator: ids and images, each padded to the longest, and masks."""
    longest = max(len(item.ids) for item in items)
    images = [image for item in items for image in item.images]
    most = max((len(image.patches) for image in images), default=0)
    batch: dict[str, np.ndarray] = {
        "input_ids": np.full((len(items), longest), MODEL.decoder.pad_token_id, np.int64),
        "labels": np.full((len(items), longest), IGNORE, np.int64),
        "attention_mask": np.zeros((len(items), longest), np.int64),
        "pixel_values": np.zeros((len(images), most, MODEL.vision.patch_dim), np.float32),
        "pixel_attention_mask": np.zeros((len(images), most), np.int64),
        "spatial_shapes": np.array([image.grids[0] for image in images], np.int64).reshape(-1, 2),
    }
    for b, item in enumerate(items):
        batch["input_ids"][b, : len(item.ids)] = item.ids
        batch["labels"][b, : len(item.ids)] = item.labels
        batch["attention_mask"][b, : len(item.ids)] = 1
    for i, image in enumerate(images):
        batch["pixel_values"][i, : len(image.patches)] = image.patches / np.float32(127.5) - np.float32(1)
        batch["pixel_attention_mask"][i, : len(image.patches)] = 1
    return batch


def full_rows(rng: np.random.Generator, rows: int, batches: int) -> Work:
    """Batches of examples of T tokens, seven tenths of them one image, as in the mix."""
    grid = (24, 30)
    items_of = [[make_item(rng, T - 720, [grid]) for _ in range(rows)] for _ in range(batches)]
    ours = [our_batch([[item] for item in items], T, 720) for items in items_of]
    return Work(ours, [peer_batch(items) for items in items_of])


def packed(items: Sequence[Item], rows: int) -> list[Batch]:
    """The items packed, ``rows`` rows per batch; the last batch may end with empty rows."""
    sizes = [len(image.patches) for item in items for image in item.images]
    offsets = np.concatenate([[0], np.cumsum([len(item.images) for item in items])])
    lengths = Lengths(np.array([item.tokens for item in items]), np.array(sizes, np.int64), offsets)
    order, ends = pack(np.arange(len(items)), lengths, RowShape(T, 1, PATCHES))
    filled = [[items[i] for i in row] for row in np.split(order, ends[1:-1])]
    filled += [[]] * (-len(filled) % rows)
    return [our_batch(filled[i : i + rows], T, PATCHES) for i in range(0, len(filled), rows)]


def unpacked(items: Sequence[Item], batch_size: int) -> Work:
    """Batches of one example per row, padded to the longest example on both sides."""
    parts = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    ours = [
        our_batch([[item] for item in part], max(i.tokens for i in part), max(i.patches for i in part))
        for part in parts
    ]
    return Work(ours, [peer_batch(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class AllWork:
    """All work of the benchmark; every process makes the same for a seed."""

    full: Work
    items: list[Item]
    """The examples of the mix."""
    packed: list[Batch]
    unpacked: Work


def make_work(seed: int, rows: int, batches: int, examples: int, cores: int) -> AllWork:
    """Make ``batches`` batches of full rows, and ``examples`` examples of the mix.

    A packed batch has ``rows`` rows. An unpacked batch has the packed batches' mean number of examples, rounded to a
    multiple of the cores, which divide ``examples``.
    """
    full_seed, mix_seed = np.random.SeedSequence(seed).spawn(2)
    items = mixed_items(np.random.default_rng(mix_seed), examples)
    in_rows = packed(items, rows)
    batch_size = cores * max(1, round(len(items) / len(in_rows) / cores))
    return AllWork(
        full_rows(np.random.default_rng(full_seed), rows, batches), items, in_rows, unpacked(items, batch_size)
    )
