"""The loop over items and modes, with a generator in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phivision_jax.evaluation.benchmark import Item
from phivision_jax.evaluation.judge import Judge
from phivision_jax.evaluation.reply_cache import ReplyCache
from phivision_jax.evaluation.results import Result
from phivision_jax.evaluation.run import Runner, separate_thought
from phivision_jax.evaluation.task import Sampling, Task, survey
from phivision_jax.images.decode import open_image
from phivision_jax.inference.requests import Request
from tests.support.answers import Answers
from tests.support.generation import reply
from tests.support.sums_benchmark import Sums, write_sums

MODES = ("auto", "think", "nothink")


def task_of(path: Path, limit: int = 0) -> Task:
    return survey(Sums(), Sums().items(str(path)), Sampling(), limit=limit)


@pytest.fixture
def task(tmp_path) -> Task:
    write_sums(tmp_path / "sums.json", 20)
    return task_of(tmp_path / "sums.json")


def run(task: Task, generator: Answers, skip=(), **settings) -> list[Result]:
    results: list[Result] = []

    def receive(result: Result, item: Item) -> None:
        assert item.id == result.item
        results.append(result)

    Runner(generator, receive, **{"modes": MODES, **settings}).run([task], skip)
    return results


def scores(results: list[Result]) -> dict[tuple, tuple]:
    return {result.key: (result.value, result.answer, result.reason) for result in results}


def test_each_item_has_a_result_in_each_mode(task):
    results = run(task, generator := Answers())
    assert len(scores(results)) == len(results) == 60 == len(generator.asked)
    assert {result.mode: result.taken for result in results} == {
        "auto": "nothink",
        "think": "think",
        "nothink": "nothink",
    }
    assert all(result.value == (result.mode != "nothink" or 2 * int(result.item) % 3 > 0) for result in results)
    result = next(r for r in results if r.key == ("sums", "5", "think"))
    assert (result.question, result.record, result.groups) == ("5 + 10?", {"answer": "15"}, {"parity": "odd"})
    assert (result.thought, result.output_tokens, result.seconds, result.judge) == ("hm", 4, 1.75, "")
    assert len({result.fingerprint for result in results}) == 20
    # Four questions have one image, and are a cluster.
    assert len({result.cluster for result in results}) == len({result.images for result in results}) == 5


def test_modes_of_an_item_are_submitted_together_and_its_image_is_laid_out_once(task):
    laid_out: list[bytes] = []

    def patch(image: bytes):
        laid_out.append(image)
        return open_image(image)

    run(task, generator := Answers(), patch=patch)
    asked = [(request.messages, request.mode) for request in generator.asked]
    assert asked == [(task.items[i].question, mode) for i in range(20) for mode in MODES]
    assert len(laid_out) == 5 == len({id(request.images[0]) for request in generator.asked})


def test_cost_asks_all_items_in_a_mode_before_the_next(task):
    run(task, generator := Answers(), by_mode=True)
    assert [request.mode for request in generator.asked] == [mode for mode in MODES for _ in range(20)]


def test_answered_items_are_not_asked_again(task):
    everything = run(task, Answers())
    skip = {result.key for result in everything[:33]}
    rest = run(task, generator := Answers(), skip)
    assert len(generator.asked) == 27 and scores(everything[:33]) | scores(rest) == scores(everything)


def test_failed_requests_are_results(tmp_path):
    rows = write_sums(tmp_path / "sums.json", 8)
    rows[3][2] = -1
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    results = run(task_of(tmp_path / "sums.json"), Answers(fails=frozenset({4, 10})), patch=open_image)
    failed = {result.key[1:]: result.error for result in results if result.failed}
    assert len(results) == 24 and len(failed) == 5
    assert [error for key, error in failed.items() if key[0] != "3"] == ["no connection"] * 2
    assert all("truncated" in failed["3", mode] or "image" in failed["3", mode] for mode in MODES)
    assert all(result.value == 0 and result.extracted is None for result in results if result.failed)


def test_cached_replies_are_not_asked_for_again(task, tmp_path):
    def cached(model: str, **settings) -> tuple[int, list[Result]]:
        cache = ReplyCache(tmp_path / "cache")
        results = run(task, generator := Answers(), cache=cache, model=model, **settings)
        cache.close()
        return len(generator.asked), results

    asked, first = cached("a")
    assert asked == 60 and not any(result.cached for result in first)
    asked, again = cached("a")
    assert asked == 0 and all(result.cached for result in again) and scores(again) == scores(first)
    assert {r.key: r.seconds for r in again} == {r.key: r.seconds for r in first}
    assert cached("b")[0] == cached("a", sampling=Sampling(temperature=0.5))[0] == 60


def test_failures_are_not_cached(task, tmp_path):
    cache = ReplyCache(tmp_path)
    run(task, Answers(fails=frozenset(range(60))), cache=cache)
    run(task, generator := Answers(), cache=cache)
    assert len(generator.asked) == 60


def test_judge_decides_where_the_benchmark_asks_one(task, tmp_path):
    cache = ReplyCache(tmp_path / "cache")
    judge = Answers(lambda prompt, mode: "yes" if "Is 0 right" in prompt else "no")
    for asked in (15, 15):  # equal prompts are asked once
        results = run(task, Answers(), judge=Judge(judge, "j", "j at url", cache))
        judged = [result for result in results if result.judge]
        assert {int(result.item) % 4 for result in judged} == {0} and len(judged) == 15
        assert {result.item for result in judged if result.value} == {"0"}
        assert len(judge.asked) <= asked


def test_failing_judge_leaves_the_score_of_the_rule(task):
    judge = Judge(Answers(fails=frozenset({0})), "j", "j at url")
    results = run(task, Answers(), judge=judge)
    failed = [result for result in results if result.error]
    assert len(failed) == 15 and all(result.error == "the judge failed: no connection" for result in failed)
    assert not any(result.failed or result.judge for result in failed) and all(r.reason != "judged" for r in failed)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a</think> b ", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a", "a", ""),
        ("b", "", "b"),
    ],
)
def test_thoughts_in_answers_are_separated(text, thought, answer):
    found = separate_thought(reply([1], text))
    assert (found.thought, found.answer) == (thought, answer)
    assert found.mode == ("think" if thought else reply([1], text).mode)


def test_error_of_the_generator_ends_the_run(task):
    class Broken(Answers):
        def reply(self, request: Request):
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        run(task, Broken())
