"""Answers of transformers' ``generate`` to the prompts of ``random_prompts.py``."""

from __future__ import annotations

import numpy as np
import torch
from random_prompts import STEPS, decided, prompts
from reference import IGNORE, Reference, normalise
from transformers import GenerationConfig


@torch.no_grad()
def random_answers(model: Reference) -> dict[str, np.ndarray]:
    """Greedy ids and, at each step, the margin between the two largest logits: [prompts, steps] each.

    Each prompt is answered alone, without a stop token.
    """
    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    ids, margins = [], []
    for prompt in prompts():
        pixels = [normalise(patches) for patches in prompt.patches]
        projected = [model.projector(f) for f in model.features(pixels, prompt.grids)] if pixels else []
        tokens = np.array(prompt.ids)
        embeddings, _ = model.splice(tokens, np.full_like(tokens, IGNORE), projected)
        attended = torch.ones(1, len(embeddings), dtype=torch.long)
        out = model.decoder.generate(
            inputs_embeds=embeddings[None], attention_mask=attended, generation_config=settings
        )
        ids.append(out.sequences[0].int().numpy())
        top = torch.cat(out.logits).topk(2).values
        margins.append((top[:, 0] - top[:, 1]).numpy())
    compared = sum(decided(m) for m in margins)
    if compared < 0.9 * len(ids) * STEPS or min(len(set(i.tolist())) for i in ids) < 2:
        raise SystemExit(f"random_prompts: {compared} steps are decided, or ids repeat too much: choose another seed")
    return {"ids": np.stack(ids), "margins": np.stack(margins)}
