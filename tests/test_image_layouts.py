"""Layouts in which vision tokens are not patches: planned, packed, trained on, generated from."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phivision_jax.convert.hf_config import config_json
from phivision_jax.data.feed.encode import encode_record
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.data.plan.record_sizes import lengths_of
from phivision_jax.evaluation.dataset import DatasetBenchmark
from phivision_jax.evaluation.periodic import Evaluator
from phivision_jax.evaluation.task import Sampling
from phivision_jax.images.layout import make_layout, with_layout
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from phivision_jax.rows import expand, fill_rows, row_shape
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.run import train
from phivision_jax.training.run_config import DataConfig, ModelSettings, OptimConfig, RunConfig
from phivision_jax.training.step import TrainStep
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support import image_layouts
from tests.support.datasets import write_dataset
from tests.support.records import CONFIG, mixed_records
from tests.support.train_steps import QUICK

MADE_UP = ("thumbnail", "overview_and_detail")
# Tiles of 2x2 patches. The caps limit images to 16 crops, 2 crops, and 10 tiles of the image's own shape.
TILED = {"multicrop": "multicrop:16", "s2": "s2", "multicrop_s2": "multicrop_s2:8", "dynamic_s2": "dynamic_s2:10"}
ALL = ("naflex", *MADE_UP, *TILED)
assert image_layouts  # imported for its registrations


def config_of(name: str, **settings):
    return dataclasses.replace(
        with_layout(dataclasses.replace(CONFIG, tile_size=16), TILED.get(name, name)), **settings
    )


def shape_of(config):
    """Rows of two vision rows, each with at least one image."""
    return row_shape(config, 128, 2, max(64, config.max_patches))


def random_model(config) -> tuple[nnx.GraphDef, phivision.Params]:
    """A model with random weights, made without compiling its initializers."""
    graphdef, state = phivision.abstract(config)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), nnx.to_pure_dict(state))


# Dynamic-S² has everything: several tiles and scales, sums, concatenation. The others take as long and fail alike.
SLOW = ("overview_and_detail", "multicrop", "s2", "multicrop_s2")
LAYOUTS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ALL[1:]]


@pytest.fixture(params=LAYOUTS)
def processor(request) -> Processor:
    return Processor.small(config_of(request.param))


@pytest.fixture
def dataset(tmp_path, processor):
    records = mixed_records(12)
    broken = tuple(image[:-30] for image in records[1].images)
    records[1] = dataclasses.replace(records[1], images=broken)
    return write_dataset(tmp_path / "set", records, processor)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts by themselves.


@pytest.mark.parametrize("name", ALL)
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4))
def test_measure_matches_encode(name, sizes):
    layout = make_layout(config_of(name))
    measured = [layout.measure(*size) for size in sizes]
    assert measured == [layout.encode(Image.new("RGB", size)).size for size in sizes]
    assert [layout.blank(size).size for size in measured] == measured
    patches, tokens = layout.measure_all(np.array(sizes))
    assert patches.tolist() == [size.patches for size in measured]
    assert tokens.tolist() == [size.tokens for size in measured]
    assert sum(tokens) <= layout.max_tokens(int(sum(patches)))


def test_make_layout_rejects_unknown_and_unfit():
    with pytest.raises(ValueError, match=r"image_layout 'thumbnial' is not registered .*did you mean 'thumbnail'"):
        Processor.small(dataclasses.replace(CONFIG, image_layout="thumbnial"))
    with pytest.raises(ValueError, match=r"put it in phivision_jax\.images\.fovea"):
        make_layout(dataclasses.replace(CONFIG, image_layout="fovea"))
    with pytest.raises(ValueError, match=r"concatenates 2 features into a token, but projector\.merge_size is 1"):
        make_layout(dataclasses.replace(CONFIG, image_layout="overview_and_detail"))


def test_fingerprints_name_layout():
    processors = [Processor.small(config_of(name)) for name in ALL]
    assert len({processor.fingerprint for processor in processors}) == len(ALL)
    assert len({processor.text_fingerprint for processor in processors}) == 1


def test_config_json_rejects_other_layouts():
    with pytest.raises(ValueError, match="cannot express image_layout='thumbnail'"):
        config_json(config_of("thumbnail"))


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


def test_fill_rows_shifts_merge_tables():
    """Vision rows of 20: the thumbnails of two examples take 16 patches of each."""
    config = config_of("thumbnail", image_attention="bidirectional")
    image = make_layout(config).encode(Image.new("RGB", (8, 8), "red"))
    shape = row_shape(config, 16, 2, 20)
    assert shape.merge == (10, 1, 4)
    batch = fill_rows([[expand([1, -200, 2], [image]), expand([-200, 3], [image])]], shape, config)
    assert batch.vision_index[0].tolist() == [-1, 0, 1, 2, 3, -1, 4, 5, 6, 7, -1, *[-1] * 5]
    assert batch.span_end[0].tolist() == [0, 4, 4, 4, 4, 5, 9, 9, 9, 9, *range(10, 16)]
    by_hand = np.array([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    assert batch.merge_index[0, :, 0].tolist() == [*by_hand.tolist(), *(20 + by_hand).tolist(), *[[-1] * 4] * 2]
    assert batch.merge_weight[0, :, 0].tolist() == [*[[0.25] * 4] * 8, *[[0.0] * 4] * 2]


def test_fill_rows_groups_attention_by_tile():
    config = config_of("overview_and_detail")
    image = make_layout(config).encode(Image.new("RGB", (24, 8)))
    batch = fill_rows([[expand([-200, -200], [image, image])]], row_shape(config, 12, 1, 16), config)
    assert batch.patch_segments[0, 0].tolist() == [1, 1, *[2] * 6, 3, 3, *[4] * 6]
    assert batch.patch_grid[0, 0, 1:3].tolist() == [[1, 2], [2, 3]]
    assert batch.merge_index[0, 6].tolist() == [[10, -1], [8, 9]]


def test_fill_rows_rejects_images_of_other_layout():
    config = config_of("thumbnail")
    image = make_layout(CONFIG).encode(Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match=r"row 0: .* without merge tables"):
        fill_rows([[expand([-200], [image])]], row_shape(config, 16, 1, 16), config)


# ---------------------------------------------------------------------------------------------------------------------
# From records to a model.


def test_lengths_count_tokens_and_patches(dataset, processor):
    lengths = lengths_of(dataset.index, processor.layout)
    for i in (0, 2, 4):
        example = encode_record(dataset[i], processor)
        assert (lengths.tokens[i], lengths.patches[i]) == (len(example.tokens), example.num_patches)
        assert example.text_tokens == dataset.index.text_tokens[i]


def test_plan_needs_shape_of_layout(dataset, processor):
    mixture = Mixture.from_directories("set")
    shape = shape_of(processor.config)
    plan = make_plan([dataset], mixture, processor, shape)
    assert plan.inputs["image_layout"]["name"] == processor.config.image_layout and plan.row_shape == shape
    with pytest.raises(ValueError, match="merge tables"):
        make_plan([dataset], mixture, processor, dataclasses.replace(shape, merge=None))


def test_packed_equals_one_by_one(dataset, processor):
    """The same loss and gradients from a plan's rows as from its examples one by one, by one compiled program."""
    config = processor.config
    graphdef, params = random_model(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def loss_and_gradients(params, batch):
        def loss(params):
            value, aux = batch_loss(phivision.merge(graphdef, params), batch)
            return value * aux["weight"]

        return jax.value_and_grad(loss)(params)

    def total(rows):
        results = [loss_and_gradients(params, jax.tree.map(jnp.asarray, row)) for row in rows]
        return jax.tree.map(lambda *values: np.sum(values, axis=0), *results)

    shape = shape_of(config)
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, shape)
    packed = list(batches([dataset], plan, processor, batch_rows=1))
    failed = {bad.id for _, info in packed for bad in info.failed}
    assert failed == {"r001"} and max(len(info.record_ids[0]) for _, info in packed) > 2
    examples = [encode_record(dataset[i], processor) for i in range(12) if dataset[i].id not in failed]
    loss, gradients = total(batch for batch, _ in packed)
    loss_1, gradients_1 = total(fill_rows([[example]], shape, config) for example in examples)
    assert loss == pytest.approx(loss_1, rel=1e-5) and loss > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, gradients_1)
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(gradients["vision"]))
    assert loss_and_gradients._cache_size() == 1


def test_evaluation_in_batches_equals_one_by_one(dataset, processor):
    """The answers that are generated for 6 records at a time are those for each alone."""
    graphdef, params = random_model(processor.config)
    model = phivision.merge(graphdef, jax.tree.map(jnp.asarray, params))
    benchmark = DatasetBenchmark()
    asked = [(benchmark, benchmark.items(str(dataset.directory)), 0)]

    def answers(slots):
        evaluator = Evaluator(asked, processor, sampling=Sampling(max_new_tokens=3), slots=slots)
        return {result.item: (result.answer, result.error) for result in evaluator(model)}

    batched = answers(6)
    assert batched == answers(1) and len(batched) == 12 and len(set(batched.values())) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TILED)
def test_training_compiles_one_step(name, tmp_path, monkeypatch):
    """The unchanged loop: plan, three steps, answers at the end; the step is compiled for one shape."""
    config = config_of(name)
    shape, dataset = shape_of(config), write_dataset(tmp_path / "set", mixed_records(12), Processor.small(config))
    lowered = []
    compile_step = TrainStep.compile
    monkeypatch.setattr(TrainStep, "compile", lambda step, spec: lowered.append(spec) or compile_step(step, spec))
    monkeypatch.setattr("phivision_jax.training.step.compiler_options", lambda mesh: QUICK)
    model = ModelSettings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    data = DataConfig(
        path=str(dataset.directory), eval_path=str(dataset.directory), batch_rows=len(jax.devices()),
        length=shape.length, vision_rows=2, num_patches=shape.num_patches, epochs=20,
    )  # fmt: skip
    cfg = RunConfig(model=model, data=data, optim=OptimConfig(steps=3), dtype="float32", max_new_tokens=2, log_every=1)
    assert train(cfg, str(tmp_path / "run")) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and rows[-1]["eval/examples"] == 12
    assert len(lowered) == 1 and lowered[0].merge_index.shape[1:] == shape.merge
