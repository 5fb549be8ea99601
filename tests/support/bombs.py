"""Files that are small on disk and large in memory, beside good records: ``python -m tests.support.bombs OUT``.

Writes OUT/lines, OUT/array, OUT/parquet and OUT/payloads, sources of one format each, whose images are in OUT/images.
Every id of a good record begins with "good"; "large" are sound images that just fit; all others are bombs.
"""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image


def deflated(length: int, start: bytes = b"") -> bytes:
    """Zeros after a beginning, compressed without ever being in memory."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    pieces = [packer.compress(start)]
    pieces += [packer.compress(block[: min(len(block), length - done)]) for done in range(0, length, len(block))]
    return b"".join([*pieces, packer.flush()])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 6, extra: bytes = b"", late: bytes = b"") -> bytes:
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = deflated((-(-width * bits // 8) + 1) * height)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), late, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, height: int, bits: int, kind: int, tile: tuple[int, int] | None = None) -> bytes:
    """One strip, or one tile of another size than the image; deflated."""
    columns, rows = tile or (width, height)
    data = deflated(columns * rows * bits // 8)
    place = (
        [(324, 8), (325, len(data)), (322, columns), (323, rows)]
        if tile
        else [(273, 8), (278, height), (279, len(data))]
    )
    tags = [(256, width), (257, height), (258, bits), (259, 8), (262, 1), (277, 1), (339, kind), *place]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def ico(png_file: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png_file), 22) + png_file


def images() -> Iterator[tuple[str, bytes]]:
    small, text = Image.new("RGB", (40, 30), "red"), b"Comment\0\0"
    yield "good.png", encoded(small, "PNG")
    for name, kind, data in (
        ("ztxt", b"zTXt", text + deflated(2**30)),
        ("itxt", b"iTXt", b"Comment\0\1\0\0\0" + deflated(2**28)),
        ("text", b"tEXt", b"Comment\0" + b"x" * (40 * 2**20)),
        ("iccp", b"iCCP", b"icc\0\0" + deflated(2**28)),
    ):
        yield f"good-{name}.png", png(40, 30, extra=chunk(kind, data))
        yield f"good-late-{name}.png", png(40, 30, late=chunk(kind, data))
    yield "good-texts.png", png(40, 30, extra=chunk(b"zTXt", text + deflated(2**20 - 9)) * 80)
    yield "good-frames.gif", encoded(small, "GIF", save_all=True, append_images=[small.rotate(k) for k in range(300)])
    yield "good-frames.png", encoded(small, "PNG", save_all=True, append_images=[small.rotate(k) for k in range(99)])
    yield (
        "good-loop.jpg",
        encoded(small, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"),
    )
    yield "large-rgba.png", png(11_000, 11_000)
    yield "large-16.png", png(11_000, 11_000, depth=16, colour=4)
    yield "large-1.png", png(11_000, 11_000, depth=1, colour=0)
    yield "bomb-60000.png", png(60_000, 60_000, depth=1, colour=0)
    yield "bomb-13000.png", png(13_000, 13_000)
    yield "bomb-float.tif", tiff(13_300, 13_300, 32, 3)
    yield "bomb-int.tif", tiff(13_300, 13_300, 32, 1)
    yield "bomb-tile.tif", tiff(16, 16, 8, 1, tile=(20_000, 20_000))
    yield "large-float.tif", tiff(8_900, 8_900, 32, 3)
    yield "bomb.ico", ico(png(12_500, 12_500))
    yield (
        "bomb.icns",
        b"icns" + struct.pack(">I4sI", 10**6, b"ic10", 10**6) + encoded(Image.new("L", (3000, 3000)), "JPEG2000"),
    )
    yield "bomb.gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(9) + b"\2\1\0\0;"
    yield "bomb.webp", encoded(Image.new("L", (8_000, 8_000)), "WEBP", lossless=True, method=0, quality=0)
    lie = bytearray(encoded(Image.new("L", (9_000, 9_000)), "AVIF", speed=10))
    lie[lie.index(b"ispe") + 8 : lie.index(b"ispe") + 16] = struct.pack(">II", 8, 8)
    yield "lie.avif", bytes(lie)
    wide = bytearray(encoded(Image.new("L", (64, 64)), "JPEG2000"))
    for place in (wide.index(b"ihdr") + 4, wide.index(b"\xff\x51") + 6):
        wide[place : place + 8] = struct.pack(">II", 30_000, 30_000)
    yield "bomb.jp2", bytes(wide)
    yield "bomb.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def item(id: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "question": "what?", "answer": "that", **fields}


def with_image(name: str, image: Any) -> dict[str, Any]:
    return item(name, question="<image>what?", image=image)


def texts() -> Iterator[bytes]:
    """Items as JSON, each written into the lines and the array."""
    for name, inner in (("lists", b"[],"), ("dicts", b'{"a":0},'), ("texts", b'"ab",'), ("floats", b"1.5,")):
        yield b'{"id": "bomb-' + name.encode() + b'", "x": [' + inner * (60 * 2**20 // len(inner)) + b"0]}"
    yield b'{"id": "bomb-200-MB", "x": [' + b"[]," * (70 * 2**20) + b"0]}"
    yield b'{"id": "bomb-deep", "x": ' + b"[" * 2**22 + b"]" * 2**22 + b"}"
    yield b'{"id": "bomb-digits", "x": ' + b"9" * 10**6 + b"}"
    yield json.dumps(item("bomb-spaces", question=" " * 10_000_001 + "what?")).encode()
    yield json.dumps(item("bomb-escapes", question="\\" * 2**24 + "😀")).encode()
    yield json.dumps(item("bomb-text", question="x" * 2**25)).encode()
    content = base64.b64encode(png(13_000, 13_000)).decode()
    yield json.dumps(with_image("bomb-base64", f"data:image/png;base64,{content}")).encode()
    yield json.dumps(with_image("bomb-uri", "data:," + "%00" * 2**24)).encode()


def write_lines(out: Path) -> None:
    (out / "lines").mkdir()
    with (out / "lines" / "images.jsonl").open("w") as file:
        for name, content in images():
            (out / "images" / name).write_bytes(content)
            file.write(json.dumps(with_image(name, name)) + "\n" + json.dumps(item(f"good after {name}")) + "\n")
        (out / "images" / "bomb-sparse.png").write_bytes(b"")
        os.truncate(out / "images" / "bomb-sparse.png", 6 * 2**30)
        file.write(json.dumps(with_image("bomb-sparse", "bomb-sparse.png")) + "\n")
        file.write(
            json.dumps(
                with_image("bomb-many", "good-text.png") | {"image": ["good-text.png"] * 9, "question": "<image>" * 9}
            )
        )
    (out / "array").mkdir()
    with (out / "lines" / "texts.jsonl").open("wb") as lines, (out / "array" / "texts.json").open("wb") as array:
        for k, text in enumerate(texts()):
            good = json.dumps(item(f"good {k}")).encode()
            lines.write(text + b"\n" + good + b"\n")
            array.write((b"," if k else b"[") + text + b"," + good)
        array.write(b"]")


def write_parquet(out: Path) -> None:
    (out / "parquet").mkdir()

    def write(name: str, table: pa.Table, **options: Any) -> None:
        with pq.ParquetWriter(out / "parquet" / name, table.schema, store_schema=False, **options) as writer:
            writer.write_table(table.slice(0, 1))
            writer.write_table(table.slice(1))

    def rows(name: str, bomb: pa.Array, more: int = 1, kind: str = "large") -> pa.Table:
        ids = [f"good {name}", *(f"{kind} {name} {k}" for k in range(more))]
        return pa.table({"id": ids, "question": ["what?"] * (more + 1), "answer": ["that"] * (more + 1), "x": bomb})

    packed = {"compression": "zstd"}
    write(
        "cell.parquet", rows("cell", pa.array([b"", bytes(900 * 2**20)], pa.binary())), use_dictionary=False, **packed
    )
    once = pa.array(["", "y" * (30 * 2**20)])
    many = pa.DictionaryArray.from_arrays(pa.array([0] + [1] * 30, pa.int32()), once)
    write("dictionary.parquet", rows("dictionary", many, 30), **packed)
    count = 3_000_000
    for name, values in (
        ("list", pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array(["z" * 1000]))),
        ("numbers", pa.array(np.zeros(20 * count, np.int8))),
        ("structs", pa.StructArray.from_arrays([pa.array(np.zeros(count, np.int8))] * 3, ["a", "b", "c"])),
    ):
        lists = pa.ListArray.from_arrays(pa.array([0, 1, len(values)], pa.int32()), values)
        write(f"{name}.parquet", rows(name, lists), **packed)
    keys = pa.array(np.arange(count, dtype=np.int32))
    maps = pa.MapArray.from_arrays(pa.array([0, 1, count], pa.int32()), keys, pa.array(np.zeros(count, np.int8)))
    write("map.parquet", rows("map", maps), **packed)


def write_payloads(out: Path) -> None:
    (out / "payloads").mkdir()
    writer = ArrayRecordWriter(str(out / "payloads" / "made.array_record"), "group_size:1")
    bombs = (
        bytes(2**30),
        b"\xdd" + struct.pack(">I", 60 * 2**20) + b"\x90" * (60 * 2**20),
        b"\x91" * 2**24,
        b'{"x": [' + b"[]," * (20 * 2**20) + b"0]}",
        msgpack.packb(item("large", x=bytes(100 * 2**20))),
        msgpack.packb(with_image("bomb", png(13_000, 13_000))),
    )
    for k, bomb in enumerate(bombs):
        writer.write(bomb)
        writer.write(msgpack.packb(item(f"good {k}")))
    writer.close()


def main(out: Path) -> None:
    (out / "images").mkdir(parents=True)
    for write in (write_lines, write_parquet, write_payloads):
        write(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
