"""The tokenizer of a checkpoint directory: text to ids and back, and the ids that steer the model.

The ids come from ``tokenizer.json`` through the ``tokenizers`` library. Nothing is ever added in front (Phi-4 has no
BOS), and control tokens that stand in the text are read as such: the chat template writes them there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

EOS = "<|im_end|>"
"""Ends a turn, and an answer."""
PAD = "<|dummy_85|>"
NOTHINK = "<|dummy_84|>"
"""Begins an answer given without thinking."""
THINK, END_THINK = "<think>", "</think>"
"""Around the thoughts that precede an answer."""
TURN_TOKENS = ("<|im_start|>", "<|im_sep|>", EOS)

_REQUIRED = (*TURN_TOKENS, PAD, NOTHINK, THINK, END_THINK)
_SMALL = Path(__file__).parent / "small" / "tokenizer.json"


class Tokenizer:
    """Built from the files of a checkpoint; see ``from_directory`` and ``small``.

    Attributes:
      files: the files it was read from, name to bytes: what ``save`` writes.
      vocab_size: the number of ids, the unused ones below the largest included.
      eos_id, pad_id, nothink_id, think_id, end_think_id: ids of the tokens named above.
      control_tokens: the texts of the tokens marked special, which message content may not contain.
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self.files = dict(files)
        self._backend = _build(self.files, where)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        missing = [token for token in _REQUIRED if token not in vocabulary]
        if missing:
            raise ValueError(
                f"{where}/tokenizer.json has no token {', '.join(missing)}: the chat format and the thinking modes "
                "need it. Take the tokenizer files of a Phi-4-reasoning-vision checkpoint"
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id, self.pad_id, self.nothink_id = vocabulary[EOS], vocabulary[PAD], vocabulary[NOTHINK]
        self.think_id, self.end_think_id = vocabulary[THINK], vocabulary[END_THINK]
        added = self._backend.get_added_tokens_decoder().values()
        self.control_tokens = tuple(token.content for token in added if token.special)
        self._hidden = {vocabulary[token] for token in self.control_tokens if token not in (THINK, END_THINK)}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where there is one, ``tokenizer_config.json``.

        Raises:
          FileNotFoundError: when there is no ``tokenizer.json``.
          ValueError: when it is broken, the two files contradict each other, or a token that the chat format or the
            modes need is not there; each names the file.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path} holds no tokenizer.json")
        names = ("tokenizer.json", "tokenizer_config.json")
        return cls({n: (path / n).read_bytes() for n in names if (path / n).is_file()}, str(path))

    @classmethod
    def small(cls) -> Tokenizer:
        """The project's own 512 tokens: English questions about pictures, short; any other text, byte by byte."""
        return cls({_SMALL.name: _SMALL.read_bytes()}, str(_SMALL.parent))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, control tokens in it included, nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the characters [start, end) it came from.

        Tokens that share one character (its bytes) all have its span. A control token that swallows the white space
        beside it (``lstrip``, ``rstrip``) spans it too.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids (integers of any kind); ``skip_special`` leaves out the control tokens.

        The tags around thoughts stay, whether the checkpoint marks them special or not.

        Raises:
          ValueError: for a number that is no id.
        """
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"{i} is not a token id: they lie in 0…{self.vocab_size - 1}")
        if skip_special:
            plain = [i for i in plain if i not in self._hidden]
        return self._backend.decode(plain, skip_special_tokens=False)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters in the longest token: a text of n characters has at least n / longest_token tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what determines the ids: normaliser, pre-tokenizer, model, added tokens."""
        state = json.loads(self._backend.to_str())
        decisive = {key: state[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the files it was read from, byte for byte, into a directory."""
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)


def _build(files: Mapping[str, bytes], where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, with the added tokens of ``tokenizer_config.json`` put over those of ``tokenizer.json``.

    transformers does the same: where the two disagree about white space beside a token, the config wins.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(f"{where}/tokenizer.json cannot be read: {error}") from None
    # A file saved after use may ask for cutting or padding; here only a plan decides lengths.
    backend.no_truncation()
    backend.no_padding()
    config = read_tokenizer_config(files, where)
    added = {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    backend.add_tokens(
        [
            AddedToken(entry["content"], **{f: entry[f] for f in flags if f in entry})
            for _, entry in sorted(added.items())
        ]
    )
    for index, entry in added.items():
        if (found := backend.token_to_id(entry["content"])) != index:
            raise ValueError(
                f"{where}: tokenizer_config.json says that {entry['content']} is token {index}, "
                f"tokenizer.json makes it {found}: the two files do not belong together"
            )
    return backend


def read_tokenizer_config(files: Mapping[str, bytes], where: str) -> dict:
    """``tokenizer_config.json`` as a dict, empty where there is none."""
    try:
        return json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise ValueError(f"{where}/tokenizer_config.json is not JSON: {error}") from None
