from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.source import Read
from tests.support.paths import ROOT
from tests.support.records import png

tfds = pytest.importorskip("tensorflow_datasets")

from phivision_jax.data.sources.tfds import TfdsSource  # noqa: E402

PNG = [png(24, 16, seed) for seed in range(3)]


class Made(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        turn = {"from": f.Text(), "value": f.Text()}
        features = f.FeaturesDict(
            {
                "id": f.Text(),
                "images": f.Sequence(f.Image()),
                "conversations": f.Sequence(turn),
                "kind": f.ClassLabel(names=["easy", "hard"]),
                "sizes": f.Sequence(f.Tensor(shape=(2,), dtype=np.int64)),
                "facts": {"tags": f.Sequence(f.Text()), "thumb": f.Image(), "seen": np.bool_, "score": np.float32},
                "steps": f.Dataset({"text": f.Text(), "image": f.Image()}),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples(5), "test": self._generate_examples(1)}

    def _generate_examples(self, n: int):
        for i in range(n):
            images = PNG[: i % 3]
            yield (
                i,
                {
                    "id": f"r{i}" if i != 4 else b"r\xff",
                    "images": [io.BytesIO(image) for image in images],
                    "conversations": [
                        {"from": "human", "value": "<image>" * len(images) + "wäs?"},
                        {"from": "gpt", "value": b"\xff" if i == 3 else "that"},
                    ],
                    "kind": i % 2,
                    "sizes": [[24, 16]] * len(images),
                    "facts": {"tags": ["a"] * i, "thumb": io.BytesIO(PNG[0]), "seen": i > 1, "score": 0.5},
                    "steps": [{"text": "x", "image": io.BytesIO(PNG[0])}],
                },
            )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    builder = Made(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


KEEP = ItemOptions(rename=("facts=dataset_facts", "steps=dataset_steps"))
"""Keeps the fields whose images are no images of the record."""


def by_id(source) -> dict:
    results = list(source.read(0, len(source)))
    return {r.record.id if isinstance(r, Read) else r.id: r for r in results}


def test_tfds_examples(directory):
    refused = by_id(TfdsSource(str(directory), ItemOptions()))["r1"]
    assert refused.reason == "unread" and "looks like an image" in refused.detail
    source = pickle.loads(pickle.dumps(TfdsSource(str(directory), KEEP)))
    assert (source.name, len(source)) == ("made", 5)
    found = by_id(source)
    # TFDS shuffles by key. An example with broken text has its own id, as far as that can be decoded.
    assert len(found) == 5 and {"r0", "r1", "r2", "r3", "r\ufffd"} == set(found)
    assert found["r3"].reason == found["r\ufffd"].reason == "encoding"
    for i in range(3):
        record = found[f"r{i}"].record
        assert record.images == tuple(PNG[:i]), "encoded files, byte for byte"
        assert record.messages[0] == {"role": "user", "content": "<image>" * i + "wäs?"}
        assert record.metadata == {"kind": ["easy", "hard"][i % 2], "sizes": [[24, 16]] * i}, (
            "values with bytes are dropped"
        )
    assert json.loads(json.dumps(source.key())) == source.key()


def test_tfds_ranges_splits_and_options(directory):
    source = TfdsSource(str(directory), ItemOptions())
    results = list(source.read(0, 5))
    assert list(source.read(0, 2)) + list(source.read(2, 5)) == results == list(source.read(0, 5))
    assert [r.where for r in results][4] == "made, split train, example 5"
    assert len(TfdsSource(str(directory), ItemOptions(), split="train[:2]")) == 2
    test = open_source(directory, split="test", options=dataclasses.replace(KEEP, task="ocr"), name="mine")
    assert (test.name, len(test), by_id(test)["r0"].record.task) == ("mine", 1, "ocr")
    assert test.key() != source.key()


def test_tfds_nested_features(directory):
    """Features inside a Dataset of dicts and inside a dict become Python values."""
    options = ItemOptions(rename=("steps=texts",))
    source = TfdsSource(str(directory), options)
    builder, examples = source._opened
    from phivision_jax.data.sources.tfds import _plain

    item = next(_plain(builder.info.features, e) for e in examples if e["id"] == b"r2")
    assert item["steps"] == [{"text": "x", "image": PNG[0]}]
    assert item["facts"] == {"tags": ["a", "a"], "thumb": PNG[0], "seen": True, "score": 0.5}
    assert item["conversations"][1] == {"from": "gpt", "value": "that"}


def test_tfds_rejects(directory, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="split 'dev'"):
        TfdsSource(str(directory), ItemOptions(), split="dev")
    with pytest.raises(ValueError, match="cannot open no_such_set"):
        open_source("tfds:no_such_set", options=ItemOptions())
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    info = (tmp_path / "dataset_info.json").read_text()
    (tmp_path / "dataset_info.json").write_text(info.replace('"5"', f'"{10**12}"'))
    with pytest.raises(ValueError, match="it has 1000000000000 examples by its"):
        open_source(tmp_path, options=ItemOptions())
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot open"):
        open_source(tmp_path, options=ItemOptions())
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "phivision_jax.data.sources.tfds")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'phivision_jax\[tfds\]'"):
        open_source(directory, format="tfds", options=ItemOptions())


def test_tfds_does_not_import_tensorflow(directory):
    program = f"""
import sys
from phivision_jax.data.sources.open_source import open_source
from phivision_jax.data.sources.item_options import ItemOptions
source = open_source({str(directory)!r}, options=ItemOptions())
print(len(list(source.read(0, 5))), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "5 False\n", done.stderr


PAYLOAD = "import pathlib\npathlib.Path({mark!r}).write_text('ran')\n"


@pytest.mark.parametrize(("name", "cwd"), [("payload.Evil", "inside"), ("mydata.payload.Evil", "above")])
def test_tfds_folder_runs_no_code_of_its_own(tmp_path, name, cwd):
    """Whatever class a feature names, at any depth and in both forms of the specification."""
    folder, mark = tmp_path / "mydata", tmp_path / "ran"
    folder.mkdir()
    for module in ("__init__.py", "payload.py"):
        (folder / module).write_text(PAYLOAD.format(mark=str(mark)))
    split = {
        "name": "train",
        "shardLengths": ["1"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "mydata", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"moduleName": name.rpartition(".")[0]}))
    own = "tensorflow_datasets.core.features"
    inner = {"pythonClassName": name, "tensor": {"shape": {}, "dtype": "int64"}}
    nested = {"pythonClassName": f"{own}.sequence_feature.Sequence", "sequence": {"feature": inner, "length": "-1"}}
    specifications = [
        {"pythonClassName": name, "featuresDict": {"features": {}}},
        {"python_class_name": f"{own}.features_dict.FeaturesDict", "features_dict": {"features": {"a": nested}}},
        {"type": name, "content": {}},
        {"type": f"{own}.features_dict.FeaturesDict", "content": {"a": {"type": name, "content": {}}}},
    ]
    program = f"""
import json, pathlib, sys
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.open_source import open_source
for specification in {specifications!r}:
    pathlib.Path({str(folder / "features.json")!r}).write_text(json.dumps(specification))
    try:
        open_source({str(folder)!r}, options=ItemOptions())
    except ValueError as error:
        print(error)
"""
    where = {"inside": folder, "above": tmp_path}[cwd]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and not done.returncode, done.stderr
    assert all(f"class {name}, which is none of TFDS's own" in line and str(folder) in line for line in lines)
    assert not mark.exists()
