"""Ids: published vectors and tiktoken for the real vocabulary, words for the small one, errors that name the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.text.tokenizer import Tokenizer
from tests.support import small_tokenizer
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def phi4(phi4_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(phi4_directory)


def test_phi4_published_vectors(phi4: Tokenizer) -> None:
    text = "<|im_start|>Hello<|im_sep|> World<|im_end|><|dummy_85|>"
    assert phi4.encode(text) == [100264, 9906, 100266, 4435, 100265, 100349]
    assert phi4.encode(">\n") == [397]
    assert len(phi4.encode("<nothink>")) == 4 and len(phi4.encode("<image>")) == 3
    assert phi4.decode(phi4.encode(text)) == "Hello World"
    assert phi4.decode(phi4.encode(text), skip_special=False) == text


def test_phi4_published_ids(phi4: Tokenizer) -> None:
    assert phi4.vocab_size == 100_352
    assert (phi4.eos_id, phi4.pad_id, phi4.nothink_id) == (100_265, 100_349, 100_348)
    assert (phi4.think_id, phi4.end_think_id) == (100_350, 100_351)
    # dummy_n = 100264 + n from 13 on; before, the named ones lie between.
    assert phi4.encode("<|dummy_0|><|dummy_3|><|dummy_4|><|dummy_13|>") == [100256, 100263, 100267, 100277]
    assert phi4.encode("<|endofprompt|>") == [100276]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What's in the image? It's 12345 px wide, isn't it?",
        "def f(x):\n    return x  # ünïcode, 漢字, العربية, 🎉👩‍👩‍👧\r\n\r\n\tend",
        "   leading and trailing   ",
        "a\n\n\nb \n c\u00a0d\u2003e",
        "x = 0.123456789e-10; \\frac{1}{2} <image>\nYes",
        "<|im_start|>user<|im_sep|>\n hi <|im_end|>\n<|im_start|>assistant<|im_sep|>\n<think>\n1\n</think>\nno",
    ],
)
def test_phi4_equals_tiktoken(phi4: Tokenizer, reference: tiktoken.Encoding, text: str) -> None:
    assert phi4.encode(text) == reference.encode(text, allowed_special="all")
    assert phi4.decode(phi4.encode(text), skip_special=False) == text


def test_phi4_equals_tiktoken_on_any_text(phi4: Tokenizer, reference: tiktoken.Encoding) -> None:
    control = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|dummy_84|>", "<think>", "<|im_", "\n", " ", "  ", "'s"])
    words = st.text(max_size=8) | st.text("aeTHE 019.,\n\t<>'", max_size=12)

    @given(st.lists(control | words, max_size=8).map("".join))
    def check(text: str) -> None:
        assert phi4.encode(text) == reference.encode(text, allowed_special="all")
        assert phi4.decode(phi4.encode(text), skip_special=False) == text

    check()


def test_tokenizer_config_flags_override(phi4: Tokenizer, phi4_directory: Path, tmp_path: Path) -> None:
    """``lstrip`` and ``rstrip`` stated in tokenizer_config.json alone hold, as in transformers."""
    shutil.copy(phi4_directory / "tokenizer.json", tmp_path)
    entry = {"content": "<|im_sep|>", "lstrip": True, "rstrip": True, "special": True, "normalized": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"100266": entry}}))
    stripping = Tokenizer.from_directory(tmp_path)
    assert stripping.encode("a <|im_sep|>\n b") == [*phi4.encode("a"), 100266, *phi4.encode("b")]
    assert len(phi4.encode("a <|im_sep|>\n b")) == 5
    assert stripping.encode_with_offsets("a <|im_sep|>\n b")[1] == [(0, 1), (1, 14), (14, 15)]
    assert stripping.fingerprint != phi4.fingerprint


def test_tokenizer_config_contradiction_refused(phi4_directory: Path, tmp_path: Path) -> None:
    shutil.copy(phi4_directory / "tokenizer.json", tmp_path)
    entry = {"content": "<|im_sep|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"100267": entry}}))
    with pytest.raises(ValueError, match=r"<\|im_sep\|> as token 100267, tokenizer.json as 100266"):
        Tokenizer.from_directory(tmp_path)


def test_small_build_is_reproducible() -> None:
    """In a process of its own, so that no order of a hash table can hide."""
    program = "import sys; from tests.support.small_tokenizer import build; sys.stdout.buffer.write(build().encode())"
    built = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout
    assert built == small_tokenizer.FILE.read_bytes()


@pytest.mark.parametrize("word", f"{small_tokenizer.ANSWERS} {small_tokenizer.QUESTION_WORDS}".split())
def test_small_words_are_tokens(word: str) -> None:
    small = Tokenizer.small()
    assert len(small.encode(word)) == len(small.encode(f" {word}")) == 1


def test_small_ids() -> None:
    small = Tokenizer.small()
    assert small.vocab_size == 512
    assert small.encode("<|endoftext|><|im_end|><|dummy_85|>") == [507, 508, 509]
    assert (small.eos_id, small.pad_id) == (508, 509)
    assert len({small.nothink_id, small.think_id, small.end_think_id}) == 3
    assert [len(small.encode(role)) for role in small_tokenizer.ROLES.split()] == [1, 1, 1]
    assert len(small.encode("does the image not contain a red triangle?")) == 9


@given(st.text())
def test_small_round_trips_any_text(text: str) -> None:
    small = Tokenizer.small()
    assert small.decode(small.encode(text), skip_special=False) == text


def test_small_decode_keeps_thoughts() -> None:
    small = Tokenizer.small()
    assert small.decode(small.encode("<think>red</think>yes<|im_end|>")) == "<think>red</think>yes"


def test_small_offsets_are_characters() -> None:
    ids, offsets = Tokenizer.small().encode_with_offsets("é red<|im_end|>")
    assert offsets == [(0, 1), (0, 1), (1, 5), (5, 15)] and ids[-1] == 508


def test_tokenizer_save_keeps_fingerprint(tmp_path: Path) -> None:
    small = Tokenizer.small()
    small.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.files == small.files and again.fingerprint == small.fingerprint


@pytest.mark.parametrize("change", ["merges", "pattern", "flag"])
def test_fingerprint_covers_what_decides_ids(change: str, tmp_path: Path) -> None:
    content = json.loads(small_tokenizer.build())
    if change == "merges":
        content["model"]["merges"][-1:] = []
    elif change == "pattern":
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    else:
        content["added_tokens"][0]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_directory(tmp_path).fingerprint != Tokenizer.small().fingerprint


def test_saved_truncation_and_padding_ignored(tmp_path: Path) -> None:
    content = json.loads(small_tokenizer.build())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_directory(tmp_path).encode("yes no yes no")) == 4


def test_tokenizer_names_missing_token(tmp_path: Path) -> None:
    content = json.loads(small_tokenizer.build())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|dummy_84|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json has no token <\|dummy_84\|>:"):
        Tokenizer.from_directory(tmp_path)


def test_from_directory_names_broken_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_directory(tmp_path)
    Tokenizer.small().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_directory(tmp_path)


def test_panic_of_the_library_is_a_sentence(tmp_path: Path) -> None:
    """A prefix that is longer than the words of a merge makes it panic, which is no ordinary exception."""
    content = json.loads(small_tokenizer.build())
    content["model"]["continuing_subword_prefix"] = "x" * 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read: .*out of range"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("index", [-200, 512])
def test_decode_refuses_invalid_id(index: int) -> None:
    with pytest.raises(ValueError, match=f"{index} is not a token id"):
        Tokenizer.small().decode([1, index])


def test_decode_keeps_special_think_tags(tmp_path):
    Tokenizer.small().save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    special = Tokenizer.from_directory(tmp_path)
    assert "<think>" in special.control_tokens
    assert special.decode(special.encode("<think>red</think>yes<|im_end|>")) == "<think>red</think>yes"
