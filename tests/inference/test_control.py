"""Modes, budgets, stops, samples, prefixes and counts, with models of which every answer is known."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from phivision_jax.inference.requests import Request
from tests.support.generation import generator_of, random_image
from tests.support.markov import CONFIG, chain, markov_model, processor

T = processor().tokenizer
EOS = CONFIG.decoder.eos_token_id
(SEP,) = T.encode("<|im_sep|>")
A, B, YES = (T.encode(text)[0] for text in ("a", "b", "yes"))

THINKS_ON = chain([SEP, T.think_id, A, B, A], [T.end_think_id, YES, EOS])
CLOSES = chain([SEP, T.think_id, "is it red", T.end_think_id, "yes circle", EOS])
ANSWERS = chain(
    [SEP, "what color is the circle not red", EOS], [T.nothink_id, "what"], [T.think_id, T.end_think_id, SEP]
)
ENDLESS = chain([SEP, A, B, A], [T.nothink_id, A])
LETTERS = {i: dict.fromkeys([*range(64, 90)], 1 / 26) for i in [SEP, *range(64, 90)]}
"""Every letter is as likely as any other."""


@pytest.fixture(scope="module")
def generator():
    return generator_of(markov_model({}), processor(), stop_ids=(EOS, T.pad_id))


@pytest.fixture
def ask(generator):
    """Ask a model with these transitions; settings are those of a single question."""

    def ask(follows, *requests, **settings):
        generator.update(markov_model(follows))
        return list(itertools.chain(*generator.generate(requests or [Request("what?", **settings)])))

    return ask


# ---------------------------------------------------------------------------------------------------------------------
# Modes and thoughts.


@pytest.mark.parametrize(
    ("mode", "budget"), [*(("think", n) for n in (0, 1, 2, 3, 4, 5, 20)), *(("auto", n) for n in (1, 2, 3, 4, 5, 20))]
)
def test_thought_is_closed_after_its_budget(ask, mode, budget):
    """The thought has as many tokens as the budget, then the closing tag is chosen, and the answer follows."""
    (reply,) = ask(THINKS_ON, mode=mode, thinking_budget=budget, logprobs=0)
    opened = [T.think_id] * (mode == "auto")
    thought = ([*opened, *[A, B] * budget])[:budget]
    assert list(reply.ids) == [*thought, T.end_think_id, YES]
    assert reply.thought == ("ab" * budget)[: budget - len(opened)] and reply.answer == "yes"
    assert reply.mode == "think" and reply.thought_closed and reply.finish_reason == "stop"
    assert (reply.thought_tokens, reply.answer_tokens) == (budget + 1, 1)
    assert reply.text == f"<think>{reply.thought}</think>yes"
    forced = reply.logprobs[budget]
    assert forced.id == T.end_think_id and forced.logprob < -50
    assert reply.logprobs[-1].logprob == pytest.approx(0, abs=1e-4)


def test_budget_of_nothing_is_mode_nothink(ask):
    (reply,) = ask(THINKS_ON | chain([T.nothink_id, YES]), thinking_budget=0)
    assert (reply.mode, reply.text, reply.thought_tokens, len(reply.ids)) == ("nothink", "yes", 0, 1)


def test_budget_counts_sampled_thoughts(ask):
    """Budgets of sequences that are generated together, each with its own."""
    follows = dict.fromkeys((T.think_id, *LETTERS), LETTERS[SEP]) | chain([T.end_think_id, YES, EOS])
    budgets = [3, 11, 0, 30, 5, 17]
    asked = [Request("what?", mode="think", thinking_budget=n, temperature=1, seed=n) for n in budgets]
    replies = ask(follows, *asked)
    assert [reply.thought_tokens for reply in replies] == [n + 1 for n in budgets]
    assert all(reply.thought_closed and reply.answer == "yes" for reply in replies)


def test_budget_leaves_thoughts_that_end_earlier(ask):
    for budget in (None, 4, 50):
        (reply,) = ask(CLOSES, mode="auto", thinking_budget=budget)
        assert (reply.thought, reply.answer) == ("is it red", "yes circle")
    (reply,) = ask(CLOSES, thinking_budget=3)
    assert reply.thought == "is it" and reply.thought_tokens == 4


def test_budget_does_not_touch_answers(ask):
    """A model that never thinks, and one whose answer is longer than the budget."""
    want = "what color is the circle not red"
    for mode in ("auto", "nothink", "think"):
        (reply,) = ask(ANSWERS, mode=mode, thinking_budget=1)
        assert reply.answer == want


@pytest.mark.parametrize(
    ("follows", "mode", "shown", "text"),
    [
        (CLOSES, "auto", "think", "<think>is it red</think>yes circle"),
        (CLOSES, "think", "think", "<think>is it red</think>yes circle"),
        (CLOSES | chain([T.nothink_id, YES]), "nothink", "nothink", "yes circle"),
        (chain([SEP, T.nothink_id, YES, EOS]), "auto", "nothink", "yes"),
        (chain([SEP, YES, EOS]), "auto", None, "yes"),
    ],
)
def test_mode_and_text_of_replies(ask, follows, mode, shown, text):
    (reply,) = ask(follows, mode=mode)
    assert (reply.mode, reply.text) == (shown, text) and reply.finish_reason == "stop"
    first = {"think": T.think_id, "nothink": T.nothink_id}.get(shown)
    assert (reply.ids[0] == first) == (mode == "auto" and shown is not None)


def test_thought_that_is_cut_off(ask):
    (reply,) = ask(THINKS_ON, mode="think", max_new_tokens=5)
    assert reply.finish_reason == "length" and not reply.thought_closed
    assert (reply.thought, reply.answer, reply.text) == ("ababa", "", "<think>ababa")
    assert (reply.thought_tokens, reply.answer_tokens) == (5, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Ends.


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (" color", "what"),
        ("t co", "wha"),  # across two tokens
        ("what", ""),  # at the beginning
        ("wh", ""),
        (("red", "is", "circle"), "what color"),  # the first in the text, not in the list
        ("red", "what color is the circle not"),
        ("hat color is the circle n", "w"),  # longer than eight tokens of one call, with the spaces
        ("green", "what color is the circle not red"),
    ],
)
def test_stop_texts(ask, stop, want):
    (reply,) = ask(ANSWERS, stop=stop)
    assert reply.answer == want and reply.finish_reason == "stop" and reply.mode is None
    ids = T.encode("what color is the circle not red")
    assert list(reply.ids) == ids[: len(reply.ids)] and want in T.decode(reply.ids)


def test_stop_texts_are_not_looked_for_in_thoughts(ask):
    (reply,) = ask(CLOSES, stop=["red", "circle"])
    assert (reply.thought, reply.answer) == ("is it red", "yes")


def test_stop_texts_of_one_request_do_not_end_others(ask):
    replies = ask(ANSWERS, *(Request("what?", stop=stop) for stop in ("is", "red", "color")))
    assert [r.answer for r in replies] == ["what color", "what color is the circle not", "what"]


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 17])
def test_limit_of_new_tokens(ask, limit):
    (reply,) = ask(ENDLESS, max_new_tokens=limit)
    assert reply.finish_reason == "length" and reply.answer == ("ab" * limit)[:limit]
    assert len(reply.ids) == reply.answer_tokens == limit


def test_limit_is_what_a_slot_leaves(ask, generator):
    (reply,) = ask(ENDLESS)
    assert reply.prompt_tokens + len(reply.ids) == generator.length and reply.finish_reason == "length"


def test_limit_and_stop_token_together(ask):
    """The stop token takes the last place, and counts as the end."""
    (reply,) = ask(ANSWERS, max_new_tokens=8)
    assert reply.finish_reason == "stop" and len(reply.ids) == 7


def test_answer_that_ends_at_once(ask):
    (reply,) = ask({SEP: {EOS: 1.0}}, logprobs=2)
    assert (reply.ids, reply.answer, reply.finish_reason, reply.logprobs) == ((), "", "stop", ())


def test_every_stop_token_ends_an_answer(ask):
    (reply,) = ask(chain([SEP, "what color", T.pad_id]))
    assert reply.answer == "what color" and reply.finish_reason == "stop" and T.pad_id not in reply.ids


# ---------------------------------------------------------------------------------------------------------------------
# Samples.


def test_samples_differ_and_reproduce_in_any_company(ask):
    """Whatever else is generated: other prompts, other seeds, another order, more samples."""
    asked = Request("what?", n=3, temperature=1, seed=5, max_new_tokens=20)
    first = [reply.ids for reply in ask(LETTERS, asked)]
    assert len(set(first)) == 3 and [r.index for r in ask(LETTERS, asked)] == [0, 1, 2]
    others = [Request(f"why {'is it ' * i}?", temperature=1, seed=5 + i, max_new_tokens=5 + 3 * i) for i in range(7)]
    again = ask(LETTERS, *others[:4], dataclasses.replace(asked, n=5), *others[4:])
    assert [reply.ids for reply in again[4:7]] == first and len({reply.ids for reply in again[4:9]}) == 5
    assert [r.ids for r in ask(LETTERS, dataclasses.replace(asked, seed=6))] != first


def test_temperature_zero_is_the_default(ask):
    follows = {SEP: {A: 0.4, B: 0.6}, A: {EOS: 1.0}, B: {EOS: 1.0}}
    assert {r.answer for r in ask(follows, n=8)} == {"b"}
    assert {r.answer for r in ask(follows, n=30, temperature=1)} == {"a", "b"}
    assert {r.answer for r in ask(follows, n=8, temperature=1, top_p=0.5)} == {"b"}
    assert {r.answer for r in ask(follows, n=8, temperature=1, top_k=1)} == {"b"}


def test_logprobs_are_those_of_the_model(ask):
    """Before temperature and truncation, and none for requests that do not ask."""
    follows = {SEP: {A: 0.3, B: 0.6, YES: 0.1}, A: {EOS: 1.0}, B: {EOS: 1.0}, YES: {EOS: 1.0}}
    want = {i: np.log(p) for i, p in follows[SEP].items()}
    asked = [Request("what?", temperature=3, top_k=2, n=4, logprobs=k, seed=1) for k in (None, 0, 2, 3)]
    for k, replies in zip((None, 0, 2, 3), itertools.batched(ask(follows, *asked), 4), strict=True):
        for reply in replies:
            assert len(reply.logprobs) == (k is not None)
            for token in reply.logprobs:
                assert token.id == reply.ids[0] and token.logprob == pytest.approx(want[token.id], abs=1e-5)
                assert [i for i, _ in token.top] == [B, A, YES][:k]
                assert [p for _, p in token.top] == pytest.approx([want[i] for i, _ in token.top], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Counts.


def test_counts_and_timings(ask):
    """An image of 8 × 8 pixels is 16 vision tokens."""
    photo = random_image((8, 8), 0)
    conversations = [[{"role": "user", "content": "<image>" * n + "what?"}] for n in (0, 1, 2)]
    start = time.monotonic()
    replies = ask(CLOSES, *(Request(c, [photo] * n, mode="think") for n, c in enumerate(conversations)))
    elapsed = time.monotonic() - start
    prompt = T.encode("<|im_start|>user<|im_sep|>what?<|im_end|><|im_start|>assistant<|im_sep|><think>")
    for n, reply in enumerate(replies):
        assert (reply.image_tokens, reply.prompt_tokens) == (16 * n, len(prompt) + 16 * n)
        assert (reply.thought_tokens, reply.answer_tokens, len(reply.ids)) == (4, 2, 6)
        times = reply.timings
        assert min(times.queue, times.prefill, times.decode) >= 0 < times.prefill
        assert times.queue + times.prefill + times.decode <= elapsed
        assert times.per_token(6) == times.decode / 5 and times.per_token(1) == 0
