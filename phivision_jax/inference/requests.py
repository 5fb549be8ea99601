"""Requests to a generator and its replies, the same for the local engine and for an OpenAI endpoint.

request = Request("What is this?", images=["cat.jpg"], mode="think", n=2)
first, second = generator.generate([request])[0]         # a Reply per sample
for event in generator.stream(request):                  # a Delta per piece of text, then a Reply per sample
    ...
"""

import collections.abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from phivision_jax.config import typed
from phivision_jax.images.sources import ImageSource, listed
from phivision_jax.io.messages import prefix_errors, shorten
from phivision_jax.rows import Example
from phivision_jax.text.chat import Message
from phivision_jax.text.constants import IMAGE_MARKER, Mode, PromptMode

FinishReason = Literal["stop", "length", "cancelled"]
MAX_NEW_TOKENS = 4096
"""Default limit of thought and answer, as in the published evaluations."""
MAX_TOP_LOGPROBS, MAX_SAMPLES, MAX_STOPS = 20, 128, 16


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation to be answered, and how.

    Raises:
      ValueError: for a setting of the wrong type or out of range, naming it.
    """

    messages: str | Message | Sequence[Message] | Example
    """A question, a message or a list of messages (``text.chat``); a single question without ``<image>`` markers gets
    its images in front. A local generator also takes a prompt that is encoded already, images included."""
    images: Any = ()
    """One image or a list, each as ``images.sources`` takes it; they replace ``<image>`` markers in order."""
    mode: PromptMode = "auto"
    """"think" and "nothink" force the answer to begin so, "auto" leaves it to the model."""
    max_new_tokens: int | None = None
    """Limit of thought and answer together; default: 4,096, or what the length of the engine's slots leaves."""
    thinking_budget: int | None = None
    """Limit of the thought in tokens: it is then closed by ``</think>``, and the answer follows. 0 in mode "auto" is
    mode "nothink". None: no limit."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: from all."""
    seed: int = 0
    """Equal seeds give equal samples, whatever else is generated at the same time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are left out of it. They are not looked for in the thought."""
    n: int = 1
    """Number of independent samples."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of this many most likely ones, before temperature, top-p and top-k;
    None for neither."""

    def __post_init__(self) -> None:
        for name, (wanted, least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is getattr(type(self), name) or (value is None and name in _OPTIONAL):
                continue  # most settings are defaults, and most requests are made several times on their way
            kind: type = int if "integer" in wanted else float
            try:
                number = typed(value.item() if hasattr(value, "item") else value, kind, name)
            except ValueError:
                number = None
            if number is None or not least <= number <= most:
                raise ValueError(f"{name} must be {wanted}, not {shorten(value)}")
            object.__setattr__(self, name, number)
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, not {shorten(self.mode)}")
        if self.mode == "auto" and self.thinking_budget == 0:
            object.__setattr__(self, "mode", "nothink")
        stops = tuple(self.stop) if isinstance(self.stop, list | tuple) else (self.stop,)
        if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop must be at most {MAX_STOPS} non-empty texts, not {shorten(self.stop)}")
        object.__setattr__(self, "stop", stops)

    def conversation(self) -> tuple[list[Message], list[ImageSource]]:
        """The messages as a list, with images of a single question in front of it, and the list of images."""
        given: Any = self.messages
        images = listed(self.images)
        if isinstance(given, str):
            given = {"role": "user", "content": given}
        messages = list(given) if isinstance(given, Sequence) else [given]
        content = messages[0].get("content") if len(messages) == 1 and isinstance(messages[0], Mapping) else None
        if isinstance(content, str) and IMAGE_MARKER not in content:
            messages = [{**messages[0], "content": (IMAGE_MARKER + "\n") * len(images) + content}]
        return messages, images


_MODES = get_args(PromptMode)
_OPTIONAL = ("max_new_tokens", "thinking_budget", "logprobs")
_RANGES: Mapping[str, tuple[str, float, float]] = {
    "max_new_tokens": ("an integer of at least 1", 1, 2**31 - 1),
    "thinking_budget": ("an integer of at least 0", 0, 2**31 - 1),
    "temperature": ("a number from 0 to 100", 0, 100),
    "top_p": ("a number above 0 and at most 1", 1e-30, 1),
    "top_k": ("an integer of at least 0", 0, 2**31 - 1),
    "seed": ("an integer of 63 bits", -(2**63), 2**63 - 1),
    "n": (f"an integer from 1 to {MAX_SAMPLES}", 1, MAX_SAMPLES),
    "logprobs": (f"an integer from 0 to {MAX_TOP_LOGPROBS}", 0, MAX_TOP_LOGPROBS),
}


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability, and the most likely tokens at its place, (id, log-probability) each."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of a reply, by the host's monotonic clock."""

    queue: float
    """From submission to the beginning of the prefill."""
    prefill: float
    """From there to the first token."""
    decode: float
    """From the first token to the last."""

    def per_token(self, tokens: int) -> float:
        """Seconds per token after the first, of a reply of this many tokens; 0 for fewer than two."""
        return self.decode / (tokens - 1) if tokens > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """One sample of the answer to a request."""

    thought: str
    """The text between ``<think>`` and ``</think>``; empty without thoughts."""
    answer: str
    """The text after it, without control tokens."""
    mode: Mode | None
    """The mode that the reply shows: forced, or chosen by the model; None if it began with neither token."""
    finish_reason: FinishReason
    """"stop": a stop token or text; "length": a limit of tokens; "cancelled"."""
    ids: tuple[int, ...]
    """Generated token ids, without the stop token; those of a forced mode are part of the prompt."""
    prompt_tokens: int
    """Tokens of the prompt, vision tokens included."""
    image_tokens: int
    """Vision tokens among them."""
    thought_tokens: int
    """Generated tokens of the thought, its closing tag included."""
    answer_tokens: int
    """Generated tokens of the answer."""
    timings: Timings
    thought_closed: bool = True
    """False for a thought that was cut off by a limit."""
    index: int = 0
    """Number of the sample, from 0 to n - 1."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per id, if the request asked for them."""

    @property
    def text(self) -> str:
        """Thought and answer as one text, ``<think>…</think>…``, with the tags that the reply has."""
        if self.mode != "think":
            return self.answer
        return f"<think>{self.thought}{'</think>' if self.thought_closed else ''}{self.answer}".strip()


@dataclasses.dataclass(frozen=True)
class Delta:
    """A piece of text of a reply that is being generated, complete characters only."""

    index: int
    """Number of the sample."""
    kind: Literal["thought", "answer"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token since the last delta, if the request asked for them."""


type Event = Delta | Reply
type Outcome = list[Reply] | ValueError | OSError
"""The replies to a request, one per sample in their order, or why there are none."""
type Finished = collections.abc.Generator[tuple[int, Outcome]]


class Generator(Protocol):
    """Answers requests: a local model (``inference.local``) or an OpenAI endpoint (``inference.endpoint``)."""

    def generate(
        self, requests: Iterable[Request], advance: Callable[[int], None] = lambda _: None
    ) -> list[list[Reply]]:
        """Answer requests, n samples each, in their order; ``advance`` receives 1 for each one that is finished.

        Requests are taken one after the other, a few before their turn, so that not all of their images are in memory.

        Raises:
          ValueError: for a request that cannot be answered, such as a prompt that is too long, naming it by its number.
          OSError: for an endpoint that does not answer.
        """
        ...

    def as_finished(self, requests: Iterable[Request]) -> Finished:
        """Answer requests as ``generate`` does; yield each one's number and its replies as soon as it is finished.

        The order is that of finishing. A request that fails has its error in place of replies, and does not stop the
        others. Closing the iterator cancels what is not finished.
        """
        ...

    def stream(self, request: Request) -> Iterator[Event]:
        """Answer one request piece by piece; each sample ends with its ``Reply``.

        Closing the iterator cancels the request.
        """
        ...


def in_order(finished: Finished, advance: Callable[[int], None]) -> list[list[Reply]]:
    """The result of ``Generator.generate`` from ``Generator.as_finished``; errors as the former."""
    replies: dict[int, list[Reply]] = {}
    with contextlib.closing(finished):
        for number, outcome in finished:
            with prefix_errors(f"request {number}"):
                if isinstance(outcome, Exception):
                    raise outcome
            replies[number] = outcome
            advance(1)
    return [replies[number] for number in sorted(replies)]
