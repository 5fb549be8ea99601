"""A small model that learns easy-VQA from random weights on two CPU cores. The demo and tests use it.

python train.py --config=configs/tiny.py --run=runs/tiny            # 3 to 10 minutes
python train.py --config=configs/tiny.py:long --run=runs/tiny-long  # within an hour
"""

import dataclasses

from ml_collections import ConfigDict

from phivision_jax.config import DecoderConfig, VisionConfig
from phivision_jax.training.run_config import RunConfig


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "long"):
        raise ValueError(f"configs/tiny.py has the variants '' and 'long', not {variant!r}")
    c = ConfigDict(dataclasses.asdict(RunConfig()), type_safe=False)

    # An image of 64x64 pixels is resized to 6x6 patches of 8x8 pixels: colors and shapes remain visible, and a step
    # costs about half of one with 8x8 patches. The position table has an entry for each patch: positions that are
    # resized from a larger table start out too weak to tell shapes apart. Three of the four vision layers run. The
    # vocabulary of 512 tokens is that of the project's own tokenizer.
    c.model.min_patches = c.model.max_patches = 36
    width = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 2}
    tokens = {"vocab_size": 512, "bos_token_id": 507, "eos_token_id": 508, "pad_token_id": 509}
    vision = VisionConfig(num_layers=4, patch_size=8, num_positions=36)
    decoder = DecoderConfig(num_layers=3, num_kv_heads=1, rope_theta=10_000.0, max_positions=1024)
    c.model.update(vision=dataclasses.asdict(vision) | width, decoder=dataclasses.asdict(decoder) | width | tokens)

    c.data.update(path="data/easy_vqa/train", eval_path="data/easy_vqa/test")
    # A row holds two conversations. Rows are short because the CPU, without an attention kernel, also computes every
    # masked score.
    c.data.update(batch_rows=4, length=184, num_patches=72, epochs=40, num_threads=1)
    # At twice this learning rate, answers to yes-or-no questions remain the majority's for a long time; at this rate
    # they are learned.
    c.optim.update(learning_rate=6e-4, steps=5500, warmup_steps=100, final_lr_ratio=0.02, b2=0.95, weight_decay=0.05)
    c.update(dtype="float32", remat="none", vision_remat="none")
    c.update(log_every=25, checkpoint_every=500, eval_every=1000, eval_examples=1000)

    if variant == "long":
        c.optim.update(steps=24_000)
    return c
