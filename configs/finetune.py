"""Train a checkpoint, released or local, on your own data. docs/finetune.md explains each step.

    phivision data import mine.json data/mine --images photos/ --checkpoint CHECKPOINT
    python train.py --config=configs/finetune.py --run=runs/mine \
        --config.init_from=CHECKPOINT --config.data.path=data/mine
    python train.py --config=configs/finetune.py --help                      # every field, its value and its meaning

    --config.lora.rank=16                                                    # LoRA adapters only
    --config.data.epochs=3
    --config.data.validation_share=0.02
    --config.data.replay_path=data/general --config.data.replay_share=0.1    # forget less of what the checkpoint knew
    --config.data.eval_path=data/mine_test --config.eval_every=200           # also score generated answers

CHECKPOINT is a Hugging Face directory or id, a checkpoint of this project, or another run.
"""

import dataclasses

from ml_collections import ConfigDict

from phivision_jax.training.run_config import RunConfig


def get_config() -> ConfigDict:
    c = ConfigDict(dataclasses.asdict(RunConfig()), type_safe=False)

    # Sizes for one machine. A row holds an image of the largest size (3,600 patches) and 4,500 tokens of text, or three
    # examples of usual size; 16 rows hold about 50 of these, a small batch of instruction data. Examples that are too
    # large, like two images of the largest size, get fewer patches instead of being dropped.
    c.data.update(batch_rows=16, length=8192, vision_rows=1, num_patches=7168, on_overflow="resize")

    # Adapters start from zero and have the full learning rate; tower and projector have a fifth of it, the decoder a
    # tenth. Those are the rates of the recipe's stage 2 (configs/phi4_rv_15b.py).
    unadapted = r"(?!.*lora_)"
    rates = ((f"^decoder{unadapted}", 0.1), (f"^(vision|projector){unadapted}", 0.2), (".", 1.0))
    c.optim.update(learning_rate=1e-4, lr_rules=rates, warmup_steps=20, weight_decay=1e-4)
    c.lora.alpha = 32.0
    c.update(log_every=5, checkpoint_every=200, validate_every=100)
    return c
