"""Prompts as the scheduler needs them: what each token is, where they may be cut, which prefixes they share."""

import dataclasses
import functools

import numpy as np

from phivision_jax.config import ModelConfig
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import Example


@dataclasses.dataclass(frozen=True)
class PromptImage:
    """An image of a prompt."""

    start: int
    """Position of its first vision token."""
    tokens: int
    key: int
    """``PatchedImage.key``: equal images have equal vision tokens."""
    image: PatchedImage

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt."""

    tokens: np.ndarray
    """[t] i32, as in ``Example``."""
    identity: np.ndarray
    """[t] i64: equal prefixes of two prompts have equal keys and values. Token ids for text, and
    ``PatchedImage.identity`` for images."""
    images: tuple[PromptImage, ...]
    whole_images: bool
    """True if images attend bidirectionally, so that no piece may end inside of one."""

    @classmethod
    def from_example(cls, example: Example, config: ModelConfig) -> "Prompt":
        """The prompt of an encoded conversation."""
        identity = example.tokens.astype(np.int64)
        images = []
        for start, image in zip(example.image_starts, example.images, strict=True):
            identity[start : start + image.size.tokens] = image.identity
            images.append(PromptImage(start, image.size.tokens, image.key, image))
        return cls(example.tokens, identity, tuple(images), config.image_attention == "bidirectional")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def image_tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    def cut_before(self, end: int) -> int:
        """The last position up to ``end`` at which the prompt may be cut."""
        inside = [image.start for image in self.images if self.whole_images and image.start < end < image.end]
        return min(inside, default=end)

    def key(self, end: int | None = None) -> bytes:
        """``identity`` up to ``end`` as bytes: equal prefixes of prompts have equal prefixes of these."""
        return self._bytes if end is None else self._bytes[: end * self.identity.itemsize]

    @functools.cached_property
    def _bytes(self) -> bytes:
        return self.identity.tobytes()

    def alike(self, identity: np.ndarray) -> int:
        """Tokens with which both this prompt and another sequence begin, of those that may be cut off."""
        n = min(len(self), len(identity))
        differs = self.identity[:n] != identity[:n]
        first = int(differs.argmax()) if n else 0
        return self.cut_before(first if n and differs[first] else n)

    def shared(self, identity: np.ndarray, least: int = 1) -> int:
        """``alike``, but never the last token, which is computed to choose the answer's first.

        Args:
          least: fewer are none.
        """
        n = min(len(self) - 1, len(identity))
        if n < least or self.identity[least - 1] != identity[least - 1]:
            return 0  # as for most sequences: comparing one token takes the least time
        found = self.cut_before(min(n, self.alike(identity)))
        return found if found >= least else 0

    def span_end(self, start: int, end: int) -> np.ndarray:
        """The last position of this prompt that each position in [start, end) sees."""
        spans = np.arange(start, end, dtype=np.int32)
        for image in self.images if self.whole_images else ():
            spans[max(image.start - start, 0) : max(image.end - start, 0)] = image.end - 1
        return spans
