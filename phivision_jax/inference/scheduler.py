"""Continuous batching: which prompts enter which slots, in which pieces, and what becomes of the chosen tokens.

    waiting ──► a slot, with the longest prefix that any slot of its shard holds ──► pieces of its prompt in rows,
                                                                                     beside those that begin alike
            ──► decoding with all other active slots ──► finished: the slot is free, and still holds its tokens

Every slot is also a cache of the prefix that it holds, until another sequence takes it: a system prompt, the samples of
one request, and the next turn of a conversation are prefilled once. Decisions depend on nothing but the requests and
the tokens, so that all processes of a job make the same ones.
"""

import collections
import itertools
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from phivision_jax.inference.engine import Engine, smallest
from phivision_jax.inference.image_pool import ImagePool
from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.pieces import LEAST_ALIKE, Piece, PlannedRow, arrange, lay_out, num_tokens
from phivision_jax.inference.programs import Row
from phivision_jax.inference.requests import FinishReason
from phivision_jax.inference.sample import Sample

LEAST_SHARED = 64
"""Fewest tokens of a prefix that is read from a slot: nearly all prompts begin with the same few, which are computed at
once."""
LEAST_REST = 8
"""A rest of a row below one part of so many is not filled with a part of a prompt that fits the next row completely:
the other part would have to read the first one as context."""
ROWS_BETWEEN = 2
"""Rows that are admitted between two calls of ``decode`` while half of the slots or more are decoding, so that these do
not wait for all new prompts."""


class Scheduler:
    """The requests of one engine.

    Args:
      share_prefixes: False prefills every prompt completely.
    """

    def __init__(self, engine: Engine, *, share_prefixes: bool = True) -> None:
        self.engine, self.share_prefixes = engine, share_prefixes
        self._trees = engine.trees and share_prefixes
        self.images = ImagePool(engine)
        self.waiting: collections.deque[Sample] = collections.deque()
        self.owners: list[Sample | None] = [None] * engine.slots
        self.counts: collections.Counter[str] = collections.Counter()
        self._held = [np.zeros(0, np.int64) for _ in range(engine.slots)]  # what each slot holds, as identities
        self._freed = [0] * engine.slots  # when each slot was last used, for taking the one that rested longest
        self._clock = 0
        self._pending: collections.deque[tuple[list[Sample | None], Any, Any]] = collections.deque()
        # On CPUs a call is long, so slots are filled again before the next one begins.
        self._ahead = 0 if engine.program.layer is not None else 1

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._pending or any(self.owners))

    def submit(self, samples: Iterable[Sample]) -> None:
        self.waiting.extend(samples)

    def forget(self) -> None:
        """Forget what slots and the image pool hold, because the weights change.

        Raises:
          RuntimeError: while requests are being answered.
        """
        self._drop_cancelled()
        if self.waiting or any(self.owners):
            raise RuntimeError("the weights cannot change while requests are being answered; wait for their replies")
        self._pending.clear()
        self._held = [np.zeros(0, np.int64) for _ in self._held]
        self.images.clear()

    def reset(self) -> list[Sample]:
        """Forget everything; returns the samples that will have no reply."""
        lost = list(dict.fromkeys([*self.waiting, *filter(None, self.owners)]))
        for sample in lost:
            sample.finished = True
        self.waiting.clear()
        self.owners = [None] * len(self.owners)
        self.forget()
        return lost

    def step(self) -> None:
        """Deal with what an earlier call chose, admit waiting prompts, and begin one call of ``decode``.

        The devices work on that call while the caller passes on what this step has finished.
        """
        self._drop_cancelled()
        while len(self._pending) > self._ahead:
            self._process(*self._pending.popleft())
        rows = 0
        while (rows < ROWS_BETWEEN or 2 * sum(self._decoding()) < self.engine.slots) and self._admit():
            rows += 1
        keep = np.array(self._decoding())
        if keep.any():
            ahead = self.engine.steps * (1 + len(self._pending))
            lengths = [
                len(s.prompt) + len(s.transcript.ids) for s, kept in zip(self.owners, keep, strict=True) if s and kept
            ]
            answers = self.engine.decode(keep, max(lengths) + ahead)
            self._pending.append(
                ([s if k else None for s, k in zip(self.owners, keep, strict=True)], answers.chosen, answers.valid)
            )
        else:
            while self._pending:
                self._process(*self._pending.popleft())

    def _decoding(self) -> list[bool]:
        """True for slots whose prompt is complete and whose answer is not."""
        return [s is not None and not s.finished and s.cached == len(s.prompt) for s in self.owners]

    def _drop_cancelled(self) -> None:
        for sample in [s for s in self.waiting if s.cancelled]:
            self.waiting.remove(sample)
            sample.finish("cancelled")
        for sample in filter(None, self.owners):
            if sample.cancelled and not sample.finished:
                self._finish(sample, "cancelled")

    # -- admitting ----------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Admit one row per shard; False if there is nothing to admit."""
        per_shard = self.engine.slots // self.engine.shards
        images: dict[int, int] = {}
        plans = [self._plan(range(r * per_shard, (r + 1) * per_shard), images) for r in range(self.engine.shards)]
        pieces = list(itertools.chain(*plans))
        if not pieces:
            return False
        now = time.monotonic()
        for piece in pieces:
            piece.sample.started = piece.sample.started or now
        soon = [image for sample in self.waiting for image in sample.prompt.images]
        self.images.encode([image for piece in pieces for image in piece.images], soon)
        row, ends, computed = self._row(plans)
        chosen = self.engine.admit(row)
        self.counts["prefilled_tokens"] += computed
        self.counts["shared_tokens"] += sum(piece.end - piece.start for piece in pieces) - computed
        if any(ends):
            self._pending.append((ends, chosen, None))
        return True

    def _plan(self, slots: range, images: dict[int, int]) -> list[Piece]:
        """The pieces of one shard's next row; their images are added to the vision tokens by key of all shards."""
        engine, planned = self.engine, PlannedRow()
        after: dict[int, np.ndarray] = {}
        room, blocks = engine.chunks[-1], engine.contexts[-1] // BLOCK
        unfinished = [s for i in slots if (s := self.owners[i]) and not s.finished and s.cached < len(s.prompt)]
        candidates = collections.deque([*unfinished, *self.waiting])
        free = [i for i in slots if self.owners[i] is None]
        while candidates and len(planned.pieces) < engine.ends:
            sample = candidates.popleft()
            prompt, start, source = sample.prompt, sample.cached, sample.slot
            known = start  # tokens that are computed already, or that another piece of this row computes
            if source is None:
                if not free:
                    break
                start, source = self._prefix(sample, slots)
                known = start
                alike, relative = planned.closest(sample) if self.share_prefixes else (0, None)
                gain = alike - max(start, relative.start) if self._trees and relative else 0
                if relative and gain >= LEAST_ALIKE and len(prompt) - alike <= room and relative.blocks <= blocks:
                    start, source, known = relative.start, relative.source, alike
                elif prompt.cut_before(min(alike, len(prompt) - 1)) >= start + LEAST_SHARED:
                    continue  # the next row can share what this one computes
            end = prompt.cut_before(min(len(prompt), known + room))
            if (
                planned.pieces
                and end < len(prompt) <= start + engine.chunks[-1]
                and room * LEAST_REST < engine.chunks[-1]
            ):
                break
            piece = Piece(sample, start, end, source)
            if end <= start or piece.blocks > blocks:
                if not planned.pieces:
                    raise AssertionError(f"an empty row has no room for tokens {start} to {end} of a prompt")
                break
            needed = images | {image.key: image.tokens for image in piece.images}
            if images and sum(needed.values()) > engine.pool:
                break
            images.update(needed)
            if sample.slot is None:
                # A slot of which little would be used keeps what it holds, for prompts that begin with more of it.
                here = source in free and 2 * start > len(self._held[source])
                sample.slot = source if here else min(free, key=self._freed.__getitem__)
                self.owners[sample.slot] = sample
                self.waiting.remove(sample)
                free.remove(sample.slot)
                self.counts["shared_tokens"] += start
            sample.cached = end
            # Pieces of one row are computed together: none can be the prefix of another in the cache.
            self._held[sample.slot] = prompt.identity[: start if source == sample.slot else 0]
            after[sample.slot] = prompt.identity[:end]
            planned.add(piece)
            room, blocks = room - (end - known), blocks - piece.blocks
        for i, identity in after.items():
            self._held[i] = identity
        return planned.pieces

    def _prefix(self, sample: Sample, slots: range) -> tuple[int, int]:
        """The longest prefix of a prompt that a slot holds, and the slot: a free one if there are several."""
        if not self.share_prefixes or len(sample.prompt) <= LEAST_SHARED:
            return 0, slots[0]
        found = ((sample.prompt.shared(self._held[i], LEAST_SHARED), self.owners[i] is None, -i) for i in slots)
        shared, _, i = max(found)
        return shared, -i

    def _row(self, plans: list[list[Piece]]) -> tuple[Row, list[Sample | None], int]:
        """The pieces as arrays, the sample of each end, and the tokens that are computed."""
        engine, per_shard = self.engine, self.engine.slots // self.engine.shards
        families = [arrange(pieces, trees=self._trees) for pieces in plans]
        tokens = [num_tokens(each) for each in families]
        context = max(sum(piece.blocks for piece in pieces) for pieces in plans) * BLOCK
        row = engine.empty_row(smallest(engine.chunks, max(tokens)), smallest(engine.contexts, context))
        ends: list[Sample | None] = []
        for r, each in enumerate(families):
            ended = lay_out(row, r, each, r * per_shard, self.images.places, engine.program.copied)
            ends += [*ended, *[None] * (engine.ends - len(ended))]
        return row, ends, sum(tokens)

    # -- results ------------------------------------------------------------------------------------------------------

    def _process(self, owners: list[Sample | None], chosen: Any, valid: Any) -> None:
        """Give chosen tokens [n, B] to the samples that they belong to; [B] without ``valid``, after a prefill."""

        def fetch(x: Any) -> np.ndarray:
            # On the host, as every shape of an operation on device arrays would compile a program.
            return np.asarray(x) if valid is not None else np.asarray(x)[None]

        waiting_for = [(b, sample) for b, sample in enumerate(owners) if sample and not sample.finished]
        if not waiting_for:
            return
        tokens, logprobs = fetch(chosen.token), fetch(chosen.logprob)
        used = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid)
        wanted = any(sample.request.logprobs for _, sample in waiting_for)
        top = (fetch(chosen.top_ids), fetch(chosen.top_logprobs)) if wanted else None
        for b, sample in waiting_for:
            for i in np.flatnonzero(used[:, b]):
                likely: tuple[tuple[int, float], ...] = ()
                if top and sample.request.logprobs:
                    likely = tuple(zip(top[0][i, b].tolist(), top[1][i, b].tolist(), strict=True))
                sample.receive(int(tokens[i, b]), float(logprobs[i, b]), likely, self.engine.program.stop_ids)
                self.counts["generated_tokens"] += 1
                if sample.finished:
                    self._release(sample)
                    break

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        sample.finish(reason)
        self._release(sample)

    def _release(self, sample: Sample) -> None:
        """Free the slot of a finished sample; it keeps the tokens that it holds, for later prompts that begin so."""
        slot = sample.slot
        assert slot is not None
        self._clock += 1
        self.owners[slot], self._freed[slot] = None, self._clock
        if sample.cached == len(sample.prompt):
            ids = np.array(sample.transcript.ids[:-1], np.int64)  # the last token was chosen, but never fed
            self._held[slot] = np.concatenate([sample.prompt.identity, ids])
