"""Generation against repeated forward passes of one prompt, without cache and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from phivision_jax.inference import generate as generation
from phivision_jax.inference.generate import generate, generate_ids, sample
from phivision_jax.processor import Processor
from phivision_jax.rows import batch_from_ids
from tests.support.forward import logits

NEW = 6
IMAGES = [(6, 4), (2, 8), (4, 4)]


def image(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def prompts(rng):
    """Ids and images of three prompts of different lengths, with no image, one and two."""
    text = [rng.integers(1, 60, n).tolist() for n in (3, 7, 8)]
    ids = [text[0], [text[1][0], -200, *text[1][1:]], [-200, text[2][0], -200, *text[2][1:]]]
    images = [[], [image(IMAGES[0], 0)], [image(IMAGES[1], 1), image(IMAGES[2], 2)]]
    return ids, images


def by_forwards(model, config, ids, images, steps) -> list[int]:
    """Greedy continuation by a forward pass over the complete sequence for each token."""
    ids, out = list(ids), []
    for _ in range(steps):
        batch = batch_from_ids([ids], [images], config=config, length=64, num_patches=64)
        last = int((batch.segment_ids[0] > 0).sum()) - 1
        out.append(int(jnp.argmax(logits(*model.split(), batch)[0, last])))
        ids.append(out[-1])
    return out


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_generate_ids_equals_repeated_forwards(tiny, image_attention):
    config = dataclasses.replace(tiny.config, image_attention=image_attention)
    ids, images = prompts(np.random.default_rng(4))
    batch = batch_from_ids(ids, images, config=config)
    assert len({int(n) for n in (batch.segment_ids > 0).sum(1)}) == 3  # three lengths of padding
    got = generate_ids(tiny, batch, max_new_tokens=NEW, eos_id=None)
    want = [by_forwards(tiny, config, i, p, NEW) for i, p in zip(ids, images, strict=True)]
    assert got.tolist() == want
    assert len({tuple(row) for row in want}) == 3


def test_generate_ids_ends_rows_at_eos(tiny):
    ids, images = prompts(np.random.default_rng(4))
    batch = batch_from_ids(ids, images, config=tiny.config)
    free = generate_ids(tiny, batch, max_new_tokens=NEW, eos_id=None)
    eos, other = int(free[1, 2]), int(free[0, 3])
    got = generate_ids(tiny, batch, max_new_tokens=NEW, eos_id=(eos, other))
    for row, ended in zip(free.tolist(), got.tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in (eos, other)), NEW)
        assert ended == (row[: length + 1] + [eos] * NEW)[:NEW]
    assert (got[1, 3:] == eos).all() and (got[0, 4:] == eos).all()


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}, {"top_p": 1.5}])
def test_generate_ids_rejects_settings(tiny, settings):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    with pytest.raises(ValueError, match="temperature >= 0 and 0 < top_p <= 1"):
        generate_ids(tiny, batch, max_new_tokens=2, eos_id=None, **settings)


def test_generate_ids_rejects_packed_batch(tiny):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    packed = batch._replace(segment_ids=np.array([[1, 1, 2]], np.int32))
    with pytest.raises(ValueError, match="one example per row"):
        generate_ids(tiny, packed, max_new_tokens=2, eos_id=None)


def test_sample_nucleus_by_hand():
    probabilities = np.array([[0.5, 0.3, 0.15, 0.05]])
    logits = jnp.log(jnp.asarray(probabilities))

    def shares(**settings):
        keys = jax.random.split(jax.random.key(0), 2000)
        return np.bincount(jax.vmap(lambda k: sample(logits, k, **settings)[0])(keys), minlength=4) / 2000

    np.testing.assert_allclose(shares(temperature=1.0), probabilities[0], atol=0.04)
    # 0.5 alone does not reach 0.7, with 0.3 it does: two tokens remain, renormalised.
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.04)
    # Half the temperature squares the odds.
    np.testing.assert_allclose(shares(temperature=0.5), probabilities[0] ** 2 / 0.365, atol=0.04)
    assert sample(logits, jax.random.key(0)).tolist() == [0]


class Answering:
    """A replacement of ``generate_ids`` that records the batch and returns given ids."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, model, batch, **settings):
        self.batch, self.settings = batch, settings
        return np.array([self.ids] * len(batch.tokens))


@pytest.fixture
def asked(monkeypatch):
    from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig

    config = ModelConfig(
        vision=VisionConfig(patch_size=2),
        decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509, max_positions=512),
        min_patches=4,
        max_patches=4,
    )
    processor = Processor.small(config)
    t = processor.tokenizer
    answer = Answering([t.nothink_id, *t.encode("a circle"), t.eos_id, t.eos_id])
    monkeypatch.setattr(generation, "generate_ids", answer)
    return processor, answer


def test_generate_one_prompt_or_list(asked):
    processor, answer = asked
    photo = image((4, 4), 0)
    assert generate(None, processor, "what shape is this?", images=[photo]) == "a circle"
    assert answer.batch.tokens.shape[1] == 128 and (answer.batch.vision_index >= 0).sum() == 4
    assert generate(None, processor, ["one", "two"], images=[[photo], []]) == ["a circle"] * 2
    conversation = [{"role": "user", "content": "one"}]
    assert generate(None, processor, conversation) == "a circle"
    assert generate(None, processor, [conversation, "two"]) == ["a circle"] * 2


def test_generate_ends_at_any_stop_token(asked):
    processor, answer = asked
    stop = answer.ids[2]
    decoder = dataclasses.replace(processor.config.decoder, eos_token_id=stop, stop_token_ids=(508,))
    processor = Processor.small(dataclasses.replace(processor.config, decoder=decoder))
    assert generate(None, processor, "what?") == processor.decode(answer.ids[1:2]).strip() != "a circle"
    assert answer.settings["eos_id"] == (stop, 508)


@pytest.mark.parametrize(("mode", "token"), [("think", "think_id"), ("nothink", "nothink_id")])
def test_generate_mode_begins_answer(asked, mode, token):
    processor, answer = asked
    generate(None, processor, "what?", mode=mode)
    tokens = answer.batch.tokens[0][answer.batch.segment_ids[0] > 0]
    assert tokens[-1] == getattr(processor.tokenizer, token)


def test_generate_drops_ids_beyond_tokenizer(asked):
    processor, answer = asked
    answer.ids = [*answer.ids[:2], 600, *answer.ids[2:]]
    assert generate(None, processor, "what?") == "a circle"


def test_generate_rejects_what_does_not_fit(asked):
    processor, _ = asked
    with pytest.raises(ValueError, match="2 prompts but 1 lists of images"):
        generate(None, processor, ["a", "b"], images=[[]])
    with pytest.raises(ValueError, match="512 positions"):
        generate(None, processor, "a", max_new_tokens=510)
