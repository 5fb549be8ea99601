"""Prompts as the scheduler needs them: what each token is, where they may be cut, which prefixes they share."""

import dataclasses

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
    """[t] i64: equal prefixes of two prompts have equal keys and values. Token ids for text; for images, negative
    numbers made of the image's key and the vision token's number in it."""
    images: tuple[PromptImage, ...]
    whole_images: bool
    """True if images attend bidirectionally, so that no piece may end inside of one."""

    @classmethod
    def from_example(cls, example: Example, config: ModelConfig) -> "Prompt":
        """The prompt of an encoded conversation."""
        identity = example.tokens.astype(np.int64)
        images = []
        for start, image in zip(example.image_starts, example.images, strict=True):
            key, count = image.key, image.size.tokens
            identity[start : start + count] = -1 - (key + np.arange(count)) % 2**62
            images.append(PromptImage(start, count, key, image))
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

    def shared(self, identity: np.ndarray, least: int = 1) -> int:
        """Tokens of the prefix that another sequence shares, of those that may be cut off; never the last token.

        Args:
          least: fewer are none.
        """
        n = min(len(self) - 1, len(identity))
        if n < least or self.identity[least - 1] != identity[least - 1]:
            return 0  # as for most sequences: comparing one token takes the least time
        differs = np.flatnonzero(self.identity[:n] != identity[:n])
        found = self.cut_before(int(differs[0]) if len(differs) else n)
        return found if found >= least else 0

    def span_end(self, start: int, end: int) -> np.ndarray:
        """The last position of this prompt that each position in [start, end) sees."""
        spans = np.arange(start, end, dtype=np.int32)
        for image in self.images if self.whole_images else ():
            spans[max(image.start - start, 0) : max(image.end - start, 0)] = image.end - 1
        return spans
