"""Requests: which settings are taken and which are refused."""

import numpy as np
import pytest

from phivision_jax.inference.requests import Request


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1.0, float("nan"), float("inf"), 101, "0.5", None, True, [0.5], 1j)),
        *(("top_p", value) for value in (0.0, 1.5, -0.1, float("nan"), "1")),
        *(("top_k", value) for value in (-1, 0.5, "3", None)),
        *(("max_new_tokens", value) for value in (0, -3, 6.5, True, "6", float("inf"))),
        *(("thinking_budget", value) for value in (-1, 0.5, "3", True)),
        *(("seed", value) for value in (0.5, "0", 2**63, float("nan"), None)),
        *(("n", value) for value in (0, 129, 1.5, None)),
        *(("logprobs", value) for value in (-1, 21, 0.5, True)),
    ],
)
def test_request_rejects_settings(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an? (integer|number) .*, not "):
        Request("what?", **{name: value})


@pytest.mark.parametrize("stop", ["", ("a", ""), [5], ["a"] * 17])
def test_request_rejects_stop_texts(stop):
    with pytest.raises(ValueError, match=r"^stop must be at most 16 non-empty texts, not "):
        Request("what?", stop=stop)


def test_request_rejects_other_modes():
    with pytest.raises(ValueError, match=r"^mode must be one of auto, think, nothink, not thinking"):
        Request("what?", mode="thinking")


def test_request_without_thoughts_is_in_mode_nothink():
    assert Request("what?", thinking_budget=0).mode == "nothink"
    assert Request("what?", thinking_budget=0, mode="think").mode == "think"
    assert Request("what?", thinking_budget=1).mode == Request("what?").mode == "auto"


def test_request_takes_numbers_of_other_types():
    given = Request(
        "what?", max_new_tokens=np.int32(3), temperature=np.float32(0.5), seed=np.int64(7), top_p=1, stop="a"
    )
    assert given == Request("what?", max_new_tokens=3, temperature=0.5, seed=7, top_p=1.0, stop=("a",))
    assert isinstance(given.max_new_tokens, int) and isinstance(given.top_p, float)


def test_conversation_puts_images_in_front_of_a_single_question():
    for question in ("what?", {"role": "user", "content": "what?"}, [{"role": "user", "content": "what?"}]):
        messages, images = Request(question, images=["a.png", "b.png"]).conversation()
        assert messages == [{"role": "user", "content": "<image>\n<image>\nwhat?"}] and images == ["a.png", "b.png"]
    marked = {"role": "user", "content": "is <image> red?"}
    assert Request(marked, images="a.png").conversation() == ([marked], ["a.png"])
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    assert Request(turns).conversation() == (turns, [])
