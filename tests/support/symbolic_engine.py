"""An engine without arithmetic: an entry of its cache states what it was computed from.

Thousands of rows run in a second, and a row that reads an entry of another sequence, or too early, changes the answer.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

from phivision_jax.inference.engine import Engine
from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.programs import Answers, Row
from phivision_jax.inference.prompts import Prompt
from phivision_jax.inference.sampling import Chosen

STOP = 5
type Entry = tuple[int, int] | None
"""A token, its place, and everything that it has seen; None for an entry that must not be read."""


class SymbolicEngine(Engine):
    """A copy of an engine that keeps hashes in place of keys and values."""

    def __new__(cls, *args, **kwargs) -> SymbolicEngine:
        return object.__new__(cls)

    def __init__(
        self,
        like: Engine,
        *,
        slots: int,
        shards: int,
        pool: int,
        ahead: bool = False,
        trees: bool = True,
        copied: int = BLOCK // 4,
    ) -> None:
        self.__dict__.update(copy.copy(like.__dict__))
        self.trees = trees
        self.slots, self.shards, self.pool, self.ends = slots, shards, pool, min(like.ends, slots // shards)
        program = vars(self.program) | {"stop_ids": (STOP,)} | ({"layer": None} if ahead else {})
        self.program = type(self.program)(**program | {"copied": copied if trees else BLOCK})
        self.cache: list[list[Entry]] = [[None] * self.entries for _ in range(slots)]
        self.vision: dict[int, int] = {}
        self.lengths, self.tokens = [0] * slots, [0] * slots
        self.active, self.counts = np.zeros(slots, bool), np.zeros(slots, int)
        self.settings: list[tuple[int, int, int]] = [(0, 0, 0)] * slots

    def encode(self, batch: Any, places: np.ndarray) -> None:
        for r, row in enumerate(places):
            for t in np.flatnonzero(row < self.pool):
                self.vision[int(row[t])] = hash(batch.patches[r, 0, batch.vision_index[r, t]].tobytes())

    def admit(self, row: Row) -> Chosen:
        per_shard, before = self.slots // self.shards, [list(entries) for entries in self.cache]
        computed = []
        for r in range(self.shards):
            context: list[Entry] = []
            for source, _, start in row.context[r, : row.num_context[r]]:
                context += before[r * per_shard + source][start : start + BLOCK]
            computed.append(self._prefill(row, r, context))
            for source, slot, start in row.context[r, : row.num_context[r]]:
                self._write(r * per_shard + slot, start, before[r * per_shard + source][start : start + BLOCK])
            for position, slot, start in row.copies[r, : row.num_copies[r]]:
                entries = computed[r][position : position + self.program.copied]
                self._write(r * per_shard + slot, start, entries + [None] * (self.program.copied - len(entries)))
        tokens = []
        for (r, e), slot in np.ndenumerate(row.end_slots):
            if slot < self.slots:
                length = int(row.lengths[r, e])
                assert computed[r][row.ends[r, e]] == self.cache[slot][length - 1]
                key = row.answering.sampling.key[r, e]
                self.settings[slot] = (int(key[0]), int(key[1]), int(row.answering.limit[r, e]))
                self.lengths[slot], self.counts[slot] = length, 0
                self._choose(slot)
            tokens.append(self.tokens[slot] if slot < self.slots else 0)
        return self._chosen(np.array(tokens))

    def _prefill(self, row: Row, r: int, context: list[Entry]) -> list[Entry]:
        out: list[Entry] = [None] * row.tokens.shape[1]
        for segment in range(1, row.segment_ids[r].max() + 1):
            before = hash(())
            for i in np.flatnonzero(row.context_segments[r] == segment):
                entry = context[i]
                assert entry is not None, "a row reads an entry that nothing wrote"
                before = hash((before, entry[0]))
            places = np.flatnonzero(row.segment_ids[r] == segment)
            last = places.max() if row.last_query is None else row.last_query[r, places]
            contents, chains = {}, {(): before}
            for t in places.tolist():
                place = int(row.vision_index[r, t])
                what = self.vision[place] if place >= 0 else int(row.tokens[r, t])
                contents[t] = hash((what, int(row.positions[r, t])))
            for t in places.tolist():
                seen = tuple(places[(places <= row.span_end[r, t]) & (t <= last)].tolist())
                known = next(n for n in range(len(seen), -1, -1) if seen[:n] in chains)
                for n in range(known, len(seen)):
                    chains[seen[: n + 1]] = hash((chains[seen[:n]], contents[seen[n]]))
                out[t] = contents[t], chains[seen]
        return out

    def _write(self, slot: int, start: int, entries: list[Entry]) -> None:
        assert start + len(entries) <= self.entries
        self.cache[slot][start : start + len(entries)] = entries

    def _choose(self, slot: int) -> None:
        first, second, limit = self.settings[slot]
        self.tokens[slot] = next_token(self.cache[slot][: self.lengths[slot]], (first, second), int(self.counts[slot]))
        self.counts[slot] += 1
        self.active[slot] = self.tokens[slot] != STOP and self.counts[slot] < limit

    def decode(self, keep: np.ndarray, read: int) -> Answers:
        self.active &= keep
        before, chosen, valid = self.active.copy(), [], []
        for b in np.flatnonzero(before):
            assert self.lengths[b] <= read
        recent: list[list[Entry]] = [[None] * self.steps for _ in range(self.slots)]
        starts = list(self.lengths)
        for i in range(self.steps):
            valid.append(self.active.copy())
            for b in np.flatnonzero(self.active):
                recent[b][i] = decoded(self.tokens[b], self.cache[b][: self.lengths[b]])
                self.cache[b][self.lengths[b]] = recent[b][i]
                self.lengths[b] += 1
                self._choose(int(b))
            chosen.append(list(self.tokens))
        for b in range(self.slots):
            self._write(b, starts[b] if before[b] else self.entries - self.steps, recent[b])
        return Answers(self._chosen(np.array(chosen)), np.array(valid))

    def _chosen(self, tokens: np.ndarray) -> Chosen:
        top = np.zeros((*tokens.shape, 20))
        return Chosen(tokens, np.zeros(tokens.shape), top, top)


def next_token(entries: list[Entry], key: tuple[int, int], count: int) -> int:
    """The token after these entries: about every tenth ends an answer."""
    chosen = hash((tuple(entries), key, count)) % 70
    return STOP if chosen > 60 else chosen


def decoded(token: int, entries: list[Entry]) -> Entry:
    """The entry of a chosen token after others."""
    content, seen = hash((token, len(entries))), hash(())
    for entry in entries:
        assert entry is not None, "a token sees an entry that nothing wrote"
        seen = hash((seen, entry[0]))
    return content, hash((seen, content))


def answer_of(prompt: Prompt, key: tuple[int, int], limit: int) -> list[int]:
    """The answer to a prompt that is computed at once, without its stop token."""
    whats = prompt.tokens.tolist()
    ends = list(range(len(whats)))
    for image in prompt.images:
        for j, patch in enumerate(image.image.patches):
            whats[image.start + j] = hash(patch.tobytes())
            ends[image.start + j] = image.end - 1 if prompt.whole_images else image.start + j
    contents = [hash((what, i)) for i, what in enumerate(whats)]
    chain = list(itertools.accumulate(contents, lambda seen, content: hash((seen, content)), initial=hash(())))[1:]
    entries: list[Entry] = [(content, chain[end]) for content, end in zip(contents, ends, strict=True)]
    answer: list[int] = []
    while len(answer) < limit and (token := next_token(entries, key, len(answer))) != STOP:
        answer.append(token)
        entries.append(decoded(token, entries))
    return answer
