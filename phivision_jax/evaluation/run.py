"""Ask a generator the items of benchmarks in each mode, score its replies, and pass on each result as it is finished.

    task.items ──► requests of all modes, images laid out once ──► cache, or generator ──► rule, or judge ──► receive
    (a thread that reads ahead)

The modes of an item are submitted together: their prompts differ in the last token only, so the engine shares the rest.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from phivision_jax.evaluation.benchmark import Item
from phivision_jax.evaluation.judge import Judge
from phivision_jax.evaluation.reply_cache import ReplyCache, cache_key
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.scoring import Score
from phivision_jax.evaluation.task import Sampling, Task, digest, fingerprint
from phivision_jax.inference.requests import Finished, Outcome, Reply, Request, Timings
from phivision_jax.io.messages import first_line
from phivision_jax.text.constants import PromptMode
from phivision_jax.text.tokenizer import END_THINK, THINK

_BLOCK, _AHEAD = 4, 2
"""Items that are read together, and blocks of them that are read before their turn: a switch of threads per item would
cost more than the item."""
_LAID_OUT = 8
"""Images that are kept, as neighbouring items often share one."""
_JUDGED_AT_ONCE = 8
_SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
_NO_REPLY = Reply("", "", None, "stop", (), 0, 0, 0, 0, Timings(0, 0, 0))


@dataclasses.dataclass(frozen=True)
class Question:
    """An item in one mode."""

    task: Task
    item: Item
    mode: PromptMode
    fingerprint: str
    images: tuple[str, ...]
    """Names of its images in the results."""
    request: Request | ValueError
    """The error of an item for which there is none, such as an image that cannot be decoded."""


type Receive = Callable[[Result, Item], None]
type Patch = Callable[[bytes], Any]


class Answering(Protocol):
    """The part of a ``Generator`` that is used."""

    def as_finished(self, requests: Iterable[Request]) -> Finished: ...


@dataclasses.dataclass
class Runner:
    """Asks the items of tasks, and scores the replies."""

    generator: Answering
    receive: Receive
    """Called with each result and its item, one call at a time, on any thread."""
    modes: Sequence[PromptMode] = ("auto",)
    sampling: Sampling = Sampling()
    cache: ReplyCache | None = None
    model: str = ""
    """Identity of the model in keys of the cache."""
    judge: Judge | None = None
    patch: Patch = bytes
    """Lays out an image for the generator, once for all modes; raises ValueError for one that cannot be decoded."""
    by_mode: bool = False
    """Ask all items in one mode before the next: nothing of an item's prompt is computed already when it is timed."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._lay_out = functools.lru_cache(_LAID_OUT)(self.patch)
        self._judging: collections.deque[Future[None]] = collections.deque()

    def run(self, tasks: Sequence[Task], skip: Collection[tuple[str, str, str]] = ()) -> None:
        """Ask everything; requests that fail have results too.

        Args:
          skip: ``Result.key`` of what is answered already.

        Raises:
          RuntimeError: when the engine fails.
          OSError: when a result cannot be written.
        """
        asked: dict[int, Question] = {}

        def requests() -> Iterator[Request]:
            number = 0
            for question in self._questions(tasks, skip):
                if isinstance(question.request, ValueError):
                    self._finish(question, question.request)
                elif self.cache and (known := self.cache.get(self._key(question))):
                    self._finish(question, [known], cached=True)
                else:
                    asked[number] = question
                    number += 1
                    yield question.request

        with ThreadPoolExecutor(_JUDGED_AT_ONCE) as self._judges:
            with contextlib.closing(self.generator.as_finished(requests())) as finished:
                for number, outcome in finished:
                    question = asked.pop(number)
                    if self.cache and isinstance(outcome, list):
                        self.cache.put(self._key(question), outcome[0])
                    self._finish(question, outcome)
                    while self._judging and self._judging[0].done():
                        self._judging.popleft().result()
            while self._judging:
                self._judging.popleft().result()

    def _key(self, question: Question) -> str:
        return cache_key(self.model, question.mode, question.fingerprint)

    # -- asking -------------------------------------------------------------------------------------------------------

    def _questions(self, tasks: Sequence[Task], skip: Collection[tuple[str, str, str]]) -> Iterator[Question]:
        orders = [(mode,) for mode in self.modes] if self.by_mode else [tuple(self.modes)]
        numbers = ((task, i, modes) for modes in orders for task in tasks for i in task.chosen)
        read = functools.partial(self._of_items, skip=skip)
        for questions in _read_ahead(read, itertools.batched(numbers, _BLOCK)):
            yield from questions

    def _of_items(
        self, given: Iterable[tuple[Task, int, Sequence[PromptMode]]], skip: Collection[tuple[str, str, str]]
    ) -> list[Question]:
        return [question for each in given for question in self._of_item(*each, skip)]

    def _of_item(
        self, task: Task, number: int, modes: Sequence[PromptMode], skip: Collection[tuple[str, str, str]]
    ) -> list[Question]:
        """The questions about an item in those modes in which it is not answered yet."""
        item = task.items[number]
        modes = [mode for mode in modes if (task.name, item.id, mode) not in skip]
        if not modes:
            return []
        plain = self.sampling.request(task.benchmark, item)
        names = tuple(f"{digest(image)}.{_suffix(image)}" for image in item.images)
        found, patched = fingerprint(plain), list[Any]()
        try:
            patched += [self._lay_out(image) for image in plain.images]
        except ValueError as error:
            return [Question(task, item, mode, found, names, error) for mode in modes]
        asked = [dataclasses.replace(plain, images=patched, mode=mode) for mode in modes]
        return [Question(task, item, mode, found, names, request) for mode, request in zip(modes, asked, strict=True)]

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _finish(self, question: Question, outcome: Outcome, cached: bool = False) -> None:
        """Score a reply, or the failure of a request, and pass on the result."""
        if isinstance(outcome, Exception):
            self._receive(question, _NO_REPLY, Score(0.0, None, "there is no reply"), error=first_line(outcome))
            return
        reply = separate_thought(outcome[0])
        benchmark, item = question.task.benchmark, question.item
        prompt = benchmark.judge_prompt(reply.answer, item) if self.judge else None
        if self.judge is None or prompt is None:
            self._receive(question, reply, benchmark.score(reply.answer, item), cached=cached)
        else:
            self._judging.append(self._judges.submit(self._judged, self.judge, prompt, question, reply, cached))

    def _judged(self, judge: Judge, prompt: str, question: Question, reply: Reply, cached: bool) -> None:
        benchmark, item = question.task.benchmark, question.item
        try:
            score = benchmark.judge_score(judge.ask(prompt), item)
        except (ValueError, OSError) as error:
            problem = f"the judge failed: {first_line(error)}"
            self._receive(question, reply, benchmark.score(reply.answer, item), cached=cached, error=problem)
        else:
            self._receive(question, reply, score, cached=cached, judge=judge.name)

    def _receive(
        self, question: Question, reply: Reply, score: Score, *, cached: bool = False, error: str = "", judge: str = ""
    ) -> None:
        item, times = question.item, reply.timings
        result = Result(
            benchmark=question.task.name,
            item=item.id,
            mode=question.mode,
            taken=reply.mode,
            fingerprint=question.fingerprint,
            question=item.question,
            images=question.images,
            record=item.record,
            groups=item.groups,
            cluster=item.cluster or " ".join(name[:16] for name in question.images) or item.id,
            thought=reply.thought,
            answer=reply.answer,
            finish_reason="error" if reply is _NO_REPLY else reply.finish_reason,
            error=error,
            value=score.value,
            extracted=score.extracted,
            reason=score.reason,
            judge=judge,
            prompt_tokens=reply.prompt_tokens,
            image_tokens=reply.image_tokens,
            thought_tokens=reply.thought_tokens,
            answer_tokens=reply.answer_tokens,
            queue=times.queue,
            prefill=times.prefill,
            decode=times.decode,
            cached=cached,
        )
        with self._lock:
            self.receive(result, item)


def separate_thought(reply: Reply) -> Reply:
    """A reply without a thought in its answer, as endpoints give it that do not separate them."""
    before, closed, answer = reply.answer.rpartition(END_THINK)
    if closed:
        thought = before.strip().removeprefix(THINK).strip()
        return dataclasses.replace(reply, thought=reply.thought or thought, answer=answer.strip(), mode="think")
    if reply.answer.lstrip().startswith(THINK):
        thought = reply.answer.strip().removeprefix(THINK).strip()
        return dataclasses.replace(reply, thought=thought, answer="", mode="think", thought_closed=False)
    return reply


def _read_ahead[A, B](function: Callable[[A], B], arguments: Iterable[A]) -> Iterator[B]:
    """The results of a function, in order, computed on a thread before their turn."""
    with ThreadPoolExecutor(1) as pool:
        coming: collections.deque[Future[B]] = collections.deque()
        try:
            for argument in arguments:
                coming.append(pool.submit(function, argument))
                if len(coming) > _AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _suffix(image: bytes) -> str:
    return next((suffix for start, suffix in _SUFFIXES.items() if image.startswith(start)), "bin")
