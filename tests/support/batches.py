"""Made-up things that several tests share: a configuration with every kind of layer, rows of random examples."""

import numpy as np

from phivision_jax.batch import Batch
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.images.layout import PatchedImage
from phivision_jax.rows import expand, fill_rows, row_shape
from phivision_jax.text.constants import IGNORE

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for tests: LLVM's optimisations take longer than everything that is computed."""

TINY = ModelConfig(
    vision=VisionConfig(
        hidden_size=24, intermediate_size=32, num_layers=3, num_heads=2, patch_size=2, num_positions=16
    ),
    decoder=DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=10_000.0,
        bos_token_id=61,
        eos_token_id=62,
        pad_token_id=63,
    ),
    min_patches=1,
    max_patches=64,
)


def random_rows(rng, config, rows, length=None, num_patches=None, vision_rows=1) -> Batch:
    """Rows of examples given as (text tokens, [grids]): images at random places, loss on half of the text."""

    def example(text, grids):
        ids = rng.integers(1, 60, text).tolist()
        labels = [i if rng.random() < 0.5 else IGNORE for i in ids[:-1]] + [ids[-1]]
        images = []
        for grid in grids:
            index = int(rng.integers(0, len(ids)))
            ids.insert(index, -200)
            labels.insert(index, IGNORE)
            images.append(
                PatchedImage(rng.integers(0, 256, (grid[0] * grid[1], config.vision.patch_dim), np.uint8), (grid,))
            )
        return expand(ids, images, labels)

    filled = [[example(*e) for e in row] for row in rows]
    return fill_rows(
        filled,
        row_shape(
            config,
            length or max(sum(len(e.tokens) for e in row) for row in filled),
            vision_rows,
            num_patches or max(1, *(sum(e.num_patches for e in row) for row in filled)),
        ),
        config,
    )


EXAMPLES = [
    (9, [(2, 3)]),
    (12, []),
    (7, [(1, 4), (3, 2)]),
    (11, [(2, 2), (1, 1), (4, 1)]),
    (5, []),
    (13, [(1, 2), (2, 1), (3, 3), (1, 1)]),
    (8, [(2, 2), (1, 3), (2, 1), (1, 1), (5, 1)]),
]
