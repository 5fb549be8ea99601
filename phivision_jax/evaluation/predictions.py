"""Predictions of others in files: JSON lines, samples of lmms-eval, tables of VLMEvalKit.

    *.jsonl               {"item": ITEM, "prediction": TEXT}, with "id" or "index" in place of "item"
    *_samples_*.jsonl     lmms-eval --log_samples: {"doc_id": 0, "filtered_resps": [TEXT], "resps": [[TEXT]], …}
    *.tsv, *.csv, *.json  VLMEvalKit with PRED_FORMAT=tsv or json: columns index and prediction, and perhaps thinking

An item is found by its id; by an index that ends its id; or by "doc_id", its number in the split, from 0.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phivision_jax.evaluation.benchmark import Item
from phivision_jax.inference.requests import Finished, Reply, Request, Timings
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import parse_json, read_limited
from phivision_jax.text.tokenizer import END_THINK, THINK

_KEYS = ("item", "id", "index", "doc_id")
_TEXTS = ("prediction", "filtered_resps", "resps")
_LARGEST_CELL = 1 << 27


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A generator that answers from a file: its requests must be those of ``numbers``, in order."""

    numbers: tuple[int, ...]
    """Numbers of the items that have a prediction, ascending."""
    texts: Sequence[str]

    def as_finished(self, requests: Iterable[Request]) -> Finished:
        """The prediction for each request."""
        for number, (_, text) in enumerate(zip(requests, self.texts, strict=True)):
            yield number, [Reply("", text, None, "stop", (), 0, 0, 0, 0, Timings(0.0, 0.0, 0.0))]


def read_predictions(path: Path, items: Sequence[Item]) -> Predictions:
    """Read a file and find the item of each prediction.

    Raises:
      ValueError: for a file of another form, a prediction of no item, or two of one, naming file and row.
      OSError: when the file cannot be read.
    """
    ids = [item.id for item in items]
    exact = {id: number for number, id in enumerate(ids)}
    ends: dict[str, list[int]] = {}
    for number, id in enumerate(ids):
        ends.setdefault(id.rpartition(":")[2], []).append(number)
    found: dict[int, str] = {}
    for k, row in enumerate(_rows(path), 1):
        where = f"{path}, row {k}"
        key = next((key for key in _KEYS if row.get(key) not in (None, "")), None)
        if key is None:
            raise ValueError(f"{where} names no item: it has no {', '.join(_KEYS[:-1])} or {_KEYS[-1]}")
        number = _find(row[key], exact, ends, len(ids), by_number=key == "doc_id", where=where)
        if number in found:
            raise ValueError(f"{where} is another prediction for item {shorten(ids[number])}")
        found[number] = _text(row, where)
    if not found:
        raise ValueError(f"{path} has no predictions")
    return Predictions(tuple(sorted(found)), [found[number] for number in sorted(found)])


def _find(
    value: Any, exact: Mapping[str, int], ends: Mapping[str, list[int]], count: int, *, by_number: bool, where: str
) -> int:
    if by_number:
        if isinstance(value, int) and 0 <= value < count:
            return value
        raise ValueError(f"{where} has the doc_id {shorten(value)}, and the benchmark {count:,} items from 0")
    key = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    candidates = [exact[key]] if key in exact else ends.get(key, [])
    if len(candidates) != 1:
        problem = f"is of {len(candidates)} items" if candidates else "is of no item"
        known = shorten(next(iter(exact)))
        raise ValueError(f"{where}: {shorten(key)!r} {problem}; ids are like {known!r}: give the data that it is about")
    return candidates[0]


def _text(row: Mapping[str, Any], where: str) -> str:
    value: Any = next((row[name] for name in _TEXTS if name in row), None)
    while isinstance(value, list) and value:
        value = value[0]
    if value is None or isinstance(value, list):
        raise ValueError(f"{where} has no text in {', '.join(_TEXTS[:-1])} or {_TEXTS[-1]}")
    thought = row.get("thinking")
    return f"{THINK}{thought}{END_THINK}{value}" if isinstance(thought, str) and thought.strip() else str(value)


def _rows(path: Path) -> list[dict[str, Any]]:
    content, name = read_limited(path), str(path)
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        return [parse_json(line, f"{name}, row {k}") for k, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".json":
        rows = parse_json(content, name, list)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{name} must contain an array of objects")
        return rows
    if path.suffix in (".tsv", ".csv"):
        csv.field_size_limit(_LARGEST_CELL)
        text = io.StringIO(content.decode("utf-8-sig", errors="replace"), newline="")
        return list(csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ","))
    advice = "of VLMEvalKit, set PRED_FORMAT=tsv, or save the sheet as TSV"
    raise ValueError(f"{path}: give .jsonl, .json, .tsv or .csv; {advice}")
