"""The computation of the released model in PyTorch: the oracle behind the arrays of this folder.

The two towers come from ``transformers``. The rest is written out here: the padding of images, the choice of the vision
features, the projector, the splice of vision tokens into text, the shifted loss and greedy decoding. Every example is
computed alone, so no effect of batching can hide in the numbers. Needs torch and transformers; tests import neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Phi3Config, Phi3ForCausalLM, Siglip2VisionConfig, Siglip2VisionModel

VISION = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
IMAGE_TOKEN, IGNORE = -200, -100
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "original_max_position_embeddings",
    "rms_norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor", "tie_word_embeddings", "sliding_window",
    "attention_dropout", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def normalise(patches: np.ndarray) -> torch.Tensor:
    """Patches [n, patch²·3] u8 as the tower's float32 input: rescaled by 1/255, then by mean and deviation 0.5."""
    rescaled = (patches.astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((rescaled - np.float32(0.5)) / np.float32(0.5))


class Reference:
    """The model of a released-layout configuration, in float32 with eager attention; ``load`` sets its weights."""

    def __init__(self, config: dict) -> None:
        self.max_patches = config["max_num_patches"]
        self.vision = Siglip2VisionModel._from_config(
            Siglip2VisionConfig(**config["vision_config"]), attn_implementation="eager"
        ).eval()
        text = Phi3Config(**{key: config[key] for key in _TEXT_KEYS})
        self.decoder = Phi3ForCausalLM._from_config(text, attn_implementation="eager").eval()
        width, hidden = config["mm_hidden_size"], config["hidden_size"]
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.GELU(approximate="none"), torch.nn.Linear(hidden, hidden)
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Reference:
        """Load the checkpoint of a released-layout directory."""
        model = cls(json.loads((directory / "config.json").read_text()))
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors.update(load_file(file))
        model.load(tensors)
        return model

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every parameter with its name in the checkpoint, in the order in which the released shards hold them."""
        decoder = dict(self.decoder.named_parameters())
        head = decoder.pop("lm_head.weight")
        yield from decoder.items()
        for name, parameter in self.vision.named_parameters():
            yield VISION + name.removeprefix("vision_model."), parameter
        for name, parameter in self.projector.named_parameters():
            yield PROJECTOR + name, parameter
        yield "lm_head.weight", head

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set every parameter; the names must be exactly the checkpoint's."""
        parameters = dict(self.parameters())
        if parameters.keys() != tensors.keys():
            raise ValueError(f"names differ: {sorted(parameters.keys() ^ tensors.keys())[:5]} ...")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def features(self, pixels: list[torch.Tensor], grids: list[tuple[int, int]]) -> list[torch.Tensor]:
        """The output of the block before the last, [n, C] per image. Images are padded and masked."""
        padded = torch.zeros(len(pixels), self.max_patches, pixels[0].shape[-1])
        mask = torch.zeros(len(pixels), self.max_patches, dtype=torch.int32)
        for j, image in enumerate(pixels):
            padded[j, : len(image)], mask[j, : len(image)] = image, 1
        out = self.vision(
            pixel_values=padded,
            pixel_attention_mask=mask,
            spatial_shapes=torch.tensor(grids),
            output_hidden_states=True,
        )
        return [states[: len(image)] for states, image in zip(out.hidden_states[-2], pixels, strict=True)]

    def splice(
        self, ids: np.ndarray, labels: np.ndarray, projected: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [T, D] and labels [T]: each −200 becomes the vision tokens of the next image, labelled −100."""
        parts, merged, images = [], [], iter(projected)
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if token == IMAGE_TOKEN:
                parts.append(next(images))
                merged += [IGNORE] * len(parts[-1])
            else:
                parts.append(self.decoder.get_input_embeddings()(torch.tensor([token])))
                merged.append(label)
        return torch.cat(parts), torch.tensor(merged)

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of one example's embeddings [T, D]."""
        return self.decoder(inputs_embeds=embeddings[None]).logits[0]

    @torch.no_grad()
    def greedy(self, embeddings: torch.Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy decoding with a KV cache and without a stop token: ids [steps] and logits [steps, V]."""
        out = self.decoder(inputs_embeds=embeddings[None], use_cache=True)
        ids, logits = [], []
        for _ in range(steps):
            logits.append(out.logits[0, -1])
            ids.append(int(logits[-1].argmax()))
            out = self.decoder(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        return np.array(ids, np.int32), torch.stack(logits).numpy()


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The summed shifted cross entropy of one example, and the number of its targets."""
    targets = labels[1:]
    total = functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORE, reduction="sum")
    return total, int((targets != IGNORE).sum())
