"""Chat templates are found, compiled and rendered as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.text.template import ChatTemplate
from tests.support.chat import RELEASED_LIKE, assistant, user

TEMPLATE = ChatTemplate.small()


def test_render_trims_block_lines() -> None:
    """trim_blocks and lstrip_blocks: a block's line vanishes, an expression's stays."""
    text, spans = ChatTemplate(RELEASED_LIKE).render([user("a"), assistant("b")], generation_prompt=True)
    assert text == (
        "<|im_start|>system<|im_sep|>Think.<|im_end|>\n<|im_start|>user<|im_sep|>a<|im_end|>\n"
        "<|im_start|>assistant<|im_sep|>b<|im_end|><|im_start|>assistant<|im_sep|>"
    )
    assert [text[slice(*span)] for span in spans] == ["b<|im_end|>"]


def test_render_drops_system_messages_like_template() -> None:
    with_system = [{"role": "system", "content": "Be brief."}, user("a")]
    assert ChatTemplate(RELEASED_LIKE).render(with_system) == ChatTemplate(RELEASED_LIKE).render([user("a")])
    assert TEMPLATE.render(with_system)[0].startswith("<|im_start|>system<|im_sep|>Be brief.<|im_end|>")


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}y{% endfor %}", "y"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1\n ],\n "b": 1\n}'),
        ("{{ strftime_now('%%') }}{{ eos_token }}{{ tools is none }}", "%<|im_end|>True"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
    ],
)
def test_render_provides_transformers_helpers(source: str, rendered: str) -> None:
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    assert template.render([user("<é>"), assistant("b")])[0] == rendered


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
    ],
)
def test_render_errors_name_template(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^a.jinja: .*{reason}"):
        ChatTemplate(source, where="a.jinja").render([user("a")])


def test_template_syntax_error_names_line() -> None:
    with pytest.raises(ValueError, match=r"^a\.jinja, line 2: "):
        ChatTemplate("x\n{% if %}", where="a.jinja")


@given(st.lists(st.text(st.characters(exclude_characters="<|"), max_size=6), min_size=1, max_size=5))
def test_render_spans_are_answers(answers: list[str]) -> None:
    messages = [m for answer in answers for m in (user(answer), assistant(answer))]
    text, spans = TEMPLATE.render(messages)
    assert [text[slice(*span)] for span in spans] == [answer + "<|im_end|>" for answer in answers]


def test_render_refuses_hidden_generation_block() -> None:
    source = "{% set x %}{% generation %}b{% endgeneration %}{% endset %}{{ x }}"
    with pytest.raises(ValueError, match="must be at the top level"):
        ChatTemplate(source).render([user("a")])


def test_from_directory_prefers_jinja_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no chat_template\.jinja"):
        ChatTemplate.from_directory(tmp_path)
    config: dict[str, Any] = {
        "eos_token": {"content": "END"},
        "bos_token": None,
        "chat_template": "{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_directory(tmp_path).render([])[0] == "END"
    config["chat_template"] = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_directory(tmp_path).render([])[0] == "d"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert ChatTemplate.from_directory(tmp_path).render([])[0] == "file END"


def test_template_save_keeps_fingerprint(tmp_path: Path) -> None:
    template = ChatTemplate("a\r\n{{ 'é' }}\n")
    template.save(tmp_path)
    again = ChatTemplate.from_directory(tmp_path)
    assert (again.source, again.fingerprint) == (template.source, template.fingerprint)
    assert ChatTemplate("b").fingerprint != ChatTemplate("a").fingerprint
    assert ChatTemplate("a", {"eos_token": "x"}).fingerprint != ChatTemplate("a").fingerprint
