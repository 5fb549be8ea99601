"""A data set in which stated records are damaged: ``python -m tests.support.damaged_sources OUT --records 1000``.

Writes OUT/data.jsonl (LLaVA's form), OUT/images/ and OUT/damaged.json (id → kind of damage). It knows nothing about the
code that reads it: the damage is of the kinds that disks, crawlers, editors and people cause.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageDraw


def draw_image(rng: random.Random) -> Image.Image:
    """Random ellipses in a small image of random size."""
    image = Image.new("RGB", (rng.randint(24, 72), rng.randint(24, 72)), tuple(rng.choices(range(256), k=3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        draw.ellipse((x, y, x + rng.randint(2, 30), y + rng.randint(2, 30)), tuple(rng.choices(range(256), k=3)))
    return image


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def png_of_size(width: int, height: int, rows: int) -> bytes:
    """A PNG with ``width`` x ``height`` in its header and ``rows`` rows of grey bytes as its content."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(b"\0" * (width + 1) * rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Maker:
    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.rng = out, random.Random(seed)
        (out / "images").mkdir(parents=True)

    def save(self, name: str, content: bytes) -> str:
        folder = self.out / "images" / name[:3]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        return f"{name[:3]}/{name}"

    def good(self, i: int) -> dict:
        """An intact record: mostly one image, sometimes none or two; one to three questions."""
        images = []
        for k in range(self.rng.choice((0, 1, 1, 1, 1, 2))):
            format, ending = self.rng.choice((("PNG", "png"), ("JPEG", "jpg"), ("JPEG", "jpeg"), ("WEBP", "webp")))
            images.append(self.save(f"{i:06d}-{k}.{ending}", encoded(draw_image(self.rng), format)))
        turns = []
        for k in range(self.rng.randint(1, 3)):
            marks = "<image>\n" * len(images) if k == 0 else ""
            turns.append({"from": "human", "value": f"{marks}what is in image {i}, part {k}? Grüße 図"})
            turns.append({"from": "gpt", "value": f"shape {self.rng.randrange(100)}"})
        record = {"id": f"r{i:06d}", "conversations": turns}
        return record | ({"image": images if len(images) > 1 else images[0]} if images else {})

    def with_image(self, i: int, content: bytes, name: str) -> dict:
        record = self.good(i)
        record["image"] = self.save(f"{i:06d}-bad.{name}", content)
        record["conversations"][0]["value"] = f"<image>\nwhat is in image {i}?"
        return record

    # Each returns the line of a damaged record.

    def truncated_jpeg(self, i: int) -> bytes:
        content = encoded(draw_image(self.rng), "JPEG")
        return self.line(self.with_image(i, content[: len(content) * 7 // 10], "jpg"))

    def truncated_png(self, i: int) -> bytes:
        content = encoded(draw_image(self.rng), "PNG")
        return self.line(self.with_image(i, content[: len(content) // 2], "png"))

    def corrupt_jpeg(self, i: int) -> bytes:
        content = bytearray(encoded(draw_image(self.rng), "JPEG"))
        tables = content.index(b"\xff\xc4")  # the Huffman tables
        content[tables + 4 : tables + 40] = bytes(self.rng.choices(range(1, 255), k=36))
        return self.line(self.with_image(i, bytes(content), "jpg"))

    def corrupt_png(self, i: int) -> bytes:
        content = bytearray(encoded(draw_image(self.rng), "PNG"))
        pixels = content.index(b"IDAT") + 8
        content[pixels : pixels + 20] = bytes(self.rng.choices(range(256), k=20))
        return self.line(self.with_image(i, bytes(content), "png"))

    def bomb(self, i: int) -> bytes:
        return self.line(self.with_image(i, png_of_size(60_000, 60_000, 1), "png"))

    def strip(self, i: int) -> bytes:
        return self.line(self.with_image(i, png_of_size(60_000, 2, 2), "png"))

    def zero_bytes(self, i: int) -> bytes:
        return self.line(self.with_image(i, b"", "png"))

    def text_called_jpg(self, i: int) -> bytes:
        return self.line(self.with_image(i, b"<html><body>404 Not Found</body></html>", "jpg"))

    def missing_file(self, i: int) -> bytes:
        record = self.with_image(i, b"x", "png")
        (self.out / "images" / record["image"]).unlink()
        return self.line(record)

    def climbing_path(self, i: int) -> bytes:
        record = self.with_image(i, encoded(draw_image(self.rng), "PNG"), "png")
        return self.line(record | {"image": self.rng.choice(("../data.jsonl", "../../x.png", "/etc/passwd"))})

    def url(self, i: int) -> bytes:
        return self.line(self.with_image(i, b"x", "png") | {"image": "http://127.0.0.1:9/cat.jpg"})

    def broken_utf8(self, i: int) -> bytes:
        return self.line(self.good(i)).replace("Grüße".encode(), b"Gr\xfc\xdfe", 1)

    def half_a_line(self, i: int) -> bytes:
        line = self.line(self.good(i))
        return line[: max(30, len(line) // 2)]

    def empty_answer(self, i: int) -> bytes:
        record = self.good(i)
        record["conversations"][1]["value"] = self.rng.choice(("", "  \n "))
        return self.line(record)

    def one_marker_too_many(self, i: int) -> bytes:
        record = self.good(i)
        record["conversations"][0]["value"] += "<image>"
        return self.line(record)

    def no_marker(self, i: int) -> bytes:
        record = self.with_image(i, encoded(draw_image(self.rng), "PNG"), "png")
        record["conversations"][0]["value"] = "what is this?"
        return self.line(record)

    def unknown_role(self, i: int) -> bytes:
        record = self.good(i)
        record["conversations"][0]["from"] = self.rng.choice(("observer", "", "USER 2"))
        return self.line(record)

    def endless_answer(self, i: int) -> bytes:
        record = self.good(i)
        record["conversations"][1]["value"] = "a 1 " * 100_000
        return self.line(record)

    def no_conversation(self, i: int) -> bytes:
        return self.line({"id": f"r{i:06d}", "image": None})

    @staticmethod
    def line(record: dict) -> bytes:
        return json.dumps(record, ensure_ascii=False).encode()


KINDS = (
    "truncated_jpeg", "truncated_png", "corrupt_jpeg", "corrupt_png", "bomb", "strip", "zero_bytes", "text_called_jpg",
    "missing_file", "climbing_path", "url", "broken_utf8", "half_a_line", "empty_answer",
    "one_marker_too_many", "no_marker", "unknown_role", "endless_answer", "no_conversation",
)  # fmt: skip


def make(out: Path, records: int, damaged: int, seed: int) -> dict[str, str]:
    maker = Maker(out, seed)
    which = maker.rng.sample(range(records), damaged)
    kinds = {i: KINDS[n % len(KINDS)] for n, i in enumerate(which)}
    with (out / "data.jsonl").open("wb") as file:
        for i in range(records):
            file.write(getattr(maker, kinds[i])(i) if i in kinds else maker.line(maker.good(i)))
            file.write(b"\n")
    named = {f"r{i:06d}": kind for i, kind in sorted(kinds.items())}
    (out / "damaged.json").write_text(json.dumps(named, indent=1))
    return named


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--damaged", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = make(args.out, args.records, args.damaged, args.seed)
    print(f"{args.out}: {args.records} records, {len(kinds)} damaged")
