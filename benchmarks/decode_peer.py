"""The other side of ``decode.py``: ``generate`` of PyTorch and transformers, in a separate environment.

Reads a JSON request per line from stdin and answers with a JSON line on stdout. It needs only Python 3.11 and imports
nothing of this project.

    {"do": "versions"}
    {"do": "load", "directory": "…", "dtype": "float32", "threads": 2}
    {"do": "unload"}
    {"do": "generate", "groups": [{"prompts": [[…]], "answers": […]}]}    seconds, CPU seconds, ids of every answer

The decoder is ``Phi3ForCausalLM`` with SDPA. A group is one call of ``generate``: greedy, without a stop token, prompts
padded on the left, all rows as long as the longest answer. Its ids are cut to the lengths asked for.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from peer_process import serve

try:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM
except ImportError as error:
    sys.exit(f"decode_peer.py needs transformers 5 and torch: {error}")


class Peer:
    def versions(self) -> dict[str, Any]:
        return {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def load(self, directory: str, dtype: str, threads: int) -> dict[str, Any]:
        """Load the decoder of a released-layout directory; every parameter must have a tensor."""
        torch.set_num_threads(threads)
        values = json.loads((Path(directory) / "config.json").read_text())
        text = {key: value for key, value in values.items() if key not in ("model_type", "vision_config")}
        config = Phi3Config(**text)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = Phi3ForCausalLM(config)
        names = dict(model.named_parameters())
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            tensors |= {k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items() if k in names}
        model.load_state_dict(tensors, strict=False, assign=True)
        # The buffers of the rotary embedding are not stored: made again, and in fp32 for every dtype.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise SystemExit(f"{directory} has no {missing[0]}")
        self.model = model.eval()
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def unload(self) -> dict[str, Any]:
        self.model = None
        return {}

    @torch.inference_mode()
    def generate(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        ids: list[list[int]] = []
        start, cpu = time.perf_counter(), time.process_time()
        for group in groups:
            width = max(map(len, group["prompts"]))
            prompts = torch.tensor([[0] * (width - len(p)) + p for p in group["prompts"]])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group["prompts"]])
            settings: dict[str, Any] = {"max_new_tokens": max(group["answers"]), "do_sample": False, "pad_token_id": 0}
            out = self.model.generate(prompts, attention_mask=mask, generation_config=GenerationConfig(**settings))
            answers = out[:, width:].tolist()
            ids += [answer[:n] for answer, n in zip(answers, group["answers"], strict=True)]
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "ids": ids}


if __name__ == "__main__":
    serve(Peer())
