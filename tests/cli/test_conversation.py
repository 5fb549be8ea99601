"""Conversations in a terminal and through pipes, with a generator that repeats what it was asked."""

import io
import json
import signal
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import phivision_jax
from phivision_jax.cli import conversation
from phivision_jax.cli.conversation import Conversation, show
from phivision_jax.cli.main import main
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.inference.requests import Delta, Reply, Timings


class Echo:
    """Answers with the question in capitals, after a thought in mode "think", and records requests and what was closed.

    Pressing Ctrl-C in the middle of an answer, and errors, are played when a question asks for them.
    """

    def __init__(self):
        self.requests, self.closed = [], 0

    def stream(self, request):
        self.requests.append(request)
        self.answers = self.answer(request)  # not closed by the garbage collector
        return self.answers

    def answer(self, request):
        question = request.messages[-1]["content"].removeprefix("<image>\n")
        if "too long" in question:
            raise ValueError("the prompt has 9,000 tokens")
        thought = "hm\x07m" if request.mode == "think" else ""
        try:
            if "stop me at once" in question:
                signal.raise_signal(signal.SIGINT)
            if thought:
                yield Delta(0, "thought", "hm")
                yield Delta(0, "thought", "\x07m")
            answer = question.upper()
            yield Delta(0, "answer", answer[:2])
            if "stop me" in question:
                signal.raise_signal(signal.SIGINT)
            yield Delta(0, "answer", answer[2:])
            mode = "think" if thought else "nothink"
            yield Reply(thought, answer, mode, "stop", (1,), 1, 0, 0, 1, Timings(0, 0, 0))
        finally:
            self.closed += 1


class Lines(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def interrupts(signals):
    """Ctrl-C raises KeyboardInterrupt, also if this process was started in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def talk(monkeypatch, capsys):
    """``talk(lines, images, terminal)`` → (generator, standard output, standard error)."""

    def run(lines, images=(), terminal=False, **settings):
        monkeypatch.setattr(sys, "stdin", (Lines if terminal else io.StringIO)("\n".join(lines) + "\n"))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        echo = Echo()
        Conversation(echo, {"mode": "nothink", **settings}, images).run()
        return echo, *capsys.readouterr()

    return run


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a photo.png")
    return tmp_path / "a photo.png"


def test_piped_lines_are_answered_one_by_one(talk):
    echo, out, err = talk(["hello", "", "and then?"])
    assert out == "HELLO\nAND THEN?\n" and err == "" and echo.closed == 2
    assert echo.requests[0].messages == [{"role": "user", "content": "hello"}]
    assert [message["content"] for message in echo.requests[1].messages] == ["hello", "HELLO", "and then?"]
    assert [message["role"] for message in echo.requests[1].messages] == ["user", "assistant", "user"]


def test_thoughts_are_shown_with_tags_or_dim_and_never_sent_again(talk):
    echo, out, _ = talk(["/mode think", "hello", "/mode nothink", "again"])
    assert out == "<think>hm\\x07m</think>HELLO\nAGAIN\n"
    assert echo.requests[1].messages[1] == {"role": "assistant", "content": "HELLO"}
    _, out, err = talk(["/mode think", "hello"], terminal=True)
    assert out == "> > \x1b[2mhm\x1b[0m\x1b[2m\\x07m\x1b[0m\n\nHELLO\n> " and "/help" in err


def test_images_go_with_the_next_question(talk, photo):
    content = photo.read_bytes()
    echo, _, err = talk([f"/image '{photo}'", "what?", "and now?", f"/image {str(photo).replace(' ', chr(92) + ' ')}",
                           "before <image> after"], [b"first"])  # fmt: skip
    assert [request.images for request in echo.requests] == [[b"first", content], [b"first", content],
                                                             [b"first", content, content]]  # fmt: skip
    asked = [request.messages[-1]["content"] for request in echo.requests]
    assert asked == ["<image>\n<image>\nwhat?", "and now?", "before <image> after"]
    assert err.count("4x3 pixels") == 2


def test_new_conversation_forgets_messages_and_images(talk, photo):
    echo, *_ = talk([f"/image '{photo}'", "one", f"/image '{photo}'", "/new", "two"])
    assert [len(request.images) for request in echo.requests] == [1, 0]
    assert [message["content"] for message in echo.requests[1].messages] == ["two"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown(talk):
    echo, out, err = talk(["please stop me now", "go on"], terminal=True)
    assert out == "> PL> GO ON\n> " and "(stopped)" in err and echo.closed == 2
    assert echo.requests[1].messages[1] == {"role": "assistant", "content": "PL"}


def test_a_question_without_an_answer_is_left_out(talk, photo):
    echo, _, err = talk([f"/image '{photo}'", "stop me at once", "go on"], terminal=True)
    assert "(stopped)" in err and echo.requests[1].messages == [{"role": "user", "content": "<image>\ngo on"}]
    assert len(echo.requests[1].images) == 1


def test_ctrl_c_at_the_prompt_ends_nothing(talk, monkeypatch):
    lines = iter([KeyboardInterrupt, "hello", KeyboardInterrupt, EOFError])

    def read(prompt):
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    _, out, _ = talk([], terminal=True)
    assert out == "\nHELLO\n\n"
    lines = iter([KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        talk([])


def test_errors_end_nothing(talk, photo, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    lines = ["/image missing.png", f"/image {tmp_path}/text.png", "/mode fast", "/modus think", "/", "/image 'a",
             "this is too long", f"/save '{photo}'", "still here", "/quit now", "never asked"]  # fmt: skip
    echo, out, err = talk(lines)
    assert out == "STILL HERE\n" and [len(request.images) for request in echo.requests] == [0, 0]
    assert len(echo.requests[1].messages) == 1
    problems = ["missing.png", "text.png", "mode must be one of", "no command /modus", "no command /;",
                "No closing quotation", "9,000 tokens", "File exists"]  # fmt: skip
    for line, problem in zip(err.splitlines(), problems, strict=True):
        assert problem in line


def test_saved_conversation_can_be_imported(talk, photo, tmp_path):
    saved = tmp_path / "talk.jsonl"
    talk([f"/image '{photo}'", "/mode think", "what is this?", "/mode nothink", "why?", f"/save {saved}"])
    record = json.loads(saved.read_text())
    assert [message.get("reasoning_content") for message in record["messages"]] == [None, "hm\x07m", None, ""]
    main(["data", "import", str(saved), str(tmp_path / "set")])
    (record,) = Dataset.open(tmp_path / "set")
    assert record.images == (photo.read_bytes(),) and record.mode == "think"
    contents = [message["content"] for message in record.messages]
    assert contents == ["<image>\nwhat is this?", "<think>hm\x07m</think>WHAT IS THIS?", "why?", "WHY?"]


def test_interrupted_single_answer_is_closed_and_ends_the_program(monkeypatch):
    def press(text):
        raise KeyboardInterrupt

    echo, request = Echo(), SimpleNamespace(messages=[{"content": "what?"}], mode="nothink")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(conversation, "printable", press)
    with pytest.raises(KeyboardInterrupt):
        show(echo.stream(request))
    assert echo.closed == 1


@pytest.mark.parametrize("words", [["what?"], []])
def test_chat_asks_one_question_or_talks(monkeypatch, capsys, photo, words):
    """With a question the answer is printed, and saved with its image; without one, lines are read."""
    echo, received = Echo(), {}
    out = photo.parent / "answer.png"

    def generate(model, processor, prompt, images, *, stream, **settings):
        received.update(settings, images=images)
        return echo.stream(SimpleNamespace(messages=[{"content": prompt}], mode=settings["mode"]))

    class Local(Echo):
        def __init__(self, model, processor, *, slots):
            super().__init__()
            self.ready = 0

        def start(self):
            self.ready += 1

        def close(self):  # a thread that computes while the program ends would crash it
            received["closed"] = True

        def stream(self, request):
            assert self.ready == 1  # on a thread of its own, so that Ctrl-C does not disturb the engine
            received.update(images=request.images)
            return super().stream(request)

    monkeypatch.setattr(phivision_jax, "load", lambda checkpoint, **settings: (None, None), raising=False)
    monkeypatch.setattr(phivision_jax, "generate", generate, raising=False)
    monkeypatch.setattr("phivision_jax.inference.local.LocalGenerator", Local)
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped?\n"))
    save = ["--save-image", str(out)] if words else []
    main(["chat", "run", *words, "--image", str(photo), "--mode", "think", *save])
    assert capsys.readouterr().out == f"<think>hm\\x07m</think>{'WHAT?' if words else 'PIPED?'}\n"
    assert len(received["images"]) == 1 and out.exists() == bool(words) and ("closed" in received) != bool(words)


@pytest.mark.parametrize("words", [["what?"], []])
def test_chat_refuses_settings_before_it_loads(monkeypatch, capsys, words):
    monkeypatch.setattr(phivision_jax, "load", lambda *args, **settings: pytest.fail("loaded"), raising=False)
    with pytest.raises(SystemExit):
        main(["chat", "run", *words, "--temperature", "-1"])
    assert capsys.readouterr().err == "phivision: temperature must be a number from 0 to 100, not -1.0\n"
