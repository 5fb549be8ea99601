"""The released model's recipe in three stages, for TPU pods.

    python train.py --config=configs/phi4_rv_15b.py:stage1 --run=runs/stage1 --config.init_from=START \
        --config.data.path=MIXTURE.toml
    python train.py --config=configs/phi4_rv_15b.py:stage2 --run=runs/stage2 --config.init_from=runs/stage1 …
    phivision preflight --config=configs/phi4_rv_15b.py:stage2 --topology=v5p:4x4x8

             trained modules   data                            rows per step      tokens
    stage1   projector         captions                        384 of  2,048      1.4 B
    stage2   all               single-image instructions       768 of  8,192    188.5 B
    stage3   all               long context, several images    448 of 16,384       12 B

A stage trains once on the mixture's stage of the same name (``configs/mixtures/recipe.toml``), with a warm-up given in
tokens. Sizes of stages and batches are the report's (arXiv 2603.03975), with samples turned into packed rows.
Learning rates and schedules were not published; the comments below and ``docs/recipe.md`` give the reasons for ours.
Mesh, remat and microbatches are chosen for the devices (``training/device_layout.py``).
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
    # Weight decay is that of Phi-4-reasoning's training. It applies to kernels of linear layers, not to norms, biases,
    # token and position embeddings, or the head (optim.is_decayed). b2 = 0.95 forgets a bad stretch in 20 steps and
    # allows moments in bf16.
    c.optim.update(b2=0.95, weight_decay=1e-4, clip_norm=1.0)
    c.update(log_every=10, checkpoint_every=500)
    c.model.max_patches = 1024 if stage == "stage1" else 3600
    rates = (("projector", 1.0), ("vision", 1.0), ("decoder", 0.5))

    if stage == "stage1":
        # A step has 1,024 samples of about 700 tokens. A random projector between frozen towers tolerates a large rate:
        # LLaVA-1.5 and Bunny align projectors of two layers with 1e-3. Warm-up is 3 % of the stage, as in theirs.
        c.data.update(batch_rows=384, length=2048, vision_rows=2, num_patches=1024)
        c.optim.update(learning_rate=1e-3, lr_rules=(("projector", 1.0), (".", 0.0)), warmup_tokens=47_000_000)
    if stage == "stage2":
        # A step has 1,920 samples of about 3,000 tokens. 2e-5 is the released config's mm_projector_lr, which in the
        # trainer that it comes from applies to projector and tower. The decoder has half of it, Phi-4-reasoning's own
        # rate. Warm-up takes 450 steps, as in Phi-4-reasoning's training.
        c.data.update(batch_rows=768, length=8192, vision_rows=1, num_patches=7168)
        c.optim.update(learning_rate=2e-5, lr_rules=rates, warmup_tokens=2_830_000_000)
    if stage == "stage3":
        # A step has 1,920 samples of about 3,750 tokens, in rows that four chips may share. The rates are half of stage
        # 2's, because stage 2 ends at a rate of zero and has 16 times the tokens. Warm-up is 3 % again.
        c.data.update(batch_rows=448, length=16_384, vision_rows=4, num_patches=3840)
        c.optim.update(learning_rate=1e-5, lr_rules=rates, warmup_tokens=367_000_000)
    return c
