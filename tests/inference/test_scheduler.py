"""Continuous batching by an engine that records what each entry of its cache was computed from."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.images.layout import PatchedImage
from phivision_jax.inference.kv_cache import BLOCK
from phivision_jax.inference.prompts import Prompt
from phivision_jax.inference.requests import Delta, Reply, Request
from phivision_jax.inference.sample import Sample
from phivision_jax.inference.scheduler import Scheduler
from phivision_jax.inference.transcript import Transcript
from phivision_jax.rows import expand
from tests.support.generation import generator_of
from tests.support.symbolic_engine import SymbolicEngine, answer_of

LENGTH, CHUNK = 512, 256


@pytest.fixture(scope="module")
def engine(tiny):
    return generator_of(tiny, slots=16, length=LENGTH, chunk=CHUNK).engine


def random_patches(rng, config, most=64) -> PatchedImage:
    grid = tuple(rng.integers(1, 1 + int(most**0.5), 2).tolist())
    return PatchedImage(rng.integers(0, 256, (grid[0] * grid[1], config.vision.patch_dim), np.uint8), (grid,))


class Asked:
    """A sample, what it is asked for, and its events."""

    def __init__(self, ids, images, config, index=0, **settings) -> None:
        self.ids, self.images = ids, images
        self.request = Request(expand(ids, images), **settings)
        self.prompt = Prompt.from_example(self.request.messages, config)
        self.limit = self.request.max_new_tokens
        self.events: list = []
        transcript = Transcript(None, None, ())
        self.sample = Sample(self.request, index, self.prompt, self.limit, transcript, self.events.append)

    @property
    def reply(self) -> Reply:
        *deltas, reply = self.events
        assert all(isinstance(delta, Delta) for delta in deltas) and isinstance(reply, Reply)
        return reply

    def expected(self) -> list[int]:
        seed = np.random.SeedSequence([self.request.seed % 2**64, self.sample.index]).generate_state(2, np.uint32)
        return answer_of(self.prompt, (int(seed[0]), int(seed[1])), self.limit)


def random_requests(rng, config, count) -> list[Asked]:
    """Prompts of which many begin as others do: with the same text and images, or with their answers."""
    pool = [random_patches(rng, config) for _ in range(rng.integers(2, 20))]
    asked: list[Asked] = []
    for _ in range(count):
        ids, images = [], []
        kind = rng.integers(5)
        if asked and kind < 4:
            other = asked[rng.integers(len(asked))]
            ids, images = list(other.ids), list(other.images)
            if kind == 0:  # the next turn
                ids += other.expected()
            elif kind == 1:  # an earlier turn
                del ids[rng.integers(1, len(ids) + 1) :]
                images = images[: ids.count(-200)]
        if kind != 1:
            for _ in range(rng.integers(0, 4)):
                if rng.random() < 0.4 and len(images) < 3:
                    ids, images = [*ids, -200], [*images, pool[rng.integers(len(pool))]]
                ids += rng.integers(6, 60, rng.integers(0, 90)).tolist()
        if ids and len(expand(ids, images).tokens) < 450:
            settings = {"max_new_tokens": int(rng.integers(1, 40)), "seed": int(rng.integers(3))}
            asked.append(Asked(ids, images, config, **settings))
    return asked


def run(scheduler, asked, rng, cancelling) -> set[Asked]:
    """Submit a few at a time or many, between steps, and cancel some; returns those."""
    waiting, submitted, cancelled = collections.deque(asked), [], set()
    most = rng.choice([3, 20])
    for _ in range(5000):
        if not waiting and scheduler.idle:
            return cancelled
        for _ in range(min(rng.integers(0, most + 1), len(waiting))):
            submitted.append(waiting.popleft())
            scheduler.submit([submitted[-1].sample])
        running = [a for a in submitted if not a.sample.finished]
        if running and rng.random() < cancelling:
            cancelled.add(running[rng.integers(len(running))])
            for a in cancelled:
                a.sample.cancelled = True
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_every_answer_is_computed_from_its_own_prompt(engine, seed):
    rng = np.random.default_rng(seed)
    mode = ("causal", "bidirectional")[rng.integers(2)]
    config = dataclasses.replace(engine.config, image_attention=mode)
    shards = int(rng.integers(1, 3))
    slots, pool = shards * int(rng.integers(1, 13)), CHUNK + 2 * 64
    ahead, trees, copied = bool(rng.integers(2)), rng.random() < 0.7, int(rng.choice([1, 32, BLOCK]))
    symbolic = SymbolicEngine(engine, slots=slots, shards=shards, pool=pool, ahead=ahead, trees=trees, copied=copied)
    symbolic.chunks = engine.chunks[: rng.integers(1, 4)]
    scheduler = Scheduler(symbolic, share_prefixes=rng.random() < 0.8)
    asked = random_requests(rng, config, int(rng.integers(1, 24)))
    cancelled = run(scheduler, asked, rng, cancelling=rng.choice([0, 0, 0.1, 0.3]))
    for a in asked:
        want = a.expected()
        if a.reply.finish_reason == "cancelled":
            assert a in cancelled and list(a.reply.ids) == want[: len(a.reply.ids)]
        else:
            assert list(a.reply.ids) == want
            assert a.reply.finish_reason == ("length" if len(want) == a.limit else "stop")
    if not cancelled:
        total = sum(len(a.prompt) for a in asked)
        assert scheduler.counts["prefilled_tokens"] + scheduler.counts["shared_tokens"] == total
        assert scheduler.share_prefixes or not scheduler.counts["shared_tokens"]
    assert all(owner is None for owner in scheduler.owners) and not scheduler.waiting


def served(engine, requests, config, **settings):
    """A scheduler that has answered requests, all waiting from the beginning."""
    sizes = {"slots": 4, "shards": 1, "pool": 1000, "ahead": False} | settings
    scheduler = Scheduler(SymbolicEngine(engine, **sizes))
    asked = [Asked(ids, images, config, index, max_new_tokens=5) for index, (ids, images) in enumerate(requests)]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert all(list(a.reply.ids) == a.expected() for a in asked)
    return scheduler


def test_common_beginnings_are_prefilled_once(engine):
    """A system prompt of 400 tokens before ten questions, in four slots."""
    rng = np.random.default_rng(0)
    system = rng.integers(6, 60, 400).tolist()
    questions = [[i + 6, *rng.integers(6, 60, 10 + i).tolist()] for i in range(10)]
    scheduler = served(engine, [([*system, *question], []) for question in questions], engine.config)
    assert scheduler.counts["prefilled_tokens"] == 400 + sum(map(len, questions))
    assert scheduler.counts["shared_tokens"] == 9 * 400


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_questions_about_an_image_are_a_tree_in_a_row(engine, mode):
    """Two texts of 20 tokens before an image, four questions after each, the last three of which begin alike."""
    rng = np.random.default_rng(0)
    config, image = dataclasses.replace(engine.config, image_attention=mode), random_patches(rng, engine.config)
    texts, begin = [[i, *rng.integers(6, 60, 19).tolist()] for i in (6, 7)], rng.integers(6, 60, 18).tolist()
    questions = [[6, 9, 8], [7, *begin], [7, *begin, 7, 6], [7, *begin, 8]]
    symbolic = SymbolicEngine(engine, slots=8, shards=1, pool=1000)
    symbolic.ends, rows, admit = 8, [], symbolic.admit
    symbolic.admit = lambda row: (rows.append(row), admit(row))[1]
    scheduler = Scheduler(symbolic)
    asked = [Asked([*text, -200, *q], [image], config, max_new_tokens=5) for q in questions for text in texts]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert all(list(a.reply.ids) == a.expected() for a in asked)
    assert len(rows) == 1 and rows[0].segment_ids.max() == 2
    assert scheduler.counts["prefilled_tokens"] == 2 * (20 + len(image.patches) + 3 + 19 + 2 + 1)
    assert scheduler.images.encoded == 1


def test_beginnings_of_a_few_tokens_are_computed_in_the_same_row(engine):
    """Waiting for another prompt's row would take longer than computing them."""
    scheduler = served(engine, [([7, 8, 9, 10 + i], []) for i in range(4)], engine.config)
    assert scheduler.counts["shared_tokens"] == 0 and scheduler.counts["prefilled_tokens"] == 16


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_samples_of_one_prompt_prefill_it_once(engine, mode, trees):
    """Those behind the first row compute its last token again, and an image is encoded once."""
    config = dataclasses.replace(engine.config, image_attention=mode)
    image = random_patches(np.random.default_rng(0), config)
    ids = [7, -200, *range(6, 40)]
    length = len(expand(ids, [image]).tokens)
    scheduler = served(engine, [(ids, [image])] * 6, config, trees=trees)
    assert scheduler.counts["prefilled_tokens"] == length + (2 if trees else 5)
    assert scheduler.images.encoded == 1


def test_image_at_the_end_of_a_prompt_is_not_cut_for_its_last_token(engine):
    """An image that sees all of itself is prefilled again; of any other, only the last token is."""
    image = random_patches(np.random.default_rng(0), engine.config)
    for mode, again in (("causal", 1), ("bidirectional", len(image.patches))):
        config = dataclasses.replace(engine.config, image_attention=mode)
        scheduler = served(engine, [([*range(6, 60), *range(6, 60), -200], [image])] * 2, config, trees=False)
        assert scheduler.counts["prefilled_tokens"] == 108 + len(image.patches) + again


def test_prompts_that_the_next_row_cannot_share_are_computed_at_once(engine):
    """Equal prompts that end with an image of 64 tokens that sees all of itself: three in a row of 256."""
    config = dataclasses.replace(engine.config, image_attention="bidirectional")
    image = PatchedImage(np.random.default_rng(0).integers(0, 256, (64, 12), np.uint8), ((8, 8),))
    symbolic = SymbolicEngine(engine, slots=3, shards=1, pool=1000, trees=False)
    rows, admit = [], symbolic.admit
    symbolic.admit = lambda row: (rows.append(row), admit(row))[1]
    scheduler = Scheduler(symbolic)
    asked = [Asked([7, 8, -200], [image], config, max_new_tokens=2) for _ in range(3)]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert [row.segment_ids.max() for row in rows] == [3] and all(list(a.reply.ids) == a.expected() for a in asked)


def test_prompts_that_need_too_much_context_do_not_stop_others(engine):
    """Four prompts that share 450 tokens: two fill the context of a row, and short ones behind them enter it."""
    long = np.random.default_rng(0).integers(6, 60, 450).tolist()
    symbolic = SymbolicEngine(engine, slots=8, shards=1, pool=1000)
    rows, admit = [], symbolic.admit
    symbolic.admit = lambda row: (rows.append(row), admit(row))[1]
    scheduler = Scheduler(symbolic)
    ids = [*([*long, 6 + i, 7] for i in range(4)), *([10 + i, 9, 8] for i in range(4))]
    asked = [Asked(prompt, [], engine.config, max_new_tokens=2) for prompt in ids]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert all(list(a.reply.ids) == a.expected() for a in asked)
    ended = [int((row.end_slots < 8).sum()) for row in rows]
    assert ended[:2] == [0, 6] and sum(ended) == 8


def test_rows_need_no_more_images_than_the_pool_holds(engine):
    """Four shards with a prompt each, and a pool for the images of two."""
    rng = np.random.default_rng(0)
    images = [PatchedImage(rng.integers(0, 256, (64, 12), np.uint8), ((8, 8),)) for _ in range(8)]
    scheduler = served(engine, [([7, -200, 9], [image]) for image in images], engine.config, shards=4, pool=130)
    assert scheduler.images.encoded == 8 and len(scheduler.images.places) == 2


def test_images_used_least_recently_make_room(engine):
    rng = np.random.default_rng(0)
    a, b, c = (PatchedImage(rng.integers(0, 256, (16, 12), np.uint8), ((4, 4),)) for _ in range(3))
    order = [a, b, a, c, a, b]  # c takes the place of b
    scheduler = served(engine, [([6 + i, -200, 9], [image]) for i, image in enumerate(order)], engine.config,
                       slots=1, pool=32)  # fmt: skip
    assert scheduler.images.encoded == 4 and scheduler.images.found == 3


def test_waiting_images_fill_a_row_of_patches(engine):
    """Eight images of 16 patches are encoded in one row of 128, and taken from the pool later."""
    rng = np.random.default_rng(0)
    images = [PatchedImage(rng.integers(0, 256, (16, 12), np.uint8), ((4, 4),)) for _ in range(8)]
    calls = []
    symbolic = SymbolicEngine(engine, slots=1, shards=1, pool=1000, ahead=False)
    encode = symbolic.encode
    symbolic.encode = lambda batch, places: (calls.append(int((places < 1000).sum())), encode(batch, places))
    scheduler = Scheduler(symbolic)
    asked = [Asked([6 + i, -200, 9], [image], engine.config, max_new_tokens=2) for i, image in enumerate(images)]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert calls == [128] and scheduler.images.encoded == 8
    assert all(list(a.reply.ids) == a.expected() for a in asked)


def test_images_of_one_prompt_that_exceed_a_row_of_patches(engine):
    """Five images of 64 patches, encoded in rows of four."""
    rng = np.random.default_rng(0)
    images = [PatchedImage(rng.integers(0, 256, (64, 12), np.uint8), ((8, 8),)) for _ in range(5)]
    scheduler = served(engine, [([-200] * 5 + [9], images)], engine.config)
    assert engine.patches[-1] == CHUNK == 256 and scheduler.images.encoded == 5


def test_waiting_images_take_the_places_of_those_nobody_waits_for(engine):
    """A pool of four images of 64 patches, and two questions about each of eight: four rows of two images."""
    rng = np.random.default_rng(0)
    images = [PatchedImage(rng.integers(0, 256, (64, 12), np.uint8), ((8, 8),)) for _ in range(8)]
    calls = []
    symbolic = SymbolicEngine(engine, slots=1, shards=1, pool=4 * 64, ahead=False)
    encode = symbolic.encode
    symbolic.patches = [128]
    symbolic.encode = lambda batch, places: (calls.append(1), encode(batch, places))
    scheduler = Scheduler(symbolic)
    for pair in (images[i : i + 2] for i in range(0, 8, 2)):
        asked = [Asked([6 + i, -200], [image], engine.config, max_new_tokens=1) for i in range(2) for image in pair]
        scheduler.submit([a.sample for a in asked])
        while not scheduler.idle:
            scheduler.step()
        assert all(list(a.reply.ids) == a.expected() for a in asked)
    assert len(calls) == 4 and scheduler.images.encoded == 8


def test_prompts_that_fit_the_next_row_are_not_cut_to_fill_one(engine):
    """Rows of 256 tokens, prompts of 50: six would fit if the sixth were cut."""
    rng = np.random.default_rng(0)
    prompts = [([6 + i, *rng.integers(6, 60, 49).tolist()], []) for i in range(10)]
    symbolic = SymbolicEngine(engine, slots=12, shards=1, pool=1000, ahead=False)
    symbolic.ends = 12
    rows, admit = [], symbolic.admit
    symbolic.admit = lambda row: (rows.append((int(row.segment_ids.max()), int(row.num_context[0]))), admit(row))[1]
    scheduler = Scheduler(symbolic)
    asked = [Asked(ids, images, engine.config, max_new_tokens=2) for ids, images in prompts]
    scheduler.submit([a.sample for a in asked])
    while not scheduler.idle:
        scheduler.step()
    assert rows == [(5, 0), (5, 0)] and all(list(a.reply.ids) == a.expected() for a in asked)


def test_a_prompt_takes_the_slot_that_holds_its_beginning(engine):
    """So the beginning of another prompt stays in its own slot."""
    scheduler = Scheduler(SymbolicEngine(engine, slots=2, shards=1, pool=1000, ahead=False))
    first, second = (np.random.default_rng(i).integers(6, 60, 200).tolist() for i in range(2))
    for ids in (first, second, [*second, 7, 8], [*first, 7, 8]):
        asked = Asked(ids, [], engine.config, max_new_tokens=1)
        scheduler.submit([asked.sample])
        while not scheduler.idle:
            scheduler.step()
        assert list(asked.reply.ids) == asked.expected()
    assert scheduler.counts["prefilled_tokens"] == 2 * 200 + 2 * 2


def endless(engine, first: int) -> Asked:
    """A short prompt with an answer of at least 25 tokens."""
    for token in range(first, 1000):
        asked = Asked([token, 8], [], engine.config, max_new_tokens=400)
        if len(asked.expected()) >= 25:
            return asked
    raise AssertionError("no prompt has a long answer")


@pytest.mark.parametrize("ahead", [False, True])
def test_cancelled_prompts_leave_nothing_that_is_wrong(engine, ahead):
    """A slot whose answer is cancelled takes a prompt of four rows, which is cancelled after two and asked again."""
    symbolic = SymbolicEngine(engine, slots=2, shards=1, pool=1000, ahead=ahead)
    symbolic.chunks = [BLOCK]
    scheduler = Scheduler(symbolic)
    first, second = endless(engine, 10), endless(engine, 200)
    scheduler.submit([first.sample, second.sample])
    scheduler.step()
    long = np.random.default_rng(0).integers(6, 60, 450).tolist()
    asked = [Asked(long, [], engine.config, max_new_tokens=9) for _ in range(2)]
    scheduler.submit([a.sample for a in asked])
    second.sample.cancelled = True
    scheduler.step()
    assert second.reply.finish_reason == "cancelled" and asked[0].sample.cached == 256
    asked[0].sample.cancelled = True
    while not scheduler.idle:
        scheduler.step()
    assert list(asked[1].reply.ids) == asked[1].expected() and list(first.reply.ids) == first.expected()
    assert asked[0].reply.finish_reason == "cancelled" and asked[0].reply.ids == ()
    again = Asked(long, [], engine.config, max_new_tokens=9)
    scheduler.submit([again.sample])
    while not scheduler.idle:
        scheduler.step()
    assert list(again.reply.ids) == again.expected()


def test_new_requests_do_not_stop_active_slots(engine):
    """A prompt of many rows enters between the tokens of an answer."""
    symbolic = SymbolicEngine(engine, slots=2, shards=1, pool=1000, ahead=False)
    symbolic.chunks = [BLOCK]
    scheduler = Scheduler(symbolic)
    first = endless(engine, 10)
    scheduler.submit([first.sample])
    scheduler.step()
    before = len(first.sample.transcript.ids)
    rows, admit = [], symbolic.admit
    symbolic.admit = lambda row: (rows.append(1), admit(row))[1]
    scheduler.submit([Asked(list(range(6, 60)) * 8, [], engine.config, max_new_tokens=5).sample])
    scheduler.step()
    assert len(rows) == 2 and len(first.sample.transcript.ids) > before
