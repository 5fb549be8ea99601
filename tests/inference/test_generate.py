"""Generation against repeated forward passes of one prompt, without cache and padding."""

import dataclasses
import io

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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1.0, float("nan"), float("inf"), "0.5", None, True, [0.5], 1j)),
        *(("top_p", value) for value in (0.0, 1.5, -0.1, float("nan"), "1")),
        *(("max_new_tokens", value) for value in (0, -3, 6.5, True, "6", float("inf"), None)),
        *(("seed", value) for value in (0.5, "0", 2**63, float("nan"), None)),
    ],
)
def test_generate_ids_rejects_settings(tiny, name, value):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    with pytest.raises(ValueError, match=rf"^{name} must be an? (integer|number) .*, not "):
        generate_ids(tiny, batch, **{"max_new_tokens": 2, "eos_id": None, name: value})


def test_generate_ids_takes_numbers_of_other_types(tiny):
    batch = batch_from_ids([[1, 2, 3]], config=tiny.config)
    want = generate_ids(tiny, batch, max_new_tokens=3, eos_id=None, temperature=0.5, seed=7)
    others = {"max_new_tokens": 3.0, "temperature": np.float32(0.5), "seed": np.int64(7), "top_p": 1}
    assert generate_ids(tiny, batch, eos_id=None, **others).tolist() == want.tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e30])
def test_sample_at_extreme_temperatures(temperature):
    logits = jnp.asarray([[-30.0, 10.0, 80.0, 5.0]] * 64)
    found = np.asarray(sample(logits, jax.random.key(0), temperature=temperature))
    assert len(set(found.tolist())) == (4 if temperature > 1 else 1) and (found >= 0).all()
    assert temperature > 1 or found[0] == 2


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


def test_generate_takes_every_form_of_images(asked, tmp_path):
    processor, answer = asked
    photo, file = image((4, 4), 0), io.BytesIO()
    photo.save(file, "PNG")
    (tmp_path / "photo.png").write_bytes(file.getvalue())

    def tokens(prompt, images):
        generate(None, processor, prompt, images)
        return answer.batch.tokens.tolist(), answer.batch.patches.tolist()

    want = tokens("what?", [photo])
    path = str(tmp_path / "photo.png")
    for images in (
        photo,
        path,
        tmp_path / "photo.png",
        file,
        file.getvalue(),
        np.asarray(photo),
        (path,),
        {"url": path},
    ):
        assert tokens("what?", images) == want
    assert tokens({"role": "user", "content": "what?"}, path) == want
    assert tokens([{"role": "user", "content": "what?"}], path) == want
    assert tokens({"role": "user", "content": "<image>\nwhat?"}, path) == want
    for part in ({"type": "image", "url": path}, {"type": "input_image", "image_url": f"file://{path}"}):
        assert tokens({"role": "user", "content": [part, {"type": "text", "text": "what?"}]}, None) == want
    assert tokens(["what?", "else?"], [path, None]) == tokens(["what?", "else?"], [[photo], []])


def test_generate_default_leaves_thoughts_room(asked):
    """4,096 new tokens, here those that a prompt leaves of 512 positions."""
    processor, answer = asked
    generate(None, processor, "what?")
    used = int((answer.batch.segment_ids > 0).sum())
    assert answer.settings["max_new_tokens"] == 512 - used
    processor.config = dataclasses.replace(
        processor.config, decoder=dataclasses.replace(processor.config.decoder, max_positions=32_768)
    )
    generate(None, processor, "what?")
    assert answer.settings["max_new_tokens"] == 4096


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (None, None, "a prompt is a question, or a list of messages or of prompts, not None"),
        ([], None, "not \\[\\]"),
        (5, None, "not 5"),
        ([5], None, "message 0 is not a dict with role and content"),
        ({"content": "what?"}, None, "message 0 is not a dict with role and content"),
        ("what?", 5, "image 0 is given as int: give a path, bytes, a PIL image or a uint8 array"),
        ("what?", np.zeros((3, 8, 8), np.float32), r"image 0 is an array \(3, 8, 8\) of float32"),
        (["a", "b"], "photo.jpg", "2 prompts but 1 lists of images"),
    ],
)
def test_generate_rejects_other_forms(asked, prompt, images, message):
    with pytest.raises(ValueError, match=message):
        generate(None, asked[0], prompt, images)


def test_generate_rejects_what_does_not_fit(asked):
    processor, _ = asked
    with pytest.raises(ValueError, match="2 prompts but 1 lists of images"):
        generate(None, processor, ["a", "b"], images=[[]])
    with pytest.raises(ValueError, match="512 positions"):
        generate(None, processor, "a", max_new_tokens=510)
