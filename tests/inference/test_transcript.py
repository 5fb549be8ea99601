"""Texts of replies as tokens arrive, against the text of all tokens at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.inference.transcript import Transcript
from phivision_jax.text.tokenizer import Tokenizer

T = Tokenizer.small()
TEXTS = st.text(st.sampled_from("aé€😀 \n.x"), max_size=12)
"""Characters of one to four bytes, each a token in this tokenizer, with white space at both ends."""
PLAIN = st.integers(0, T.nothink_id - 1)
"""Any token that is not a control token: many of them are parts of characters."""


def spoken(transcript, ids):
    """The pieces of each kind, as they are given out."""
    pieces = {"thought": [], "answer": []}
    for token in ids:
        transcript.add(token)
        for kind, text in transcript.new_text(final=transcript.stopped):
            assert text
            pieces[kind].append(text)
        if transcript.stopped:
            break
    else:
        for kind, text in transcript.new_text(final=True):
            pieces[kind].append(text)
    assert transcript.new_text(final=True) == []
    assert "".join(pieces["thought"]) == transcript.thought.text
    assert "".join(pieces["answer"]) == transcript.answer.text
    return pieces


@given(st.lists(PLAIN, max_size=30))
def test_pieces_of_any_tokens_are_the_text(ids):
    transcript = Transcript(T, "nothink", ())
    spoken(transcript, ids)
    assert transcript.answer.text == T.decode(ids).strip()
    assert transcript.ids == ids and transcript.thought_tokens == 0 and not transcript.in_thought


@given(TEXTS, TEXTS, st.sampled_from(["forced", "opened"]))
def test_thought_and_answer(thought, answer, how):
    first = [] if how == "forced" else [T.think_id]
    ids = [*first, *T.encode(thought), T.end_think_id, *T.encode(answer)]
    transcript = Transcript(T, "think" if how == "forced" else None, ())
    pieces = spoken(transcript, ids)
    assert (transcript.thought.text, transcript.answer.text) == (thought.strip(), answer.strip())
    assert transcript.mode == "think" and not transcript.in_thought
    assert transcript.thought_tokens == len(first) + len(T.encode(thought)) + 1
    assert not any("\ufffd" in text for text in pieces["thought"] + pieces["answer"])


@given(TEXTS, st.lists(st.text(st.sampled_from("aé€ .x"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_texts_end_the_answer(text, stops):
    """At the first place in the text where any of them is complete."""
    transcript = Transcript(T, "nothink", stops)
    spoken(transcript, T.encode(text))
    places = [text.find(stop) for stop in stops if stop in text]
    assert transcript.stopped == bool(places)
    if not places:
        assert transcript.answer.text == text.strip()
        return
    # Tokens are added one by one, so the first stop that is complete ends it.
    ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
    found = [text[:ends].find(stop) for stop in stops if stop in text[:ends]]
    assert transcript.answer.text == text[: min(found)].strip()


@given(TEXTS)
def test_nothing_is_given_out_that_a_stop_text_takes_back(text):
    stop = "a€x."
    transcript = Transcript(T, "nothink", (stop,))
    pieces = spoken(transcript, T.encode(text + stop + "b"))
    assert transcript.stopped and "".join(pieces["answer"]) == text[: (text + stop).find(stop)].strip()


def test_characters_appear_when_their_last_byte_does():
    transcript = Transcript(T, "nothink", ())
    found = []
    for token in T.encode("x😀é"):
        transcript.add(token)
        found.append("".join(text for _, text in transcript.new_text()))
    assert found == ["x", "", "", "", "😀", "", "é"]


def test_bytes_of_no_character_do_not_change_the_next_one():
    """Continuation bytes alone, and beginnings without an end, in one run."""
    first, *rest = T.encode("€")
    ids = [*rest, first, first, *rest[:1], *T.encode("€x"), *rest]
    transcript = Transcript(T, "nothink", ())
    spoken(transcript, ids)
    assert transcript.answer.text == T.decode(ids) and "€x" in transcript.answer.text


def test_stop_text_that_begins_with_white_space():
    transcript = Transcript(T, "nothink", (" aa",))
    assert spoken(transcript, [*T.encode(" "), *T.encode("a") * 3])["answer"] == []
    assert transcript.stopped and transcript.answer.text == ""


def test_white_space_waits_for_what_follows():
    transcript = Transcript(T, "nothink", ())
    found = []
    for token in (T.encode(c)[0] for c in " a \nb "):
        transcript.add(token)
        found.append("".join(text for _, text in transcript.new_text()))
    assert found == ["", "a", "", "", " \nb", ""]


def test_stop_texts_are_held_back_while_they_may_come():
    transcript = Transcript(T, "nothink", ("abc",))
    found = []
    for token in (T.encode(c)[0] for c in "xababx"):
        transcript.add(token)
        found.append("".join(text for _, text in transcript.new_text()))
    assert found == ["x", "", "", "ab", "", "abx"]


def test_character_that_is_cut_off():
    ids = T.encode("x€")
    transcript = Transcript(T, "nothink", ())
    assert "".join(spoken(transcript, ids[:-1])["answer"]) == "x\ufffd" == T.decode(ids[:-1])


def test_ids_beyond_the_tokenizer_have_no_text():
    transcript = Transcript(T, "nothink", ())
    spoken(transcript, [*T.encode("a"), 600, *T.encode("b")])
    assert transcript.answer.text == "ab" and len(transcript.ids) == 3


@pytest.mark.parametrize("mode", [None, "think", "nothink"])
def test_without_a_tokenizer_there_is_no_text(mode):
    transcript = Transcript(None, mode, ("a",))
    for token in range(5):
        transcript.add(token)
    assert transcript.new_text(final=True) == [] and transcript.ids == list(range(5)) and not transcript.stopped
