"""The same items, asked and scored by lmms-eval and by ``phivision eval`` on one server: accuracy, and what differs.

    python3.11 -m venv ../lmms && ../lmms/bin/pip install lmms-eval==0.7.3 "filelock<4"
    python benchmarks/lmms_scores.py --peer-python ../lmms/bin/python [--items 200] [--out FILE]

The tasks are lmms-eval's own ChartQA and MMStar, on data in their schemas (``lmms_score_tasks/``). The server answers
by a script: right and wrong answers in the forms in which models give them. lmms-eval's samples are also scored by
``phivision score``, which must give what ``phivision eval`` gives.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from phivision_jax.evaluation.results import load_results

TASKS = Path(__file__).with_name("lmms_score_tasks")
METRICS = {"chartqa": "relaxed_overall", "mmstar": "average"}
LETTERS, COLOURS = "ABCD", ("red", "green", "blue", "yellow")
NUMBER_FORMS = ("{}", "{}.0", "{}%", "{} people", "${}", "The answer is {}.", " {} ", "{},000")
LETTER_FORMS = ("{}", "{}.", "({})", "{}. {}", "The answer is {}", "Answer: {}", "**{}**", "{} because it is {}")


def rows(folder: Path, count: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Rows of both data sets, and the answer to each question."""
    rng, answers = random.Random(0), dict[str, str]()
    charts, choices = [], []
    for k in range(count):
        Image.new("RGB", (40 + k % 7, 30), COLOURS[k % 4]).save(path := folder / f"{k}.png")
        gold = rng.randrange(1, 500)
        given = gold if rng.random() < 0.6 else round(gold * rng.choice([0.8, 0.96, 1.04, 1.2]), 2)
        question = f"How many are there in chart {k}?"
        answers[question] = rng.choice(NUMBER_FORMS).format(given)
        kind = rng.choice(["human_test", "augmented_test"])
        charts.append({"type": kind, "question": question, "answer": str(gold), "image": str(path)})
        letter = rng.choice(LETTERS)
        given_letter = letter if rng.random() < 0.6 else rng.choice(LETTERS)
        question = f"Which colour has shape {k}?"
        colour = COLOURS[LETTERS.index(given_letter)]
        answers[question] = rng.choice(LETTER_FORMS).format(given_letter, colour)
        inline = ", ".join(f"{letter}: {colour}" for letter, colour in zip(LETTERS, COLOURS, strict=True))
        about = {"category": "math", "l2_category": "geometry", "answer": letter, "image": str(path)}
        choices.append({"index": k, "question": f"{question}\nOptions: {inline}", **about})
    return {"chartqa": charts, "mmstar": choices}, answers


@contextlib.contextmanager
def served(answers: dict[str, str]) -> Iterator[str]:
    """The address of a server with OpenAI's chat API that gives these answers, as a stream or at once."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = re.search(r"(How many|Which colour)[^?]*\?", json.dumps(body["messages"]))
            message = {"role": "assistant", "content": answers[found[0]] if found else ""}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            common = {"id": "0", "created": 0, "model": "model"}
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            if body.get("stream"):
                chunk = {**common, "object": "chat.completion.chunk", "choices": [choice | {"delta": message}]}
                text = f"data: {json.dumps(chunk | {'usage': usage})}\n\ndata: [DONE]\n\n"
            else:
                choices = [choice | {"message": message}]
                text = json.dumps({**common, "object": "chat.completion", "choices": choices, "usage": usage})
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def theirs(python: Path, name: str, url: str, folder: Path) -> Path:
    """The samples that lmms-eval logs."""
    arguments = f"model_version=model,base_url={url},api_key=none"
    words = ["--model", "async_openai", "--model_args", arguments, "--include_path", str(TASKS)]
    words += ["--tasks", f"{name}_local", "--batch_size", "1", "--log_samples", "--output_path", str(folder / "out")]
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([python, "-m", "lmms_eval", *words], cwd=folder, env={**os.environ, **own}, check=True)
    (logged,) = (folder / "out").rglob(f"*_samples_{name}_local.jsonl")
    return logged


def ours(*words: str, out: Path) -> list[float]:
    """The values of all items in their order, from a command of this project."""
    subprocess.run([sys.executable, "-m", "phivision_jax.cli", *words, f"--out={out}"], check=True)
    results = load_results(out)[1]
    return [r.value for r in sorted(results, key=lambda result: int(result.item.rpartition(":")[2]))]


def main(peer_python: Path, items: int = 200, out: Path | None = None) -> None:
    """Ask and score all items twice, and print accuracies and the answers that are scored differently.

    Args:
        peer_python: Python of an environment with lmms-eval.
        items: Items of each task.
        out: Write the numbers to this JSON file as well.
    """
    found: dict[str, Any] = {"items": items}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, answers = rows(folder, items)
        (folder / "rows.json").write_text(json.dumps(data))
        subprocess.run([peer_python, TASKS / "make.py", folder / "rows.json", folder], check=True)
        with served(answers) as url:
            for name, metric in METRICS.items():
                where = f"--benchmark-data={folder}/parquet"
                asked = ["eval", f"--endpoint={url}", "--model=model", f"--benchmarks={name}", where, "--no-cache"]
                values = ours(*asked, out=folder / f"{name}_eval")
                logged = theirs(peer_python, name, url, folder)
                scored = ours("score", str(logged), f"--benchmark={name}", where, out=folder / f"{name}_score")
                samples = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda row: row["doc_id"])
                other = [float(sample[metric]) for sample in samples]
                differing = [
                    {"answer": list(answers.values())[2 * k + (name == "mmstar")], "lmms": other[k], "ours": values[k]}
                    for k in range(items) if other[k] != values[k]
                ]  # fmt: skip
                found[name] = {
                    "lmms": sum(other) / items,
                    "ours": sum(values) / items,
                    "scored_samples_equal": scored == values,
                    "differing": differing,
                }
    print(json.dumps(found, indent=1))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
