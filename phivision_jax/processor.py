"""The processor: messages and images to a ``Batch``, ids back to text.

    processor = Processor.from_directory("checkpoint/", model_config("checkpoint/"))
    batch = processor.batch([[{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                                           {"type": "text", "text": "What is this?"}]}]])

It holds everything that decides the model's inputs: the tokenizer, the chat template and the image layout. Their
``fingerprint`` is part of a plan's hash, since they decide the lengths of examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.config import ModelConfig
from phivision_jax.images.layout import PatchedImage, make_layout, with_layout
from phivision_jax.images.sources import ImageSource, listed, pixels
from phivision_jax.io import storage
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.io.read_json import read_json
from phivision_jax.io.storage import Location
from phivision_jax.rows import Example, expand, one_per_row
from phivision_jax.text import chat
from phivision_jax.text.chat import Message
from phivision_jax.text.constants import PromptMode
from phivision_jax.text.template import TEMPLATE_FILE, TEMPLATE_JSON, ChatTemplate
from phivision_jax.text.tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer

_FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE_FILE, TEMPLATE_JSON, "preprocessor_config.json")
_SHORT, _KEPT = 2000, 4096
"""Characters of a short prompt, and the number of these that are kept as ids: an evaluation measures all prompts before
it asks them, and many benchmarks ask the same of many images."""


class Processor:
    """Tokenizer, chat template and image layout of one model.

    Without a tokenizer or a template (not every checkpoint ships them) images still work; other methods raise a
    ValueError that names the missing file.

    Raises:
      ValueError: when the tokenizer and the model's configuration do not belong together.
    """

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, config: ModelConfig) -> None:
        self._tokenizer, self._template, self.config = tokenizer, template, config
        self.layout = make_layout(config)
        decoder = config.decoder
        if tokenizer and tokenizer.vocab_size > decoder.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {decoder.vocab_size}")
        if tokenizer and tokenizer.eos_id not in decoder.stop_ids:
            problem = f"config.decoder.eos_token_id is {decoder.eos_token_id}; give the model the tokenizer's"
            raise ValueError(f"the tokenizer ends a turn with token {tokenizer.eos_id}, {problem}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_short_prompt"}

    @classmethod
    def from_directory(cls, path: str | Location, config: ModelConfig) -> Processor:
        """The processor of a Hugging Face directory, or of the assets of a checkpoint.

        Args:
          path: directory with ``tokenizer.json`` and ``chat_template.jinja``, either of which may be missing, and
            perhaps ``tokenizer_config.json`` and ``preprocessor_config.json``.
          config: the model's configuration; ``preprocessor_config.json`` must agree with its patch settings.

        Raises:
          ValueError: for a broken file, or one that contradicts ``config``; for links that leave the directory.
          StorageError: for a bucket that does not answer.
        """
        path = storage.location(path)
        storage.check_links(path)
        if not isinstance(path, Path):
            with tempfile.TemporaryDirectory() as folder:
                storage.download(path, Path(folder), [name for name in storage.files(path) if name in _FILES])
                try:
                    return cls.from_directory(folder, config)
                except ValueError as error:
                    raise ValueError(str(error).replace(folder, str(path))) from None
        if (file := path / "preprocessor_config.json").is_file():
            _check_pixels(file, config)
        tokenizer = Tokenizer.from_directory(path) if (path / TOKENIZER).is_file() else None
        template: ChatTemplate | None = None
        with contextlib.suppress(FileNotFoundError):
            template = ChatTemplate.from_directory(path)
        return cls(tokenizer, template, config)

    @classmethod
    def small(cls, config: ModelConfig) -> Processor:
        """The project's own tokenizer of 512 tokens and its template, for models without a checkpoint."""
        return cls(Tokenizer.small(), ChatTemplate.small(), config)

    def with_patches(self, patch_size: int | None, min_patches: int | None, max_patches: int | None) -> Processor:
        """This processor with other patch settings; None keeps one."""
        old = self.config
        vision = dataclasses.replace(old.vision, patch_size=patch_size or old.vision.patch_size)
        least, most = min_patches or old.min_patches, max_patches or old.max_patches
        config = dataclasses.replace(old, vision=vision, min_patches=least, max_patches=most)
        return Processor(self._tokenizer, self._template, config)

    def with_strategy(self, strategy: str) -> Processor:
        """This processor with another image layout, named as ``images.layout.with_layout`` takes it."""
        return Processor(self._tokenizer, self._template, with_layout(self.config, strategy))

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("this checkpoint came without tokenizer.json; rows.batch_from_ids makes batches of ids")
        return self._tokenizer

    def find_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the checkpoint came without one."""
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            raise ValueError("this checkpoint came without chat_template.jinja, which messages need")
        return self._template

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource | PatchedImage] | ImageSource | None = None,
        *,
        mode: PromptMode = "auto",
        generation_prompt: bool = False,
        group: int = 0,
        max_patches: int | None = None,
    ) -> Example:
        """Tokenize a conversation and lay out its images.

        Args:
          messages: as described in ``text.chat``.
          images: one for each ``<image>`` without an inline image, in order, each as ``images.sources`` takes it, or
            laid out by ``patch``; or a single image.
          mode, generation_prompt: as in ``text.chat.encode``; for a training example, "auto" infers the mode of each
            answer as an import does: thoughts, or else the no-think token.
          group: mode × task, for metrics.
          max_patches: limit per image, if lower than the model's.

        Raises:
          ValueError: when images and ``<image>`` markers do not match, an image or a message is invalid, or a prompt
            ends with an answer.
        """
        plain, inline = chat.flatten(messages)
        if generation_prompt and plain[-1]["role"] == "assistant":
            remedy = "end with a question, or give generation_prompt=False for a training example"
            raise ValueError(f"message {len(plain) - 1} is an answer, but the model is to answer next: {remedy}")
        ids: list[int] | np.ndarray
        labels: list[int] | None
        if generation_prompt:
            ids, labels = self._prompt_ids(plain, mode), None
        else:
            if mode == "auto":
                plain, mode = chat.with_modes(plain)
            ids, labels = chat.encode(self.tokenizer, self.template, plain, mode=mode)
        given = listed(images)
        if (missing := inline.count(None)) != len(given):
            raise ValueError(f"{missing} <image> markers without an image of their own, but {len(given)} images given")
        sources = [given.pop(0) if source is None else source for source in inline]
        patched = [self.patch(source, f"image {i}", max_patches) for i, source in enumerate(sources)]
        return expand(ids, patched, labels, group)

    def tokenize_prompt(self, messages: Sequence[Message], mode: PromptMode = "auto") -> np.ndarray:
        """The ids of a conversation that the model is to continue, [t] i32, −200 (``IMAGE_TOKEN``) for each image.

        Args:
          messages, mode: as in ``text.chat.encode``.

        Raises:
          ValueError: as ``text.chat.encode``.
        """
        return self._prompt_ids(chat.flatten(messages)[0], mode)

    def _prompt_ids(self, plain: Sequence[Message], mode: PromptMode) -> np.ndarray:
        is_short = sum(len(message["content"]) for message in plain) <= _SHORT
        if is_short and all(message.keys() == {"role", "content"} for message in plain):
            return self._short_prompt(tuple((message["role"], message["content"]) for message in plain), mode)
        return self._tokenize(plain, mode)

    @functools.cached_property
    def _short_prompt(self) -> Callable[[tuple[tuple[str, str], ...], PromptMode], np.ndarray]:
        return functools.lru_cache(_KEPT)(self._tokenize_turns)

    def _tokenize_turns(self, turns: tuple[tuple[str, str], ...], mode: PromptMode) -> np.ndarray:
        return self._tokenize([{"role": role, "content": content} for role, content in turns], mode)

    def _tokenize(self, plain: Sequence[Message], mode: PromptMode) -> np.ndarray:
        ids, _ = chat.encode(self.tokenizer, self.template, plain, mode=mode, generation_prompt=True)
        array = np.array(ids, np.int32)
        array.setflags(write=False)  # it may be given out again
        return array

    def patch(
        self, source: ImageSource | PatchedImage, name: str = "image", max_patches: int | None = None
    ) -> PatchedImage:
        """Lay out one image, with at most ``max_patches`` patches where given; one that is laid out stays as it is.

        Raises:
          ValueError: for an image that cannot be decoded or converted, with ``name`` and the reason.
        """
        if isinstance(source, PatchedImage):
            return source
        image = pixels(source, name)
        with prefix_errors(name):
            return self.layout.encode(image, max_patches)

    def batch(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[ImageSource] | ImageSource | None] | None = None,
        *,
        mode: PromptMode = "auto",
        generation_prompt: bool = True,
        multiple: int = 1,
    ) -> Batch:
        """A ``Batch`` of one conversation per row, by default prompts to be answered.

        Args:
          images: per conversation, as in ``encode``.
          mode, generation_prompt: as in ``encode``; False gives training examples with a loss.
          multiple: as in ``rows.one_per_row``.

        Raises:
          ValueError: as ``encode``, naming the conversation.
        """
        images = images if images is not None else [()] * len(conversations)
        if len(images) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(images)} lists of images: need one each")
        examples = []
        for i, (messages, row_images) in enumerate(zip(conversations, images, strict=True)):
            with prefix_errors(f"conversation {i}"):
                examples.append(self.encode(messages, row_images, mode=mode, generation_prompt=generation_prompt))
        return one_per_row(examples, self.config, multiple=multiple)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, without control tokens."""
        return self.tokenizer.decode(ids)

    @property
    def text_fingerprint(self) -> str:
        """SHA-256 over tokenizer and template (or their absence), which decide token counts."""
        parts = [part and part.fingerprint for part in (self._tokenizer, self._template)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokenizer, template and image layout, which decide a plan."""
        parts = [self.text_fingerprint, self.layout.fingerprint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's and the template's files into a directory, creating it if need be."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for part in (self._tokenizer, self._template):
            if part is not None:
                part.save(path)


def _check_pixels(file: Path, config: ModelConfig) -> None:
    """Refuse a ``preprocessor_config.json`` that asks for other pixels than ``config`` gives."""
    values = read_json(file)
    ours = {
        "patch_size": config.vision.patch_size,
        "min_num_patches": config.min_patches,
        "max_num_patches": config.max_patches,
        # Only this arithmetic is computed; 2 is bilinear.
        "resample": 2,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        **{key: [0.5, 0.5, 0.5] for key in ("image_mean", "image_std")},
    }
    for key, value in ours.items():
        if values.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {shorten(values[key])}, the model's configuration computes {value!r}")
