"""The other side of ``step.py``: PyTorch and transformers, in a separate environment.

Reads a JSON request per line from stdin and answers with a JSON line on stdout. It needs only Python 3.11 and imports
nothing of this project.

    {"do": "versions"}
    {"do": "load", "config": {…}, "weights": "x.npz", "optimizer": {…}, "threads": 2}
    {"do": "batches", "name": "full", "files": [...]}    .npz files with the arrays of transformers' collator
    {"do": "start", "compile": false, "learning_rate": x}    reset weights and optimizer
    {"do": "steps", "name": "full"}    one step on every batch: seconds, CPU seconds, losses
    {"do": "product", "sizes": [M, K, N], "times": n}    GFLOP/s of the fastest of n products of matrices

The decoder is ``Phi3ForCausalLM``, the tower ``Siglip2VisionModel`` without the parts that never reach the loss (its
last block, post-norm and pooling head, which the released code runs and discards), both with SDPA. Between them are the
projector and the splice of the released model: features without their padding, each at its marker (−200).
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from peer_process import serve

try:
    import numpy as np
    import torch
    import transformers
    from torch import nn
    from transformers import Phi3Config, Phi3ForCausalLM
    from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel
except ImportError as error:
    sys.exit(f"step_peer.py needs transformers 5 and torch: {error}")

IMAGE_TOKEN, IGNORE = -200, -100
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."


class PhiVision(nn.Module):
    """Decoder, tower and projector, from the released layout of configuration and tensor names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text = {key: value for key, value in config.items() if key not in ("model_type", "vision_config")}
        vision = {"num_patches": 256, "patch_size": 16, **config["vision_config"], "vision_use_head": False}
        vision["num_hidden_layers"] -= 1
        decoder_config, vision_config = Phi3Config(**text), Siglip2VisionConfig(**vision)
        decoder_config._attn_implementation = vision_config._attn_implementation = "sdpa"
        self.decoder, self.tower = Phi3ForCausalLM(decoder_config), Siglip2VisionModel(vision_config)
        self.tower.post_layernorm = nn.Identity()
        C, D = vision_config.hidden_size, decoder_config.hidden_size
        self.projector = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))

    def load(self, tensors: Any) -> None:
        """Load every tensor of the file; each parameter must have one."""
        parts: dict[str, dict[str, torch.Tensor]] = {"tower": {}, "projector": {}, "decoder": {}}
        for name in tensors:
            part = next(
                (p for p, prefix in (("tower", TOWER), ("projector", PROJECTOR)) if name.startswith(prefix)), ""
            )
            prefix = {"tower": TOWER, "projector": PROJECTOR, "": ""}[part]
            parts[part or "decoder"][name.removeprefix(prefix)] = torch.from_numpy(tensors[name].copy())
        for part, state in parts.items():
            getattr(self, part).load_state_dict(state, strict=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        embeds, mask, labels = self.splice(batch)
        return self.decoder(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss

    def features(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """[patches of the image, D] for each image."""
        if len(batch["pixel_values"]) == 0:
            return []
        real = batch["pixel_attention_mask"]
        features = self.tower(batch["pixel_values"], real, batch["spatial_shapes"]).last_hidden_state
        counts = real.sum(1).tolist()
        return list(self.projector(features[real.bool()]).split(counts))

    def splice(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, T, D], mask and labels [B, T], padded on the right to the longest example."""
        features = iter(self.features(batch))
        rows, row_labels = [], []
        for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            ids, labels = ids[real], labels[real]
            markers = torch.where(ids == IMAGE_TOKEN)[0].tolist()
            cuts = [-1, *markers, len(ids)]
            text = [ids[a + 1 : b] for a, b in itertools.pairwise(cuts)]
            text_labels = [labels[a + 1 : b] for a, b in itertools.pairwise(cuts)]
            embeds = self.decoder.model.embed_tokens(torch.cat(text)).split([len(part) for part in text])
            pieces, piece_labels = [embeds[0]], [text_labels[0]]
            for part, part_labels in zip(embeds[1:], text_labels[1:], strict=True):
                image = next(features)
                pieces += [image, part]
                piece_labels += [torch.full((len(image),), IGNORE), part_labels]
            rows.append(torch.cat(pieces))
            row_labels.append(torch.cat(piece_labels))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, mask, nn.utils.rnn.pad_sequence(row_labels, batch_first=True, padding_value=IGNORE)


class Peer:
    def __init__(self) -> None:
        self.sets: dict[str, list[dict[str, torch.Tensor]]] = {}

    def versions(self) -> dict[str, Any]:
        return {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def load(self, config: dict[str, Any], weights: str, optimizer: dict[str, Any], threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.config, self.weights, self.settings = config, weights, optimizer
        return {}

    def batches(self, name: str, files: list[str]) -> dict[str, Any]:
        self.sets[name] = []
        for file in files:
            with np.load(file) as arrays:
                self.sets[name].append({key: torch.from_numpy(arrays[key]) for key in arrays.files})
        return {}

    def start(self, compile: bool, learning_rate: float) -> dict[str, Any]:
        self.model = PhiVision(self.config).train()
        with np.load(self.weights) as tensors:
            self.model.load(tensors)
        if compile:  # the loops over images and examples break graphs; the modules between them do not
            torch._dynamo.reset()
            self.model.decoder.compile()
            self.model.tower.encoder.compile()
        linear = {id(m.weight) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        linear -= {id(self.model.decoder.lm_head.weight)}
        params = list(self.model.parameters())
        groups = [
            {"params": [p for p in params if id(p) in linear], "weight_decay": self.settings["weight_decay"]},
            {"params": [p for p in params if id(p) not in linear], "weight_decay": 0.0},
        ]
        betas = self.settings["b1"], self.settings["b2"]
        self.optimizer = torch.optim.AdamW(groups, learning_rate, betas, self.settings["eps"], fused=True)
        return {"parameters": sum(p.numel() for p in params)}

    def steps(self, name: str) -> dict[str, Any]:
        seconds, losses, cpu = [], [], time.process_time()
        for batch in self.sets[name]:
            start = time.perf_counter()
            loss = self.model(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip_norm"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return {"seconds": sum(seconds), "cpu_seconds": time.process_time() - cpu, "losses": losses}

    def product(self, sizes: list[int], times: int) -> dict[str, Any]:
        M, K, N = sizes
        left, right, seconds = torch.randn(M, K), torch.randn(K, N), []
        for _ in range(times + 1):
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
        return {"gflops": 2 * M * K * N / min(seconds) / 1e9}


if __name__ == "__main__":
    serve(Peer())
