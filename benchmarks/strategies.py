"""Accuracy of image strategies by the size of a target on synthetic screens, after equal training of a small model.

    python benchmarks/strategies.py                  # what is missing of 3 seeds x 5 strategies, then the table
    python benchmarks/strategies.py --table-only     # only the table, from docs/results/strategies.json

A screen of 512x384 pixels has pale windows and two square buttons of different colours, 8 to 128 pixels wide; the
question asks in which quarter of the screen the button of one colour is. The quarters are equally frequent, so the
question alone is answered by chance. The model is a small one with random weights. Patches of 32 pixels and tiles of
128 (16 features) keep the proportions of 384-pixel tiles, with caps that are smaller by the same factor of 36. Every
training run sees the same examples, one per row.

A training run that was interrupted continues, and one that is finished is not repeated. The table is informative only
if the largest targets are learned: 15 points above the question alone, by every seed of at least one strategy.
Otherwise it states that it is not.
"""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

from benchmarks.tables import fill, markdown
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.records import Record
from phivision_jax.data.sources.easy_vqa import question_only_baseline
from phivision_jax.data.sources.source import RecordsSource
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.store.importing import import_source
from phivision_jax.images.layout import make_layout, with_layout
from phivision_jax.processor import Processor
from phivision_jax.training.run_config import DataConfig, ModelSettings, OptimConfig, RunConfig

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "docs/results/strategies.json", ROOT / "docs/image_strategies.md"
SCREEN, TARGETS = (512, 384), (8, 16, 32, 64, 128)
QUARTERS = ("1", "2", "3", "4")
COLOURS = {"red": "#d32f2f", "green": "#2e9e3a", "blue": "#1e5fd0", "yellow": "#f2c200"}
TEST_PER_TARGET, ROWS, CONTROL = 200, 16, 0.15
STRATEGIES = {
    "dynamic resolution, 2,048": "naflex:57",
    "dynamic resolution, 3,600": "naflex:100",
    "multi-crop": "multicrop:86",
    "multi-crop with S²": "multicrop_s2:57",
    "Dynamic-S²": "dynamic_s2:86",
}
WIDTH: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
MODEL = ModelConfig(
    vision=VisionConfig(num_layers=4, num_heads=2, patch_size=32, num_positions=16, **WIDTH),
    decoder=DecoderConfig(
        vocab_size=512, num_layers=2, num_heads=2, num_kv_heads=1, rope_theta=10_000.0, max_positions=1024,
        bos_token_id=507, eos_token_id=508, pad_token_id=509, **WIDTH,
    ),
    min_patches=16,
    tile_size=128,
)  # fmt: skip


def screen(rng: np.random.Generator, target: int, i: str) -> Record:
    """One question about one screen; ``target``: side of both buttons in pixels."""
    image = Image.new("RGB", SCREEN, tuple(rng.integers(215, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = (int(rng.integers(-40, side)) for side in SCREEN)
        right, bottom = left + int(rng.integers(40, 220)), top + int(rng.integers(30, 160))
        fill_colour = tuple(rng.integers(195, 256, 3).tolist())
        draw.rectangle((left, top, right, bottom), fill=fill_colour, outline="#9e9e9e")
    asked, other = (list(COLOURS)[k] for k in rng.permutation(len(COLOURS))[:2])
    places = rng.permutation(4)[:2].tolist()
    for colour, quarter in zip((other, asked), reversed(places), strict=True):
        room = [side // 2 - target for side in SCREEN]
        left, top = (int(rng.integers(0, r + 1)) for r in room)
        left, top = left + (quarter % 2) * SCREEN[0] // 2, top + (quarter // 2) * SCREEN[1] // 2
        draw.rectangle((left, top, left + target - 1, top + target - 1), fill=COLOURS[colour])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    question = f"<image>\nwhere is the {asked} button?"
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": QUARTERS[places[0]]})
    return Record(i, "screens", (file.getvalue(),), messages, "nothink", "gui", {"target": target})


def screens(count: int, seed: int) -> list[Record]:
    """As many of each size of target."""
    rng = np.random.default_rng(seed)
    return [screen(rng, TARGETS[i % len(TARGETS)], f"{TARGETS[i % len(TARGETS)]}/{i:06d}") for i in range(count)]


def prepare(data: Path, steps: int) -> float:
    """Write the training and the test set, unless they exist; returns the accuracy of the question alone."""
    level = data / "question_only.json"
    if not level.exists():
        sets = {"train": screens(steps * ROWS, 0), "test": screens(TEST_PER_TARGET * len(TARGETS), 1)}
        for name, records in sets.items():
            source = RecordsSource(records, name="screens")
            import_source(source, data / name, Processor.small(MODEL), workers=0, progress=False)
        level.write_text(json.dumps(question_only_baseline(sets["train"], sets["test"])), encoding="utf-8")
    return float(json.loads(level.read_text()))


def train_once(strategy: str, seed: int, steps: int, work: Path, data: Path) -> dict[str, Any]:
    """Train and score one model; returns the finished result of an earlier call.

    Returns:
      ``accuracy`` by target, ``tokens`` and ``patches`` of a screen, ``minutes``.
    """
    from phivision_jax.checkpoint.loading import load
    from phivision_jax.evaluation.dataset import DatasetBenchmark
    from phivision_jax.evaluation.periodic import Evaluator
    from phivision_jax.evaluation.task import Sampling
    from phivision_jax.training.run import train

    run = work / f"{strategy.replace(':', '_')}-{seed}"
    if (finished := run / "result.json").exists():
        return json.loads(finished.read_text())
    started = time.monotonic()
    model = with_layout(MODEL, strategy)
    size, dataset = make_layout(model).measure(*SCREEN), Dataset.open(data / "train")
    text = int(dataset.index.text_tokens.max())
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    cfg = RunConfig(
        model=ModelSettings(**fields),
        data=DataConfig(
            path=str(data / "train"), batch_rows=ROWS, length=size.tokens + text, num_patches=size.patches,
            num_threads=1, seed=seed,
        ),
        optim=OptimConfig(learning_rate=1e-3, steps=steps, warmup_steps=50, final_lr_ratio=0.05, weight_decay=0.05),
        dtype="float32", remat="none", vision_remat="none", microbatches=1, seed=seed,
        log_every=50, checkpoint_every=max(1, steps // 4), keep_checkpoints=2,
    )  # fmt: skip
    if code := train(cfg, str(run)):
        raise SystemExit(code)
    minutes = (time.monotonic() - started) / 60
    loaded, processor = load(run)
    benchmark = DatasetBenchmark()
    asked = [(benchmark, benchmark.items(str(data / "test")), 0)]
    results = Evaluator(asked, processor, sampling=Sampling(max_new_tokens=2), slots=32)(loaded)
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result.item.partition("/")[0], []).append(result.value)
    accuracy = {target: statistics.fmean(values) for target, values in scores.items()}
    row = {"accuracy": accuracy, "tokens": size.tokens, "patches": size.patches, "minutes": round(minutes, 2)}
    finished.write_text(json.dumps(row), encoding="utf-8")
    return row


def is_informative(found: dict[str, Any]) -> bool:
    """The positive control: every seed of a strategy learns the largest targets."""
    level = found["question_only"] + CONTROL
    return any(min(run["accuracy"][str(TARGETS[-1])] for run in runs) >= level for runs in found["strategies"].values())


def table(found: dict[str, Any]) -> str:
    """Mean and range over seeds, in percent."""
    rows = []
    for title, runs in found["strategies"].items():
        cells = []
        for target in map(str, TARGETS):
            values = [100 * run["accuracy"][target] for run in runs]
            cells.append(f"{statistics.fmean(values):.0f} ({min(values):.0f}–{max(values):.0f})")
        rows.append((title, f"{runs[0]['tokens']}", f"{runs[0]['patches']}", *cells))
    head = ("strategy", "tokens", "patches", *(f"{target} px" for target in TARGETS))
    note = f"Accuracy in percent, mean and range of {found['seeds']} seeds, {TEST_PER_TARGET} questions per cell; "
    note += f"the question alone: {100 * found['question_only']:.0f}."
    if not is_informative(found):
        note += " **Not informative**: no strategy learned the largest targets 15 points above that level."
    return markdown(head, rows) + "\n\n" + note


def main(steps: int = 800, seeds: int = 3, work: Path = Path("runs/strategies"), table_only: bool = False) -> None:
    """Train what is missing; when all is there, write the numbers and the table of docs/image_strategies.md.

    Args:
        steps: Steps of 16 examples per training run.
        seeds: Training runs per strategy.
        work: Directory of the data and the runs.
        table_only: Only write the table.
    """
    if not table_only:
        work = work / f"{steps}"
        found: dict[str, Any] = {"steps": steps, "rows": ROWS, "seeds": seeds, "strategies": {}}
        found["question_only"] = prepare(work / "data", steps)
        for seed in range(seeds):
            for title, strategy in STRATEGIES.items():
                row = train_once(strategy, seed, steps, work, work / "data")
                print(title, seed, row, flush=True)
                found["strategies"].setdefault(title, []).append(row)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = table(json.loads(RESULT.read_text()))
    PAGE.write_text(fill(PAGE.read_text(), "strategies", shown), encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    tyro.cli(main)
