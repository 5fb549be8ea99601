"""Every published benchmark in every form: what is read, asked, scored and summarised."""

from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phivision_jax.evaluation.benchmark import Benchmark, Item, Scored
from phivision_jax.evaluation.benchmarks import registry
from phivision_jax.evaluation.scoring import Score
from phivision_jax.images.decode import image_size
from tests.support.benchmark_sets import HEIGHT, WIDTH, Written
from tests.support.benchmark_sets_of_questions import SETS

SUMMARIES = {
    "chartqa": {"human", "augmented"},
    "cuactspot": {"Canvas", "Text"},
    "hallusionbench": {"aAcc", "fAcc", "qAcc"},
    "mathverse": {"Text Lite", "Vision Only"},
    "mathvision": {"algebra"},
    "mmmu": {"unparsed"},
    "mmstar": {"l2_mean", "math", "logical reasoning"},
    "screenspot_v2": {"desktop", "mobile", "web", "icon", "unparsed"},
    "wemath": {"problems", "accuracy", "strict score", "loose score", "strict RM"},
}
"""Figures besides "score", whatever the form."""


@pytest.fixture(params=SETS, ids="-".join)
def read(request, tmp_path) -> tuple[Benchmark, Written, list[Item]]:
    name, _ = request.param
    written, benchmark = SETS[request.param](tmp_path), registry.find(name)
    return benchmark, written, list(benchmark.items(str(written.path)))


def test_every_benchmark_has_a_set():
    assert {name for name, _ in SETS} == set(registry.NAMES)


def test_set_is_read(read):
    _, written, items = read
    assert len(items) == len(written.right)
    assert items[0].question == written.prompt
    counts = [len(item.images) for item in items]
    assert counts == [*written.images] * (1 if len(written.images) > 1 else len(items))
    assert {image_size(image) for item in items for image in item.images} == {(WIDTH, HEIGHT)}
    assert len({item.id for item in items}) == len(items)
    assert json.loads(json.dumps([dict(item.record) for item in items]))
    assert all(isinstance(value, str) and value for item in items for value in item.groups.values())


def test_request_has_the_images_of_its_item(read):
    benchmark, _, items = read
    for item in items:
        (message,), images = benchmark.request(item).conversation()
        assert message["content"].count("<image>") == len(images) == len(item.images)


def test_right_reply_scores_1_and_a_wrong_one_0(read):
    benchmark, written, items = read
    assert [benchmark.score(reply, item).value for reply, item in zip(written.right, items, strict=True)] == [1] * len(
        items
    )
    assert {benchmark.score(written.wrong, item).value for item in items} == {0}
    assert benchmark.score("", items[0]).value == 0


def test_summary_of_right_and_wrong_replies(read):
    benchmark, written, items = read
    right = [Scored(item, benchmark.score(reply, item)) for reply, item in zip(written.right, items, strict=True)]
    figures = benchmark.summary(right)
    assert figures["score"] == 100 and SUMMARIES.get(benchmark.name, set()) <= figures.keys()
    wrong = [Scored(item, Score(0.0, None, "wrong")) for item in items]
    assert benchmark.summary(wrong)["score"] == 0
    assert all(isinstance(value, float) for value in (*figures.values(), *benchmark.summary([]).values()))


def test_items_are_equal_when_read_again_in_another_process(read):
    benchmark, written, items = read
    again = pickle.loads(pickle.dumps(benchmark.items(str(written.path))))
    assert list(again[::-1]) == items[::-1]
    assert again.ids == [item.id for item in items] and again[-1] == items[-1]


def test_published_figures_have_a_source(read):
    benchmark, _, _ = read
    for figure in (*filter(None, [benchmark.published]), *benchmark.published_groups.values()):
        assert 0 < figure.value < 100 and figure.source


def test_mmmu_images_are_where_the_question_names_them(tmp_path):
    items = registry.find("mmmu").items(str(SETS["mmmu", "hub"](tmp_path).path))
    first, second = items[0], items[1]
    assert "A. <image>\nB. <image>" in second.question
    assert second.images[1] == first.images[0] and second.images[0] != second.images[1]


def test_clusters(tmp_path):
    items = registry.find("wemath").items(str(SETS["wemath", "hub"](tmp_path / "a").path))
    assert [item.cluster for item in items] == ["17/2"] * 3 + ["17/3"] * 4
    items = registry.find("mathverse").items(str(SETS["mathverse", "tsv"](tmp_path / "b").path))
    assert [item.cluster for item in items] == ["0"] * 3 + ["1"] * 3


def test_boxes_are_normalised_by_the_convention_of_their_source(tmp_path):
    v2 = registry.find("screenspot_v2").items(str(SETS["screenspot_v2", "json"](tmp_path / "a").path))[0]
    assert v2.record["bbox_xyxy_norm"] == pytest.approx([10 / 40, 10 / 20, 19 / 40, 17 / 20])
    pro = registry.find("screenspot_pro").items(str(SETS["screenspot_pro", "json"](tmp_path / "b").path))[0]
    assert pro.record == {"bbox_xyxy_norm": [0.25, 0.5, 0.5, 0.9], "image_size": [40, 20]}


def test_grounding_reads_a_point_where_there_is_no_box(tmp_path):
    benchmark = registry.find("screenspot_pro")
    item = benchmark.items(str(SETS["screenspot_pro", "json"](tmp_path).path))[0]
    assert benchmark.score("[0.30, 0.60]", item).value == 1
    assert benchmark.score("[0.60, 0.60]", item).value == 0


@pytest.mark.parametrize(
    "reply, value",
    [
        ("[0.15, 0.5] [0.75, 0.5]", 1),
        ("[0.75, 0.5] [0.15, 0.5]", 0),
        ("[0.15, 0.5]", 0),
        ("[0.15, 0.5] [0.75, 0.5] [0.45, 0.5]", 0),
        ("[0.10, 0.30, 0.20, 0.70] to [0.70, 0.30, 0.80, 0.70]", 1),
        ("nothing", 0),
    ],
)
def test_cuactspot_drag(tmp_path, reply, value):
    benchmark = registry.find("cuactspot")
    item = benchmark.items(str(SETS["cuactspot", "json"](tmp_path).path))[0]
    assert benchmark.score(reply, item).value == value


def test_wemath_counts_problems_of_which_every_part_was_asked(tmp_path):
    benchmark = registry.find("wemath")
    items = benchmark.items(str(SETS["wemath", "hub"](tmp_path).path))
    scored = [Scored(item, Score(float(k not in (0, 6)), "A", "")) for k, item in enumerate(items)]
    figures = benchmark.summary(scored)
    assert figures["problems"] == 2
    assert figures["strict score"] == figures["score"] == 25 and figures["loose score"] == 75
    assert benchmark.summary(scored[:4])["problems"] == 1


@pytest.mark.parametrize("name", ["mathvista", "mathverse", "mathvision"])
def test_judge_is_asked_where_the_rule_does_not_decide(tmp_path, name):
    benchmark = registry.find(name)
    written = SETS[name, "hub"](tmp_path)
    items = benchmark.items(str(written.path))
    assert benchmark.judged
    free = items[1]
    prompt = benchmark.judge_prompt("After some work, that is all.", free)
    assert prompt is not None and free.question.partition("\n")[0].removeprefix("Please")[:20] in prompt
    assert benchmark.judge_prompt(free.record["answer"], free) is None
    right, wrong = ("1", "0") if name == "mathverse" else (free.record["answer"], "77")
    assert benchmark.judge_score(right, free).value == 1
    assert benchmark.judge_score(wrong, free).value == 0
    assert benchmark.judge_score("I would have to see it", free).value == 0


def test_wemath_keeps_options_in_another_form(tmp_path):
    path = SETS["wemath", "hub"](tmp_path).path / "data/testmini-00000-of-00001.parquet"
    table = pq.read_table(path)
    column = table.column_names.index("option")
    pq.write_table(table.set_column(column, "option", pa.array(["red / blue / green / white"] * 7)), path)
    items = registry.find("wemath").items(str(path))
    assert items[0].question.endswith("?\nOptions:\nred / blue / green / white\n")
    assert items[0].record == {"answer": "A", "key": "2steps_1"}


def test_mathvista_does_not_guess_a_choice(tmp_path):
    benchmark = registry.find("mathvista")
    items = benchmark.items(str(SETS["mathvista", "hub"](tmp_path).path))
    assert benchmark.score("It looks bluish to me, I would say.", items[0]).extracted is None
    assert benchmark.judge_score("blu", items[0]).value == 1
    assert benchmark.score("1.23", items[2]).value == 1


def test_benchmark_without_a_judge_asks_none(tmp_path):
    benchmark = registry.find("ai2d")
    item = benchmark.items(str(SETS["ai2d", "hub"](tmp_path).path))[0]
    assert not benchmark.judged and benchmark.judge_prompt("?", item) is None
    with pytest.raises(NotImplementedError, match="asks no judge"):
        benchmark.judge_score("1", item)
