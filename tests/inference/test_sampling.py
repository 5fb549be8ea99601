"""The choice of tokens from given logits, against distributions computed by hand."""

import functools

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from phivision_jax.inference.sampling import Chosen, Sampling, choose

run = jax.jit(choose)
ROWS, MANY = 50, 4000
"""Rows of all calls, so that few programs are compiled: the last row is repeated."""


def chosen(logits, *, count=0, forced=-1, needed=True, temperature=0.0, top_p=1.0, top_k=0, key=None, top=False):
    """``choose`` for rows of logits; each setting is one value or one per row."""
    B = len(logits)

    def array(value, dtype, *shape):
        value = np.broadcast_to(np.asarray(value, dtype), (B, *shape))
        return np.concatenate([value, np.repeat(value[-1:], (ROWS if B <= ROWS else MANY) - B, axis=0)])

    if key is None:
        key = np.stack([np.arange(B), np.zeros(B)], axis=1)
    settings = Sampling(
        array(temperature, np.float32),
        array(top_p, np.float32),
        array(top_k, np.int32),
        array(key, np.uint32, 2),
        array(top, bool),
    )
    counts, ids, used = array(count, np.int32), array(forced, np.int32), array(needed, bool)
    out = run(array(logits, np.float32, len(logits[0])), settings, counts, ids, used)
    return Chosen(*(np.asarray(x)[:B] for x in out))


PROBABILITIES = np.array([0.5, 0.05, 0.3, 0.15])


@functools.cache
def rows(count: int = MANY) -> np.ndarray:
    return np.tile(np.log(PROBABILITIES), (count, 1))


def shares(**settings) -> np.ndarray:
    return np.bincount(chosen(rows(), **settings).token, minlength=4) / len(rows())


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        # 0.5 alone does not reach 0.7, with 0.3 it does: two tokens remain, renormalised.
        ({"temperature": 1.0, "top_p": 0.7}, [0.625, 0, 0.375, 0]),
        ({"temperature": 1.0, "top_p": 0.45}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"temperature": 1.0, "top_k": 1}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2**31 - 1}, PROBABILITIES),
        # Of three tokens 0.5 / 0.95 is less than 0.55; of all four 0.5 would be too, of two 0.5 / 0.8 is not.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.55}, [0.625, 0, 0.375, 0]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),
        # Half the temperature squares the odds, and top-p counts these: 0.25 / 0.365 = 0.685.
        ({"temperature": 0.5}, PROBABILITIES**2 / 0.365),
        ({"temperature": 0.5, "top_p": 0.65}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_choose_samples_the_distribution(settings, want):
    found = shares(**settings)
    np.testing.assert_allclose(found, want, atol=0.035)
    assert ((found > 0) == (np.asarray(want) > 0)).all()


def test_choose_has_settings_for_each_sequence():
    """Every row has its own; rows that are truncated do not truncate others."""
    cases = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0}]
    cases += [{"temperature": 1.0, "top_p": 0.7}]
    default = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    columns = {name: [(default | case)[name] for case in cases * 800] for name in default}
    token = chosen(rows(), **columns).token.reshape(-1, len(cases))
    kinds = [set(column.tolist()) for column in token.T]
    assert kinds == [{0}, {0, 1, 2, 3}, {0, 2}, {0, 1, 2, 3}, {0, 2}]


def test_choose_keeps_equal_tokens_at_the_border():
    """No token is preferred to another that is equally likely."""
    logits = np.tile([2.0, 1.0, 1.0, 0.0], (1000, 1))
    assert set(chosen(logits, temperature=1.0, top_k=2).token.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 100.0, 1e30])
def test_choose_at_extreme_temperatures(temperature):
    logits = np.tile([-30.0, 10.0, 80.0, 5.0], (400, 1))
    out = chosen(logits, temperature=temperature)
    assert set(out.token.tolist()) == ({0, 1, 2, 3} if temperature > 1 else {2})
    assert np.isfinite(out.logprob).all()


def test_logprobs_are_before_temperature_and_truncation():
    logits = np.random.default_rng(0).normal(size=(6, 40)) * 3
    want = log_softmax(logits.astype(np.float32), axis=-1)
    out = chosen(logits, temperature=0.3, top_k=3, top_p=0.8, top=True)
    np.testing.assert_allclose(out.logprob, np.take_along_axis(want, out.token[:, None], 1)[:, 0], atol=1e-5)
    order = np.argsort(-want, axis=-1)[:, :20]
    np.testing.assert_array_equal(out.top_ids, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(want, order, 1), atol=1e-5)


def test_logprobs_of_a_small_vocabulary():
    out = chosen(np.log(PROBABILITIES)[None], top=True)
    assert out.top_ids.tolist() == [[0, 2, 3, 1]]
    np.testing.assert_allclose(np.exp(out.top_logprobs), [[0.5, 0.3, 0.15, 0.05]], rtol=1e-5)


def test_forced_token_has_its_own_logprob():
    out = chosen(rows(3), forced=[-1, 1, 3], temperature=[0, 0, 1.0])
    assert out.token.tolist() == [0, 1, 3]
    np.testing.assert_allclose(np.exp(out.logprob), [0.5, 0.05, 0.15], rtol=1e-5)


def test_sample_depends_on_key_and_count_alone():
    logits = np.random.default_rng(1).normal(size=(8, 40))
    keys = np.random.default_rng(2).integers(0, 2**32, (8, 2))
    settings = {"temperature": 1.5, "count": np.arange(8)}
    batched = chosen(logits, key=keys, **settings).token.tolist()
    order = np.array([5, 0, 7, 2])
    some = chosen(logits[order], key=keys[order], temperature=[1.5] * 4, count=order, top_p=[1, 1, 1, 1]).token
    assert some.tolist() == [batched[i] for i in order]
    # A row that samples beside others that are greedy, truncated or not needed.
    mixed = chosen(
        logits,
        key=keys,
        temperature=[1.5, 0, 1.5, 0, 0, 1.5, 0, 0],
        top_k=[0, 0, 0, 0, 0, 3, 0, 0],
        count=np.arange(8),
        needed=[True, False, True, True, False, True, True, True],
    ).token
    assert [mixed[0], mixed[2]] == [batched[0], batched[2]] and mixed[3] == logits[3].argmax()
    many = np.tile(logits[:1], (50, 1))
    assert len(set(chosen(many, key=keys[:1], temperature=1.5, count=np.arange(50)).token.tolist())) > 10
    assert len(set(chosen(many, key=keys[:1], temperature=1.5, count=3).token.tolist())) == 1
