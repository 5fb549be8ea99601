"""Features of transformers' ``SiglipVisionModel``, the class of fixed-resolution SigLIP-2, on tiny random weights.

Patches of 14 pixels do not divide the tile, as in the released 384-pixel models: the convolution drops the rest. The
tile of patches of 16 pixels is divided. Needs torch and transformers; tests import it for ``CONFIGS`` alone.
"""

from __future__ import annotations

import math

import numpy as np

CONFIGS = {
    name: {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "image_size": size,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": patch,
    }
    for name, size, patch in (("patch14", 62, 14), ("patch16", 48, 16))
}
SEED, TILES = 1, 2


def fixed_resolution() -> dict[str, dict[str, np.ndarray]]:
    """Files by name: the ``tiles`` [2, size, size, 3] u8, their ``features`` [2, n, 24], the tensors by their names."""
    import torch
    from checkpoint import draw
    from reference import normalise
    from transformers import SiglipVisionConfig, SiglipVisionModel

    files = {}
    for name, config in CONFIGS.items():
        rng = np.random.default_rng([SEED, *name.encode()])
        model = SiglipVisionModel._from_config(SiglipVisionConfig(**config), attn_implementation="eager").eval()
        tensors = {}
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                rows = parameter.shape[0], math.prod(parameter.shape[1:])
                shape = rows if parameter.ndim == 4 else tuple(parameter.shape)  # a convolution, sampled as a product
                tensor = draw(path, shape, rng).reshape(parameter.shape)
                parameter.copy_(torch.from_numpy(tensor))
                tensors[f"vision_model.{path.removeprefix('vision_model.')}"] = tensor
            size = config["image_size"]
            level, contrast = rng.uniform(60, 195, (TILES, 1, 1, 3)), rng.uniform(20, 90, (TILES, size, 1, 1))
            noise = level + contrast * rng.standard_normal((TILES, size, size, 3))
            tiles = noise.clip(0, 255).round().astype(np.uint8)
            pixels = normalise(tiles).permute(0, 3, 1, 2)
            features = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].numpy()
        files[f"fixed_{name}.npz"] = {"tiles": tiles, "features": features, **tensors}
    return files
