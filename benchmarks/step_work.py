"""What ``step.py`` trains: two small models, random tokens and pixels, and batches of them for both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from phivision_jax.batch import Batch, RowShape
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.plan.packing import Lengths, pack
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import Example, expand, fill_rows
from phivision_jax.text.constants import IGNORE, IMAGE_TOKEN
from phivision_jax.training.run_config import OptimConfig


def _model(vision: VisionConfig, **decoder: int) -> ModelConfig:
    ids = {"vocab_size": 8192, "bos_token_id": 8189, "eos_token_id": 8190, "pad_token_id": 8191}
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
    "heads of 32 columns": _model(
        VisionConfig(hidden_size=256, intermediate_size=1024, num_layers=5, num_heads=4),
        hidden_size=512,
        intermediate_size=1408,
        num_heads=16,
        num_kv_heads=4,
    ),
}
"""By shape. The first has what does not shrink with a model: heads of 128 columns (72 in the tower), four of them to a
KV head, and feed-forward layers as wide for their tower as the released ones. The second has four times as many heads
as that, so that attention is a larger part of its work than it is of any large model's. The head is a fifth of the
products here, and 3 % of the released model's: what the loss saves where few columns have one (``training/loss.py``)
counts for more here."""

MODEL = MODELS["the released model's proportions"]
"""Tokens, pixels and their limits are the same in every shape."""

OPTIMIZER = OptimConfig(warmup_steps=0, final_lr_ratio=1.0, weight_decay=0.1, clip_norm=1.0)

T, PATCHES = 1024, 896
"""Columns of a row and patches of its vision row: an eighth of what is trained with."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An example before its images are laid out: what both sides are made from."""

    ids: list[int]
    """Text, with −200 where an image stands."""
    labels: list[int]
    images: list[PatchedImage]

    def laid_out(self) -> Example:
        return expand(self.ids, self.images, self.labels)

    @property
    def columns(self) -> int:
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
    """``text`` random tokens, images in front; the second half of the text is learnt."""
    words = rng.integers(1, MODEL.decoder.bos_token_id, text).tolist()
    ids = [IMAGE_TOKEN] * len(grids) + words
    labels = [IGNORE] * (len(grids) + text // 2) + words[text // 2 :]
    patch_dim = MODEL.vision.patch_dim
    images = [PatchedImage(rng.integers(0, 256, (h * w, patch_dim), np.uint8), ((h, w),)) for h, w in grids]
    return Item(ids, labels, images)


def mixed_items(rng: np.random.Generator, count: int) -> list[Item]:
    """The mix of ``benchmarks/packing.py``, an eighth as long: lengths, and image sides by the square root of it."""
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
        if item.columns <= T and item.patches <= PATCHES:
            items.append(item)
    return items


def our_batch(rows: Sequence[Sequence[Item]], length: int, patches: int) -> Batch:
    return fill_rows(
        [[item.laid_out() for item in row] for row in rows],
        RowShape(length, 1, patches),
        MODEL,
    )


def peer_batch(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """What a collator of transformers gives: ids and images, each padded to the longest, and masks."""
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
    """Examples of T columns, seven tenths of them one image, as in the mix."""
    grid = (24, 30)
    made = [[make_item(rng, T - 720, [grid]) for _ in range(rows)] for _ in range(batches)]
    ours = [our_batch([[item] for item in items], T, 720) for items in made]
    return Work(ours, [peer_batch(items) for items in made])


def packed(items: Sequence[Item], rows: int) -> list[Batch]:
    """The items in as few rows as packing finds, ``rows`` to a batch; the last one may end with empty rows."""
    sizes = [len(image.patches) for item in items for image in item.images]
    offsets = np.concatenate([[0], np.cumsum([len(item.images) for item in items])])
    lengths = Lengths(np.array([item.columns for item in items]), np.array(sizes, np.int64), offsets)
    order, ends = pack(np.arange(len(items)), lengths, RowShape(T, 1, PATCHES))
    filled = [[items[i] for i in row] for row in np.split(order, ends[1:-1])]
    filled += [[]] * (-len(filled) % rows)
    return [our_batch(filled[i : i + rows], T, PATCHES) for i in range(0, len(filled), rows)]


def unpacked(items: Sequence[Item], batch_size: int) -> Work:
    """An example in a row, padded to the longest of its batch on both sides."""
    cut = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    ours = [
        our_batch([[item] for item in part], max(i.columns for i in part), max(i.patches for i in part)) for part in cut
    ]
    return Work(ours, [peer_batch(part) for part in cut])


@dataclasses.dataclass(frozen=True)
class AllWork:
    """Everything that is trained on: the same for a seed, whichever process makes it."""

    full: Work
    items: list[Item]
    """The mix."""
    packed: list[Batch]
    unpacked: Work


def make_work(seed: int, rows: int, batches: int, examples: int, cores: int) -> AllWork:
    """``batches`` of full rows, and ``examples`` of the mix: ``rows`` to a packed batch, and unpacked as many as those
    hold on average, to the nearest multiple of the cores, which divide the examples too.
    """
    full_seed, mix_seed = np.random.SeedSequence(seed).spawn(2)
    items = mixed_items(np.random.default_rng(mix_seed), examples)
    in_rows = packed(items, rows)
    batch_size = cores * max(1, round(len(items) / len(in_rows) / cores))
    return AllWork(
        full_rows(np.random.default_rng(full_seed), rows, batches), items, in_rows, unpacked(items, batch_size)
    )
