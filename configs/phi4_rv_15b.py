"""The released model's recipe in three stages, for TPU pods.

    python train.py --config=configs/phi4_rv_15b.py:stage1 --run=runs/stage1 --config.init_from=START \
        --config.data.path=MIXTURE.toml
    python train.py --config=configs/phi4_rv_15b.py:stage2 --run=runs/stage2 --config.init_from=runs/stage1 …
    phivision preflight --config=configs/phi4_rv_15b.py:stage2 --topology=v5p:4x4x8

    stage1   the projector alone, on captions       0.4 k rows of  2,048    1.4 B tokens
    stage2   everything, single-image instruction   0.8 k rows of  8,192  188.5 B tokens
    stage3   everything, long and several images    0.4 k rows of 16,384     12 B tokens

A stage trains through the mixture's stage of its name once (``configs/mixtures/recipe.toml``), warming up over a stated
number of tokens. Sizes of stages and batches are the report's (arXiv 2603.03975), samples turned into packed rows.
Learning rates and schedules were not published: the reasons for ours stand beside them and in ``docs/recipe.md``. How a
step is laid out on the devices follows from the devices (``training/device_layout.py``).
"""

import dataclasses

from ml_collections import ConfigDict

from phivision_jax.training.run_config import RunConfig

STAGES = ("stage1", "stage2", "stage3")


def get_config(stage: str = "stage2") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"configs/phi4_rv_15b.py has the stages {', '.join(STAGES)}, not {stage!r}")
    c = ConfigDict(dataclasses.asdict(RunConfig()), type_safe=False)
    c.data.stage = stage
    # Decay as in Phi-4-reasoning's training, on kernels of linear layers: no norms, biases, tables of embeddings and
    # positions, and not the head, which is such a table (optim.is_decayed). 0.95 forgets a bad stretch in 20 steps, and
    # lets moments be kept in bf16.
    c.optim.update(b2=0.95, weight_decay=1e-4, clip_norm=1.0)
    c.update(log_every=10, checkpoint_every=500)
    c.model.max_patches = 1024 if stage == "stage1" else 3600

    if stage == "stage1":
        # 1,024 samples of about 700 tokens. A fresh projector between frozen towers takes a large rate: 1e-3 is what
        # projectors of two layers are aligned with (LLaVA-1.5, Bunny). Warm-up is 3 % of the stage, as theirs.
        c.data.update(batch_rows=384, length=2048, vision_rows=2, num_patches=1024)
        c.optim.update(learning_rate=1e-3, lr_rules=(("projector", 1.0), (".", 0.0)), warmup_tokens=47_000_000)
    if stage == "stage2":
        # 1,920 samples of about 3,000 tokens. 2e-5 is the released config's mm_projector_lr, which in the trainer it
        # comes from holds for projector and tower; half of it, Phi-4-reasoning's own rate, for the decoder. Warm-up is
        # as many steps as that training's, 450.
        c.data.update(batch_rows=768, length=8192, vision_rows=1, num_patches=7168)
        rates = (("projector", 1.0), ("vision", 1.0), ("decoder", 0.5))
        c.optim.update(learning_rate=2e-5, lr_rules=rates, warmup_tokens=2_830_000_000)
    if stage == "stage3":
        # 1,920 samples of about 3,750 tokens, in rows that four chips may share. Half of stage 2's rates: the schedule
        # has come down to nothing there, and what is left is a sixteenth of the tokens. Warm-up is 3 % again.
        c.data.update(batch_rows=448, length=16_384, vision_rows=4, num_patches=3840)
        rates = (("projector", 1.0), ("vision", 1.0), ("decoder", 0.5))
        c.optim.update(learning_rate=1e-5, lr_rules=rates, warmup_tokens=367_000_000)
    return c
