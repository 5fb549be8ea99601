"""A checkpoint's tokenizer: text to ids and back, and the ids of the control tokens.

The ids come from ``tokenizer.json`` through the ``tokenizers`` library. Nothing is added in front (Phi-4 has no BOS).
Control tokens in a text become their ids, because the chat template writes them there.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from phivision_jax.config import typed
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.io.read_json import parse_json, read_limited, wrong_file

EOS = "<|im_end|>"
"""Ends a turn, and an answer."""
PAD = "<|dummy_85|>"
NOTHINK = "<|dummy_84|>"
"""Begins an answer without thoughts."""
THINK, END_THINK = "<think>", "</think>"
"""Around the thoughts at the beginning of an answer."""
TURN_TOKENS = ("<|im_start|>", "<|im_sep|>", EOS)
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_REQUIRED = (*TURN_TOKENS, PAD, NOTHINK, THINK, END_THINK)
_SMALL = Path(__file__).parent / "small"


class Tokenizer:
    """A tokenizer built from the files of a checkpoint; see ``from_directory`` and ``small``.

    Attributes:
      files: the contents of its files by name, as ``save`` writes them.
      vocab_size: the number of ids, including unused ones below the largest.
      eos_id, pad_id, nothink_id, think_id, end_think_id: the ids of the tokens named above.
      control_tokens: the texts of the tokens marked special, which message content may not contain.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self.files = dict(files)
        self._backend = _build(self.files, where)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        missing = [token for token in _REQUIRED if token not in vocabulary]
        if missing:
            problem = f"has no token {', '.join(missing)}: it is not of a Phi-4-reasoning-vision checkpoint"
            raise ValueError(f"{where}/{TOKENIZER} {problem}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id, self.pad_id, self.nothink_id = vocabulary[EOS], vocabulary[PAD], vocabulary[NOTHINK]
        self.think_id, self.end_think_id = vocabulary[THINK], vocabulary[END_THINK]
        added = self._backend.get_added_tokens_decoder().values()
        self.control_tokens = tuple(token.content for token in added if token.special)
        self._hidden = {vocabulary[token] for token in self.control_tokens if token not in (THINK, END_THINK)}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, if present, ``tokenizer_config.json``.

        Raises:
          FileNotFoundError: when there is no ``tokenizer.json``.
          ValueError: when it cannot be read, the two files contradict each other, or a token that the chat format or
            the thinking modes need is missing; each names the file.
        """
        path = Path(path)
        if not (path / TOKENIZER).is_file():
            raise FileNotFoundError(f"{path} holds no {TOKENIZER}")
        names = (TOKENIZER, TOKENIZER_CONFIG)
        return cls({name: read_limited(path / name) for name in names if (path / name).is_file()}, str(path))

    @classmethod
    def small(cls) -> Tokenizer:
        """The project's own 512 tokens: short English questions about images; any other text, byte by byte."""
        return cls.from_directory(_SMALL)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, control tokens included, nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and for each the characters [start, end) that it came from.

        Tokens for the bytes of one character all have its span. The span of a control token includes the white space
        that it strips (``lstrip``, ``rstrip``).
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids (integers of any type).

        Args:
          skip_special: leave out the control tokens, but not the tags around thoughts, whether the checkpoint marks
            these special or not.

        Raises:
          ValueError: for a number that is not an id.
        """
        plain = [int(i) for i in ids]
        if wrong := [i for i in plain if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{wrong[0]} is not a token id: ids are 0 to {self.vocab_size - 1}")
        if skip_special:
            plain = [i for i in plain if i not in self._hidden]
        return self._backend.decode(plain, skip_special_tokens=False)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n characters has at least n / longest_token tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what determines the ids: normalizer, pre-tokenizer, model, added tokens."""
        state = json.loads(self._backend.to_str())
        decisive = {key: state[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write its files into a directory, byte for byte as they were read."""
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)


def _build(files: Mapping[str, bytes], where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, in which the added tokens of ``tokenizer_config.json`` override its own.

    transformers does the same: where the files disagree about white space beside a token, the config wins.
    """
    config_name = f"{where}/{TOKENIZER_CONFIG}"
    config = parse_json(files.get(TOKENIZER_CONFIG, b"{}"), config_name)
    added_tokens = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added: dict[int, AddedToken] = {}
    with prefix_errors(f"{config_name}: added_tokens_decoder"):
        for index, entry in typed(added_tokens, Mapping[str, Mapping[str, Any]], "it").items():
            content = typed(entry.get("content"), str, "content")
            added[int(index)] = AddedToken(content, **{f: typed(entry[f], bool, f) for f in flags if f in entry})
    try:
        backend = tokenizers.Tokenizer.from_buffer(files[TOKENIZER].removeprefix(codecs.BOM_UTF8))
        # A saved tokenizer may truncate or pad; here the data plan decides lengths.
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens([added[i] for i in sorted(added)])
        backend.encode("A trial.")
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        known = wrong_file(files[TOKENIZER]) or f"cannot be read: {shorten(str(error))}"
        raise ValueError(f"{where}/{TOKENIZER} {known}") from None
    for index, token in added.items():
        if (found := backend.token_to_id(token.content)) != index:
            problem = f"{TOKENIZER_CONFIG} has {shorten(token.content)} as token {index}, {TOKENIZER} as {found}"
            raise ValueError(f"{where}: {problem}")
    return backend
