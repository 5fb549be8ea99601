from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phivision_jax.batch import Batch, RowShape
from phivision_jax.data.feed.pipeline import batches, rows_of_process, to_device
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.sources.easy_vqa import easy_vqa
from phivision_jax.io import retry
from phivision_jax.processor import Processor
from tests.support.datasets import write_dataset
from tests.support.records import CONFIG, make_record, mixed_records

ONE, TWO_EPOCHS = Mixture.from_directories("set"), Mixture.from_directories("set", epochs=2)
SHAPE = RowShape(160, 2, 80)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, processor):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", mixed_records(40), processor)


@pytest.fixture(scope="module")
def plan(dataset, processor):
    return make_plan([dataset], TWO_EPOCHS, processor, SHAPE)


def assert_same(a, b) -> None:
    for (batch_a, info_a), (batch_b, info_b) in zip(a, b, strict=True):
        assert info_a == info_b
        jax.tree.map(np.testing.assert_array_equal, batch_a, batch_b)


def rows_in(batch: Batch, which: list[int]) -> Batch:
    return jax.tree.map(lambda a: a[which], batch)


def test_batches_cover_plan_and_fill_last_step(dataset, plan, processor):
    complete = list(batches([dataset], plan, processor, batch_rows=3))
    assert [info.step for _, info in complete] == list(range(plan.num_steps(3)))
    seen = [record_id for _, info in complete for row in info.record_ids for record_id in row]
    assert sorted(seen) == sorted(2 * [f"r{i:03d}" for i in range(40)])
    assert not any(info.failed for _, info in complete)
    assert plan.num_rows % 3, "the last step of this plan is not full"
    last, info = complete[-1]
    empty = [j for j, row in enumerate(info.record_ids) if not row]
    assert empty == list(range(plan.num_rows % 3, 3))
    assert not rows_in(last, empty).segment_ids.any() and not rows_in(last, empty).patch_segments.any()
    # One shape for all steps: one compilation.
    assert len({str(jax.tree.map(np.shape, batch)) for batch, _ in complete}) == 1


def test_row_holds_its_records(dataset, plan, processor):
    batch, info = next(batches([dataset], plan, processor, batch_rows=2))
    by_id = {record.id: record for record in mixed_records(40)}
    for j, row in enumerate(info.record_ids):
        for segment, record_id in enumerate(row, start=1):
            record = by_id[record_id]
            expected = processor.encode(record.messages, record.images, mode="nothink")
            np.testing.assert_array_equal(batch.tokens[j][batch.segment_ids[j] == segment], expected.tokens)
            mine = batch.vision_index[j][(batch.segment_ids[j] == segment) & (batch.vision_index[j] >= 0)]
            patches = [i.patches for i in expected.images] or [np.zeros((0, 192), np.uint8)]
            np.testing.assert_array_equal(batch.patches[j].reshape(-1, 192)[mine], np.concatenate(patches))


def test_resume_at_any_step_is_tail(dataset, plan, processor):
    complete = list(batches([dataset], plan, processor, batch_rows=2, num_threads=0))
    for start in range(len(complete) + 1):
        assert_same(list(batches([dataset], plan, processor, batch_rows=2, start_step=start)), complete[start:])
    with pytest.raises(IndexError, match="start_step"):
        batches([dataset], plan, processor, batch_rows=2, start_step=len(complete) + 1)


class Host:
    """A sharding as one of several hosts sees it, with that host's devices."""

    def __init__(self, sharding: NamedSharding, devices: list) -> None:
        self.sharding, self.devices, self.device_set = sharding, devices, sharding.device_set

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d in self.devices}


def shardings() -> dict[str, NamedSharding]:
    devices = np.array(jax.devices()[:8])
    mesh = Mesh(devices.reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    crossed = Mesh(devices.reshape(2, 4).T.reshape(4, 2), ("data", "tensor"))
    return {
        "rows": NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        "few": NamedSharding(mesh, PartitionSpec("fsdp")),
        "crossed": NamedSharding(crossed, PartitionSpec("data")),
        "context": NamedSharding(mesh, PartitionSpec("data", "tensor")),
        "replicated": NamedSharding(mesh, PartitionSpec()),
    }


def test_rows_of_process_by_hand():
    named, devices = shardings(), jax.devices()

    def rows(name, *numbers):
        return rows_of_process(Host(named[name], [devices[n] for n in numbers]), 8)

    # 2 x 2 groups of 2 rows, each on the 2 devices of "tensor".
    assert rows("rows", 0, 1, 2, 3) == [0, 1, 2, 3] and rows("rows", 4, 5, 6, 7) == [4, 5, 6, 7]
    assert rows("rows", 2, 3) == [2, 3]
    # "fsdp" alone: devices 0, 1, 4, 5 hold rows 0-3, and so both hosts make all rows.
    assert rows("few", 0, 1, 2, 3) == rows("few", 4, 5, 6, 7) == list(range(8))
    # Rows that are not one stretch: a host's devices lie apart in the mesh.
    assert rows("crossed", 0, 2, 4, 6) == [0, 1, 4, 5]
    assert rows("context", 0, 1, 2, 3) == [0, 1, 2, 3]
    assert rows_of_process(named["rows"], 8) == list(range(8))


@pytest.mark.parametrize("name", ["rows", "few", "crossed"])
def test_two_hosts_make_rows_of_one(dataset, plan, processor, name):
    sharding = shardings()[name]
    complete = list(batches([dataset], plan, processor, batch_rows=4))
    for devices in (jax.devices()[0:8:2], jax.devices()[1:8:2], jax.devices()[:4], jax.devices()[4:8]):
        here = rows_of_process(Host(sharding, devices), 4)
        mine = list(batches([dataset], plan, processor, batch_rows=4, rows_here=here))
        expected = [
            (rows_in(b, here), dataclasses.replace(i, record_ids=tuple(i.record_ids[j] for j in here)))
            for b, i in complete
        ]
        assert_same(mine, expected)


@pytest.mark.parametrize("name", ["rows", "few", "crossed", "context", "replicated"])
def test_to_device_follows_sharding(dataset, plan, processor, name):
    batch, _ = next(batches([dataset], plan, processor, batch_rows=8))
    sharding = shardings()[name]
    on_device = to_device(batch, sharding, 8)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, on_device), batch)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(on_device))
    per_field = to_device(batch, jax.tree.map(lambda _: sharding, batch), 8)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, per_field), batch)


def test_batches_resize_large_images(dataset, processor):
    small = RowShape(60, 1, 40)
    plan = make_plan([dataset], ONE, processor, small, on_overflow="resize")
    assert plan.patch_limits and not len(plan.rejected)
    limits = {dataset[i].id: limit for (_, i), limit in plan.patch_limits.items()}
    seen = []
    for batch, info in batches([dataset], plan, processor, batch_rows=2):
        assert not info.failed
        for j, row in enumerate(info.record_ids):
            for segment, record_id in enumerate(row, start=1):
                mine = batch.vision_index[j][(batch.segment_ids[j] == segment) & (batch.vision_index[j] >= 0)]
                grids = batch.patch_grid[j].reshape(-1, 2)[mine].prod(axis=1)
                assert (grids <= limits.get(record_id, 64)).all()
                seen.append(record_id)
    assert sorted(seen) == sorted(f"r{i:03d}" for i in range(40))


def test_batches_of_two_datasets(tmp_path, processor):
    records = mixed_records(40)
    parts = [
        write_dataset(tmp_path / name, part, processor) for name, part in (("a", records[:25]), ("b", records[25:]))
    ]
    plan = make_plan(parts, Mixture.from_directories(tmp_path / "a", tmp_path / "b"), processor, SHAPE)
    rows = [row for _, info in batches(parts, plan, processor, batch_rows=2) for row in info.record_ids]
    assert sorted(record_id for row in rows for record_id in row) == sorted(r.id for r in records)
    assert any(len({record_id < "r025" for record_id in row}) == 2 for row in rows)
    with pytest.raises(ValueError, match="from other datasets"):
        batches(parts[::-1], plan, processor, batch_rows=2)


# ---------------------------------------------------------------------------------------------------------------------
# Bad records and I/O errors.


def spoiled(record_id: str):
    """A file whose header is sound and whose pixels are cut off: it can be measured, not decoded."""
    return lambda record: (
        dataclasses.replace(record, images=tuple(image[:-30] for image in record.images))
        if record.id == record_id
        else record
    )


def test_bad_record_becomes_placeholder(tmp_path, dataset, plan, processor):
    bad = write_dataset(tmp_path / "set", map(spoiled("r004"), mixed_records(40)), processor)
    bad_plan = make_plan([bad], TWO_EPOCHS, processor, SHAPE)
    out, sound = (
        list(batches([bad], bad_plan, processor, batch_rows=2)),
        list(batches([dataset], plan, processor, batch_rows=2)),
    )
    assert [bad.id for _, info in out for bad in info.failed] == ["r004", "r004"]
    failed = next(bad for _, info in out for bad in info.failed)
    assert (failed.source, failed.reason, failed.where) == ("made-up", "image-broken", f"{tmp_path / 'set'}, record 4")
    assert "image 0" in failed.detail
    for (batch, info), (expected, expected_info) in zip(out, sound, strict=True):
        assert info.record_ids == expected_info.record_ids
        segments = np.zeros_like(batch.segment_ids, bool)
        for j, row in enumerate(info.record_ids):
            for segment in [s for s, record_id in enumerate(row, start=1) if record_id == "r004"]:
                segments[j] |= batch.segment_ids[j] == segment
        assert segments.any() == bool(info.failed)
        assert not batch.loss_weights[segments].any()
        # Every other example has its tokens, patches and places as if nothing had happened.
        for name in ("tokens", "targets", "loss_weights", "vision_index", "group_ids"):
            kept, planned = getattr(batch, name), getattr(expected, name)
            np.testing.assert_array_equal(kept[~segments], planned[~segments])
        for name in ("segment_ids", "positions", "patch_segments", "patch_coords", "patch_grid"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))
        seen = {(b, m) for b, t in np.argwhere(~segments) if (m := expected.vision_index[b, t]) >= 0}
        for b, m in seen:
            np.testing.assert_array_equal(batch.patches[b].reshape(-1, 192)[m], expected.patches[b].reshape(-1, 192)[m])


class Flaky:
    """A dataset on storage that fails the first ``failures`` reads."""

    def __init__(self, dataset, failures: int) -> None:
        self._dataset, self.failures = dataset, failures

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, i):
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        return self._dataset[i]


def test_batches_retry_io_errors(dataset, plan, processor, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    flaky = Flaky(dataset, failures=3)
    assert_same(
        list(batches([flaky], plan, processor, batch_rows=2, num_threads=0)),
        list(batches([dataset], plan, processor, batch_rows=2)),
    )
    assert waits == [0.5, 1.0, 2.0]
    with pytest.raises(OSError, match="4 attempts to read it failed"):
        list(batches([Flaky(dataset, failures=4)], plan, processor, batch_rows=2, num_threads=0))


def test_batches_raise_errors_of_threads(dataset, plan, processor, monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with pytest.raises(OSError, match="attempts to read it failed"):
        list(batches([Flaky(dataset, failures=10**6)], plan, processor, batch_rows=2, num_threads=2))


def test_batches_reject_wrong_index(dataset, plan, processor):
    wrong = Flaky(dataset, failures=0)
    wrong.index = dataclasses.replace(dataset.index, text_tokens=dataset.index.text_tokens + 1)
    with pytest.raises(ValueError, match=r"text tokens.*in its index.*import the dataset again"):
        next(batches([wrong], plan, processor, batch_rows=2, num_threads=0))


def test_image_unlike_its_header_becomes_placeholder(dataset, plan, processor):
    """The row is planned from the header's size."""
    wrong = Flaky(dataset, failures=0)
    sizes = np.array(dataset.index.image_sizes)
    first = int(dataset.index.image_offsets[1])
    sizes[first] = sizes[first][::-1]
    wrong.index = dataclasses.replace(dataset.index, image_sizes=sizes)
    found = list(batches([wrong], plan, processor, batch_rows=2))
    failed = [bad for _, info in found for bad in info.failed]
    assert [(bad.id, bad.reason) for bad in failed] == [("r001", "image-broken")] * 2
    assert "images decode to grids [((2, 3),)], planned were [((3, 2),)]" in failed[0].detail


def test_batches_reject_mismatched_plan(tmp_path, dataset, plan, processor):
    other = write_dataset(tmp_path / "other", [make_record(0)], processor)
    with pytest.raises(ValueError, match="from other datasets"):
        batches([other], plan, processor, batch_rows=2)
    finer = Processor.small(dataclasses.replace(CONFIG, max_patches=32))
    with pytest.raises(ValueError, match="image layout; make it again"):
        batches([dataset], plan, finer, batch_rows=2)
    # The dataset itself holds no patches: other patch settings need another plan, not another import.
    finer_plan = make_plan([dataset], ONE, finer, SHAPE)
    assert finer_plan.hash != plan.hash
    batch, _ = next(batches([dataset], finer_plan, finer, batch_rows=2))
    assert np.unique(batch.patch_grid.prod(axis=-1)).max() <= 32


def test_batches_of_easy_vqa(tmp_path, processor):
    records = easy_vqa("train", questions_per_record=4, max_images=12)
    dataset = write_dataset(tmp_path / "easy", records, processor)
    plan = make_plan([dataset], ONE, processor, RowShape(512, 1, 384))
    seen = 0
    for batch, info in batches([dataset], plan, processor, batch_rows=2):
        seen += sum(map(len, info.record_ids))
        images = [row[row >= 0] for row in batch.vision_index]
        assert [len(tokens) for tokens in images] == [64 * len(row) for row in info.record_ids]
        assert (batch.loss_weights.sum(axis=1) >= 2 * np.array([len(row) for row in info.record_ids])).all()
    assert seen == len(records)
