"""The text of a reply as its tokens arrive: thought and answer apart, complete characters only, stop texts left out.

What has been given out never changes: characters that the next token may still change are held back, and so are white
space that may turn out to be the end of a text, and the beginning of a stop text.
"""

from collections.abc import Sequence
from typing import Literal

from phivision_jax.text.constants import Mode
from phivision_jax.text.tokenizer import Tokenizer

type Kind = Literal["thought", "answer"]
REPLACEMENT = "\ufffd"
"""Ends the decoded text of a character whose last bytes are missing."""
MOST_HELD = 32
"""Most tokens that wait for the end of a character. It has at most four, but before it there may be bytes of no
character, and how many replacements these are depends on what follows."""


class Section:
    """The text of one kind of tokens, as it grows.

    It is decoded when it is asked for, and with each token where stop texts are looked for.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._longest = max(map(len, stops), default=0)
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before _read are in the text; decoding begins at _start, for its context
        self._text, self._given = "", 0
        self.stopped = False

    def add(self, token: int) -> None:
        # A vocabulary padded beyond its tokenizer can yield ids without a text.
        if self._tokenizer and token < self._tokenizer.vocab_size and not self.stopped:
            self._ids.append(token)
            if self._stops:
                self._decode(final=False)

    def _decode(self, *, final: bool) -> None:
        if self._tokenizer is None or self._read == len(self._ids):
            return
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith(REPLACEMENT) and not final and len(self._ids) - self._read < MOST_HELD:
            return
        looked = max(len(self._text) - self._longest, 0)
        self._text += after[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        found = [place for stop in self._stops if (place := self._text.find(stop, looked)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def new_text(self, *, final: bool = False) -> str:
        """The text that is new and certain; all that is left if it is ``final``."""
        if not self.stopped:
            self._decode(final=final)
        text = self._text
        if not final and not self.stopped:
            text = text[: len(text) - self._held(text)]
        text = text.strip()
        new, self._given = text[self._given :], max(len(text), self._given)
        return new

    def _held(self, text: str) -> int:
        """The number of characters at the end that may be the beginning of a stop text."""
        sizes = range(min(self._longest - 1, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

    @property
    def text(self) -> str:
        """The text up to the last ``new_text``."""
        return self._text.strip()


class Transcript:
    """The tokens of one sample, and the texts of its thought and answer.

    Args:
      tokenizer: None for a model without one: then there is no text.
      mode: forced by the prompt, or None.
      stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, mode: Mode | None, stops: Sequence[str]) -> None:
        self._tokenizer, self.mode = tokenizer, mode
        self.ids: list[int] = []
        self.thought, self.answer = Section(tokenizer), Section(tokenizer, stops)
        self.in_thought, self.thought_tokens = mode == "think", 0

    def add(self, token: int) -> None:
        """Add a token that is not a stop token."""
        self.ids.append(token)
        tokenizer = self._tokenizer
        if (
            tokenizer
            and len(self.ids) == 1
            and self.mode is None
            and token in (tokenizer.think_id, tokenizer.nothink_id)
        ):
            self.in_thought = token == tokenizer.think_id
            self.mode = "think" if self.in_thought else "nothink"
            self.thought_tokens += self.in_thought
        elif self.in_thought:
            self.thought_tokens += 1
            self.in_thought = tokenizer is None or token != tokenizer.end_think_id
            if self.in_thought:
                self.thought.add(token)
        else:
            self.answer.add(token)

    @property
    def stopped(self) -> bool:
        """True once the answer has a stop text."""
        return self.answer.stopped

    def new_text(self, *, final: bool = False) -> list[tuple[Kind, str]]:
        """New pieces of text."""
        pieces: list[tuple[Kind, str]] = [
            ("thought", self.thought.new_text(final=final or not self.in_thought)),
            ("answer", self.answer.new_text(final=final)),
        ]
        return [(kind, text) for kind, text in pieces if text]
