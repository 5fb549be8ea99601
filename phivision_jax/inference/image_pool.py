"""Vision tokens of images, kept on the devices by the hash of their patches within the engine's ``pool``."""

import collections
import itertools
from collections.abc import Iterable, Sequence, Set

import numpy as np

from phivision_jax.inference.engine import Engine, smallest
from phivision_jax.inference.prompts import PromptImage
from phivision_jax.rows import expand, fill_rows
from phivision_jax.text.constants import IMAGE_TOKEN


class ImagePool:
    """The encoded images and their places; those used least recently make room for others.

    Attributes:
      places: by key, the places in ``State.pool`` of an image's vision tokens, [tokens] i32.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.places: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self.encoded = self.found = 0
        self.clear()

    def clear(self) -> None:
        """Forget all images."""
        self.places.clear()
        self._free = np.arange(self.engine.pool, dtype=np.int32)

    def encode(self, needed: Sequence[PromptImage], soon: Iterable[PromptImage]) -> None:
        """Encode the needed images that are not in the pool, and others where patches would be padding.

        Args:
          needed: must all be in the pool at the same time.
          soon: images of waiting prompts.
        """
        missing: dict[int, PromptImage] = {}
        for image in needed:
            if image.key in self.places:
                self.places.move_to_end(image.key)
                self.found += 1
            else:
                missing[image.key] = image
        kept, coming = {image.key for image in needed}, {image.key: image for image in soon}
        while missing:
            rows = self._pack(missing, self.engine.patches[-1])
            patches = max(sum(len(image.image.patches) for image in row) for row in rows)
            size = smallest(self.engine.patches, patches)
            batch_rows = [row[:] for row in rows]
            idle = (len(x) for key, x in self.places.items() if key not in kept and key not in coming)
            free = len(self._free) + sum(idle) - sum(image.tokens for row in rows for image in row)
            for image in (i for i in coming.values() if i.key not in self.places and i.key not in kept):
                room = [
                    r for r in batch_rows if sum(len(i.image.patches) for i in r) + len(image.image.patches) <= size
                ]
                if room and image.tokens <= free:
                    room[0].append(image)
                    free -= image.tokens
            self._run(batch_rows, size, kept, coming.keys())
            for image in itertools.chain(*batch_rows):
                missing.pop(image.key, None)

    def _pack(self, images: dict[int, PromptImage], size: int) -> list[list[PromptImage]]:
        """A row of images per shard, as many as fit."""
        rows: list[list[PromptImage]] = [[] for _ in range(self.engine.shards)]
        used = [0] * len(rows)
        for image in images.values():
            r = min(range(len(rows)), key=used.__getitem__)
            if used[r] + len(image.image.patches) <= size:
                rows[r].append(image)
                used[r] += len(image.image.patches)
        return rows

    def _run(self, rows: list[list[PromptImage]], size: int, kept: Set[int], coming: Set[int]) -> None:
        shape = self.engine.encode_shape(size)
        examples = [[expand([IMAGE_TOKEN], [image.image]) for image in row] for row in rows]
        batch = fill_rows(examples, shape, self.engine.config)
        places = np.full((len(rows), shape.length), self.engine.pool, np.int32)
        for r, row in enumerate(rows):
            position = 0
            for image in row:
                places[r, position : position + image.tokens] = self._allocate(image, kept, coming)
                position += image.tokens
        self.engine.encode(batch, places)
        self.encoded += sum(map(len, rows))

    def _allocate(self, image: PromptImage, kept: Set[int], coming: Set[int]) -> np.ndarray:
        """Places for an image: free ones, then those of images that no prompt waits for, those used least recently
        first; then of any that are not kept."""
        if len(self._free) < image.tokens:
            for key in sorted((key for key in self.places if key not in kept), key=coming.__contains__):
                if len(self._free) >= image.tokens:
                    break
                self._free = np.concatenate([self._free, self.places.pop(key)])
        if len(self._free) < image.tokens:
            raise AssertionError(f"{image.tokens} vision tokens do not fit the pool of {self.engine.pool}")
        self.places[image.key], self._free = self._free[: image.tokens], self._free[image.tokens :]
        return self.places[image.key]
