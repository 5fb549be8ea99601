"""Each format of data sets, from files to twenty training steps: imported, validated, exported and imported again.

The data is easy-VQA (real images and questions), written in each format by its definition.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax import sharding
from phivision_jax.batch import RowShape, batch_spec
from phivision_jax.data.feed.encode import GROUP_NAMES
from phivision_jax.data.feed.pipeline import batches, to_device
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.records import Record
from phivision_jax.data.sources.easy_vqa import easy_vqa
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.data.store.exporting import export
from phivision_jax.data.store.importing import import_source
from phivision_jax.data.store.integrity import validate
from phivision_jax.training.run_config import OptimConfig, RunConfig
from phivision_jax.training.step import init_params, make_train_step
from tests.support.records import CONFIG

STEPS, ROWS = 20, 8
SHAPE = RowShape(192, 1, 128)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return easy_vqa("train", questions_per_record=3, max_images=40)


def save_images(records: list[Record], folder: Path) -> list[str]:
    folder.mkdir()
    names = [f"{i:04d}.png" for i in range(len(records))]
    for name, record in zip(names, records, strict=True):
        (folder / name).write_bytes(record.images[0])
    return names


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def llava(record: Record, name: str) -> dict[str, Any]:
    people = {"user": "human", "assistant": "gpt"}
    turns = [{"from": people[m["role"]], "value": m["content"]} for m in record.messages]
    return {"id": record.id, "image": name, "conversations": turns}


def as_llava_json(records: list[Record], folder: Path) -> Path:
    names = save_images(records, folder / "images")
    items = [llava(r, f"images/{name}") for r, name in zip(records, names, strict=True)]
    (folder / "train.json").write_text(json.dumps(items, indent=2))
    return folder / "train.json"


def as_llava_jsonl(records: list[Record], folder: Path) -> Path:
    names = save_images(records, folder / "images")
    lines = [json.dumps(llava(r, f"images/{name}")) for r, name in zip(records, names, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def as_openai_messages(records: list[Record], folder: Path) -> Path:
    """Chat completions with the image as a data URI in a part of the first message."""
    with (folder / "train.jsonl").open("w") as file:
        for r in records:
            messages: list[dict[str, Any]] = [dict(m) for m in r.messages]
            text = messages[0]["content"].removeprefix("<image>\n")
            image = {"type": "image_url", "image_url": {"url": data_uri(r.images[0])}}  # type: ignore[arg-type]
            messages[0]["content"] = [image, {"type": "text", "text": text}]
            file.write(json.dumps({"id": r.id, "messages": messages}) + "\n")
    return folder / "train.jsonl"


def as_hub_parquet(records: list[Record], folder: Path) -> Path:
    """As the datasets library writes an Image feature: a struct of bytes and path; two parts, small row groups."""
    (folder / "data").mkdir()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([
        ("id", pa.string()),
        ("images", pa.list_(image)),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ])  # fmt: skip
    half = len(records) // 2
    for part, chosen in enumerate((records[:half], records[half:])):
        rows = [
            {"id": r.id, "images": [{"bytes": r.images[0], "path": None}], "messages": [dict(m) for m in r.messages]}
            for r in chosen
        ]
        path = folder / "data" / f"train-{part:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=37)
    return folder


def as_tfds(records: list[Record], folder: Path) -> Path:
    texts = {"from": tfds.features.Text(), "value": tfds.features.Text()}

    class EasyVqa(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="png"),
                    "conversations": tfds.features.Sequence(texts),
                }),
            )  # fmt: skip

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, r in enumerate(records):
                (folder / "image.png").write_bytes(r.images[0])
                yield (
                    i,
                    {"id": r.id, "image": str(folder / "image.png"), "conversations": llava(r, "")["conversations"]},
                )

    builder = EasyVqa(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def as_array_record(records: list[Record], folder: Path) -> Path:
    writer = ArrayRecordWriter(str(folder / "train.array_record"), "group_size:1")
    for r in records:
        writer.write(json.dumps(llava(r, data_uri(r.images[0]))).encode())  # type: ignore[arg-type]
    writer.close()
    return folder


FORMS: dict[str, Callable[[list[Record], Path], Path]] = {
    f.__name__.removeprefix("as_"): f
    for f in (as_llava_json, as_llava_jsonl, as_openai_messages, as_hub_parquet, as_tfds, as_array_record)
}


@pytest.fixture(scope="module")
def compiled():
    cfg = RunConfig(model=CONFIG, dtype="float32", optim=OptimConfig(learning_rate=3e-3, warmup_steps=2))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    step = make_train_step(cfg, mesh, STEPS, len(GROUP_NAMES))
    spec = batch_spec(ROWS, SHAPE, CONFIG.vision.patch_dim)
    params = jax.device_get(init_params(cfg, step))  # a run gives its own away
    return step, step.compile(spec), sharding.batch_shardings(mesh, spec), params


def train(compiled, dataset: Dataset, processor) -> list[float]:
    step, run, shardings, params = compiled
    plan = make_plan([dataset], Mixture.from_directories("set", epochs=8), processor, SHAPE, batch_rows=ROWS)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, step.abstract_state["params"])
    state, losses = step.init(params), []
    for batch, info in batches([dataset], plan, processor, batch_rows=ROWS):
        if info.step == STEPS:
            break
        assert not info.failed
        state, metrics = run(state, to_device(batch, shardings, ROWS))
        losses.append(float(metrics["loss"]))
    return losses


def read(path: Path, out: Path, processor) -> Dataset:
    source = open_source(path, options=ItemOptions(), name="mine")
    return import_source(source, out, processor, workers=0, chunk=100, progress=False)


@pytest.mark.parametrize("form", FORMS)
def test_import_validate_train_and_export(form, records, tmp_path, processor, compiled):
    (tmp_path / "raw").mkdir()
    dataset = read(FORMS[form](records, tmp_path / "raw"), tmp_path / "set", processor)
    # The same records in every format.
    found = {record.id: record for record in (dataset[i] for i in range(len(dataset)))}
    assert found == {r.id: dataclasses.replace(r, source="mine") for r in records}
    assert not dataset.manifest["counts"]["quarantined"]
    assert not validate(tmp_path / "set", workers=0).problems
    for again in ("llava", "messages"):
        export(dataset, tmp_path / again, again, progress=False)
        assert read(tmp_path / again, tmp_path / f"{again}-set", processor).hash == dataset.hash
    losses = train(compiled, dataset, processor)
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
