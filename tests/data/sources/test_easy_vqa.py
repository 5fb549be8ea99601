from __future__ import annotations

import collections
import functools
import io

import pytest
from PIL import Image

from phivision_jax.data.records import Record
from phivision_jax.data.sources.easy_vqa import easy_vqa, question_only_baseline

all_train = functools.cache(lambda: easy_vqa("train"))
all_test = functools.cache(lambda: easy_vqa("test"))


def pairs(records: list[Record]) -> collections.Counter:
    """Count every (image, question, answer) of all records."""
    found: collections.Counter = collections.Counter()
    for record in records:
        texts = [m["content"] for m in record.messages]
        assert texts[0].startswith("<image>\n") and sum(t.count("<image>") for t in texts) == len(record.images) == 1
        assert [m["role"] for m in record.messages] == ["user", "assistant"] * (len(texts) // 2)
        texts[0] = texts[0].removeprefix("<image>\n")
        found.update((record.images[0], q, a) for q, a in zip(texts[::2], texts[1::2], strict=True))
    return found


def test_easy_vqa_uses_each_question_once():
    single, grouped = all_train(), easy_vqa("train", questions_per_record=6)
    assert len(single) == 38_575 and len({r.id for r in single}) == 38_575
    assert pairs(single) == pairs(grouped)
    assert len({r.images[0] for r in single}) <= 4_000
    assert len(all_test()) == 9_673
    assert max(len(r.messages) for r in grouped) == 12


def test_easy_vqa_seed_groups_questions():
    first, again, other = (easy_vqa("train", questions_per_record=3, seed=s, max_images=20) for s in (1, 1, 2))
    assert first == again
    assert first != other and pairs(first) == pairs(other)


def test_easy_vqa_record():
    record = easy_vqa("test", max_images=1)[0]
    assert (record.mode, record.task, record.source) == ("nothink", "general", "easy_vqa/test")
    assert Image.open(io.BytesIO(record.images[0])).size == (64, 64)


def test_question_only_baseline_full_set():
    assert question_only_baseline(all_train(), all_test()) == pytest.approx(0.670, abs=5e-4)


def test_question_only_baseline_by_hand():
    def ask(question: str, *answers: str) -> list[Record]:
        turns = [({"role": "user", "content": question}, {"role": "assistant", "content": a}) for a in answers]
        return [Record("r", "s", (), turn) for turn in turns]

    seen = ask("red?", "no", "yes", "yes") + ask("shape?", "circle", "circle", "circle", "box")
    # "red?" → yes, "shape?" → circle, never asked → circle, the most frequent answer of all.
    asked = ask("red?", "yes", "no") + ask("shape?", "circle") + ask("<image>\nnew?", "circle")
    assert question_only_baseline(seen, asked) == 3 / 4


def test_easy_vqa_errors():
    with pytest.raises(ValueError, match="'train' and 'test', not 'dev'"):
        easy_vqa("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        easy_vqa("train", questions_per_record=0)
