"""The adapters (LoRA) of a run as PEFT reads them, and the model card of an export.

Hugging Face fuses q|k|v and gate|up, so the adapter of a fused layer has the sum of their ranks:

    A = [A_q; A_k; A_v]  [3r, in]        B = diag(B_q, B_k, B_v)  [out, 3r]        scale 3·alpha / 3r = alpha / r
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from phivision_jax.convert.hf import header_of
from phivision_jax.convert.mapping import Leaf, hf_shapes
from phivision_jax.convert.ours import OursSource
from phivision_jax.io.messages import shorten


def peft_files(source: OursSource) -> dict[str, bytes]:
    """The contents of ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
      ValueError: for an adapter on a convolution, which PEFT would apply to pixels in another order.
    """
    rank, alpha = source.adapters.rank, source.adapters.alpha
    shapes, parts = hf_shapes(source.leaves), dict[str, list[tuple[Leaf, int]]]()
    for leaf in source.leaves:
        if leaf.path in source.adapters.kernels and len(leaf.row_shape) > 1:
            raise ValueError(f"{leaf.path} has an adapter, but is a convolution to PEFT; export the merged model")
        for layer, name in enumerate(leaf.names if leaf.path in source.adapters.kernels else ()):
            parts.setdefault(name, []).append((leaf, layer))
    tensors, ranks = dict[str, np.ndarray](), dict[str, int]()
    for name, fused in parts.items():
        module = name.removesuffix(".weight")
        ranks[module], where = rank * len(fused), f"base_model.model.{module}.lora_"
        b = np.zeros((shapes[name][0], ranks[module]), np.float32)
        pairs = [source.adapter(leaf, layer, range(leaf.num_rows)) for leaf, layer in fused]
        for i, ((leaf, _), (_, part)) in enumerate(zip(fused, pairs, strict=True)):
            b[leaf.start : leaf.start + leaf.num_rows, i * rank : (i + 1) * rank] = part
        tensors |= {f"{where}A.weight": np.concatenate([a for a, _ in pairs]), f"{where}B.weight": b}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    config |= {"base_model_name_or_path": source.meta["run"].get("init_from"), "target_modules": [*ranks]}
    config["bias"] = "none"
    config["rank_pattern"] = {module: r for module, r in ranks.items() if r != rank}
    config["alpha_pattern"] = {module: alpha * r / rank for module, r in ranks.items() if r != rank}
    header = header_of({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    data = b"".join(tensors[name].tobytes() for name in sorted(tensors))
    return {"adapter_config.json": json.dumps(config, indent=2).encode(), "adapter_model.safetensors": header + data}


def model_card(name: str, meta: Mapping[str, Any]) -> bytes:
    """The ``README.md`` of a trained model: what its checkpoint states about base, data, steps and losses."""
    run = meta["run"]
    data, lora = (run[key] if isinstance(run.get(key), Mapping) else {} for key in ("data", "lora"))
    facts = {"base model": run.get("init_from") or "none (trained from scratch)", "data": data.get("path")}
    facts |= {"evaluation data": data.get("eval_path"), "steps": meta["step"], "program": meta.get("code")}
    facts["adapters"] = f"LoRA, rank {lora['rank']}, alpha {lora.get('alpha')}" if lora.get("rank") else None
    facts |= {key: value for key, value in (meta.get("metrics") or {}).items() if key.endswith(("loss", "accuracy"))}
    rows = "\n".join(f"| {key} | {shorten(value).replace('|', '/')} |" for key, value in facts.items() if value)
    base = f"base_model: {json.dumps(run['init_from'])}\n" if run.get("init_from") else ""
    front = f"---\n{base}library_name: transformers\npipeline_tag: image-text-to-text\n---\n"
    return f"{front}\n# {shorten(name)}\n\nTrained with phivision_jax.\n\n| | |\n| --- | --- |\n{rows}\n".encode()
