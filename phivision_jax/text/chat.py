"""From messages to ids and labels: the checkpoint's own chat template, the thinking modes, the spans that are learned.

    messages   user "<image>\\nwhat shape?"                            assistant "circle"
    rendered   <|im_start|>user<|im_sep|><image>\\nwhat shape?<|im_end|><|im_start|>assistant<|im_sep|>circle<|im_end|>
    chunks     |-----------------------|       |-------------------------------------------------------------------|
    ids        im_start user im_sep      -200   \\n what shape ? im_end im_start assistant im_sep circle im_end
    labels                                                                                       circle im_end

The text is rendered first and cut at ``<image>`` afterwards; each chunk is tokenised by itself, as the released code
does (``>`` and a line break are one token: the whole string would give other ids). A message is a dict with ``role``
(system, user or assistant) and ``content``: a string with a literal ``<image>`` where an image stands, or a list of
parts, ``{"type": "text", "text": ...}`` and ``{"type": "image"}``, the latter with the image under ``"image"`` or not.
An assistant message with ``"weight": 0`` is read and not learned.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phivision_jax.batch import IGNORE, IMAGE_TOKEN
from phivision_jax.images.decode import ImageSource
from phivision_jax.text.tokenizer import END_THINK, NOTHINK, THINK, Tokenizer, read_tokenizer_config

type Message = Mapping[str, Any]
Mode = Literal["auto", "think", "nothink"]

IMAGE_MARKER = "<image>"
_ANSWER_BEGINS: dict[Mode | None, str] = {"think": THINK, "nothink": NOTHINK, "auto": "", None: ""}
_ROLES = ("system", "user", "assistant")
_TEMPLATE_FILE = "chat_template.jinja"
_SMALL = Path(__file__).parent / "small"


class ModeError(ValueError):
    """An answer that is not of its mode."""


class ControlTokenError(ValueError):
    """Content with a control token written in it: it would be obeyed, not read."""


class UnmarkedTemplateError(ValueError):
    """A template that does not say which text is the assistant's: nothing can be learned with it."""


class ChatTemplate:
    """A checkpoint's jinja template, rendered as transformers renders it; see ``from_directory`` and ``small``.

    Sandboxed and immutable, ``trim_blocks`` and ``lstrip_blocks`` on, ``break`` and ``continue``; ``raise_exception``,
    ``strftime_now`` and a ``tojson`` that keeps non-ASCII text; special tokens of ``tokenizer_config.json`` by name.

    Args:
      source: the template.
      special_tokens: what the template finds as ``bos_token``, ``eos_token``...
      where: what errors call it.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = "chat template"
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._where = where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{where}, line {error.lineno}: {error.message}") from None

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, or else the ``chat_template`` in ``tokenizer_config.json``.

        Raises:
          FileNotFoundError: when there is neither.
          ValueError: when the template does not compile.
        """
        path = Path(path)
        config_file = path / "tokenizer_config.json"
        files = {config_file.name: config_file.read_bytes()} if config_file.is_file() else {}
        config = read_tokenizer_config(files, str(path))
        special_tokens = {
            key: value["content"] if isinstance(value, Mapping) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | Mapping)
        }
        if (path / _TEMPLATE_FILE).is_file():
            return cls((path / _TEMPLATE_FILE).read_bytes().decode(), special_tokens, str(path / _TEMPLATE_FILE))
        source = config.get("chat_template")
        if isinstance(source, list):  # Several, by name.
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is None:
            raise FileNotFoundError(
                f"{path} holds no {_TEMPLATE_FILE}, and no default chat_template in tokenizer_config.json"
            )
        return cls(source, special_tokens, f"chat_template in {config_file}")

    @classmethod
    def small(cls) -> ChatTemplate:
        """The project's own: the turns of Phi-4, no system prompt, no white space between turns."""
        return cls.from_directory(_SMALL)

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the characters [start, end) inside ``{% generation %}``, in order.

        Args:
          messages: dicts whose ``content`` is a string.
          generation_prompt: end with the beginning of the assistant's next turn.

        Raises:
          ValueError: when the template refuses the messages or breaks on them.
        """
        marked: list[_Generated] = []
        context = self._template.new_context(
            {
                **self.special_tokens,
                "messages": messages,
                "add_generation_prompt": generation_prompt,
                "tools": None,
                "documents": None,
                _MARKED: marked,
            }
        )
        text, spans = "", []
        try:
            for piece in self._template.root_render_func(context):
                if isinstance(piece, _Generated):
                    spans.append((len(text), len(text) + len(piece)))
                text += piece
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self._where}: {error}") from None
        if len(spans) != len(marked):
            raise ValueError(
                f"{self._where}: a {{% generation %}} block inside a macro, a set block or a filter block hides where "
                "its text ends up: write it at the top level or inside plain if and for"
            )
        return text, spans

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the template and the special tokens it may print."""
        return hashlib.sha256(json.dumps([self.source, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled template cannot be pickled, and data workers in processes of their own need one.
        return type(self), (self.source, self.special_tokens, self._where)

    def save(self, path: str | Path) -> None:
        """Write the template into a directory as ``chat_template.jinja``, where it is read first."""
        (Path(path) / _TEMPLATE_FILE).write_text(self.source, encoding="utf-8", newline="")


def encode(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    mode: Mode | None = None,
    generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """A conversation as ids and labels.

    Args:
      messages: see the module's docstring. What the template drops (the released one drops system messages) is gone.
      mode: of a training example: "nothink": no answer begins with ``<think>``; "think": at least one does, and those
        that do contain ``</think>`` once. In both, every other answer holds neither tag and begins with the no-think
        token, put there where it is missing: each answer carries one mode tag. Of a prompt, how the answer begins:
        "nothink" and "think" append that first token. "auto" and None leave both as they stand.
      generation_prompt: end with the beginning of the assistant's next turn; such a prompt has no labels.

    Returns:
      ids with −200 (``IMAGE_TOKEN``) at each image; labels, the id itself where the token begins inside
      ``{% generation %}`` (the assistant's content and its end token) of an answer whose weight is not 0, −100
      (``IGNORE``) elsewhere.

    Raises:
      ControlTokenError: for content with a control token written in it, by which a user could close the turn
        (``<think>`` and ``</think>`` are let through).
      ModeError: for an answer that is not of its mode.
      UnmarkedTemplateError: when labels are needed and the template marks no assistant text.
      ValueError: for a message of the wrong form; for weights with a template that marks not one text per answer.
    """
    if mode not in _ANSWER_BEGINS:
        raise ValueError(f"mode must be auto, think or nothink, not {mode!r}")
    plain, _ = flatten(messages)
    for i, message in enumerate(plain):
        _refuse_control_tokens(message, f"message {i} ({message['role']})", tokenizer.control_tokens)
    if generation_prompt:
        text, _ = template.render(plain, generation_prompt=True)
        text += _ANSWER_BEGINS[mode]
        spans: list[tuple[int, int]] = []
    else:
        text, spans = template.render(_in_mode(plain, mode))
        if not spans and any(message["role"] == "assistant" for message in plain):
            raise UnmarkedTemplateError(
                "the chat template marks no assistant text, so there is nothing to learn from: in chat_template.jinja "
                "put {% generation %} and {% endgeneration %} around the assistant's content and its end token"
            )
        spans = _weighted(spans, plain)
    learned = bytearray(len(text))
    for start, end in spans:
        learned[start:end] = b"\1" * (end - start)

    ids: list[int] = []
    labels: list[int] = []
    begin = 0
    for i, chunk in enumerate(text.split(IMAGE_MARKER)):
        if i:
            ids.append(IMAGE_TOKEN)
            labels.append(IGNORE)
            begin += len(IMAGE_MARKER)
        chunk_ids, offsets = tokenizer.encode_with_offsets(chunk)
        ids += chunk_ids
        labels += [t if learned[begin + start] else IGNORE for t, (start, _) in zip(chunk_ids, offsets, strict=True)]
        begin += len(chunk)
    return ids, labels


def flatten(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[ImageSource | None]]:
    """Messages with string contents, and one entry per ``<image>`` in them: the image given inline, or None.

    The parts of a content are joined; an image part becomes ``<image>`` and a line break, the form that the released
    model was trained on.

    Raises:
      ValueError: for a message that is not of the form in the module's docstring, naming it.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError("a conversation is a non-empty list of messages, each with a role and a content")
    plain: list[dict[str, Any]] = []
    images: list[ImageSource | None] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {i} is not a dict with role and content")
        if message["role"] not in _ROLES:
            raise ValueError(f"message {i} has role {message['role']!r}: it must be one of {', '.join(_ROLES)}")
        content = message["content"]
        if not isinstance(content, str | Sequence):
            raise ValueError(f"message {i}: its content is neither a string nor a list of parts")
        if message.get("weight") not in (None, 0, 1):
            raise ValueError(f"message {i}: its weight is {message['weight']!r}: it must be 0 (not learned) or 1")
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image":
                texts.append(IMAGE_MARKER + "\n")
                images.append(part.get("image"))
            elif kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                images += [None] * part["text"].count(IMAGE_MARKER)
            else:
                raise ValueError(f"message {i}: a part of its content is neither a text with its text nor an image")
        plain.append({**message, "content": "".join(texts)})
    return plain, images


def _refuse_control_tokens(message: Message, where: str, control_tokens: Sequence[str]) -> None:
    content = message["content"]
    if message["role"] == "assistant":
        content = content.removeprefix(NOTHINK)
    for token in control_tokens:
        if token in content and token not in (THINK, END_THINK):
            raise ControlTokenError(
                f"{where} contains the control token {token}: it would be obeyed, not read; reword it"
            )


def _in_mode(messages: list[dict[str, Any]], mode: Mode | None) -> list[dict[str, Any]]:
    """The messages with one mode tag at the beginning of each answer."""
    if mode in (None, "auto"):
        return messages
    tagged, thinks = [], False
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant":
            tagged.append(message)
        elif content.startswith(THINK):
            if mode == "nothink":
                raise ModeError(f"message {i}: mode is nothink, but the answer begins with {THINK}")
            if (ends := content.count(END_THINK)) != 1:
                raise ModeError(
                    f"message {i}: mode is think, but the answer begins with {THINK} and has {ends} {END_THINK}"
                )
            tagged.append(message)
            thinks = True
        elif tag := next((tag for tag in (THINK, END_THINK) if tag in content), None):
            # A tag in the middle would be learned as the control token that it is, against the answer's own mode.
            raise ModeError(
                f"message {i}: mode is {mode}, but the answer holds {tag} without beginning with {THINK}: thoughts "
                "stand first; reword an answer that only speaks of the tag"
            )
        else:
            tagged.append({**message, "content": NOTHINK + content.removeprefix(NOTHINK)})
    if mode == "think" and not thinks:
        raise ModeError(f"mode is think, but no answer is {THINK} thoughts {END_THINK} answer")
    return tagged


def _weighted(spans: list[tuple[int, int]], messages: Sequence[Message]) -> list[tuple[int, int]]:
    """The spans of the answers that are learned: those whose weight is not 0."""
    weights = [message.get("weight") for message in messages if message["role"] == "assistant"]
    if 0 not in weights:
        return spans
    if len(spans) != len(weights):
        raise ValueError(
            f"the chat template marks {len(spans)} texts in a conversation of {len(weights)} answers, so it does not "
            "show which of them has weight 0"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight != 0]


# ---------------------------------------------------------------------------------------------------------------------
# What transformers gives to its templates.

_MARKED = "_marked"  # The context's list of every generated piece, to notice those that never come out whole.


class _Generated(str):
    """A piece of rendered text that stood inside ``{% generation %}``."""


class _GenerationBlocks(Extension):
    """``{% generation %} … {% endgeneration %}``: yields its text as one piece of a type of its own.

    ``render`` joins the pieces of a template itself, so it sees where each such piece begins.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        piece = _Generated(caller())
        context[_MARKED].append(piece)
        return piece


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
