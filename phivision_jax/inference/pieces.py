"""Pieces of prompts, and how they are laid out in rows: one after the other, or as trees of pieces that begin alike."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.programs import Row
from phivision_jax.inference.prompts import PromptImage
from phivision_jax.inference.sample import Sample

LEAST_ALIKE = 16
"""Fewest tokens that are worth a tree: nearly all prompts begin with the same few, and each branch is one more copy."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a prompt for a row; those before are context, read from slot ``source``."""

    sample: Sample
    start: int
    end: int
    source: int

    @property
    def blocks(self) -> int:
        """Blocks of context."""
        return -(-self.start // BLOCK)

    @property
    def context(self) -> tuple[int, int]:
        """A value that is the same for pieces with the same context."""
        return self.start, self.source if self.start else 0

    @property
    def key(self) -> bytes:
        """Bytes by which pieces are sorted, so that those that begin alike are neighbours, the shorter one first."""
        return self.sample.prompt.key(self.end)

    @property
    def images(self) -> list[PromptImage]:
        """The images with tokens in this piece."""
        return [image for image in self.sample.prompt.images if image.start < self.end and image.end > self.start]

    def alike(self, sample: Sample) -> int:
        """Tokens with which both this piece and a sample's prompt begin, context included."""
        return sample.prompt.alike(self.sample.prompt.identity[: self.end])


class PlannedRow:
    """The pieces that are chosen for a row so far."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._keys: list[bytes] = []
        self._by_key: list[Piece] = []

    def add(self, piece: Piece) -> None:
        key = piece.key
        i = bisect.bisect(self._keys, key)
        self._keys.insert(i, key)
        self._by_key.insert(i, piece)
        self.pieces.append(piece)

    def closest(self, sample: Sample) -> tuple[int, Piece | None]:
        """The piece that begins most like a prompt, and the tokens that both begin with."""
        i = bisect.bisect(self._keys, sample.prompt.key())
        found = [(piece.alike(sample), piece) for piece in self._by_key[max(i - 1, 0) : i + 1]]
        return max(found, key=lambda pair: pair[0], default=(0, None))


class _Run(NamedTuple):
    """Tokens of a prompt, from number ``token`` on, at consecutive positions of a row."""

    token: int
    position: int
    length: int


type Family = list[tuple[Piece, int]]
"""Pieces that share a segment, each with the number of the first token that it does not share with the one before."""


def arrange(pieces: Sequence[Piece], *, trees: bool) -> list[Family]:
    """Pieces in the order of their row: those with the same context that begin alike are a family.

    Args:
      trees: False makes each piece a family of its own.
    """
    families: list[Family] = []
    before = None
    for piece in sorted(pieces, key=lambda piece: (piece.context, piece.key)) if trees else pieces:
        alike = before.alike(piece.sample) if trees and before and before.context == piece.context else 0
        if alike >= LEAST_ALIKE:
            families[-1].append((piece, alike))
        else:
            families.append([(piece, piece.start)])
        before = piece
    return families


def num_tokens(families: Sequence[Family]) -> int:
    """Tokens that a row of these families computes."""
    return sum(piece.end - start for family in families for piece, start in family)


def lay_out(
    row: Row, r: int, families: Sequence[Family], first_slot: int, places: Mapping[int, np.ndarray], copied: int
) -> list[Sample]:
    """Write pieces into row ``r``.

    Args:
      first_slot: of the row's shard.
      places: of images in ``State.pool``, by key.
      copied: as ``Program.copied``.

    Returns:
      The samples whose prompts end in the row, in the order of ``row.ends``.
    """
    position = blocks = copies = 0
    ends: list[Sample] = []
    for segment, family in enumerate(families, start=1):
        runs: list[_Run] = []
        for i, (piece, start) in enumerate(family):
            sample, prompt, end = piece.sample, piece.sample.prompt, piece.end
            assert sample.slot is not None
            slot = sample.slot - first_slot
            runs = [_Run(token, first, min(n, start - token)) for token, first, n in runs if token < start]
            if start < end:
                runs.append(_Run(start, position, end - start))
                span = slice(position, position + end - start)
                row.tokens[r, span] = prompt.tokens[start:end]
                row.positions[r, span] = np.arange(start, end)
                row.segment_ids[r, span] = segment
                row.span_end[r, span] = prompt.span_end(start, end) + (position - start)
                for image in piece.images:
                    first, last = max(image.start, start), min(image.end, end)
                    if first < last:
                        seen = slice(position + first - start, position + last - start)
                        row.vision_index[r, seen] = places[image.key][first - image.start : last - image.start]
                position = span.stop
            for block in range(piece.blocks):
                row.context[r, blocks] = piece.source - first_slot, slot, block * BLOCK
                if i == 0:  # it is seen by the entire family
                    used = slice(blocks * BLOCK, blocks * BLOCK + min(BLOCK, piece.start - block * BLOCK))
                    row.context_segments[r, used] = segment
                blocks += 1
            for token, first, n in runs:
                if row.last_query is not None:
                    row.last_query[r, first : first + n] = position - 1
                for offset in range(0, n, copied):
                    row.copies[r, copies] = first + offset, slot, token + offset
                    copies += 1
            if end == len(prompt):
                place = r, len(ends)
                row.ends[place], row.end_slots[place] = runs[-1].position + runs[-1].length - 1, sample.slot
                row.lengths[place] = end
                _settings(row, place, sample)
                ends.append(sample)
    row.num_context[r], row.num_copies[r] = blocks, copies
    return ends


def _settings(row: Row, end: tuple[int, int], sample: Sample) -> None:
    """Write what decides a sample's answer."""
    request, now = sample.request, row.answering
    now.sampling.temperature[end], now.sampling.top_p[end] = request.temperature, request.top_p
    now.sampling.top_k[end], now.sampling.top[end] = request.top_k, bool(request.logprobs)
    now.sampling.key[end] = _key(request.seed, sample.index)
    now.limit[end] = sample.limit
    now.in_thought[end] = sample.transcript.mode == "think"
    now.budget[end] = -1 if request.thinking_budget is None else request.thinking_budget


@functools.lru_cache(256)
def _key(seed: int, index: int) -> np.ndarray:
    """[2] u32: the random key of a sample."""
    return np.random.SeedSequence([seed % 2**64, index]).generate_state(2, np.uint32)
