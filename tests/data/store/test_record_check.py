"""What of a record can be trained on, and why not; on any bytes whatever, never a crash."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phivision_jax.config import ModelConfig
from phivision_jax.data.quarantine import REASONS, BadRecord
from phivision_jax.data.records import Record
from phivision_jax.data.store import record_check
from phivision_jax.data.store.record_check import Measured, count_text_tokens, measure, with_bytes
from phivision_jax.images.decode import image_size, open_image
from phivision_jax.processor import Processor
from phivision_jax.text.chat import UnmarkedTemplateError
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.records import CONFIG, make_record, png


def encoded(mode: str = "RGB", size: tuple[int, int] = (24, 16), format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, None).save(file, format, **options)
    return file.getvalue()


def said(*answers: str, **fields: Any) -> Record:
    messages = [m for a in answers for m in ({"role": "user", "content": "a"}, {"role": "assistant", "content": a})]
    return make_record(0, (), **{"messages": tuple(messages), "mode": None} | fields)


def with_image(image: bytes | str) -> Record:
    return make_record(0, images=(image,))


def reason(record: Record, processor: Processor, *, decode: bool = False) -> str:
    with pytest.raises(BadRecord) as raised:
        measure(record, processor, decode=decode)
    assert raised.value.reason in REASONS and str(raised.value)
    return raised.value.reason


def test_a_measured_record(processor):
    record = make_record(3, ((24, 16), (64, 8)))
    example = processor.encode(record.messages, record.images, mode="nothink")
    assert measure(record, processor, decode=True) == measure(record, processor, decode=False)
    assert measure(record, processor, decode=True) == Measured(
        len(example.tokens) - example.num_patches, ((24, 16), (64, 8))
    )


def test_sizes_are_upright(processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = with_image(encoded(format="JPEG", exif=exif))
    assert measure(turned, processor, decode=True).image_sizes == ((16, 24),)


@pytest.mark.parametrize(
    "record, expected",
    [
        (make_record(0, (), messages=({"role": "user", "content": "a"},)), "empty-answer"),
        (said(""), "empty-answer"),
        (said(" \n"), "empty-answer"),
        (said("yes", ""), "empty-answer"),
        (said("<|dummy_84|> "), "empty-answer"),
        (said("<think>red</think>\n"), "empty-answer"),
        (said("<think>a</think>b", "<think>c</think>"), "empty-answer"),
        (said("<image>", images=(png(8, 8),)), "empty-answer"),
        (make_record(0, (), messages=({"role": "bot", "content": "a"},)), "role"),
        (make_record(0, (), messages=({"content": "a"},)), "role"),
        (make_record(0, (), messages=({"role": "user", "content": None},)), "fields"),
        (make_record(0, images=()), "image-count"),
        (make_record(0, (), images=(png(8, 8),)), "image-count"),
        (said("yes", mode="think"), "mode"),
        (said("<think>a", mode=None), "mode"),
        (said("<think>a</think>b</think>c"), "mode"),
        (said("<think>a</think>b", mode="nothink"), "mode"),
        (said("write </think>"), "mode"),
        (said("write <think>", mode="nothink"), "mode"),
        (said("<think>a</think>b", "and </think>"), "mode"),
        (said("yes", messages=({"role": "assistant", "content": "b", "weight": 0},)), "empty-answer"),
        (said("yes", messages=({"role": "assistant", "content": "b", "weight": 0.5},)), "fields"),
        (said("yes<|im_end|>"), "control-token"),
        (said("yes", messages=({"role": "user", "content": "<|dummy_84|>"}, {"role": "assistant", "content": "b"})),
         "control-token"),
        (said("\udc80"), "encoding"),
        (said("yes", id="\ud800"), "encoding"),
        (said("yes", source="\ud800"), "encoding"),
        (said("yes", metadata={"a": ["\ud800"]}), "encoding"),
        (said("yes", metadata={1: "a"}), "fields"),
        (said("yes", metadata={"a": 2**64}), "fields"),
        (said("yes", metadata={"a": object()}), "fields"),
        (said("yes " * 40_000), "too-long"),
        (with_image(b""), "image-broken"),
        (with_image(b"GIF"), "image-broken"),
        (with_image(b"<html>not found</html>"), "image-broken"),
        (with_image(png(24, 16)[:20]), "image-broken"),
        (with_image(encoded(size=(1, 32_769))), "image-size"),
        (with_image(encoded(size=(60_000, 2))), "image-size"),
    ],
)  # fmt: skip
def test_reasons(processor, record, expected):
    assert reason(record, processor) == expected
    assert reason(record, processor, decode=True) == expected


def test_what_is_good_however_odd(processor):
    for record in (
        said("yes", "<think>a</think>b"),
        said("<|dummy_84|>yes"),
        said("yes", messages=({"role": "user", "content": "what is </think>?"}, {"role": "assistant", "content": "b"})),
        said("yes", messages=(*said("no").messages, {"role": "assistant", "content": "b", "weight": 0})),
        said("yes", metadata={"a": [1, {"b": None}], "c": b"\xff"}),
        make_record(0, (), messages=({"role": "assistant", "content": "caption"},)),
        with_image(encoded("CMYK", format="JPEG")),
        with_image(encoded("1")),
        with_image(encoded(size=(32_768, 1))),
        with_image(encoded(size=(1, 1), format="GIF")),
    ):
        measure(record, processor, decode=True)


def test_what_only_decoding_shows(processor):
    truncated, sound = png(24, 16)[:-100], png(24, 16)
    at = sound.index(b"IDAT") + 10
    corrupt = sound[:at] + bytes([sound[at] ^ 255]) + sound[at + 1 :]
    for image in (truncated, corrupt):
        assert measure(with_image(image), processor, decode=False).image_sizes == ((24, 16),)
        assert reason(with_image(image), processor, decode=True) == "image-broken"


def test_a_decompression_bomb_is_never_decoded(processor):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert reason(with_image(bomb + png(8, 8)[33:]), processor, decode=True) == "image-size"


def test_the_limit_of_tokens_is_the_models(processor):
    decoder = CONFIG.decoder
    record = said("yes " * 20)
    tokens = count_text_tokens(record, processor)
    for positions, fits in ((tokens, True), (tokens - 1, False)):
        config = ModelConfig(
            **{**vars(CONFIG), "decoder": type(decoder)(**{**vars(decoder), "max_positions": positions})}
        )
        if fits:
            assert count_text_tokens(record, Processor.small(config)) == tokens
        else:
            assert reason(record, Processor.small(config)) == "too-long"


def test_absurd_lengths_are_not_tokenised(processor, monkeypatch):
    def tokenise(self: Tokenizer, text: str) -> Any:
        raise AssertionError("tokenised")

    monkeypatch.setattr(Tokenizer, "encode_with_offsets", tokenise)
    assert reason(said("x" * 50_000_000), processor) == "too-long"


def test_a_template_that_drops_an_image(processor):
    source = (
        "{% for m in messages if m.role != 'system' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    dropping = Processor(processor.tokenizer, ChatTemplate(source), CONFIG)
    messages = ({"role": "system", "content": "<image>"}, {"role": "assistant", "content": "a"})
    assert reason(make_record(0, ((8, 8),), messages=messages), dropping) == "image-count"


def test_what_is_wrong_with_a_template_is_not_the_records_fault(processor):
    strict = Processor(processor.tokenizer, ChatTemplate("{{ raise_exception('users first') }}"), CONFIG)
    assert reason(said("a"), strict) == "fields"
    unmarked = Processor(processor.tokenizer, ChatTemplate("{{ messages[0].content }}"), CONFIG)
    with pytest.raises(UnmarkedTemplateError, match="marks no assistant text"):
        measure(said("a"), unmarked, decode=False)


def test_paths(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(24, 16))
    assert with_bytes(with_image(str(tmp_path / "a.png"))).images == (png(24, 16),)
    assert measure(with_image(str(tmp_path / "a.png")), processor, decode=True).image_sizes == ((24, 16),)
    with pytest.raises(BadRecord, match=r"no file .*b\.png") as raised:
        with_bytes(with_image(str(tmp_path / "b.png")))
    assert raised.value.reason == "image-missing"
    with pytest.raises(IsADirectoryError):
        with_bytes(with_image(str(tmp_path)))


# Small files of every kind that is common in data sets, to be damaged.
SOUND = [
    png(24, 16),
    encoded(format="JPEG", size=(40, 30)),
    encoded("P", format="GIF"),
    encoded(format="WEBP"),
    encoded("RGBA", format="TIFF"),
    encoded(format="BMP"),
    encoded("RGBA", format="ICO"),
    encoded("LA"),
    encoded("I;16"),
    encoded(format="PPM"),
    encoded(format="TIFF", compression="tiff_lzw"),
]


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda sound, at, new, cut: (sound[: at % len(sound)] + new + sound[at % len(sound) + len(new) :])[
                : cut or None
            ],
            st.sampled_from(SOUND),
            st.integers(0, 5_000),
            st.binary(max_size=8),
            st.integers(0, 300),
        ),
    )
)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_measured_or_bad(processor, image):
    try:
        sizes = measure(with_image(image), processor, decode=True).image_sizes
    except BadRecord as bad:
        assert bad.reason in ("image-broken", "image-size")
    else:
        assert sizes == (image_size(image),) == (open_image(image).size,)


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            lambda role, parts: {"role": role, "content": "".join(parts)},
            st.sampled_from(["user", "assistant", "system", "tool"]),
            st.lists(
                st.one_of(
                    st.sampled_from(["<think>", "</think>", "<|dummy_84|>", "<image>", "<|im_end|>", " "]),
                    st.text(st.characters(), max_size=5),
                ),
                max_size=5,
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_messages_are_measured_or_bad(processor, messages):
    record = make_record(0, (), mode=None, messages=tuple(messages))
    try:
        tokens = measure(record, processor, decode=True).text_tokens
    except BadRecord as bad:
        assert bad.reason in ("role", "encoding", "empty-answer", "image-count", "mode", "control-token")
    else:
        assert Record.from_bytes(record.to_bytes()) == record and tokens > 0


def test_an_os_error_of_a_decoder_is_the_images_that_of_a_file_is_not(processor, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(record_check, "image_size", fail)
    assert reason(with_image(png(8, 8)), processor) == "image-broken"
    with pytest.raises(OSError, match="Input/output"):
        measure(with_image("a.png"), processor, decode=False)
