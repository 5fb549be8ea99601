"""The local generator: requests answered by a model in this process.

Without a thread, waiting for a result drives the engine: ``generate`` until all replies have come, ``stream``
while it is iterated. Servers start a thread (``start``), which then drives it for all.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax.numpy as jnp

from phivision_jax.inference.engine import Engine
from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.prompts import Prompt
from phivision_jax.inference.requests import MAX_NEW_TOKENS, Event, Finished, Reply, Request, in_order
from phivision_jax.inference.sample import Sample
from phivision_jax.inference.scheduler import Scheduler
from phivision_jax.inference.transcript import Transcript
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from phivision_jax.rows import Example

_log = logging.getLogger(__name__)
SLOTS, LENGTH, CHUNK = 8, 8192, 2048
"""Default sizes: sequences at the same time, tokens of each, and most tokens of prompts per row."""
IMAGE_BYTES, MOST_IMAGES = 512 << 20, 64
"""Default memory for vision tokens of images that may be asked about again, and most images of the largest size."""
type OnEvent = Callable[[Event | Exception], None]
type Events = queue.SimpleQueue[tuple[int, Event | Exception]]


class Ticket:
    """A submitted request."""

    def __init__(self, samples: Sequence[Sample], wake: Callable[[], None]) -> None:
        self._samples, self._wake = samples, wake

    @property
    def finished(self) -> bool:
        """True once every sample has its reply."""
        return all(sample.finished for sample in self._samples)

    def cancel(self) -> None:
        """Stop generating; each sample that is not finished ends with a reply "cancelled". Safe from any thread."""
        for sample in self._samples:
            sample.cancelled = True
        self._wake()


class LocalGenerator:
    """A ``requests.Generator`` on a model in this process.

    Args:
      model: its parameters may be on a mesh.
      processor: of the model; one without a tokenizer answers encoded prompts (``rows.Example``), with ids only.
      slots: sequences that are generated at the same time; rounded up to what mesh and platform need.
      length: tokens of a slot, prompt and answer together; default: 8,192, or the model's positions.
      chunk: most tokens of prompts that are prefilled together; larger for a model whose images may not be cut.
      cache_dtype: of keys and values; default: the computation's; "int8" halves the memory of bfloat16.
      image_bytes: memory for vision tokens of images.
      stop_ids: tokens that end an answer; default: those of the model's configuration.
      share_prefixes: False prefills every prompt completely.
    """

    def __init__(
        self,
        model: PhiVision,
        processor: Processor,
        *,
        slots: int = SLOTS,
        length: int | None = None,
        chunk: int = CHUNK,
        cache_dtype: Any = None,
        image_bytes: int = IMAGE_BYTES,
        stop_ids: tuple[int, ...] | None = None,
        share_prefixes: bool = True,
    ) -> None:
        config, self.processor = processor.config, processor
        decoder, dtype = config.decoder, model.decoder.dtype
        self.length = min(length or LENGTH, decoder.max_positions)
        tokenizer = processor.find_tokenizer()
        largest = processor.layout.max_tokens(config.max_patches)
        if config.image_attention == "bidirectional":
            chunk = max(chunk, largest)
        chunk = -(-min(chunk, self.length) // BLOCK) * BLOCK
        self.engine = Engine(
            model,
            slots=slots,
            length=self.length,
            chunk=chunk,
            # A piece of a prompt can begin and end within an image.
            pool=max(
                min(image_bytes // (decoder.hidden_size * dtype.itemsize), MOST_IMAGES * largest), chunk + 2 * largest
            ),
            cache_dtype=jnp.dtype(cache_dtype or dtype),
            stop_ids=decoder.stop_ids if stop_ids is None else stop_ids,
            think_id=tokenizer.think_id if tokenizer else -1,
            end_think_id=tokenizer.end_think_id if tokenizer else -1,
        )
        self.scheduler = Scheduler(self.engine, share_prefixes=share_prefixes)
        self._inbox: queue.SimpleQueue[list[Sample]] = queue.SimpleQueue()
        self._lock, self._wake, self._door = threading.Lock(), threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def update(self, model: PhiVision) -> None:
        """Answer with other weights of the same model from now on; what was cached of prompts and images is forgotten.

        Raises:
          RuntimeError: while requests are being answered.
        """
        with self._lock:
            self._take_in()
            self.scheduler.forget()
            self.engine.update(model)

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_event: OnEvent, *, deltas: bool = True) -> Ticket:
        """Queue a request, from any thread.

        Args:
          on_event: called on the thread that drives the engine, with each ``Delta`` and ``Reply``, or with the
            exception that ended the request; it must return quickly.
          deltas: False gives replies alone, which takes less time.

        Raises:
          ValueError: for a request that cannot be answered, such as a prompt that is too long.
          RuntimeError: after ``close``.
        """
        prompt, limit = self._prompt(request)
        samples = []
        for index in range(request.n):
            forced = None if request.mode == "auto" else request.mode
            transcript = Transcript(self.processor.find_tokenizer(), forced, request.stop)
            samples.append(Sample(request, index, prompt, limit, transcript, on_event, deltas=deltas))
        ticket = Ticket(samples, self._wake.set)
        with self._door:  # after ``close`` nobody looks into the inbox
            if self._closed:
                raise RuntimeError("the generator is closed and answers no more requests; make another one")
            self._inbox.put(samples)
        self._wake.set()
        return ticket

    def _prompt(self, request: Request) -> tuple[Prompt, int]:
        """The prompt of a request and the limit of its new tokens."""
        given: Any = request.messages
        if isinstance(given, Example):
            example = given
        else:
            example = self.processor.encode(*request.conversation(), mode=request.mode, generation_prompt=True)
        room = self.length - len(example.tokens)
        limit = min(MAX_NEW_TOKENS, room) if request.max_new_tokens is None else request.max_new_tokens
        if limit > room or room < 1:
            wanted = f" and {limit:,} new ones are asked for" if room >= 1 else ""
            raise ValueError(
                f"the prompt has {len(example.tokens):,} tokens, images included{wanted}, but a slot has "
                f"{self.length:,}; shorten it, ask for fewer, or give the generator a larger length"
            )
        return Prompt.from_example(example, self.processor.config), limit

    def generate(
        self, requests: Iterable[Request], advance: Callable[[int], None] = lambda _: None
    ) -> list[list[Reply]]:
        """As ``requests.Generator``; prompts are encoded while others are generated."""
        return in_order(self.as_finished(requests), advance)

    def as_finished(self, requests: Iterable[Request]) -> Finished:
        """As ``requests.Generator``."""
        submitted: dict[int, tuple[Ticket, int, list[Reply]]] = {}
        events: Events = queue.SimpleQueue()
        coming = enumerate(requests)
        more, queued = True, 0
        try:
            while more or queued:
                # Far enough ahead that no slot waits for a prompt, and no farther: patches of images are large.
                while more and queued < 2 * self.engine.slots:
                    i, request = next(coming, (-1, None))
                    if request is None:
                        more = False
                        break
                    try:
                        ticket = self.submit(request, functools.partial(_put, events, i), deltas=False)
                        submitted[i] = ticket, request.n, []
                        queued += request.n
                    except ValueError as error:
                        yield i, error
                for i, event in self._drive(events) if queued else ():
                    if isinstance(event, Reply):
                        queued -= 1
                        _, n, replies = submitted[i]
                        replies.append(event)
                        if len(replies) == n:
                            del submitted[i]
                            yield i, sorted(replies, key=lambda reply: reply.index)
        finally:
            for ticket, _, _ in submitted.values():
                ticket.cancel()

    def stream(self, request: Request) -> Iterator[Event]:
        """As ``requests.Generator``."""
        events: Events = queue.SimpleQueue()
        ticket = self.submit(request, functools.partial(_put, events, 0))
        left = request.n
        try:
            while left:
                for _, event in self._drive(events):
                    left -= isinstance(event, Reply)
                    yield event
        finally:
            if not ticket.finished:
                ticket.cancel()

    def _drive(self, events: Events) -> list[tuple[int, Event]]:
        """Some events: those of one step of the engine, or what its thread has sent."""
        if self._thread is None:
            with self._lock:
                self._step()
        found = [] if self._thread is None else [events.get()]
        while not events.empty():
            found.append(events.get())
        for _, event in found:
            if isinstance(event, Exception):
                raise event
        return cast(list[tuple[int, Event]], found)

    # -- driving ------------------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        while not self._inbox.empty():
            self.scheduler.submit(self._inbox.get())

    def _step(self) -> None:
        self._take_in()
        if not self.scheduler.idle:
            try:
                self.scheduler.step()
            except BaseException as error:
                self._recover(error)
                raise

    def _recover(self, error: BaseException) -> None:
        """Tell everybody who waits, and begin again: slots may not hold what was planned for them."""
        reported = error if isinstance(error, Exception) else RuntimeError(f"interrupted by {type(error).__name__}")
        for sample in self.scheduler.reset():
            cast(OnEvent, sample.on_event)(reported)
        self.engine.reset()

    def start(self) -> None:
        """Drive the engine on a thread from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            try:
                with self._lock:
                    self._step()
            except Exception:
                _log.exception("requests have failed")
            if self.scheduler.idle and self._inbox.empty():
                self._wake.wait()

    def close(self) -> None:
        """End the thread; requests in flight end with "cancelled"."""
        with self._door:
            self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._take_in()
        for sample in {*self.scheduler.waiting, *filter(None, self.scheduler.owners)}:
            sample.cancelled = True
        if not self.scheduler.idle:
            self.scheduler.step()

    def stats(self) -> dict[str, Any]:
        """Numbers for monitoring, all since the generator was made except the first three."""
        scheduler = self.scheduler
        active = sum(owner is not None for owner in scheduler.owners)
        now = {"slots": self.engine.slots, "active": active, "waiting": len(scheduler.waiting) + self._inbox.qsize()}
        images = {"images_encoded": scheduler.images.encoded, "images_reused": scheduler.images.found}
        return now | dict(scheduler.counts) | images | {"programs_compiled": self.engine.compiled}

    def warm_up(self, advance: Callable[[int], None] = lambda _: None) -> None:
        """Compile every program that requests can need; ``advance`` receives 1 for each of ``engine.shapes()``."""
        with self._lock:
            self.engine.warm_up(advance)


def _put(events: Events, i: int, event: Event | Exception) -> None:
    events.put((i, event))
