"""A model of 5 billion parameters for ablations, like the report's proxy.

    python train.py --config=configs/proxy_5b.py --run=runs/proxy --config.data.path=MIXTURE.toml
    phivision preflight --config=configs/proxy_5b.py --topology=v5e:16x16

    decoder     40 layers, width 3,072, MLP 8,192, 24 query and 8 key heads of 128, vocabulary 100,352    4,643,343,360
    encoder     SigLIP-2 So400m, patch 16, NaFlex: 27 layers, width 1,152                                   427,888,064
    projector   1,152 → 3,072 → 3,072                                                                        12,982,272
                                                                                                          5,084,213,696

The report's ablations use a proxy of about 5B, based on Phi-4, and 10 M pairs of image and text, mostly of computer use
and grounding; its decoder, encoder and schedule were not published. Widths and heads here are Phi-4-mini's (arXiv
2503.01743: 32 layers, 3,072, 8,192, 24 and 8 heads, tied embeddings of 200,064 entries, 3.8B). Tokenizer and RoPE are
the released model's, so that data and modes are the same; with this smaller vocabulary 32 layers would be 4.3B, and the
40 layers are the released model's number.
"""

import dataclasses

from ml_collections import ConfigDict

from phivision_jax.config import DecoderConfig
from phivision_jax.training.run_config import RunConfig

DECODER = DecoderConfig(hidden_size=3072, intermediate_size=8192, num_layers=40, num_heads=24, num_kv_heads=8)


def get_config() -> ConfigDict:
    c = ConfigDict(dataclasses.asdict(RunConfig()), type_safe=False)
    c.model.decoder = dataclasses.asdict(DECODER)

    # A row has one image of the largest size and a conversation, or several of usual size; a step has about 1,000
    # samples, which makes 10,000 steps of 10 M pairs.
    c.data.update(batch_rows=512, length=4096, num_patches=3712, on_overflow="resize")
    # Random weights tolerate the rate of pretraining a model of this size (OPT and LLaMA: 1e-4 to 3e-4); the tower,
    # which is pretrained where init_from provides it, has a fifth.
    rates = (("vision", 0.2), (".", 1.0))
    c.optim.update(learning_rate=1e-4, lr_rules=rates, warmup_tokens=210_000_000, weight_decay=1e-4)
    # With these, two rows of any strategy fit a chip with 16 GB: recompute of the tower is cheap, and its activations
    # grow with the tiles of an image. The offloading policies of larger models are not needed.
    c.update(remat="attention", vision_remat="full", log_every=10, checkpoint_every=500)
    return c
