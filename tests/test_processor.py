"""Encoding messages with images, however the images are given; saving, reading and comparing processors."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.images.layout import with_layout
from phivision_jax.images.naflex import preprocess
from phivision_jax.processor import Processor
from phivision_jax.rows import batch_from_ids
from phivision_jax.text import chat
from phivision_jax.text.constants import IGNORE, PromptMode
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import Tokenizer
from tests.support import image_layouts  # noqa: F401  registers layouts

GOLDEN = Path(__file__).parent / "golden" / "pixels"
PNG = GOLDEN / "noise_37x91.png"
CONFIG = ModelConfig(
    decoder=DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509),
    min_patches=4,
    max_patches=64,
)
PROCESSOR = Processor.small(CONFIG)


def ask(*images: Any, text: str = "what shape?") -> list[dict[str, Any]]:
    parts = [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    "source", [PNG, str(PNG), PNG.read_bytes(), Image.open(PNG)], ids=["path", "str", "bytes", "pil"]
)
def test_encode_takes_every_image_source(source: Any) -> None:
    inline = PROCESSOR.encode(ask(source))
    in_order = PROCESSOR.encode(ask(None), [source])
    as_string = PROCESSOR.encode([{"role": "user", "content": "<image>\nwhat shape?"}], [source])
    patches, grid = preprocess(Image.open(PNG), 16, 4, 64)
    for example in (inline, in_order, as_string):
        assert example.images[0].grids == (grid,) == ((5, 2),)
        np.testing.assert_array_equal(example.images[0].patches, patches)
        np.testing.assert_array_equal(example.tokens, inline.tokens)


def test_encode_orders_images() -> None:
    shapes = [Image.new("RGB", (16 * n, 16), "red") for n in (4, 5, 6)]
    example = PROCESSOR.encode(ask(None, shapes[1], None), [shapes[0], shapes[2]])
    assert [image.grids for image in example.images] == [((1, 4),), ((1, 5),), ((1, 6),)]
    assert list(np.diff(example.image_starts)) == [4 + 1, 5 + 1]  # its tokens and a line break


def test_encode_training_example_by_hand() -> None:
    messages = [*ask(Image.new("RGB", (32, 32))), {"role": "assistant", "content": "circle"}]
    example = PROCESSOR.encode(messages, mode="nothink", group=3)
    tokenizer = PROCESSOR.tokenizer
    learned = example.labels[example.labels != IGNORE].tolist()
    assert learned == [tokenizer.nothink_id, *tokenizer.encode("circle"), tokenizer.eos_id]
    assert example.tokens[-3:].tolist() == learned
    assert example.image_starts == (3,) and example.num_patches == 4 and example.group == 3
    assert PROCESSOR.decode(learned) == "circle"


def test_batch_for_a_loss_infers_modes() -> None:
    question = {"role": "user", "content": "what shape?"}
    plain = [question, {"role": "assistant", "content": "circle"}]
    thinking = [*plain, question, {"role": "assistant", "content": "<think>red</think>circle"}]
    blank = [question, {"role": "assistant", "content": "<think>\n</think>\ncircle"}]
    found = PROCESSOR.batch([plain, thinking, blank], generation_prompt=False)
    stated = [
        PROCESSOR.batch([c], generation_prompt=False, mode=m) for c, m in ((plain, "nothink"), (thinking, "think"))
    ]
    for row, batch in zip((0, 1, 2), (*stated, stated[0]), strict=True):
        length = batch.tokens.shape[1]
        np.testing.assert_array_equal(found.tokens[row, :length], batch.tokens[0])
        np.testing.assert_array_equal(found.loss_weights[row, :length], batch.loss_weights[0])
        assert batch.loss_weights.any() and PROCESSOR.tokenizer.nothink_id in batch.tokens
    with pytest.raises(ValueError, match="conversation 0: message 1 is an answer, but the model is to answer next"):
        PROCESSOR.batch([plain])


def test_batch_of_conversations() -> None:
    image = Image.open(PNG)
    conversations = [ask(image), ask(text="is red a color?"), ask(None, None)]
    batch = PROCESSOR.batch(conversations, [[], [], [image, image]], mode="think")
    examples = [
        PROCESSOR.encode(c, i, mode="think", generation_prompt=True)
        for c, i in zip(conversations, [[], [], [image, image]], strict=True)
    ]
    assert batch.tokens.shape == (3, max(len(e.tokens) for e in examples))
    assert batch.patches.shape == (3, 1, 20, 768)
    assert [(row >= 0).sum() for row in batch.vision_index] == [10, 0, 20]
    assert [(row > 0).sum() for row in batch.segment_ids] == [len(e.tokens) for e in examples]
    for row, example in zip(batch.tokens, examples, strict=True):
        assert row[len(example.tokens) - 1] == PROCESSOR.tokenizer.think_id
    assert not batch.loss_weights.any()
    wider = PROCESSOR.batch(conversations[:1], multiple=128)
    assert wider.tokens.shape == (1, 128) and wider.patches.shape == (1, 1, 128, 768)


def test_batch_equals_batch_from_ids() -> None:
    image = Image.open(PNG)
    ours = PROCESSOR.batch([ask(image)])
    t = PROCESSOR.tokenizer.encode
    ids = [*t("<|im_start|>user<|im_sep|>"), -200, *t("\nwhat shape?<|im_end|><|im_start|>assistant<|im_sep|>")]
    plain = batch_from_ids([ids], [[image]], config=CONFIG)
    for mine, theirs in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_errors_name_conversation_and_image(tmp_path: Path) -> None:
    image = Image.open(PNG)
    (tmp_path / "empty.png").write_bytes(b"")
    one_not_many: Any = ask(image)
    for call, reason in [
        (lambda: PROCESSOR.batch([ask(image), ask(b"")]), r"^conversation 1: image 0 is empty"),
        (lambda: PROCESSOR.encode(ask(image, b"GIF8")), r"^image 1 is not an image"),
        (lambda: PROCESSOR.encode(ask(tmp_path / "empty.png")), r"empty\.png is empty"),
        (lambda: PROCESSOR.encode(ask(image, Image.new("RGB", (0, 9)))), "^image 1: an image of 0x9 pixels has no"),
        (lambda: PROCESSOR.encode(ask(None)), "1 <image> markers without an image of their own, but 0 images given"),
        (lambda: PROCESSOR.encode(ask(image), [image]), "0 <image> markers without an image of their own, but 1"),
        (lambda: PROCESSOR.batch([ask(image)], [[], []]), "1 conversations but 2 lists of images"),
        (lambda: PROCESSOR.batch([]), "at least one example"),
        (lambda: PROCESSOR.batch(one_not_many), "^conversation 0: a conversation is a non-empty list"),
        (lambda: batch_from_ids([[1] * 9], config=CONFIG, length=8), "do not fit length 8"),
    ]:
        with pytest.raises(ValueError, match=reason):
            call()


def test_encode_turns_files_but_not_edited_images() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (64, 16)).save(file, "JPEG", exif=exif)
    assert PROCESSOR.encode(ask(file.getvalue())).images[0].grids == ((4, 1),)
    assert PROCESSOR.encode(ask(Image.open(file))).images[0].grids == ((4, 1),)
    assert PROCESSOR.encode(ask(Image.open(file).convert("RGB"))).images[0].grids == ((1, 4),)


def test_save_and_from_directory(tmp_path: Path) -> None:
    PROCESSOR.save(tmp_path / "assets")
    again = Processor.from_directory(tmp_path / "assets", CONFIG)
    assert again.fingerprint == PROCESSOR.fingerprint
    assert again.encode(ask(text="a")).tokens.tolist() == PROCESSOR.encode(ask(text="a")).tokens.tolist()


def test_prompts_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones that are plain; each mode, and a message with another field, is another prompt."""
    processor, encoded = Processor.small(CONFIG), []
    encode = chat.encode
    monkeypatch.setattr(chat, "encode", lambda *args, **kinds: (encoded.append(1), encode(*args, **kinds))[1])
    parts = [{"type": "image"}, {"type": "text", "text": "what shape?"}]
    for messages in ([{"role": "user", "content": parts}], [{"role": "user", "content": "<image>\nwhat shape?"}]):
        for mode in get_args(PromptMode):
            ids = processor.tokenize_prompt(messages, mode)
            want = encode(processor.tokenizer, processor.template, messages, mode=mode, generation_prompt=True)[0]
            assert ids.tolist() == want and ids.dtype == np.int32
            with pytest.raises(ValueError, match="read-only"):
                ids[0] = 0
    assert len(encoded) == 3
    for messages in (
        [{"role": "user", "content": "what shape?", "weight": 1}],
        [{"role": "user", "content": "a " * 1001}],
    ):
        for _ in range(2):
            processor.tokenize_prompt(messages)
    assert len(encoded) == 7


def test_processor_pickles() -> None:
    PROCESSOR.tokenize_prompt(ask(text="a"))  # with a prompt that is kept
    again = pickle.loads(pickle.dumps(PROCESSOR))
    assert again.fingerprint == PROCESSOR.fingerprint
    assert again.encode(ask(text="a")).tokens.tolist() == PROCESSOR.encode(ask(text="a")).tokens.tolist()


def test_processor_with_a_layout_of_ones_own_pickles_for_other_processes(tmp_path: Path) -> None:
    """Loading the processor imports the module of its layout."""
    (tmp_path / "processor").write_bytes(pickle.dumps(Processor.small(with_layout(CONFIG, "thumbnail"))))
    load = f"import pickle; print(pickle.load(open({str(tmp_path / 'processor')!r}, 'rb')).layout.name)"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "thumbnail\n", done.stderr


def test_fingerprint_covers_each_part() -> None:
    tokenizer, template = Tokenizer.small(), ChatTemplate.small()
    others = [
        Processor(None, template, CONFIG),
        Processor(tokenizer, None, CONFIG),
        Processor(tokenizer, ChatTemplate("x"), CONFIG),
        Processor(tokenizer, template, dataclasses.replace(CONFIG, min_patches=5)),
        Processor(tokenizer, template, dataclasses.replace(CONFIG, max_patches=65)),
        Processor(
            tokenizer, template, dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, patch_size=14))
        ),
    ]
    assert len({p.fingerprint for p in [PROCESSOR, *others]}) == 7


def test_from_directory_without_text_files(tmp_path: Path) -> None:
    processor = Processor.from_directory(tmp_path, CONFIG)
    assert processor.patch(PNG).grids == ((5, 2),)
    with pytest.raises(ValueError, match=r"came without tokenizer\.json"):
        processor.encode(ask(text="a"))
    Tokenizer.small().save(tmp_path)
    with pytest.raises(ValueError, match=r"came without chat_template\.jinja"):
        Processor.from_directory(tmp_path, CONFIG).batch([ask(text="a")])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_num_patches", 5),
        ("max_num_patches", 3600),
        ("patch_size", 14),
        ("resample", 3),
        ("image_mean", [0.4, 0.5, 0.5]),
    ],
)
def test_from_directory_rejects_other_pixels(key: str, value: Any, tmp_path: Path) -> None:
    agreeing = {"min_num_patches": 4, "max_num_patches": 64, "patch_size": 16, "resample": 2, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(agreeing))
    Processor.from_directory(tmp_path, CONFIG)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(agreeing | {key: value}))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {key} is"):
        Processor.from_directory(tmp_path, CONFIG)


def test_processor_rejects_other_tokenizer() -> None:
    small = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=510))
    with pytest.raises(ValueError, match="512 tokens, the model 510"):
        Processor.small(small)
    other_end = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, eos_token_id=7))
    with pytest.raises(ValueError, match="eos_token_id is 7"):
        Processor.small(other_end)
