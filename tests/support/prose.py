"""Count what the style guide forbids in prose: headless docstrings, and words that have a standard term.

    python -m tests.support.prose [PATH …]      # every finding with its file and line

Prose is every docstring, attribute docstring, comment, message (string literal with a space in it) and identifier that
a file defines, and the text of Markdown pages.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

HEADLESS = re.compile(r"(What|Of|Whether|How|Where|Who|Which|That)\b")
SEARCHED = ("phivision_jax", "convert", "configs", "benchmarks", "docs", "examples", "tests")

# Pattern → the term to use. Patterns match whole words, in any case.
WORDS = {
    r"holes?": "placeholder of a failed example",
    r"columns? (of|in) (a|the|each|one|its) (row|batch)": "positions, tokens, sequence length",
    r"(text|image|vision|loss|query|key|generated|own) columns?": "positions, tokens",
    r"columns? that": "positions that",
    r"copies of (a |the |all )?(parameters?|weights?|params)": "replicas",
    r"drawn": "sampled",
    r"pictures?": "image (code), figure (docs)",
    r"whole": "complete, intact, committed",
    r"is told|are told|told|tells": "receives, logs, reports",
    r"says|said": "reports, states",
    r"stands|lies": "is stored, is in",
    r"a training(?= (is|was|that|which|goes|ends|starts|has|can|in|of|on)\b|[.,;:])": "a training run",
    r"trainings": "training runs",
    r"not taken": "skipped updates",
    r"whoever": "users",
    r"anew": "again",
    r"for ever": "forever",
    r"likewise": "also",
    r"mended?|mending": "fix",
}
_PATTERNS = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): term for pattern, term in WORDS.items()}
NAMES = {
    *("agree", "at", "by_device", "cut", "drawn", "explained", "fed", "first_alone", "give", "hole", "holes", "made"),
    *("naming", "of", "picture", "pictures", "said", "says", "take", "takes", "there", "together", "told", "whole"),
}
"""Names that no function, class, argument, variable or attribute may have."""
_NOT_PROSE = re.compile(r"`[^`]*`|https?://\S+")


class Finding(NamedTuple):
    path: Path
    line: int
    problem: str
    text: str


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Docstrings, those below attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def headless(path: Path) -> tuple[int, list[Finding]]:
    """The number of docstrings in a Python file, and those that start without a subject or a verb."""
    found, count = [], 0
    for node in docstrings(ast.parse(path.read_text())):
        count += 1
        text = str(node.value).strip()
        if HEADLESS.match(text):
            found.append(Finding(path, node.lineno, "headless docstring", text.splitlines()[0]))
    return count, found


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of all prose in a file."""
    source = path.read_text()
    if path.suffix == ".md":
        fenced = False
        for number, line in enumerate(source.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, line
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
        elif token.type in (tokenize.STRING, tokenize.FSTRING_MIDDLE) and " " in token.string:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, identifier) of everything that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def words(path: Path) -> list[Finding]:
    """Words in a file's prose and names that have a standard term."""
    found = []
    for line, text in _prose(path):
        text = _NOT_PROSE.sub("", text)
        for pattern, term in _PATTERNS.items():
            found += [Finding(path, line, f"{m[0]!r}: {term}", text.strip()) for m in pattern.finditer(text)]
    if path.suffix == ".py":
        tree = ast.parse(path.read_text())
        found += [Finding(path, line, f"name {name!r}", name) for line, name in _names(tree) if name in NAMES]
    return found


def files(roots: list[Path] | None = None) -> list[Path]:
    """Python files and Markdown pages below ``roots``; default: all of the repository's."""
    if roots is None:
        roots = [ROOT / name for name in SEARCHED] + [p for p in ROOT.iterdir() if p.suffix in (".py", ".md")]
    found = []
    for root in roots:
        found += [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".py", ".md"))
    return [path for path in found if path.name not in ("prose.py", "test_prose.py")]  # these quote the words


def main(arguments: list[str]) -> int:
    paths = files([Path(a).resolve() for a in arguments] or None)
    python = [path for path in paths if path.suffix == ".py"]
    counted = [headless(path) for path in python]
    findings = [f for _, found in counted for f in found] + [f for path in paths for f in words(path)]
    for finding in findings:
        print(f"{finding.path.relative_to(ROOT)}:{finding.line}: {finding.problem}    {finding.text[:100]}")
    total, bad = sum(n for n, _ in counted), sum(len(found) for _, found in counted)
    print(f"{bad} of {total} docstrings are headless; {len(findings) - bad} words or names have a standard term")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
