"""Mutated files of a checkpoint, 2,000 of each, are read or refused with a sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.checkpoint import layout
from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf import HFDirectory, HFSource, read_header
from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.mapping import model_leaves
from phivision_jax.convert.ours import Adapters
from phivision_jax.processor import Processor
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import Tokenizer
from tests.support import small_tokenizer
from tests.support.mutations import survivors
from tests.support.released_layout import SMALL

HEADER = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "model.layers.0.self_attn.rotary_emb.inv_freq": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
    "lm_head.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [24, 40]},
}


def with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(40)


def test_config_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    values = {**SMALL, "eos_token_id": [46, 44], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert len(model_leaves(model_config(tmp_path))) > 30

    assert 200 < survivors(json.dumps(values).encode(), read, str(file)) < 1200


def test_generation_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    file = tmp_path / "generation_config.json"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        model_config(tmp_path)

    content = b'{"eos_token_id": [46, 44], "pad_token_id": 47, "top_p": 0.9}'
    assert survivors(content, read, str(file), count=300) > 50


def test_index(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(with_length(json.dumps(HEADER).encode()))
    file = tmp_path / "model.safetensors.index.json"
    index = {"metadata": {"total_size": 40}, "weight_map": dict.fromkeys(HEADER.keys() - {"__metadata__"}, file.name)}
    index["weight_map"] = dict.fromkeys(index["weight_map"], "a.safetensors")

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert len(HFDirectory(tmp_path).entries) == 2

    assert 100 < survivors(json.dumps(index).encode(), read, file.name) < 1500


def test_safetensors_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        _, entries = read_header(file, len(content))
        data = np.frombuffer(content, np.uint8)
        assert all(0 <= entry.offset <= entry.offset + entry.nbytes <= len(data) for entry in entries.values())

    content = json.dumps(HEADER).encode()
    accepted = survivors(content, lambda mutated: read(with_length(mutated)), str(file))
    assert 50 < accepted < 1000


def test_header_length(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write((100_000_000).to_bytes(8, "little") + b"{")
        sparse.truncate(200_000_000)
    with pytest.raises(ValueError, match=r"model.safetensors: its header has 100,000,000 bytes, more than the limit"):
        read_header(file, 200_000_000)


def test_tokenizer_json(tmp_path: Path) -> None:
    file, text = tmp_path / "tokenizer.json", "a red <|im_end|>"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)

    state = json.loads(small_tokenizer.build())
    assert survivors(json.dumps(state).encode(), read, str(file)) < 1500


def test_tokenizer_config_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small_tokenizer.build())
    file = tmp_path / "tokenizer_config.json"
    token = {"content": "<|im_end|>", "lstrip": False, "special": True}
    config = {"added_tokens_decoder": {"508": token}, "eos_token": token, "bos_token": "x", "chat_template": "{{ 1 }}"}

    def read(content: bytes) -> None:
        file.write_bytes(content)
        Tokenizer.from_directory(tmp_path)
        ChatTemplate.from_directory(tmp_path).render([{"role": "user", "content": ""}])

    survivors(json.dumps(config).encode(), read, str(file), str(tmp_path), count=600)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "chat_template.json"])
def test_processor_files(tmp_path: Path, name: str) -> None:
    content = {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "chat_template": "{{ messages[0].content }}"}

    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        Processor.from_directory(tmp_path, ModelConfig())

    assert survivors(json.dumps(content).encode(), read, str(tmp_path / name), count=300) > 20


def test_checkpoint_metadata(tmp_path: Path) -> None:
    """Also with a checksum that fits the mutated values, as somebody could write it."""
    file = tmp_path / "meta" / "metadata"
    file.parent.mkdir()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.json").write_text("{}")
    meta = {"model": {"decoder": {"num_layers": 2}}, "step": 3, "run": {"lora": {"rank": 2, "alpha": 4.0}}}
    meta |= {
        "metrics": {"loss": 1.5},
        "assets": {"a.json": layout.crc_of_files(tmp_path / "assets")["a.json"]},
        "arrays": {"params/a/b/kernel": ["float32", [2, 3], "00"]},
    }
    meta["arrays"] |= {f"params/a/b/lora_{x}": ["float32", [2, 3], "00"] for x in "ab"}

    def read(content: bytes) -> None:
        file.write_bytes(content)
        found = layout.read_meta(tmp_path, assets=True)
        layout.model_of(tmp_path, found)
        Adapters.find(tmp_path, found, layout.arrays_of(found))
        assert all(min(array.shape, default=0) is not None for array in layout.arrays_of(found).values())

    def sealed(content: bytes) -> None:
        try:
            values = json.loads(content)
            content = json.dumps(layout.with_crc(values)).encode()
        except (ValueError, TypeError, RecursionError):
            pass
        read(content)

    content = json.dumps(layout.with_crc(meta)).encode()
    survivors(content, read, str(tmp_path), count=500)
    assert 100 < survivors(json.dumps(meta).encode(), sealed, str(tmp_path)) < 1500


def test_config_of_huge_sizes_is_refused_at_once(tmp_path: Path) -> None:
    """Nothing of that size is built: neither from sizes beyond all limits nor from those below."""
    for key, value in {"num_hidden_layers": 10**9, "vocab_size": 10**12, "hidden_size": 8 * 10**9}.items():
        with pytest.raises(ValueError, match=rf"must be from 1 to [0-9,]*, not {value}"):
            model_config({**SMALL, key: value})
    (tmp_path / "model.safetensors").write_bytes(with_length(json.dumps(HEADER).encode()))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 10_000, "vocab_size": 2**24}))
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight"):
        HFSource(HFDirectory(tmp_path), model_leaves(model_config(tmp_path)))
