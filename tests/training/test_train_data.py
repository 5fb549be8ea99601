"""The mixtures for training and validation that a data configuration describes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.training.run_config import DataConfig
from phivision_jax.training.train_data import training_mixture, validation_mixture, validation_plan
from tests.support.records import BARE_PROCESSOR, BareDataset

SIZES = {"length": 12, "vision_rows": 1, "num_patches": 8, "batch_rows": 2}


def data(**fields: Any) -> DataConfig:
    return DataConfig(**{"path": "mine", **SIZES, **fields})


@pytest.fixture
def bare(monkeypatch):
    """Directories by name, opened as datasets of bare lengths."""
    datasets: dict[str, Any] = {}

    def opened(path):
        name = str(path)
        if name not in datasets:
            datasets[name] = BareDataset([6] * 100, [[]] * 100)
            datasets[name].hash, datasets[name].directory = name, path
        return datasets[name]

    monkeypatch.setattr(Dataset, "open", opened)
    return opened


def test_training_mixture_stage_and_epochs(tmp_path):
    file = tmp_path / "mix.toml"
    file.write_text('[[sources]]\npath = "a"\n[[stages]]\nname = "one"\nepochs = 5\n[[stages]]\nname = "two"\n')
    both = training_mixture(data(path=str(file), epochs=2))
    assert [(s.name, s.epochs) for s in both.stages] == [("one", 5), ("two", 2)]
    assert training_mixture(data(path=str(file), stage="two")).stages == (
        dataclasses.replace(both.stages[1], epochs=1),
    )
    (stage,) = training_mixture(data(epochs=3)).stages
    assert stage.epochs == 3 and training_mixture(data()).held_out == 0


def test_training_mixture_replay_share(bare):
    mixture = training_mixture(data(replay_path="base", replay_share=0.2, epochs=2))
    datasets = [bare(path) for _, path in mixture.sources]
    plan = make_plan(datasets, mixture, BARE_PROCESSOR, RowShape(12, 1, 8), batch_rows=2)
    assert len(plan.examples) == 250 and (plan.sources == 1).sum() == 50


def test_validation_plan_of_held_out_records(bare):
    cfg = data(validation_share=0.1, epochs=3, replay_path="base", replay_share=0.5, seed=4)
    mixture = training_mixture(cfg)
    datasets = [bare(path) for _, path in mixture.sources]
    plan = make_plan(datasets, mixture, BARE_PROCESSOR, RowShape(12, 1, 8), batch_rows=2, seed=4)
    found = validation_plan(cfg, BARE_PROCESSOR, datasets)
    assert found is not None and found[0] == datasets
    held, trained = set(found[1].examples.tolist()), set(plan.examples[plan.sources == 0].tolist())
    assert not held & trained and held | trained == set(range(100)) and len(found[1].examples) == len(held)
    assert not found[1].sources.any()
    # The same with more epochs, other rows and without a replay.
    other = data(validation_share=0.1, epochs=9, length=6, batch_rows=4, seed=4)
    again = validation_plan(other, BARE_PROCESSOR, datasets[:1])
    assert again is not None and set(again[1].examples.tolist()) == held
    assert found[1].row_shape.length == 12 and found[1].inputs["batch_rows"] == 2


def test_validation_plan_of_another_dataset(bare, tmp_path):
    cfg = data(validation_path="test")
    assert training_mixture(cfg).held_out == 0
    found = validation_plan(cfg, BARE_PROCESSOR, [bare("mine")])
    assert found is not None and [d.directory.name for d in found[0]] == ["test"]
    assert sorted(found[1].examples.tolist()) == list(range(100))
    assert validation_plan(data(), BARE_PROCESSOR, [bare("mine")]) is None and validation_mixture(data()) is None
    with pytest.raises(ValueError, match=r"test holds the records of other, which is trained on"):
        validation_plan(cfg, BARE_PROCESSOR, [SimpleNamespace(hash="test", directory="other")])


def test_validation_plan_omits_records_that_are_too_large(bare):
    bare("test").index = dataclasses.replace(bare("test").index, text_tokens=np.array([6] * 99 + [99], np.int32))
    found = validation_plan(data(validation_path="test", on_overflow="error"), BARE_PROCESSOR, [])
    assert found is not None and len(found[1].examples) == 99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, r"data\.path is empty: give --config\.data\.path=DIRECTORY"),
        ({"replay_path": "base"}, r"data\.replay_share=0 belong together"),
        ({"replay_share": 0.1}, r"data\.replay_path='' and .* belong together"),
        (
            {"replay_path": "base", "replay_share": 1.0},
            "share=1 belong together: give a path and a share bet",
        ),
        ({"replay_path": "base", "replay_share": -0.1}, r"share=-0\.1 belong together"),
        ({"validation_share": 1.0}, "from 0 to below 1, not 1.0"),
        ({"stage": "two"}, "no stage 'two'"),
    ],
)
def test_training_mixture_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        training_mixture(data(**fields))


def test_validation_mixture_refuses_two_sets():
    with pytest.raises(ValueError, match="two validation sets: give one"):
        validation_mixture(data(validation_path="test", validation_share=0.1))


@pytest.mark.parametrize("field", ["path", "validation_path", "replay_path"])
@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "part-0.parquet"])
def test_mixture_of_a_file_names_the_import_command(tmp_path, field, name):
    file = tmp_path / name
    file.write_text("[]")
    cfg = data(**{field: str(file)}, **({"replay_share": 0.1} if field == "replay_path" else {}))
    with pytest.raises(ValueError) as error:
        (validation_mixture if field == "validation_path" else training_mixture)(cfg)
    assert f"phivision data import {file} {file.with_suffix('')} --images" in str(error.value)


def test_mixture_with_a_file_among_its_sources(tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    (tmp_path / "mix.toml").write_text('[[sources]]\npath = "mine.json"\n')
    with pytest.raises(ValueError, match=r"mix\.toml: .*mine\.json is a file; import its records once"):
        training_mixture(data(path=str(tmp_path / "mix.toml")))
