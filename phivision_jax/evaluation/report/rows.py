"""The rows of an evaluation as files that its page loads: an index of all rows, and chunks with their texts.

data/index.js        evaluation.index({…})       a few values of each row, as columns: lists, filters, counts
data/rows-N.js       evaluation.rows(N, […])     everything about some hundred rows, loaded when one of them is shown

They are scripts, because pages that are opened as files may load scripts but may not fetch data.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.report.marks import marks_of
from phivision_jax.evaluation.report.numbers import MODES, is_unparsed, title_of
from phivision_jax.evaluation.results import Result
from phivision_jax.io import atomic
from phivision_jax.io.storage import Location, children

CHUNK_ROWS, CHUNK_CHARACTERS = 200, 1_000_000
"""A chunk ends after so many rows, or so many characters."""
PREVIEW = 100
"""Characters of a text in the index."""
TAKEN = (None, "think", "nothink")
ERROR, UNPARSED, LENGTH, JUDGED = 1, 2, 4, 8
"""Bits of a row's flags in the index, as in page/answers.js."""
REFERENCE_KEYS = ("answer", "answers", "label", "bbox_xyxy_norm", "bbox_xywh_px", "bbox")
"""Keys of a record that hold the reference, the first of them that is present."""


def write_rows(
    folder: Location,
    results: Sequence[Result],
    benchmarks: Mapping[str, Benchmark],
    other: Mapping[tuple[str, str, str], Result] | None,
) -> list[str]:
    """Write the files of all rows to a folder, and remove chunks of an earlier report.

    Args:
      folder: exists.
      results: rows in the order of ``numbers.group``.
      benchmarks: for titles.
      other: rows of another evaluation by key, to compare with; or None.

    Returns:
      Names of the files.
    """
    order = _by_item(results)
    chunks: list[list[str]] = [[]]
    characters = 0
    for result in order:
        line = _script_json(_everything(result, other.get(result.key) if other else None))
        if chunks[-1] and (len(chunks[-1]) == CHUNK_ROWS or characters + len(line) > CHUNK_CHARACTERS):
            chunks.append([])
            characters = 0
        chunks[-1].append(line)
        characters += len(line)
    starts = [0]
    for chunk in chunks[:-1]:
        starts.append(starts[-1] + len(chunk))
    index = _index(order, benchmarks, other) | {"starts": starts}
    files = {f"rows-{n}.js": f"evaluation.rows({n}, [\n" + ",\n".join(c) + "\n]);\n" for n, c in enumerate(chunks)}
    files["index.js"] = f"evaluation.index({_script_json(index)});\n"
    for name, text in files.items():
        atomic.write(folder / name, text, durable=False)
    for left in children(folder):
        if left.name.startswith("rows-") and left.name not in files:
            left.unlink()
    return sorted(files)


def _by_item(results: Sequence[Result]) -> list[Result]:
    """The modes of an item next to each other."""
    benchmarks = {name: i for i, name in enumerate(dict.fromkeys(row.benchmark for row in results))}
    items = {key: i for i, key in enumerate(dict.fromkeys((row.benchmark, row.item) for row in results))}
    return sorted(
        results, key=lambda row: (benchmarks[row.benchmark], items[row.benchmark, row.item], MODES.index(row.mode))
    )


def _index(
    rows: Sequence[Result],
    benchmarks: Mapping[str, Benchmark],
    other: Mapping[tuple[str, str, str], Result] | None,
) -> dict[str, Any]:
    names = list(dict.fromkeys(row.benchmark for row in rows))
    numbers = {name: i for i, name in enumerate(names)}
    columns: dict[str, list[Any]] = {
        "benchmark": [numbers[row.benchmark] for row in rows],
        "mode": [MODES.index(row.mode) for row in rows],
        "taken": [TAKEN.index(row.taken) for row in rows],
        "value": [round(row.value, 4) for row in rows],
        "flags": [_flags(row) for row in rows],
        "tokens": [row.output_tokens for row in rows],
        "item": [row.item for row in rows],
        "question": [_preview(row.question.replace("<image>", "")) for row in rows],
        "answer": [_preview(row.error if row.failed else row.answer) for row in rows],
        "reference": [_preview(_reference(row)) for row in rows],
    }
    if other is not None:
        columns["other"] = [round(other[row.key].value, 4) if row.key in other else None for row in rows]
    titles = [title_of(name, benchmarks) for name in names]
    return {"benchmarks": names, "titles": titles, "modes": MODES, "columns": columns}


def _flags(row: Result) -> int:
    bits = (ERROR, bool(row.error)), (UNPARSED, is_unparsed(row)), (LENGTH, row.finish_reason == "length")
    return sum(bit for bit, is_set in (*bits, (JUDGED, bool(row.judge))) if is_set)


def _everything(row: Result, other: Result | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "images": row.images,
        "marks": [dataclasses.asdict(mark) for mark in marks_of(row)],
        "question": row.question.replace("<image>", "").strip(),
        "thought": row.thought,
        "answer": row.answer,
        "reference": _reference(row),
        "record": _text(row.record),
        "extracted": None if row.extracted is None else _text(row.extracted),
        "reason": row.reason,
        "judge": row.judge,
        "finish": row.finish_reason,
        "error": row.error,
        "groups": ", ".join(f"{name}: {value}" for name, value in row.groups.items()),
        "cluster": row.cluster,
        "tokens": [row.prompt_tokens, row.image_tokens, row.thought_tokens, row.answer_tokens],
        "seconds": [round(seconds, 3) for seconds in (row.queue, row.prefill, row.decode)],
        "cached": row.cached,
    }
    if other is not None:
        names = ("value", "thought", "answer", "reason", "error")
        extracted = None if other.extracted is None else _text(other.extracted)
        shown["other"] = {name: getattr(other, name) for name in names} | {"extracted": extracted}
    return shown


def _reference(row: Result) -> str:
    key = next((key for key in REFERENCE_KEYS if key in row.record), None)
    if key is None:
        return _text(row.record)
    options, value = row.record.get("options"), row.record[key]
    option = options.get(value) if isinstance(options, Mapping) and isinstance(value, str) else None
    return _text(value) if option is None else f"{_text(value)}: {_text(option)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _preview(text: str) -> str:
    line = " ".join(text[: 4 * PREVIEW].split())
    return line if len(line) <= PREVIEW else line[: PREVIEW - 2] + " …"


def _script_json(value: Any) -> str:
    """JSON in ASCII, which is the same value as a script whatever its encoding; it has no end of a script element.

    No key is a text of the evaluation, so that ``__proto__`` cannot be one.
    """
    return json.dumps(value).replace("<", "\\u003c")
