"""Your own data on a checkpoint, released or local: what most people run. docs/finetune.md goes through it.

    phivision data import mine.json data/mine --images photos/ --checkpoint CHECKPOINT
    python train.py --config=configs/finetune.py --run=runs/mine \
        --config.init_from=CHECKPOINT --config.data.path=data/mine
    python train.py --config=configs/finetune.py --help                      # every field, with what it means

    --config.lora.rank=16                                                    # adapters, instead of everything
    --config.data.epochs=3
    --config.data.validation_share=0.02
    --config.data.replay_path=data/general --config.data.replay_share=0.1    # keep what the checkpoint knew
    --config.data.eval_path=data/mine_test --config.eval_every=200           # score answers as well

CHECKPOINT is a Hugging Face directory or id, a checkpoint of ours, or another run.
"""

import dataclasses

from ml_collections import ConfigDict

from phivision_jax.training.run_config import RunConfig


def get_config() -> ConfigDict:
    c = ConfigDict(dataclasses.asdict(RunConfig()), type_safe=False)

    # For one machine. A row takes an image of the largest size (3,600 patches) and 4,500 tokens of text, or three
    # examples of usual size; 16 rows are about 50 such, a small batch of instruction data. What is too large, like two
    # images of the largest size, gets fewer patches rather than being left out.
    c.data.update(batch_rows=16, length=8192, vision_rows=1, num_patches=7168, on_overflow="resize")

    # Rates for what is trained: adapters start from zero and take the full rate; tower and projector a fifth, the
    # decoder a tenth, which are the recipe's rates for instruction (configs/phi4_rv_15b.py).
    unadapted = r"(?!.*lora_)"
    c.optim.update(
        learning_rate=1e-4,
        lr_rules=((f"^decoder{unadapted}", 0.1), (f"^(vision|projector){unadapted}", 0.2), (".", 1.0)),
        warmup_steps=20,
        weight_decay=1e-4,
    )
    c.lora.alpha = 32.0
    c.update(log_every=5, checkpoint_every=200, validate_every=100)
    return c
