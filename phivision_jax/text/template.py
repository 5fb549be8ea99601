"""A checkpoint's chat template (jinja), rendered as transformers renders it."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

from phivision_jax.config import typed
from phivision_jax.io.messages import first_line, prefix_errors, shorten
from phivision_jax.io.read_json import read_json, read_limited
from phivision_jax.text import sandbox
from phivision_jax.text.tokenizer import TOKENIZER_CONFIG

TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_SMALL = Path(__file__).parent / "small"
_MARKED = "_marked"  # in the context: every generated piece, to notice those that render does not see


class ChatTemplate:
    """A jinja template in a sandbox (``sandbox.py``); see ``from_directory`` and ``small``.

    The settings are those of transformers: ``trim_blocks`` and ``lstrip_blocks`` on, ``break`` and ``continue``,
    ``raise_exception``, ``strftime_now``, a ``tojson`` that keeps non-ASCII text, and the special tokens of
    ``tokenizer_config.json`` by name.

    Args:
      source: the template's text.
      special_tokens: values of ``bos_token``, ``eos_token`` … in the template.
      where: the template's name in error messages.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = "chat template"
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._where = where
        environment = sandbox.Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        environment.globals["raise_exception"] = _raise_exception
        if len(source) > sandbox.SOURCE:
            raise ValueError(f"{where} has {len(source):,} characters, over the limit of {sandbox.SOURCE:,}")
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{where}, line {error.lineno}: {shorten(error.message or '', 300)}") from None
        except Exception as error:  # RecursionError, or Python's own limits on the program that jinja writes
            raise ValueError(f"{where} cannot be compiled: {shorten(first_line(error), 300)}") from None

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, ``chat_template.json``, or the template in ``tokenizer_config.json``.

        Raises:
          FileNotFoundError: when there is neither.
          ValueError: when the template does not compile.
        """
        path = Path(path)
        file, json_file, config_file = path / TEMPLATE_FILE, path / TEMPLATE_JSON, path / TOKENIZER_CONFIG
        config = read_json(config_file) if config_file.is_file() else {}
        special_tokens = {
            key: typed(value.get("content") if isinstance(value, Mapping) else value, str, f"{config_file}: {key}")
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | Mapping)
        }
        if file.is_file():
            with prefix_errors(str(file)):
                text = read_limited(file).decode("utf-8-sig")
            return cls(text, special_tokens, str(file))
        if json_file.is_file():
            config_file, config = json_file, read_json(json_file)
        name, source = f"chat_template in {config_file}", config.get("chat_template")
        if isinstance(source, list):  # several templates, by name
            entries = typed(source, tuple[Mapping[str, str], ...], name)
            source = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
        if source is None:
            raise FileNotFoundError(f"{path} holds no {TEMPLATE_FILE}, nor a default one in {TOKENIZER_CONFIG}")
        return cls(typed(source, str, name), special_tokens, name)

    @classmethod
    def small(cls) -> ChatTemplate:
        """The project's own template: the turns of Phi-4, no system prompt, no white space between turns."""
        return cls.from_directory(_SMALL)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation to text.

        Args:
          messages: dicts whose ``content`` is a string.
          generation_prompt: end with the beginning of the assistant's next turn.

        Returns:
          The text, and the character spans [start, end) inside ``{% generation %}`` blocks, in order.

        Raises:
          ValueError: when the template refuses the messages or fails on them.
        """
        marked: list[_Generated] = []
        variables = {**self.special_tokens, "messages": messages, "add_generation_prompt": generation_prompt}
        context = self._template.new_context({**variables, "tools": None, "documents": None, _MARKED: marked})
        text, spans = "", []
        try:
            sandbox.start(sum(len(message["content"]) for message in messages))
            for piece in self._template.root_render_func(context):
                sandbox.spend(len(piece))
                if isinstance(piece, _Generated):
                    spans.append((len(text), len(text) + len(piece)))
                text += piece
        except Exception as error:  # a template is a program, which can raise anything
            raise ValueError(f"{self._where}: {shorten(first_line(error), 300)}") from None
        if len(spans) != len(marked):
            problem = "must be at the top level or inside plain if and for, not in a macro, a set or a filter block"
            raise ValueError(f"{self._where}: {{% generation %}} {problem}")
        return text, spans

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the template and the special tokens that it may print."""
        return hashlib.sha256(json.dumps([self.source, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled template cannot be pickled, and data workers need one in their own processes.
        return type(self), (self.source, self.special_tokens, self._where)

    def save(self, path: str | Path) -> None:
        """Write the template into a directory as ``chat_template.jinja``, which takes precedence when it is read."""
        (Path(path) / TEMPLATE_FILE).write_text(self.source, encoding="utf-8", newline="")


class _Generated(str):
    """Text rendered inside a ``{% generation %}`` block."""


class _GenerationBlocks(Extension):
    """``{% generation %} … {% endgeneration %}`` yields its text as one ``_Generated`` piece.

    ``ChatTemplate.render`` joins the pieces of a template itself, so it sees where each of them begins.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        piece = _Generated(caller())
        context[_MARKED].append(piece)
        return piece


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
