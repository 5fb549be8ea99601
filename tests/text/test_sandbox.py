"""Hostile chat templates end in a sentence, in bounded time and memory; ordinary ones render as in jinja."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phivision_jax.text import sandbox
from phivision_jax.text.template import ChatTemplate
from tests.support.chat import assistant, user

MESSAGES = [user("one  two\nthree"), assistant("<b>four</b>"), user("4")]


def doubled(change: str, start: str = "'aaaa'") -> str:
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{change}{{% endfor %}}{{{{ ns.x|length }}}}"


TOO_LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ ([0] * 10**10)|length }}",
    "{{ (['a' * 1000000] * 100000)|join }}",
    "{{ range(100000)|join('a' * 1000000) }}",
    "{{ ('a' * 1000000).join(range(1000)|map('string')) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a\n' * 100000)|indent(100000) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{% macro m() %}{{ caller() * 10**9 }}{% endmacro %}{% call m() %}abc{% endcall %}",
    "{% for i in range(100000) %}" + "a" * 10_000 + "{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "a" * 10_000 + "{% endfor %}{% endset %}{{ x|length }}",
    "{% set b = ['a' * 1000000] * 15 %}{% for i in range(100000) %}{% set x = b|string %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% set b = [[1] * 8000] * 900 %}{{ b|sum(start=[])|length }}",
    doubled("{% set ns.x = [ns.x, ns.x] %}", "[1]"),
    doubled("{% set ns.x = (ns.x,) %}", "(1,)").replace("60", "100000"),
    doubled("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{}"),
    doubled("{% set ns.x = dict(a=ns.x, b=ns.x) %}", "{}"),
    doubled("{% set ns.x = {1: ns.x.items(), 2: ns.x.items()} %}", "{}"),
    doubled("{% set ns.x = range(60)|map(attribute='q', default=ns.x)|list %}"),
    "{{ ('a' * 100000).strip('b' * 100000 ~ 'a') }}",
    "{{ range(1000)|sort(attribute='x,' * 1000) }}",
    doubled("{% set ns.x = ns.x ~ ns.x %}"),
    doubled("{% set ns.x = ns.x + ns.x %}"),
    doubled("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    doubled("{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
]
REFUSED = [
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ ('x'|attr('ljust'))(10**9) }}",
    "{{ range(100000)|map('center', 1000000)|list }}",
    "{{ ('a' * 4000).rfind('ab' + 'a' * 2000) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ ([[1]] * 100000)|sum(start=[]) }}",
    "{{ ('\xe9' * 1000000).encode('punycode') }}",
    "{{ 1|round(10**9, 'ceil') }}",
    "{% filter center(1000000000) %}a{% endfilter %}",
]
OTHERS = [
    ("{{ '%1000000000d' % 1 }}", "no width over 999"),
    ("{{ '%1000000000d'|format(1) }}", "no width over 999"),
    ("{{ '{:1000000000}'.format(1) }}", "no width over 999"),
    ("{{ '{a:1000000000}'.format_map({'a': 1}) }}", "no width over 999"),
    *((source, "is not available in chat templates") for source in REFUSED),
    ("{{ 10**(10**8) }}", "a number is too large"),
    (doubled("{% set ns.x = ns.x * ns.x %}", "3"), "a number is too large"),
    ("{{ '%*d' % (10**9, 1) }}", "nor one from its values"),
    ("{{ '{:{}}'.format(1, 10**9) }}", "nor one from its values"),
    ("{{ range(10**9) }}", "Range too big"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 1e308 * 10 ** 400 }}", "int too large"),
    ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion depth"),
    ("{{ ('\t' * 1000000).expandtabs(1000000) }}", "expandtabs is not available"),
    ("{{ ('a' * 1000).translate({97: 'b' * 1000000}) }}", "translate is not available"),
    ("{{ ('<!---->' * 100000)|striptags }}", "striptags is not available"),
    ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
    ("{% include 'other' %}", "no loader"),
    ("{{ [-10**12]|map('_pay')|list and 'a' * 10**8 }}", "limit for a conversation"),
    ("{{ raise_exception('\x1b[31m' ~ 'x' * 10000) }}", r"\\x1b\[31mxxx.{200,300}$"),
]
NEVER_COMPILED = [
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion depth"),
    ("{% if 1 %}" * 300 + "{% endif %}" * 300, "cannot be compiled"),
    ("{{ " + "9" * 5000 + " }}", "cannot be compiled: Exceeds the limit"),
    ("a" * (sandbox.SOURCE + 1), "has 1,048,577 characters, over the limit"),
]


@pytest.mark.parametrize("source", TOO_LARGE, ids=lambda source: source[:60])
def test_template_that_makes_too_much_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a smaller limit, for speed."""
    assert sandbox.CHARACTERS == 2**24
    monkeypatch.setattr(sandbox, "CHARACTERS", 2**20)
    ChatTemplate("a").render(MESSAGES)  # what one rendering leaves behind does not help the next
    template = ChatTemplate(source, where="a.jinja")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^a\.jinja: it would make more than 1,048,576 characters"):
            template.render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("source", "reason"), OTHERS, ids=lambda text: text[:60])
def test_every_failure_of_a_template_is_a_sentence(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.jinja: .*{reason}"):
        ChatTemplate(source, where="a.jinja").render(MESSAGES)


@pytest.mark.parametrize(("source", "reason"), NEVER_COMPILED, ids=lambda text: text[:30])
def test_template_that_cannot_be_compiled_is_refused(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.jinja .*{reason}"):
        ChatTemplate(source, where="a.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(1000) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in range(9) recursive %}{% if loop.depth < 99 %}{{ loop([1, 2, 3]) }}{% endif %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(100) }}",
        "{{ range(100000)|select('in', range(100000)|list)|list }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = 1 == 2 %}{% endfor %}{% endfor %}",
    ],
)
def test_endless_template_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ChatTemplate("a").render(MESSAGES)
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"takes longer than 0\.2 seconds"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages|length }}{{ messages[1:]|map(attribute='content')|join(', ') }}{{ messages|tojson }}",
        "{% for m in messages %}{{ m.role ~ ': ' ~ m['content']|trim }}{{ '\n' if not loop.last }}{% endfor %}",
        "{% for k, v in messages[0]|items %}{{ k }}={{ v }}{% endfor %}{{ messages[::-1][0].content }}",
        "{% set a, b = 1, (2, 'x') %}{{ [a, b, {'c': b}] }}{{ '%s and %03d' % ('x', 5) }}{{ '{:>5}|'.format(a) }}",
        "{{ 'a-b-c'.split('-')[-1] }}{{ 'abc'.replace('b', 'xx') }}{{ 'a' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1.5 * 2 }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'a\nb'|indent(2) }}",
        "{% macro show(m, n=2) %}{{ m.content|upper * n }}{% endmacro %}{{ show(messages[0]) }}{{ [3, 1]|sort }}",
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{{ loop.length }}{% else %}none{% endfor %}{{ ns.n }}{{ 1700000000 % 86400 }}{{ '%d' % 1700000000 }}",
    ],
)
def test_ordinary_template_renders_as_in_jinja(source: str) -> None:
    settings: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    plain = ImmutableSandboxedEnvironment(**settings)
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    want = plain.from_string(source).render(messages=MESSAGES)
    assert ChatTemplate(source).render(MESSAGES)[0] == want


def test_long_conversation_may_make_more() -> None:
    """A message of 6 million characters, copied eight times."""
    text = "a" * 6_000_000
    source = "{% for i in range(8) %}{{ messages[0].content|trim }}{% endfor %}"
    assert len(ChatTemplate(source).render([user(text)])[0]) == 48_000_000


def test_nested_namespaces_are_not_written_out() -> None:
    source = doubled("{% set ns.x = namespace(a=ns.x, b=ns.x) %}").replace("ns.x|length", "ns.x")
    assert len(ChatTemplate(source).render(MESSAGES)[0]) < 100
