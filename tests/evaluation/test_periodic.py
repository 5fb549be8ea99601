"""Benchmarks during training: the same items, the newest weights, programs that are compiled once."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from phivision_jax.data.records import Record
from phivision_jax.evaluation.dataset import DatasetBenchmark
from phivision_jax.evaluation.periodic import Evaluator
from phivision_jax.evaluation.task import Sampling
from phivision_jax.models import phivision
from phivision_jax.training import setup
from phivision_jax.training.run_config import DataConfig, RunConfig
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT
from tests.support.small_model import small_model
from tests.support.sums_benchmark import image, write_sums

SUMS = ROOT / "tests" / "support" / "sums_benchmark.py"


@pytest.fixture
def cfg(tmp_path) -> RunConfig:
    """Settings of a run that is evaluated on a dataset and a benchmark."""
    _, processor = small_model()
    turns = ({"role": "user", "content": "<image>\nred?"}, {"role": "assistant", "content": "yes"})
    records = [Record(str(i), "made", (image(i),), turns, mode="nothink") for i in range(9)]
    write_dataset(tmp_path / "set", records, processor)
    write_sums(tmp_path / "sums.json", 30)
    data = DataConfig(eval_path=str(tmp_path / "set"))
    benchmarks = {"eval_benchmarks": str(SUMS), "eval_benchmark_data": f"sums={tmp_path}/sums.json"}
    return RunConfig(data=data, eval_examples=5, eval_benchmark_examples=7, **benchmarks)


def test_evaluator_asks_the_same_items_of_every_model(cfg):
    model, processor = small_model()
    graphdef, params = model.split()
    sampling = Sampling(max_new_tokens=4)
    evaluator = Evaluator(setup.eval_benchmarks(cfg), processor, sampling=sampling, slots=8, shown=2)
    assert cfg.evaluates and [len(task.chosen) for task in evaluator.tasks] == [5, 7]
    first = evaluator(model)
    metrics = evaluator.metrics(first)
    assert metrics.keys() == {"eval/accuracy", "eval/examples", "eval/sums/score"} and metrics["eval/examples"] == 5
    assert all(result.mode == "auto" and result.output_tokens <= 4 and not result.error for result in first)
    shown = [item.id for item, _ in evaluator.examples]
    assert len(shown) == 2 and all(result.benchmark == "dataset" for _, result in evaluator.examples)

    compiled = evaluator._generator.engine.compiled
    other = evaluator(phivision.merge(graphdef, jax.tree.map(lambda x: 0.5 * x, params)))
    again = evaluator(model)
    assert evaluator._generator.engine.compiled == compiled
    answers, others, repeated = ({r.key: r.answer for r in results} for results in (first, other, again))
    assert answers == repeated and answers.keys() == others.keys() and answers != others
    assert [item.id for item, _ in evaluator.examples] == shown


def test_benchmarks_without_a_dataset(cfg):
    alone = dataclasses.replace(cfg, data=DataConfig())
    ((benchmark, items, limit),) = setup.eval_benchmarks(alone)
    assert alone.evaluates and (benchmark.name, len(items), limit) == ("sums", 30, 7)
    assert not dataclasses.replace(alone, eval_benchmarks="").evaluates
    assert isinstance(setup.eval_benchmarks(cfg)[0][0], DatasetBenchmark)
