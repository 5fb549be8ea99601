"""lmms-eval against ``phivision serve``, unmodified, through both of its OpenAI clients.

    python3.11 -m venv ../lmms && ../lmms/bin/pip install lmms-eval==0.7.3 "filelock<4"
    python benchmarks/lmms_clients.py --peer-python ../lmms/bin/python [--model DIR] [--out docs/results/lmms.json]

The task (``lmms_task/``) has questions about coloured shapes with no image, one and two. Both clients must log the
answers that the engine gives to the same questions without a server, and the same numbers of tokens.

Of what lmms-eval installs, an evaluation through a server does not need torchvision, timm, peft, sentence-transformers,
OpenCV, wandb and yt-dlp.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import decode_work as work
import tyro
from PIL import Image, ImageDraw
from vllm_ids import MODEL

import phivision_jax
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Reply, Request

CLIENTS = ("openai", "async_openai")
COLOURS = ("red", "green", "blue", "yellow")
TASK = Path(__file__).with_name("lmms_task")
MAX_TOKENS = 24
"""As in ``shapes.yaml``."""


def write_records(directory: Path, count: int) -> list[dict[str, Any]]:
    """Records of the task; their images become files of the directory."""
    rng = random.Random(0)

    def image() -> tuple[str, str]:
        width, height, colour = rng.randrange(40, 200), rng.randrange(40, 200), rng.choice(COLOURS)
        canvas = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(canvas).ellipse((width // 8, height // 8, width * 7 // 8, height * 7 // 8), colour)
        path = directory / f"{len(list(directory.glob('*.png')))}.png"
        canvas.save(path)
        return str(path), colour

    first, second = image(), image()
    records: list[dict[str, Any]] = [
        {"question": "What colour is the sky?", "answer": "blue", "images": []},
        {"question": "What colour is the second shape?", "answer": second[1], "images": [first[0], second[0]]},
    ]
    while len(records) < count:
        path, colour = image()
        records.append({"question": "What colour is the shape?", "answer": colour, "images": [path]})
    (directory / "records.json").write_text(json.dumps(records))
    return records


@contextlib.contextmanager
def served(model: Path, length: int) -> Iterator[str]:
    """The API's address of a running ``phivision serve``."""
    words = [sys.executable, "-m", "phivision_jax.cli", "serve", str(model), "--port=0", f"--length={length}"]
    process = subprocess.Popen([*words, "--name=model"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if found := re.search(r"http://\S+/v1", line):
                break
        else:
            raise SystemExit("phivision serve stopped; its output is above")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def evaluate(python: Path, client: str, url: str, directory: Path) -> list[dict[str, Any]]:
    """The samples that lmms-eval logs, in the order of the records."""
    out = directory / client
    arguments = f"model_version=model,base_url={url},api_key=none"
    words = ["--model", client, "--model_args", arguments, "--include_path", str(TASK), "--tasks", "shapes"]
    words += ["--batch_size", "1", "--log_samples", "--output_path", str(out)]
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([python, "-m", "lmms_eval", *words], cwd=directory, env={**os.environ, **own}, check=True)
    (logged,) = out.rglob("*_samples_shapes.jsonl")
    samples = [json.loads(line) for line in logged.read_text().splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def direct(model: Path, records: Sequence[dict[str, Any]], length: int) -> list[Reply]:
    """The engine's replies to the same questions."""
    generator = LocalGenerator(*phivision_jax.load(model), length=length)
    requests = []
    for one in records:
        parts = [{"type": "image", "image": image} for image in one["images"]]
        content = [*parts, {"type": "text", "text": one["question"]}]
        requests.append(Request({"role": "user", "content": content}, max_new_tokens=MAX_TOKENS))
    return [reply for (reply,) in generator.generate(requests)]


def main(
    peer_python: Path, model: Path | None = None, records: int = 12, length: int = 1024, out: Path | None = None
) -> None:
    """Run both clients, compare, and print how many answers are equal.

    Args:
        peer_python: Python of an environment with lmms-eval.
        model: Checkpoint to serve; default: a small random one.
        records: Number of records of the task.
        length: Tokens of a slot, as of ``phivision serve``.
        out: Write the numbers to this JSON file as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if model is None:
            work.write_random(model := directory / "model", MODEL)
        asked = write_records(directory, records)
        subprocess.run(
            [peer_python, TASK / "make.py", directory / "records.json", directory / "shapes_data"], check=True
        )
        want = direct(model, asked, length)
        with served(model, length) as url:
            logged = {client: evaluate(peer_python, client, url, directory) for client in CLIENTS}
    found: dict[str, Any] = {"records": records}
    for client, samples in logged.items():
        for sample, reply in zip(samples, want, strict=True):
            if sample["filtered_resps"].strip() != reply.answer.strip():
                print(f"{client}, question {sample['doc_id']}: {sample['filtered_resps']!r}, not {reply.answer!r}")
        same = sum(
            sample["filtered_resps"].strip() == reply.answer.strip()
            for sample, reply in zip(samples, want, strict=True)
        )
        tokens = sum(
            one["output_tokens"] == reply.thought_tokens + reply.answer_tokens
            for sample, reply in zip(samples, want, strict=True)
            for one in sample["token_counts"]
        )
        found[client] = {"equal_answers": same, "equal_token_counts": tokens}
        print(f"{client}: {same} of {records} answers and {tokens} counts of tokens are those without a server")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(found[client]["equal_answers"] < records for client in CLIENTS):
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
