"""Images per second per core, from JPEG bytes to patches, compared with transformers' image processors in one run.

    python3.11 -m venv ../peer && ../peer/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.23.0 pillow
    python benchmarks/loader.py --peer-python ../peer/bin/python --photos DIR [--out docs/results/loader.json]

The files are JPEGs of several sizes, tiled with photographs at their original scale, so that they take as long to
decode as photographs. First all sides make patches of all files, and the differences are printed. "pil" is the
processor of the released model: ours must equal it bit for bit after normalisation. "torchvision" is transformers'
default: its resizing differs by a level or two of 255, and is faster than Pillow's when an image has to shrink. Then
all sides take turns on the same files, one size at a time, on one core and with one thread. Time is CPU time of the
process; a ratio is taken within a turn, and the median over the turns is printed. Each side does its work before a
batch: ours ends with u8 patches (they are normalised on the device), theirs with float32. The last measurement is the
complete pipeline from a dataset to packed batches of T = 8,192, on one and on two threads, in wall time.

Cores that feed a v5p host of 4 chips at 50 % of 459 bf16 TFLOP/s each:

    an example of the mix     1,830 patches + 745 text tokens = 2,575 tokens
    forward and backward      2,575 · (84.9 + 3.7) GFLOP decoder + 1,830 · (2.4 + 1.3 + 0.2) GFLOP vision = 235 TFLOP
    a host needs              4 · 459 · 50 % / 235 = 3.9 examples/s, 1,830 patches each
    cores                     3.9 · 1,830 / (patches/s per core as measured, JPEG decoding included)
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import tyro
from peer_process import Peer, peer_process
from PIL import Image

from phivision_jax.batch import RowShape
from phivision_jax.images.decode import open_image
from phivision_jax.images.naflex import grid_of, preprocess
from phivision_jax.io.progress import bar
from tests.support.pixels import normalize

SIZES = ((640, 427), (640, 480), (1024, 768), (1280, 720), (1920, 1080))
QUALITY = 90
CHIPS, CHIP_TFLOPS, MFU = 4, 459, 0.5
MIX_PATCHES, MIX_TEXT = 1_830, 745
EXAMPLE_TFLOP = ((MIX_PATCHES + MIX_TEXT) * (84.9 + 3.7) + MIX_PATCHES * (2.4 + 1.3 + 0.2)) / 1e3
_PEER = Path(__file__).with_name("loader_peer.py")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: one size (or all), one peer, with JPEG decoding or without."""

    size: str
    decode: bool
    peer: str
    ours_per_s: float
    peer_per_s: float
    ratio: float
    """Median over the turns of the peer's seconds over ours."""
    ratio_range: tuple[float, float]


def photographs(folder: Path | None) -> list[Image.Image]:
    """RGB photographs to tile files with; by default the one that comes with matplotlib."""
    paths = [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    if folder is not None:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not paths:
            raise SystemExit(f"no .jpg or .png below {folder}")
    opened = (open_image(path) for path in paths)
    return [image for image in opened if image.mode == "RGB" and min(image.size) >= 200]


def make_file(photos: Sequence[Image.Image], size: tuple[int, int], first: int) -> bytes:
    """A JPEG of ``size`` pixels tiled with photographs, starting with number ``first``."""
    image, number, y = Image.new("RGB", size), first, 0
    while y < size[1]:
        x, tallest = 0, 0
        while x < size[0]:
            photo = photos[number % len(photos)]
            if number // len(photos) % 2:
                photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image.paste(photo, (x, y))
            x, tallest, number = x + photo.width, max(tallest, photo.height), number + 1
        y += tallest
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def largest_difference(ours: Sequence[np.ndarray], theirs: np.ndarray) -> tuple[bool, float]:
    """Compare normalised patches: equality bit for bit, and the largest difference in steps of 1/255."""
    mine = normalize(np.concatenate(ours))
    same = mine.shape == theirs.shape and bool((mine.view(np.int32) == theirs.view(np.int32)).all())
    return same, float(np.abs(mine - theirs).max()) * 127.5 if mine.shape == theirs.shape else float("inf")


def take_turns(
    files: Sequence[bytes], sizes: Sequence[tuple[int, int]], peer: Peer, names: Sequence[str], turns: int
) -> list[Row]:
    """Time every side on every size ``turns`` times, in alternating order."""
    decoded = [open_image(content) for content in files]

    def ours(decode: bool, which: Sequence[int]) -> float:
        start = time.process_time()
        for i in which:
            preprocess(open_image(files[i]) if decode else decoded[i])
        return time.process_time() - start

    def theirs(name: str) -> Callable[[bool, Sequence[int]], float]:
        return lambda decode, which: peer.ask("time", processor=name, decode=decode, which=which)["seconds"]

    sides = {"ours": ours, **{name: theirs(name) for name in names}}
    groups = {f"{w}x{h}": [i for i, size in enumerate(sizes) if size == (w, h)] for w, h in SIZES}
    seconds: dict[tuple[str, bool, str], list[float]] = {}
    with bar("turns", turns + 1) as advance:
        for turn in range(-1, turns):  # the first warms up and is not counted
            for decode, (size, which) in itertools.product((True, False), groups.items()):
                for side in list(sides)[:: 1 if turn % 2 else -1]:
                    spent = sides[side](decode, which)
                    if turn >= 0:
                        seconds.setdefault((size, decode, side), []).append(spent)
            advance(1)
    for decode in (True, False):
        for side in sides:
            by_size = [seconds[size, decode, side] for size in groups]
            seconds["all sizes", decode, side] = [sum(parts) for parts in zip(*by_size, strict=True)]
    counts = {**{size: len(which) for size, which in groups.items()}, "all sizes": len(files)}
    rows = []
    for decode in (True, False):
        for size, count in counts.items():
            mine = seconds[size, decode, "ours"]
            for name in names:
                other = seconds[size, decode, name]
                ratios = [b / a for a, b in zip(mine, other, strict=True)]
                speeds = count / statistics.median(mine), count / statistics.median(other)
                ratio = statistics.median(ratios)
                rows.append(Row(size, decode, name, *speeds, ratio, (min(ratios), max(ratios))))
    return rows


def pipeline_speeds(files: Sequence[bytes], folder: Path, turns: int) -> dict[int, float]:
    """Images per second of ``data.feed.pipeline.batches`` by number of threads, medians of alternating turns."""
    from phivision_jax.cli.data import processor_for
    from phivision_jax.data.feed.pipeline import batches
    from phivision_jax.data.plan.mixture import Mixture
    from phivision_jax.data.plan.plan import make_plan
    from phivision_jax.data.records import Record
    from phivision_jax.data.sources.source import RecordsSource
    from phivision_jax.data.store.importing import import_source

    messages = ({"role": "user", "content": "<image>\nwhat is this?"}, {"role": "assistant", "content": "a photograph"})
    processor = processor_for(None)
    records = [Record(str(i), "photographs", (content,), messages, "nothink") for i, content in enumerate(files)]
    dataset = import_source(RecordsSource(records), folder / "set", processor, workers=0, progress=False)
    mixture = Mixture.from_directories(dataset.directory, epochs=4)
    plan = make_plan([dataset], mixture, processor, RowShape(8192, 1, 7168), batch_rows=1)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(-1, turns):
        for threads, measured in speeds.items():
            start, images = time.perf_counter(), 0
            for _, info in batches([dataset], plan, processor, batch_rows=1, num_threads=threads):
                images += sum(map(len, info.record_ids))
            if turn >= 0:
                measured.append(images / (time.perf_counter() - start))
    return {threads: statistics.median(measured) for threads, measured in speeds.items()}


def cores_per_host(patches_per_s: float) -> float:
    """Cores that feed four v5p chips at 50 %, at ``patches_per_s`` per core (formula in the module's docstring)."""
    return CHIPS * CHIP_TFLOPS * MFU / EXAMPLE_TFLOP * MIX_PATCHES / patches_per_s


def print_rows(rows: Sequence[Row]) -> None:
    for decode in (True, False):
        print(f"\n{'JPEG decoding → resize → patches' if decode else 'resize → patches'}, images/s per core")
        print(f"{'size':<12}{'peer':<14}{'ours':>8}{'peer':>8}{'ratio':>8}   range over turns")
        for row in rows:
            if row.decode == decode:
                low, high = row.ratio_range
                speeds = f"{row.ours_per_s:>8.1f}{row.peer_per_s:>8.1f}{row.ratio:>8.2f}"
                print(f"{row.size:<12}{row.peer:<14}{speeds}   {low:.2f}…{high:.2f}")


def main(
    peer_python: Path,
    photos: Path | None = None,
    files_per_size: int = 6,
    turns: int = 7,
    out: Path | None = None,
) -> None:
    """Compare, time, and print the tables.

    Args:
        peer_python: Python of an environment with torch and transformers 5 (and torchvision, for its default).
        photos: Directory of photographs to tile the files with; default: the photograph of matplotlib.
        files_per_size: Files of each size.
        turns: Timed turns of each side over all files, after one to warm up.
        out: Write the numbers to this JSON file as well.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:  # the peer inherits it
        os.sched_setaffinity(0, {max(cores)})
    originals = photographs(photos)
    sizes = [size for size in SIZES for _ in range(files_per_size)]
    files = [make_file(originals, size, 5 * i) for i, size in enumerate(sizes)]
    bits = sum(map(len, files)) * 8 / sum(w * h for w, h in sizes)
    patches = statistics.mean(grid[0] * grid[1] for grid in (grid_of(*size) for size in sizes))
    print(f"{len(files)} JPEGs of quality {QUALITY}, {bits:.2f} bits per pixel, {patches:,.0f} patches on average")
    with tempfile.TemporaryDirectory() as folder, peer_process(peer_python, _PEER, threads=1) as peer:
        names = []
        for i, content in enumerate(files):
            names.append(str(Path(folder) / f"{i}.jpg"))
            Path(names[-1]).write_bytes(content)
        about = peer.ask("versions")
        versions = {"ours": {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__}}
        versions["peer"] = about["versions"]
        for side, values in versions.items():
            print(f"{side}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
        if versions["ours"]["pillow"] != versions["peer"]["pillow"]:
            print("the Pillow versions differ, so decoding and resizing may differ")
        peer.ask("load", files=names)
        ours = [preprocess(open_image(content))[0] for content in files]
        equality = {}
        for name in about["processors"]:
            peer.ask("patches", processor=name, out=f"{folder}/patches.npy")
            same, most = largest_difference(ours, np.load(f"{folder}/patches.npy"))
            equality[name] = {"bit_for_bit": same, "largest_difference": most}
            print(f"patches and {name}: {'equal bit for bit' if same else f'they differ by {most:.2g}/255 at most'}")
        rows = take_turns(files, sizes, peer, about["processors"], turns)
        print_rows(rows)
        if cores:
            os.sched_setaffinity(0, cores)
        pipeline = pipeline_speeds(files, Path(folder), turns)
    print("\nfrom a dataset to packed batches, images/s: ", end="")
    print(", ".join(f"{speed:.1f} on {threads} thread{'s' * (threads > 1)}" for threads, speed in pipeline.items()))
    speed = next(row.ours_per_s for row in rows if row.decode and row.size == "all sizes") * patches
    needed = cores_per_host(speed)
    print(
        f"\n{speed:,.0f} patches/s per core. One v5p host ({CHIPS} chips) at {MFU:.0%} MFU takes "
        f"{CHIPS * CHIP_TFLOPS * MFU / EXAMPLE_TFLOP:.2f} examples/s ({EXAMPLE_TFLOP:.0f} TFLOP each): "
        f"{needed:.3f} cores feed it"
    )
    if out is not None:
        content_out = {
            "files": {"count": len(files), "quality": QUALITY, "bits_per_pixel": bits, "mean_patches": patches},
            "versions": versions,
            "turns": turns,
            "equality": equality,
            "rows": [dataclasses.asdict(row) for row in rows],
            "patches_per_s_per_core": speed,
            "pipeline_images_per_s": pipeline,
            "cores_per_v5p_host": needed,
        }
        out.write_text(json.dumps(content_out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
