"""The local generator: streams, cancellation, threads, errors, new weights, shared prefixes."""

import dataclasses
import itertools
import queue
import threading

import pytest

from phivision_jax.inference.requests import Delta, Reply, Request
from tests.support.generation import generator_of, random_image
from tests.support.markov import CONFIG, chain, markov_model, processor

T = processor().tokenizer
EOS = CONFIG.decoder.eos_token_id
(SEP,) = T.encode("<|im_sep|>")
A, B = (T.encode(text)[0] for text in "ab")
MODEL = markov_model(
    chain([SEP, A, B, A], [T.think_id, "is it red", T.end_think_id, "yes circle", EOS], [T.nothink_id, "no", EOS])
)
"""Answers "ababab…" without an end, or shortly where the mode is forced."""
SHORT = Request("what?", mode="nothink")
TIMEOUT = 300


@pytest.fixture
def generator():
    generator = generator_of(MODEL, processor(), stop_ids=CONFIG.decoder.stop_ids)
    yield generator
    generator.close()


def answers(generator, requests) -> list[str]:
    return [reply.answer for reply in itertools.chain(*generator.generate(requests))]


def until(condition) -> None:
    """Wait for another thread."""
    waited = threading.Event()
    for _ in range(TIMEOUT * 20):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("nothing happened")


# ---------------------------------------------------------------------------------------------------------------------
# Streams and cancellation.


@pytest.mark.parametrize("threaded", [False, True])
def test_stream_gives_pieces_and_then_the_reply(generator, threaded):
    if threaded:
        generator.start()
    *deltas, reply = generator.stream(Request("what?", mode="think", logprobs=1))
    assert {type(delta) for delta in deltas} == {Delta} and isinstance(reply, Reply)
    texts = {kind: [d.text for d in deltas if d.kind == kind] for kind in ("thought", "answer")}
    assert "".join(texts["thought"]) == reply.thought == "is it red" and len(texts["thought"]) > 1
    assert "".join(texts["answer"]) == reply.answer == "yes circle" and len(texts["answer"]) > 1
    assert tuple(token for delta in deltas for token in delta.logprobs) == reply.logprobs
    assert reply == dataclasses.replace(generator.generate([Request("what?", mode="think", logprobs=1)])[0][0],
                                        timings=reply.timings)  # fmt: skip


def test_stream_of_several_samples(generator):
    events = list(generator.stream(Request("what?", mode="think", n=3)))
    for index in range(3):
        *deltas, reply = [event for event in events if event.index == index]
        assert isinstance(reply, Reply) and "".join(d.text for d in deltas) == "is it redyes circle"


def test_closing_a_stream_frees_its_slot(generator):
    streams = [generator.stream(Request("what?")) for _ in range(4)]
    for stream in streams:
        assert isinstance(next(stream), Delta)
    assert generator.stats()["active"] == 4
    for stream in streams:
        stream.close()
    assert answers(generator, [SHORT]) == ["no"]
    assert generator.stats()["active"] == 0 and generator.stats()["waiting"] == 0


def test_cancelled_requests_end_and_others_go_on(generator):
    """A cancelled one in a slot, one that waits, and one that was cancelled at once."""
    events: dict[int, list] = {i: [] for i in range(8)}
    tickets = [generator.submit(Request("what?", max_new_tokens=40), events[i].append) for i in range(8)]
    tickets[7].cancel()
    stream = generator.stream(SHORT)
    while not events[1]:
        generator._step()
    for i in (1, 6):
        tickets[i].cancel()
    *_, reply = stream
    assert reply.answer == "no" and tickets[1].finished and tickets[6].finished
    while not all(ticket.finished for ticket in tickets):
        generator._step()
    replies = {i: found[-1] for i, found in events.items()}
    assert {i for i, reply in replies.items() if reply.finish_reason == "cancelled"} == {1, 6, 7}
    assert all(reply.answer == "ab" * 20 for i, reply in replies.items() if i not in (1, 6, 7))
    cancelled = replies[1]
    assert (
        0 < len(cancelled.ids) < 40 and cancelled.answer == ("ab" * 20)[: len(cancelled.ids)] and replies[6].ids == ()
    )
    assert "".join(event.text for event in events[1][:-1]) == cancelled.answer
    assert all(sum(isinstance(event, Reply) for event in found) == 1 for found in events.values())


def test_cancelling_after_the_end_changes_nothing(generator):
    events: list = []
    ticket = generator.submit(SHORT, events.append)
    while not ticket.finished:
        generator._step()
    ticket.cancel()
    assert answers(generator, [SHORT]) == ["no"] and events[-1].finish_reason == "stop"


# ---------------------------------------------------------------------------------------------------------------------
# Many requests.


def test_requests_are_taken_a_few_before_their_turn(generator):
    taken, done = [], []

    def requests():
        for i in range(40):
            taken.append(i)
            yield SHORT

    def advance(count):
        done.append(count)
        assert len(taken) <= len(done) + 2 * generator.engine.slots

    assert [r.answer for (r,) in generator.generate(requests(), advance)] == ["no"] * 40
    assert done == [1] * 40


@pytest.mark.parametrize("threaded", [False, True])
def test_replies_come_as_they_are_finished_and_errors_in_their_place(generator, threaded):
    if threaded:
        generator.start()
    asked = [Request("what?", max_new_tokens=60), SHORT, Request("what? " * 600), dataclasses.replace(SHORT, n=3)]
    outcomes = list(generator.as_finished(iter(asked)))
    found = dict(outcomes)
    assert len(outcomes) == 4 and outcomes[-1][0] == 0  # the longest
    assert isinstance(found[2], ValueError) and "tokens" in str(found[2])
    assert [reply.answer for reply in found[3]] == ["no"] * 3 and [reply.index for reply in found[3]] == [0, 1, 2]
    assert list(generator.as_finished(iter(()))) == []


def test_closing_the_iterator_cancels_what_is_not_finished(generator):
    finished = generator.as_finished(iter([SHORT, Request("what?", max_new_tokens=400)]))
    assert next(finished)[0] == 0
    finished.close()
    generator.generate([SHORT])
    assert generator.stats()["active"] == 0


def test_request_that_cannot_be_answered_is_named(generator):
    with pytest.raises(ValueError, match=r"request 2: the prompt has .* tokens.*but a slot has 512; shorten it"):
        generator.generate([SHORT, SHORT, Request("what? " * 600)])
    with pytest.raises(ValueError, match=r"and 510 new ones are asked for, but a slot has 512"):
        generator.generate([dataclasses.replace(SHORT, max_new_tokens=510)])
    assert answers(generator, [SHORT]) == ["no"] and generator.stats()["active"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Threads and errors.


def test_requests_of_several_threads(generator):
    generator.start()
    found: queue.SimpleQueue = queue.SimpleQueue()

    def client(i):
        try:
            request = Request("what?", mode="think" if i % 2 else "nothink", n=1 + i % 3)
            found.put((i, *answers(generator, [request] * 3)))
        except BaseException as error:
            found.put((i, error))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    results = {i: rest for i, *rest in (found.get(timeout=TIMEOUT) for _ in threads)}
    assert results == {i: [("no", "yes circle")[i % 2]] * (3 * (1 + i % 3)) for i in range(8)}


def in_thread(function, *arguments) -> queue.SimpleQueue:
    """The result or the exception of a function on another thread."""
    found: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            found.put(function(*arguments))
        except BaseException as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def test_close_cancels_requests_in_flight(generator):
    """Those in slots and those that wait; later ones are refused."""
    generator.start()
    results = [in_thread(generator.generate, [Request("what?")] * 3) for _ in range(3)]
    until(lambda: generator.stats().get("generated_tokens", 0) > 0 and generator.stats()["active"] == 4)
    generator.close()
    for result in results:
        found = result.get(timeout=TIMEOUT)
        if isinstance(found, RuntimeError):  # closed before its last request was submitted
            continue
        reasons = {reply.finish_reason for reply in itertools.chain(*found)}
        assert reasons <= {"cancelled", "length"}
    for ask in (lambda: generator.generate([SHORT]), lambda: next(generator.stream(SHORT))):
        with pytest.raises(RuntimeError, match="the generator is closed"):
            ask()


def broken(times):
    """A replacement of ``Engine.decode`` that fails this many times, and then works."""
    calls = itertools.count()

    def wrap(decode):
        def run(*arguments):
            if next(calls) < times:
                raise MemoryError("no memory")
            return decode(*arguments)

        return run

    return wrap


@pytest.mark.parametrize("threaded", [False, True])
def test_errors_of_the_engine_reach_all_who_wait(generator, threaded):
    """Requests in slots and waiting ones; later requests are answered, and by nothing that was left behind."""
    asked = dataclasses.replace(SHORT, messages="what is the colour of the shape in the image? " * 4)
    want = answers(generator, [asked])
    generator.engine.decode = broken(1)(generator.engine.decode)
    events: list[list] = [[] for _ in range(7)]
    tickets = [generator.submit(Request("what?"), each.append) for each in events]
    if threaded:
        generator.start()
        until(lambda: all(ticket.finished for ticket in tickets))
    else:
        with pytest.raises(MemoryError, match="no memory"):
            generator.generate([Request("why?")])
    for each in events:
        assert isinstance(each[-1], MemoryError) and not any(isinstance(event, Reply) for event in each)
    assert generator.stats()["active"] == generator.stats()["waiting"] == 0
    before = generator.stats()["prefilled_tokens"]
    assert answers(generator, [asked]) == want
    (reply,) = generator.generate([asked])[0]
    assert generator.stats()["prefilled_tokens"] == before + reply.prompt_tokens + 1  # nothing was shared, then all


def test_errors_reach_a_thread_that_waits(generator):
    generator.engine.decode = broken(1)(generator.engine.decode)
    generator.start()
    result = in_thread(generator.generate, [Request("what?")])
    assert isinstance(result.get(timeout=TIMEOUT), MemoryError)
    assert answers(generator, [SHORT]) == ["no"]


def test_interrupt_leaves_nothing_half_done(generator):
    """Ctrl-C while a row is being computed: the slot does not hold the prompt, and nobody takes it for a prefix."""
    admit = generator.engine.admit

    def interrupted(row):
        raise KeyboardInterrupt

    generator.engine.admit = interrupted
    with pytest.raises(KeyboardInterrupt):
        generator.generate([SHORT])
    generator.engine.admit = admit
    (reply,) = generator.generate([SHORT])[0]
    assert reply.answer == "no" and generator.stats()["prefilled_tokens"] == reply.prompt_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Shared prefixes and new weights.


def test_common_beginning_of_three_modes_is_prefilled_once(generator):
    """A system prompt of some 400 tokens and an image; the modes differ in their last tokens."""
    system = {"role": "system", "content": "is it red? " * 100}
    conversation = [system, {"role": "user", "content": "<image>\nwhat color is it?"}]
    photo = random_image((16, 16), 0)
    modes = ("auto", "think", "nothink")
    requests = [Request(conversation, photo, mode=mode, n=2, max_new_tokens=3) for mode in modes]
    lengths = [replies[0].prompt_tokens for replies in generator.generate(requests)]
    assert lengths[1] == lengths[2] == lengths[0] + 1 > 400
    stats = generator.stats()
    # The first one completely, and of the five others the last token: the others begin with the prompt of "auto".
    assert stats["prefilled_tokens"] == lengths[0] + 5 and stats["images_encoded"] == 1


def test_next_turn_continues_the_one_before(generator):
    first = [{"role": "user", "content": "what? " * 60}]
    ((reply,),) = generator.generate([Request(first, mode="nothink")])
    before = generator.stats()["prefilled_tokens"]
    turn = [*first, {"role": "assistant", "content": reply.answer}, {"role": "user", "content": "why?"}]
    ((second,),) = generator.generate([Request(turn, mode="nothink")])
    assert generator.stats()["prefilled_tokens"] - before < 20 < 60 < second.prompt_tokens


def test_new_weights_use_nothing_of_the_old_ones(generator):
    photo = random_image((16, 16), 0)
    asked = Request("what?" * 20, photo, mode="nothink", logprobs=0)
    assert answers(generator, [asked, asked]) == ["no", "no"]
    before = generator.stats()["prefilled_tokens"]
    generator.update(markov_model(chain([T.nothink_id, "red", EOS])))
    (reply,) = generator.generate([asked])[0]
    assert reply.answer == "red"
    assert generator.stats()["prefilled_tokens"] - before == reply.prompt_tokens
    assert generator.stats()["images_encoded"] == 2  # once more: the old vision tokens are not used


def test_weights_do_not_change_under_way(generator):
    stream = generator.stream(Request("what?"))
    next(stream)
    with pytest.raises(RuntimeError, match="the weights cannot change while requests are being answered"):
        generator.update(MODEL)
    stream.close()
    generator.update(MODEL)  # what is cancelled is not being answered
    assert answers(generator, [SHORT]) == ["no"]
