"""Tasks of any name, from the import to the loss weights of batches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from phivision_jax.batch import RowShape
from phivision_jax.data.feed.encode import GROUP_NAMES, group_names, group_weights
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture, Stage
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.records import TASKS
from phivision_jax.data.sources.source import RecordsSource
from phivision_jax.data.store.dataset import MANIFEST, Dataset
from phivision_jax.data.store.importing import import_source
from phivision_jax.data.store.integrity import validate
from phivision_jax.data.view.statistics import compute
from tests.support.records import CONFIG, make_record

SHAPE = RowShape(160, 1, 80)
TASKS_OF = {"one": ("receipts", "math", "Küche"), "two": ("math", "agents", "receipts", "receipts")}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, processor) -> list[Dataset]:
    """Datasets of 24 records, imported in chunks that see their tasks in different orders."""
    folder, found = tmp_path_factory.mktemp("tasks"), []
    for name, tasks in TASKS_OF.items():
        records = [make_record(i, task=tasks[i % len(tasks)]) for i in range(24)]
        found.append(
            import_source(RecordsSource(records), folder / name, processor, workers=0, chunk=5, progress=False)
        )
    return found


def test_index_names_every_task(datasets):
    assert datasets[0].index.task_names == (*TASKS, "Küche", "receipts")
    assert datasets[1].index.task_names == (*TASKS, "agents", "receipts")
    for dataset in datasets:
        tasks = [dataset.index.task_names[number] for number in dataset.index.tasks]
        assert tasks == [dataset[i].task for i in range(24)] and dataset.index.tasks.dtype == np.uint8
        assert not validate(dataset.directory, workers=0).problems
    assert datasets[1].manifest["counts"]["tasks"] == {"agents": 6, "math": 6, "receipts": 12}


def test_index_of_a_manifest_without_tasks(datasets, tmp_path, processor):
    records = [make_record(i, task="ocr") for i in range(4)]
    first = import_source(RecordsSource(records), tmp_path / "set", processor, workers=0, progress=False)
    manifest = {name: value for name, value in first.manifest.items() if name != "tasks"}
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(manifest))
    again = Dataset.open(tmp_path / "set")
    assert again.hash == first.hash and again.index.task_names[again.index.tasks[0]] == "ocr"


def test_import_refuses_too_many_tasks(tmp_path, processor):
    records = [make_record(i, sizes=(), task=f"t{i}") for i in range(246)]
    with pytest.raises(
        ValueError, match="the records have 257 tasks, an index at most 256: --rename task=dataset_task"
    ):
        import_source(RecordsSource(records), tmp_path / "set", processor, workers=0, progress=False)


def test_plan_statistics_and_weights_distinguish_every_task(datasets, processor):
    mixture = Mixture.from_directories(*(dataset.directory for dataset in datasets))
    stage = Stage(task_caps={"receipts": 0.25, "Küche": 0.25}, examples=400)
    plan = make_plan(datasets, dataclasses.replace(mixture, stages=(stage,)), processor, SHAPE)
    shares = {share.name: share.example_share for share in plan.shares if share.kind == "task"}
    assert shares.keys() == {"math", "Küche", "receipts", "agents"}
    assert shares["receipts"] == pytest.approx(0.25, abs=0.01)
    unknown = dataclasses.replace(mixture, stages=(Stage(task_caps={"receipt": 0.5}),))
    with pytest.raises(ValueError, match=r"no record has the task 'receipt' of task_caps; did you mean 'receipts'"):
        make_plan(datasets, unknown, processor, SHAPE)

    counts = compute(datasets, CONFIG, SHAPE).groups[-1]["examples_by"]["nothink"]
    assert {task: n for task, n in counts.items() if n} == {"math": 14, "Küche": 8, "receipts": 20, "agents": 6}

    groups = group_names(datasets)
    assert groups[: len(GROUP_NAMES)] == GROUP_NAMES and groups[len(GROUP_NAMES) + 3 :] == (
        *("nothink/Küche", "nothink/agents", "nothink/receipts"),
    )
    weights = group_weights([("/receipts", 0.5), ("Küche", 0.0)], groups)
    wanted = {"receipts": 0.5, "Küche": 0.0}
    seen = set()
    for batch, info in batches(datasets, plan, processor, batch_rows=2, loss_weights=weights, end_step=20):
        assert not info.failed
        for group in np.unique(batch.group_ids[batch.segment_ids > 0]).tolist():
            task = groups[group].partition("/")[2]
            seen.add(task)
            of_group = (batch.group_ids == group) & (batch.segment_ids > 0)
            assert batch.loss_weights[of_group].max() == wanted.get(task, 1.0)
    assert seen == {"math", "Küche", "receipts", "agents"}
