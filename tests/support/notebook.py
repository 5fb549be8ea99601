"""Run a notebook without Jupyter, in this process: its cells in order, their outputs as Jupyter stores them.

    cd notebooks && python -m tests.support.notebook ask.ipynb      # runs it and writes its outputs into it

A cell's output is what it prints, what it gives to ``display``, and its last expression, as HTML, PNG or text.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FORMATS = {"text/html": "_repr_html_", "image/png": "_repr_png_"}


class Cell:
    """A code cell while it runs; ``outputs`` are those of the notebook format."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self._printed = io.StringIO()

    def run(self, source: str, names: dict[str, Any]) -> None:
        names["display"] = self.display
        body = ast.parse(source).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(self._printed):
            exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None
        self._flush()
        if value is not None and not source.rstrip().endswith(";"):
            self.outputs.append({"output_type": "execute_result", "execution_count": None, **_data(value)})

    def display(self, *values: Any) -> None:
        for value in values:
            self._flush()
            self.outputs.append({"output_type": "display_data", **_data(value)})

    def _flush(self) -> None:
        if text := self._printed.getvalue():
            self.outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
            self._printed.seek(0)
            self._printed.truncate()


def _data(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": [repr(value)]}
    for mime, method in FORMATS.items():
        if hasattr(value, method):
            shown = getattr(value, method)()
            data[mime] = base64.b64encode(shown).decode() if isinstance(shown, bytes) else shown.splitlines(True)
    return {"data": data, "metadata": {}}


def run(notebook: dict[str, Any], replaced: tuple[tuple[str, str], ...] = ()) -> None:
    """Run all cells and store their outputs, in place.

    Args:
      replaced: (old, new) pieces of source, each of which must be in the notebook.

    Raises:
      RuntimeError: for a cell that fails, with its number and source.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    left = dict(replaced)
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        for old, new in replaced:
            if old in source:
                source = source.replace(old, new)
                left.pop(old, None)
        running = Cell()
        try:
            running.run(source, names)
        except Exception as error:
            raise RuntimeError(f"cell {number} failed with {type(error).__name__}: {error}\n{source}") from error
        cell["outputs"] = running.outputs
    if left:
        raise RuntimeError(f"not in the notebook: {[*left]}")


def main(path: str, *pieces: str) -> None:
    notebook = json.loads(Path(path).read_text())
    run(notebook, tuple(zip(pieces[::2], pieces[1::2], strict=True)))
    if not pieces:
        Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
