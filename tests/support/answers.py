"""Generators whose answers are a function of the request: in memory, and behind HTTP with faults."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from phivision_jax.inference.requests import Finished, Outcome, Reply, Request, Timings, in_order

type Answer = Callable[[str, str], str]
"""The answer to the text of a question in a mode."""


def sum_of(question: str, mode: str) -> str:
    """The right answer to "a + b?", except in mode "nothink", which is wrong for every third b."""
    a, b = map(int, re.findall(r"\d+", question)[:2])
    return str(a + b + (mode == "nothink" and b % 3 == 0))


@dataclasses.dataclass
class Answers:
    """A generator in memory, which finishes its requests in another order than it receives them.

    Attributes:
      fails: numbers of requests that fail.
      asked: the requests.
    """

    answer: Answer = sum_of
    fails: frozenset[int] = frozenset()
    slots: int = 4
    asked: list[Request] = dataclasses.field(default_factory=list)

    def as_finished(self, requests: Iterable[Request]) -> Finished:
        waiting: list[tuple[int, Outcome]] = []
        rng = random.Random(0)
        for number, request in enumerate(requests):
            self.asked.append(request)
            failed = number in self.fails
            waiting.append((number, OSError("no connection") if failed else [self.reply(request)]))
            if len(waiting) > self.slots:
                yield waiting.pop(rng.randrange(len(waiting)))
        yield from waiting

    def generate(self, requests: Iterable[Request], advance: Callable[[int], None] = lambda _: None) -> list:
        return in_order(self.as_finished(requests), advance)

    def reply(self, request: Request) -> Reply:
        messages, _ = request.conversation()
        text, thinks = self.answer(str(messages[-1]["content"]), request.mode), request.mode == "think"
        return Reply(
            thought="hm" if thinks else "",
            answer=text,
            mode="think" if thinks else "nothink",
            finish_reason="stop",
            ids=(),
            prompt_tokens=10,
            image_tokens=4,
            thought_tokens=3 * thinks,
            answer_tokens=1,
            timings=Timings(0.0, 0.25, 0.5 + thinks),
        )


@contextlib.contextmanager
def serve_answers(
    answer: Answer = sum_of,
    *,
    faults: Callable[[int], str] = lambda number: "",
    seconds: float = 0.0,
    silence: float = 5.0,
) -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI endpoint: its address, and the bodies that it received.

    Args:
      faults: "fail", "silent", "garbage", or "" for an answer, by the number of the call.
      seconds: of an answer.
      silence: seconds without a byte of a silent one.
    """
    received: list[dict] = []
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                received.append(body)
                fault = faults(len(received) - 1)
            time.sleep(silence if fault == "silent" else seconds)
            with contextlib.suppress(OSError):  # the client has gone
                self.send_response(503 if fault == "fail" else 200)
                self.end_headers()
                self.wfile.write(b'data: {"choices": 5}\n\n' if fault == "garbage" else self._reply(body).encode())

        def _reply(self, body: dict) -> str:
            content = body["messages"][-1]["content"]
            text = " ".join(part["text"] for part in content if part["type"] == "text")
            delta = {"content": answer(text, body.get("mode", "auto"))}
            pieces = [
                {"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]},
                {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}},
            ]
            return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
