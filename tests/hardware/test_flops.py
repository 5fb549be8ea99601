"""Model FLOPs against hand counts of a tiny model, the released model's numbers, and XLA's own count."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.config import DecoderConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from phivision_jax.hardware.flops import Workload, mfu, step_flops
from phivision_jax.models import phivision
from phivision_jax.training import optim
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.run_config import OptimConfig
from tests.support.batches import TINY, random_rows

WORK = Workload(tokens=10, pairs=55, patches=6, patch_pairs=20, vision_tokens=3)

# TINY: C 24, F 32, 2 blocks run, 12 numbers a patch; D 32, F 48, 2 layers, 4 heads and 2 kv heads of 8, V 64.
PATCH = 2 * (12 * 24 + 2 * (4 * 24 * 24 + 2 * 24 * 32))
VISION_TOKEN = 2 * (24 * 32 + 32 * 32)
TOKEN = 2 * 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
HEAD = 2 * 32 * 64


def only(pattern):
    return ((pattern, 1.0), (".", 0.0))


def counted(config, work, lr_rules=()):
    return {name: (cost.forward, cost.backward) for name, cost in step_flops(config, work, lr_rules).parts.items()}


def test_step_flops_all_trained():
    parts = counted(TINY, WORK)
    assert {name: forward for name, (forward, _) in parts.items()} == {
        "vision": 6 * PATCH,
        "vision_attention": 20 * 4 * 2 * 24,
        "projector": 3 * VISION_TOKEN,
        "decoder": 10 * TOKEN,
        "decoder_attention": 55 * 4 * 2 * 32,
        "head": 10 * HEAD,
    }
    # Twice the forward pass, but that pixels need no gradient.
    pixels = 6 * 2 * 12 * 24
    assert {name: 2 * forward - backward for name, (forward, backward) in parts.items()} == {
        **dict.fromkeys(parts, 0),
        "vision": pixels,
    }
    flops = step_flops(TINY, WORK)
    assert flops.forward == sum(forward for forward, _ in parts.values())
    assert flops.total == 3 * flops.forward - pixels


def test_step_flops_lora():
    lora = LoraConfig(rank=3, targets=r"decoder/layers/mlp/.*_proj")
    parts, frozen = step_flops(TINY, WORK, (), lora).parts, step_flops(TINY, WORK).parts
    # Two layers of gate and up, 32 to 48, and down, 48 to 32, each with x · A and · B.
    adapters = 10 * 2 * 3 * 2 * 3 * (32 + 48)
    assert parts["decoder"].forward == frozen["decoder"].forward + adapters
    # Nothing before the first layer's gate and up depends on an adapter: no gradient of their x, nor of attention's.
    attention = 10 * 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    through = 10 * TOKEN - attention - 2 * 10 * 2 * 32 * 48
    first = 10 * 2 * 3 * 2 * 32
    assert parts["decoder"].backward == through + 2 * adapters - first
    # Scores and values of the second layer alone; the head passes on what it gets.
    assert parts["decoder_attention"].backward == frozen["decoder_attention"].backward / 2
    assert parts["head"].backward == 10 * HEAD
    assert parts["vision"].backward == parts["vision_attention"].backward == parts["projector"].backward == 0
    # An adapter in the projector brings gradients back to it, through all of the decoder.
    lora = LoraConfig(rank=3, targets="projector/fc2")
    parts = step_flops(TINY, WORK, (), lora).parts
    assert (parts["projector"].backward, parts["decoder"].backward) == (2 * 3 * 3 * (32 + 2 * 32), 10 * TOKEN)
    assert step_flops(TINY, WORK, (("lora", 0.0),), lora).total == step_flops(TINY, WORK, ((".", 0.0),), lora).total


def test_step_flops_projector_only():
    everything, parts = counted(TINY, WORK), counted(TINY, WORK, only("projector"))
    assert {name: forward for name, (forward, _) in parts.items()} == {n: f for n, (f, _) in everything.items()}
    assert {name: backward for name, (_, backward) in parts.items()} == {
        "vision": 0,
        "vision_attention": 0,
        "projector": 3 * (2 * 24 * 32 + 2 * 2 * 32 * 32),  # W of fc1; W and x of fc2
        "decoder": 10 * TOKEN,
        "decoder_attention": 2 * 55 * 4 * 2 * 32,
        "head": 10 * HEAD,
    }


def test_step_flops_backward_stops_at_first_trained():
    assert [b for _, b in counted(TINY, WORK, only("lm_head")).values()] == [0, 0, 0, 0, 0, 10 * HEAD]
    # Without norms: nothing before q, k, v of the first layer trains, so their inputs need no gradient.
    parts = counted(TINY, WORK, only("decoder/layers/(self_attn|mlp)"))
    assert parts["decoder"][1] == 10 * (2 * TOKEN - 2 * 32 * (32 + 2 * 16))
    assert parts["projector"][1] == parts["vision"][1] == 0
    # Of the first block's attention only k and the scores; then everything flows back through x.
    parts = counted(TINY, WORK, only("vision.*k_proj"))
    assert parts["vision"][1] == 6 * 2 * ((576 + 576 + 1536) + (4 * 576 + 576 + 1536))
    assert parts["vision_attention"][1] == 20 * 2 * 24 * (2 + 4)


def test_step_flops_text_only():
    text = dataclasses.replace(WORK, patches=0, patch_pairs=0, vision_tokens=0)
    frozen_table = (("embed_tokens|layernorm", 0.0),)
    assert counted(TINY, text, frozen_table)["decoder"][1] < counted(TINY, WORK, frozen_table)["decoder"][1]
    assert sum(sum(counted(TINY, text)[name]) for name in ("vision", "vision_attention", "projector")) == 0


def test_step_flops_knows_every_parameter():
    names = [optim.path_name(path) for path in optim.flatten(nnx.to_pure_dict(phivision.abstract(TINY)[1]))]
    for name in names:
        assert step_flops(TINY, WORK, only(f"^{name}$")).total > step_flops(TINY, WORK, only("^$")).total, name
    none = step_flops(TINY, WORK, [(f"^{name}$", 0.0) for name in names])
    assert none.total == none.forward


def test_step_flops_early_fusion():
    """One product of 12 numbers and 32 outputs per patch, whose backward has the gradient of its kernel alone."""
    vision = VisionConfig("early_fusion", hidden_size=32, patch_size=2, num_positions=16)
    early = dataclasses.replace(TINY, vision=vision)
    product = 2 * WORK.patches * 12 * 32
    parts = counted(early, WORK)
    assert parts["vision"] == (product, product)
    assert parts["vision_attention"] == parts["projector"] == (0, 0)
    assert parts["decoder"] == counted(TINY, WORK)["decoder"]
    assert counted(early, WORK, only("position_embedding"))["decoder"][1] == 10 * TOKEN


def test_step_flops_released_model():
    def giga(work, *names):
        parts = step_flops(ModelConfig(), work).parts
        return sum(parts[name].total for name in names) / 1e9

    one = Workload(tokens=1, pairs=0, patches=1, patch_pairs=0, vision_tokens=1)
    assert giga(one, "decoder", "head") == pytest.approx(84.9, abs=0.05)
    # Six per parameter: all of the text model's, but the embedding table and the 81 norms.
    assert giga(one, "decoder", "head") == 6 * (14_659_507_200 - 100_352 * 5120 - 81 * 5120) / 1e9
    assert giga(one, "vision") == pytest.approx(2.4, abs=0.05)
    assert giga(one, "projector") == pytest.approx(0.2, abs=0.05)
    alike = Workload.of_examples(1, 3000, [3600])
    assert giga(alike, "decoder_attention") / 3000 == pytest.approx(3.7, abs=0.05)
    assert giga(alike, "vision_attention") / 3600 == pytest.approx(1.3, abs=0.05)


def test_step_flops_merged_features():
    merged = dataclasses.replace(TINY, projector=ProjectorConfig(merge_size=4))
    assert counted(merged, WORK)["projector"][0] == 3 * 2 * (4 * 24 * 32 + 32 * 32)


# ---------------------------------------------------------------------------------------------------------------------
# The contents of a step.


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_of_examples_matches_masks(image_attention):
    config = dataclasses.replace(TINY, image_attention=image_attention)
    example = (5, [(2, 3), (1, 4)])
    batch = random_rows(np.random.default_rng(0), config, [[example] * 2, [example]], length=40, num_patches=30)
    segments, vision = batch.segment_ids, batch.patch_segments.reshape(2, -1)
    visible = (segments[:, :, None] == segments[:, None]) & (np.arange(40) <= batch.span_end[..., None])
    assert Workload.of_examples(3, 15, [6, 4], bidirectional=image_attention == "bidirectional") == Workload(
        tokens=(segments > 0).sum(),
        pairs=(visible & (segments > 0)[..., None]).sum(),
        patches=(vision > 0).sum(),
        patch_pairs=((vision[:, :, None] == vision[:, None]) & (vision > 0)[..., None]).sum(),
        vision_tokens=(batch.vision_index >= 0).sum(),
    )


def test_of_examples_by_hand():
    assert Workload.of_examples(2, 9, [4, 2]) == Workload(18, 2 * 45, 12, 2 * (16 + 4), 12)
    assert Workload.of_examples(2, 9, [4, 2], bidirectional=True).pairs == 2 * (45 + 6 + 1)
    assert Workload.of_examples(128, 8192).patches == 0


def test_mfu():
    assert mfu(100.0, seconds=2.0, chips=5, peak_flops=20.0) == 0.5
    with pytest.raises(ValueError, match="positive"):
        mfu(100.0, seconds=0.0, chips=5, peak_flops=20.0)


# ---------------------------------------------------------------------------------------------------------------------
# XLA's own count, of one layer each: it counts the body of a loop once. It scores masked pairs too, and adds the
# elementwise work, which the widths here keep under 2 %; a product too many or too few is more than that.

WIDE = ModelConfig(
    vision=VisionConfig(
        hidden_size=128, intermediate_size=384, num_layers=2, num_heads=2, patch_size=8, num_positions=16
    ),
    decoder=DecoderConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        bos_token_id=253,
        eos_token_id=254,
        pad_token_id=255,
    ),
)
B, T, P = 2, 128, 96
QUICKLY = {"xla_backend_optimization_level": 0}  # the machine code is never run
EVERY_PAIR = Workload(tokens=B * T, pairs=B * T * T, patches=B * P, patch_pairs=B * P * P, vision_tokens=B * P)
SPEC = batch_spec(B, RowShape(T, 1, P), WIDE.vision.patch_dim)


def test_step_flops_match_xla_forward():
    graphdef, state = phivision.abstract(WIDE)
    logits = jax.jit(lambda params, batch: phivision.merge(graphdef, params)(batch))
    compiled = logits.lower(nnx.to_pure_dict(state), SPEC).compile(QUICKLY)
    assert compiled.cost_analysis()["flops"] == pytest.approx(step_flops(WIDE, EVERY_PAIR).forward, rel=0.02)


@pytest.mark.parametrize("lr_rules", [(), only("vision.*k_proj")])
def test_step_flops_match_xla_gradients(lr_rules):
    graphdef, state = phivision.abstract(WIDE)
    trainable, frozen = optim.partition(nnx.to_pure_dict(state), OptimConfig(lr_rules=lr_rules))

    def gradients(trainable, frozen, batch):
        def loss(trainable):
            return batch_loss(phivision.merge(graphdef, optim.unflatten({**trainable, **frozen})), batch)[0]

        return jax.grad(loss)(trainable)

    compiled = jax.jit(gradients).lower(trainable, frozen, SPEC).compile(QUICKLY)
    cost = step_flops(WIDE, EVERY_PAIR, lr_rules)
    wanted = cost.total + cost.parts["head"].forward  # the loss makes the logits again in its backward pass
    assert compiled.cost_analysis()["flops"] == pytest.approx(wanted, rel=0.02)
