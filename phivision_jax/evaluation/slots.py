"""A local generator of the size that an evaluation needs: slots as long as its longest prompt and answer."""

import functools
from typing import Any, cast

from phivision_jax.images.decode import image_size
from phivision_jax.inference.local import SLOTS, LocalGenerator
from phivision_jax.inference.requests import MAX_NEW_TOKENS, Request
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor

_MULTIPLE = 512
"""The length of slots is rounded up to a multiple of this. Prompts that are prefilled together have no more tokens than
a slot, so that shorter slots would be filled by few prompts at a time."""
_MOST_SLOTS, _CACHE_BYTES = 64, 2 << 30
"""Small models have more slots than ``SLOTS``: as many as this memory holds."""


class LongestRequest:
    """The most tokens of prompt and answer among requests, from headers of images alone.

    Attributes:
      tokens: the most so far.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor, self.tokens = processor, 1
        # Neighbouring items often share an image.
        self._image_tokens = functools.lru_cache(16)(self._measure_image)

    def __call__(self, request: Request) -> None:
        """Measure a request; one that cannot be encoded counts nothing."""
        messages, images = request.conversation()
        try:
            tokens = len(self._processor.tokenize_prompt(messages)) + 1 - len(images)  # one more in a forced mode
            for image in images:
                tokens += self._image_tokens(cast(bytes, image))
        except (ValueError, OSError):
            return
        self.tokens = max(self.tokens, tokens + (request.max_new_tokens or MAX_NEW_TOKENS))

    def _measure_image(self, image: bytes) -> int:
        return self._processor.layout.measure(*image_size(image)).tokens


def make_generator(
    model: PhiVision, processor: Processor, longest: int, *, slots: int = 0, **settings: Any
) -> LocalGenerator:
    """A local generator.

    Args:
      longest: tokens of prompt and answer; more than the model's positions are cut to these.
      slots: sequences that are generated at the same time; 0: ``SLOTS``, or more for a small model.
      settings: further ones of ``LocalGenerator``.
    """
    decoder = processor.config.decoder
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    values = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * min(length, decoder.max_positions)
    fitting = _CACHE_BYTES // (values * model.decoder.dtype.itemsize)
    slots = slots or min(max(SLOTS, fitting), _MOST_SLOTS)
    return LocalGenerator(model, processor, slots=slots, length=length, **settings)
