"""A conversation in a terminal: several turns with images, answers printed while they are generated."""

import base64
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from phivision_jax.images.decode import open_image
from phivision_jax.inference.requests import Event, Generator, Reply, Request
from phivision_jax.io.messages import first_line, printable
from phivision_jax.text.constants import IMAGE_MARKER

HELP = """\
/image FILE                   send an image with the next question, in which <image> may mark its place
/mode auto | think | nothink  let the model decide whether to think, make it think, or not
/new                          begin a new conversation
/save FILE                    write the conversation as a line of JSON that phivision data import reads
/quit                         end the program, as Ctrl-D does; Ctrl-C only stops an answer"""


class Conversation:
    """A conversation with a model, driven by lines of text.

    Earlier thoughts are not sent again. A question without an answer is left out, and its images go with the next one.

    Args:
      generator: answers the questions; an interruption must not disturb it (``LocalGenerator.start``).
      settings: of each ``Request``.
      images: contents of image files, for the first question.
    """

    def __init__(self, generator: Generator, settings: Mapping[str, Any], images: Sequence[bytes] = ()) -> None:
        self._generator, self._settings = generator, dict(settings)
        self._messages: list[dict[str, str]] = []
        self._images: list[bytes] = []
        self._waiting = list(images)

    def run(self) -> None:
        """Read questions and commands from standard input until it ends; errors are printed and end nothing."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # would otherwise stop an answer, as Ctrl-C does
        if interactive := sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                __import__("readline")  # input() then edits lines and repeats earlier ones
            _note("Ask a question, or type /help.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                line = ""
                print()
            if line.split(" ")[0] == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*shlex.split(line[1:]))
                elif line:
                    self._ask(line)
            except (ValueError, OSError) as error:
                _note(first_line(error))

    def _command(self, name: str = "", *words: str) -> None:
        value = " ".join(words)
        if name == "image":
            content = Path(value).expanduser().read_bytes()
            width, height = open_image(content, value).size
            self._waiting.append(content)
            _note(f"{width}x{height} pixels, to be sent with the next question")
        elif name == "mode":
            Request("", mode=cast(Any, value))  # refuses other modes
            self._settings["mode"] = value
        elif name == "save":
            images = ["data:;base64," + base64.b64encode(image).decode() for image in self._images]
            with Path(value).expanduser().open("x") as file:
                file.write(json.dumps({"messages": self._messages, "images": images}) + "\n")
        elif name == "new":
            self._messages, self._images, self._waiting = [], [], []
        elif name == "help":
            _note(HELP)
        else:
            raise ValueError(f"there is no command /{name}; /help lists them")

    def _ask(self, text: str) -> None:
        markers = "" if IMAGE_MARKER in text else (IMAGE_MARKER + "\n") * len(self._waiting)
        question, images = {"role": "user", "content": markers + text}, [*self._images, *self._waiting]
        past = [{"role": message["role"], "content": message["content"]} for message in self._messages]
        events = self._generator.stream(Request([*past, question], images, **self._settings))
        thought, answer = show(events, stoppable=True)
        if answer.strip():
            self._messages += [question, {"role": "assistant", "content": answer, "reasoning_content": thought}]
            self._images, self._waiting = images, []


def show(events: Iterator[Event], stoppable: bool = False) -> tuple[str, str]:
    """Print an answer: to a terminal while it is generated, its thought dim; elsewhere at once, with its tags.

    Args:
      stoppable: end the answer, but not the program, at Ctrl-C.

    Returns:
      Thought and answer, as far as they were generated.
    """
    texts, streams = {"thought": "", "answer": ""}, sys.stdout.isatty()
    try:
        with contextlib.closing(cast(Any, events)):
            for event in events:
                if isinstance(event, Reply):
                    texts = {"thought": event.thought, "answer": event.answer}
                    print("" if streams else printable(event.text), flush=True)
                elif streams:
                    gap = "\n\n" if event.kind == "answer" and texts["thought"] and not texts["answer"] else ""
                    dim, plain = ("\x1b[2m", "\x1b[0m") if event.kind == "thought" else ("", "")
                    print(f"{gap}{dim}{printable(event.text)}{plain}", end="", flush=True)
                    texts[event.kind] += event.text
    except KeyboardInterrupt:
        if not stoppable:
            raise
        _note("\n(stopped)")
    return texts["thought"], texts["answer"]


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
