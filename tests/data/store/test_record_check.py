"""The check of records: a size or a reason for any record, never a crash."""

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
from phivision_jax.data import image_check
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import Record
from phivision_jax.data.store.record_check import check_record, count_text_tokens
from phivision_jax.images.decode import image_size, open_image
from phivision_jax.processor import Processor
from phivision_jax.text.chat import UnmarkedTemplateError
from phivision_jax.text.template import ChatTemplate
from phivision_jax.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.records import CONFIG, make_record, png

DOCUMENTED = (ROOT / "docs" / "data.md").read_text()


def encoded(mode: str = "RGB", size: tuple[int, int] = (24, 16), format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, None).save(file, format, **options)
    return file.getvalue()


def answered(*answers: str, **fields: Any) -> Record:
    messages = [m for a in answers for m in ({"role": "user", "content": "a"}, {"role": "assistant", "content": a})]
    return make_record(0, (), **{"messages": tuple(messages), "mode": None} | fields)


def with_image(image: bytes) -> Record:
    return make_record(0, images=(image,))


def measure_record(record: Record, processor: Processor, *, decode: bool) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Text tokens and image sizes."""
    sizes = check_record(record, decode=decode)
    return count_text_tokens(record, processor), sizes


def reason(record: Record, processor: Processor, *, decode: bool = False) -> str:
    with pytest.raises(BadRecord) as raised:
        measure_record(record, processor, decode=decode)
    assert f"`{raised.value.reason}`" in DOCUMENTED and str(raised.value)
    return raised.value.reason


def test_measure_record_by_hand(processor):
    record = make_record(3, ((24, 16), (64, 8)))
    example = processor.encode(record.messages, record.images, mode="nothink")
    assert measure_record(record, processor, decode=True) == measure_record(record, processor, decode=False)
    assert measure_record(record, processor, decode=True) == (
        len(example.tokens) - example.num_patches,
        ((24, 16), (64, 8)),
    )


def test_measure_record_sizes_are_upright(processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = with_image(encoded(format="JPEG", exif=exif))
    assert measure_record(turned, processor, decode=True)[1] == ((16, 24),)


@pytest.mark.parametrize(
    "record, expected",
    [
        (make_record(0, (), messages=({"role": "user", "content": "a"},)), "empty-answer"),
        (answered(""), "empty-answer"),
        (answered(" \n"), "empty-answer"),
        (answered("yes", ""), "empty-answer"),
        (answered("<|dummy_84|> "), "empty-answer"),
        (answered("<think>red</think>\n"), "empty-answer"),
        (answered("<think>a</think>b", "<think>c</think>"), "empty-answer"),
        (answered("<image>", images=(png(8, 8),)), "empty-answer"),
        (make_record(0, (), messages=({"role": "bot", "content": "a"},)), "role"),
        (make_record(0, (), messages=({"content": "a"},)), "fields"),
        (make_record(0, (), messages=({"role": "user", "content": None},)), "fields"),
        (make_record(0, images=()), "image-count"),
        (make_record(0, (), images=(png(8, 8),)), "image-count"),
        (answered("yes", mode="think"), "mode"),
        (answered("<think>a", mode=None), "mode"),
        (answered("<think>a</think>b</think>c"), "mode"),
        (answered("<think>a</think>b", mode="nothink"), "mode"),
        (answered("write </think>"), "mode"),
        (answered("write <think>", mode="nothink"), "mode"),
        (answered("<think>a</think>b", "and </think>"), "mode"),
        (answered("yes", messages=({"role": "assistant", "content": "b", "weight": 0},)), "empty-answer"),
        (answered("yes", messages=({"role": "assistant", "content": "b", "weight": 0.5},)), "fields"),
        (answered("yes<|im_end|>"), "control-token"),
        (answered("yes", messages=({"role": "user", "content": "<|dummy_84|>"}, {"role": "assistant", "content": "b"})),
         "control-token"),
        (answered("\udc80"), "encoding"),
        (answered("yes", id="\ud800"), "encoding"),
        (answered("yes", source="\ud800"), "encoding"),
        (answered("yes", metadata={"a": ["\ud800"]}), "encoding"),
        (answered("yes", metadata={1: "a"}), "fields"),
        (answered("yes", metadata={"a": 2**64}), "fields"),
        (answered("yes", metadata={"a": object()}), "fields"),
        (answered("yes " * 40_000), "too-long"),
        (with_image(b""), "image-broken"),
        (with_image(b"GIF"), "image-broken"),
        (with_image(b"<html>not found</html>"), "image-broken"),
        (with_image(png(24, 16)[:20]), "image-broken"),
        (with_image(encoded(size=(1, 32_769))), "image-size"),
        (with_image(encoded(size=(60_000, 2))), "image-size"),
    ],
)  # fmt: skip
def test_measure_record_reasons(processor, record, expected):
    assert reason(record, processor) == expected
    assert reason(record, processor, decode=True) == expected


def test_measure_record_accepts_unusual_records(processor):
    for record in (
        answered("yes", "<think>a</think>b"),
        answered("<|dummy_84|>yes"),
        answered(
            "yes", messages=({"role": "user", "content": "what is </think>?"}, {"role": "assistant", "content": "b"})
        ),
        answered("yes", messages=(*answered("no").messages, {"role": "assistant", "content": "b", "weight": 0})),
        answered("yes", metadata={"a": [1, {"b": None}], "c": b"\xff"}),
        make_record(0, (), messages=({"role": "assistant", "content": "caption"},)),
        with_image(encoded("CMYK", format="JPEG")),
        with_image(encoded("1")),
        with_image(encoded(size=(32_768, 1))),
        with_image(encoded(size=(1, 1), format="GIF")),
    ):
        measure_record(record, processor, decode=True)


def test_measure_record_decode_finds_broken_pixels(processor):
    truncated, corrupt = png(24, 16)[:-100], bytearray(png(24, 16))
    corrupt[corrupt.index(b"IDAT") + 10] ^= 255
    for image in (truncated, bytes(corrupt)):
        assert measure_record(with_image(image), processor, decode=False)[1] == ((24, 16),)
        assert reason(with_image(image), processor, decode=True) == "image-broken"


def test_measure_record_never_decodes_bomb(processor):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert reason(with_image(bomb + png(8, 8)[33:]), processor, decode=True) == "image-size"


def test_count_text_tokens_limit_is_max_positions(processor):
    decoder = CONFIG.decoder
    record = answered("yes " * 20)
    tokens = count_text_tokens(record, processor)
    for positions, fits in ((tokens, True), (tokens - 1, False)):
        config = ModelConfig(
            **{**vars(CONFIG), "decoder": type(decoder)(**{**vars(decoder), "max_positions": positions})}
        )
        if fits:
            assert count_text_tokens(record, Processor.small(config)) == tokens
        else:
            assert reason(record, Processor.small(config)) == "too-long"


def test_count_text_tokens_does_not_tokenize_huge_text(processor, monkeypatch):
    def tokenize(self: Tokenizer, text: str) -> Any:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode_with_offsets", tokenize)
    assert reason(answered("x" * 50_000_000), processor) == "too-long"


def test_count_text_tokens_template_drops_image(processor):
    source = (
        "{% for m in messages if m.role != 'system' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    dropping = Processor(processor.tokenizer, ChatTemplate(source), CONFIG)
    messages = ({"role": "system", "content": "<image>"}, {"role": "assistant", "content": "a"})
    assert reason(make_record(0, ((8, 8),), messages=messages), dropping) == "image-count"


def test_count_text_tokens_template_errors(processor):
    strict = Processor(processor.tokenizer, ChatTemplate("{{ raise_exception('users first') }}"), CONFIG)
    assert reason(answered("a"), strict) == "fields"
    unmarked = Processor(processor.tokenizer, ChatTemplate("{{ messages[0].content }}"), CONFIG)
    with pytest.raises(UnmarkedTemplateError, match="marks no assistant text"):
        measure_record(answered("a"), unmarked, decode=False)


def test_check_record_needs_no_processor():
    assert check_record(make_record(0, ((24, 16), (64, 8))), decode=True) == ((24, 16), (64, 8))
    for bad, expected in ((make_record(0, images=()), "image-count"), (with_image(b"GIF"), "image-broken")):
        with pytest.raises(BadRecord) as raised:
            check_record(bad, decode=False)
        assert raised.value.reason == expected


# Small files of every format that is common in data sets, to be damaged.
INTACT = [
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
            lambda intact, start, new, end: (
                intact[: start % len(intact)] + new + intact[start % len(intact) + len(new) :]
            )[: end or None],
            st.sampled_from(INTACT),
            st.integers(0, 5_000),
            st.binary(max_size=8),
            st.integers(0, 300),
        ),
    )
)
@pytest.mark.filterwarnings("ignore")
def test_measure_record_any_image_bytes(processor, image):
    try:
        sizes = measure_record(with_image(image), processor, decode=True)[1]
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
def test_measure_record_any_messages(processor, messages):
    record = make_record(0, (), mode=None, messages=tuple(messages))
    try:
        tokens = measure_record(record, processor, decode=True)[0]
    except BadRecord as bad:
        assert bad.reason in ("role", "encoding", "empty-answer", "image-count", "mode", "control-token")
    else:
        assert Record.from_bytes(record.to_bytes()) == record and tokens > 0


def test_check_record_os_error_of_decoder_is_broken_image(processor, monkeypatch):
    def fail(*args):
        raise OSError("unrecognized data stream contents")

    monkeypatch.setattr(image_check, "image_size", fail)
    assert reason(with_image(png(8, 8)), processor) == "image-broken"
