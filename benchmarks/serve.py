"""The server under load: many clients for some minutes, with others among them that misbehave.

    python benchmarks/serve.py --clients 32 --seconds 120 [--checkpoint DIR] [--out docs/results/serve.json]

``phivision serve`` runs as a process of its own, by default with a tiny random model, on loopback. Each client asks one
question after another, with and without images, complete or as a stream, in every mode. Beside them, three others leave
in the middle of a stream, read one byte a second, and send what is no request. Prints percentiles of the time of a
request, of the time until the first piece of a stream, and of the time in the queue alone, as the server measures it;
and the memory of the server over time. Exits with 1 if a request of a well-behaved client failed, if a slot was not
freed, or if the server's memory still grew in the last half.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tables import fill, markdown
from tests.support.bombs import png
from tests.support.paths import ROOT
from tests.support.small_model import write_small_model

PAGE = ROOT / "docs/serving.md"
PERCENTILES = ("p50", "p95", "p99", "longest")
QUESTION = "what color is the circle? is there a blue shape? how many are in the image?"


def request(rng: random.Random, longest: int) -> dict[str, Any]:
    """A request with up to two images, of any mode."""
    sizes = [(rng.randrange(1, 200), rng.randrange(1, 200)) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    uris = ["data:image/png;base64," + base64.b64encode(png(*size, 8, 2)).decode() for size in sizes]
    words = " ".join(rng.choices(QUESTION.split(), k=rng.randrange(1, 40)))
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris] + [{"type": "text", "text": words}]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": rng.randrange(1, longest),
        "mode": rng.choice(["auto", "think", "nothink"]),
        "temperature": rng.choice([0, 1]),
        "n": rng.choice([1, 1, 1, 2]),
        "stream": rng.random() < 0.5,
        "stream_options": {"include_usage": True},
    }


class Load:
    """Clients of one server, and what they have seen.

    Attributes:
      seconds: of requests, of first pieces, and in the queue.
      failures: sentences about requests that should have been answered.
      others: what came of the clients that misbehave.
    """

    def __init__(self, address: str, end: float, longest: int) -> None:
        self.address, self.end, self.longest = address, end, longest
        self.seconds: dict[str, list[float]] = {"request": [], "first piece": [], "queue": []}
        self.failures: list[str] = []
        self.others: Counter[str] = Counter()
        self.tokens = 0

    async def client(self, session: aiohttp.ClientSession, seed: int) -> None:
        """Ask until the time is over."""
        rng = random.Random(seed)
        while time.monotonic() < self.end:
            body, begun = request(rng, self.longest), time.monotonic()
            try:
                async with session.post(f"{self.address}/v1/chat/completions", json=body) as reply:
                    if reply.status != 200:
                        self.failures.append(f"status {reply.status}: {(await reply.text())[:200]}")
                        continue
                    await (self._stream(reply, begun) if body["stream"] else self._complete(await reply.json()))
            except (aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(repr(error))
            self.seconds["request"].append(time.monotonic() - begun)

    async def _stream(self, reply: aiohttp.ClientResponse, begun: float) -> None:
        first, last = None, b""
        async for line in reply.content:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                if "error" in piece:
                    self.failures.append(str(piece))
                elif piece["choices"] and first is None:
                    first = time.monotonic() - begun
                    self.seconds["first piece"].append(first)
                self._note(piece)
            last = line.strip() or last
        if last != b"data: [DONE]":
            self.failures.append(f"a stream ended with {last!r}")

    async def _complete(self, reply: dict[str, Any]) -> None:
        self._note(reply)

    def _note(self, piece: dict[str, Any]) -> None:
        self.tokens += (piece.get("usage") or {}).get("completion_tokens", 0)
        self.seconds["queue"] += [c["phivision"]["queue_s"] for c in piece.get("choices", ()) if "phivision" in c]

    async def leaver(self, session: aiohttp.ClientSession) -> None:
        """Leave in the middle of a stream, again and again."""
        rng = random.Random(-1)
        while time.monotonic() < self.end:
            body = request(rng, self.longest) | {"stream": True, "max_tokens": self.longest, "n": 1}
            async with session.post(f"{self.address}/v1/chat/completions", json=body) as reply:
                await reply.content.readline()
            self.others["streams left"] += 1
            await asyncio.sleep(0.2)

    async def slow_reader(self) -> None:
        """Read a byte a second."""
        body = json.dumps(request(random.Random(-2), self.longest) | {"stream": True}).encode()
        host, port = self.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while time.monotonic() < self.end:
            self.others["bytes read slowly"] += len(await reader.read(1))
            await asyncio.sleep(1)
        writer.close()

    async def nonsense(self, session: aiohttp.ClientSession) -> None:
        """Send what is no request, or too much."""
        bomb = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        bomb["image_url"]["url"] += base64.b64encode(png(30_000, 30_000, 1, 0)).decode()  # type: ignore[index]
        bodies = [
            b"{",
            b"\xff",
            bytes(40 * 2**20),
            json.dumps({"messages": [{"role": "user", "content": [bomb]}]}).encode(),
        ]
        while time.monotonic() < self.end:
            for body in bodies:
                headers = {"Content-Type": "application/json"}
                async with session.post(f"{self.address}/v1/chat/completions", data=body, headers=headers) as reply:
                    self.others[f"refused with {reply.status}"] += 1
                    await reply.read()
                await asyncio.sleep(0.5)

    async def run(self, clients: int) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300)) as session:
            misbehaving = [self.leaver(session), self.slow_reader(), self.nonsense(session)]
            await asyncio.gather(*(self.client(session, i) for i in range(clients)), *misbehaving)

    async def metrics(self) -> dict[str, float]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.address}/metrics") as reply:
            lines = [line.rsplit(" ", 1) for line in (await reply.text()).splitlines()]
        return {name: float(value) for name, value in lines}


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


async def measure(load: Load, clients: int, pid: int) -> tuple[list[float], dict[str, float]]:
    """Run the load; the server's memory at every second, and its metrics after it has become idle."""
    memory = []
    running = asyncio.ensure_future(load.run(clients))
    while not running.done():
        memory.append(resident(pid))
        await asyncio.sleep(1)
    await running
    for _ in range(60):
        metrics = await load.metrics()
        if not metrics["phivision_samples_in_flight"] and not metrics["phivision_engine_active"]:
            break
        await asyncio.sleep(1)
    return memory, metrics


def main(
    clients: int = 32,
    seconds: float = 120.0,
    slots: int = 8,
    longest: int = 100,
    length: int = 512,
    checkpoint: Path | None = None,
    out: Path | None = None,
) -> None:
    """Run the benchmark.

    Args:
      clients: well-behaved clients at the same time.
      seconds: how long they ask.
      slots: sequences that the server generates at the same time.
      longest: limit of the tokens of an answer.
      length: tokens of a slot.
      checkpoint: model to serve; default: a tiny one with random weights.
      out: also write the results to this JSON file, and the table into docs/serving.md.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint or write_small_model(Path(folder) / "model")
        command = [sys.executable, "-m", "phivision_jax.cli", "serve", str(model), "--port=0", f"--slots={slots}"]
        command += [f"--length={length}", "--max-queue=256", "--client-seconds=30"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(Path(folder) / "log", "w") as log:
            server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout
            address = next(re.search(r"http://[^,\s]+", line) for line in server.stdout if "a page at" in line)
            assert address
            load = Load(address[0], time.monotonic() + seconds, longest)
            memory, metrics = asyncio.run(measure(load, clients, server.pid))
        finally:
            server.terminate()
            code = server.wait(60)
        if code or "Traceback" in (Path(folder) / "log").read_text():
            load.failures.append(f"exit code {code}: {(Path(folder) / 'log').read_text()[-2000:]}")
    report(load, memory, metrics, clients, seconds, out)


def report(
    load: Load, memory: list[float], metrics: dict[str, float], clients: int, seconds: float, out: Path | None
) -> None:
    table = Table("seconds", *PERCENTILES, "count", title=f"{clients} clients for {seconds:g} s")
    results: dict[str, Any] = {"clients": clients, "seconds": seconds}
    for name, found in load.seconds.items():
        values = [float(v) for v in np.percentile(found, [50, 95, 99, 100])]
        results[name] = dict(zip(PERCENTILES, values, strict=True)) | {"count": len(found)}
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{len(found):,}")
    # The first quarter fills caches: of compiled programs, of images, and the allocator's.
    quarter = len(memory) // 4
    parts = [float(np.median(memory[i * quarter : (i + 1) * quarter])) for i in range(4)]
    results |= {"tokens_per_s": load.tokens / seconds, "memory_mib_by_quarter": parts, "failures": load.failures[:20]}
    results |= {"others": dict(load.others), "in_flight_after": metrics["phivision_samples_in_flight"]}
    results |= {
        "active_after": metrics["phivision_engine_active"],
        "compiled": metrics["phivision_engine_programs_compiled"],
    }
    Console().print(table)
    print(json.dumps({k: v for k, v in results.items() if k not in load.seconds}, indent=1))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")
        rows = [[n, *(f"{results[n][p]:.2f}" for p in PERCENTILES), f"{results[n]['count']:,}"] for n in load.seconds]
        rows += [["server's memory in MiB, by quarter of the time", *(f"{part:,.0f}" for part in parts), ""]]
        head = [f"seconds, {clients} clients for {seconds:g} s", *PERCENTILES, "count"]
        PAGE.write_text(fill(PAGE.read_text(), "measured", markdown(head, rows)))
    grew = parts[3] > 1.02 * parts[2]
    if load.failures or grew or results["in_flight_after"] or results["active_after"]:
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
