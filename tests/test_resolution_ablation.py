"""The variants of configs/ablations: their sizes, and training, evaluation, generation and packing by the same code."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import preflight_ablations, strategy_flops
from benchmarks.preflight_ablations import VARIANTS
from benchmarks.tables import fill
from phivision_jax.cli.load_config import load_config
from phivision_jax.config import ModelConfig
from phivision_jax.convert.mapping import model_leaves
from phivision_jax.data.feed.encode import encode_record
from phivision_jax.data.feed.pipeline import batches
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.data.plan.plan import make_plan
from phivision_jax.evaluation.dataset import DatasetBenchmark
from phivision_jax.evaluation.periodic import Evaluator
from phivision_jax.evaluation.task import Sampling
from phivision_jax.images.layout import make_layout
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from phivision_jax.rows import fill_rows, row_shape
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT
from tests.support.records import mixed_records
from tests.support.runs import compilations, finish, losses, write_data
from tests.support.train_steps import QUICK

# Early fusion is not covered elsewhere, and its programs are the smallest.
SLOW_BUT_ONE = [v if v == "early_fusion" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_heads": 2}


def read(name: str, variant: str):
    return load_config(f"{ROOT}/configs/ablations/{name}.py:{variant}")


def model_of(name: str, variant: str) -> ModelConfig:
    return read(name, variant).model_over(ModelConfig())


def narrow(variant: str) -> ModelConfig:
    """The tiny variant with fewer and narrower layers."""
    config = model_of("resolution_tiny", variant)
    decoder = dataclasses.replace(config.decoder, **NARROW)
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **NARROW), decoder=decoder)


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in model_leaves(config))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes.


def test_proxy_has_the_parameters_of_its_docstring() -> None:
    file = f"{ROOT}/configs/proxy_5b.py"
    config = load_config(file).model_over(ModelConfig())
    text = Path(file).read_text()
    parts = {"decoder": 0, "vision": 0, "projector": 0}
    for leaf in model_leaves(config):
        parts[leaf.path.split("/")[0].removesuffix("_tail")] += math.prod(leaf.shape)
    assert all(f" {size:,}\n" in text for size in (*parts.values(), sum(parts.values())))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_differ_in_nothing_else(variant: str) -> None:
    cfg, other = read("resolution", variant), read("resolution", "dynamic_3600")
    data = dataclasses.replace(cfg.data, num_patches=other.data.num_patches)
    assert dataclasses.replace(cfg, model=other.model, data=data) == other
    config = model_of("resolution", variant)
    layout, row = make_layout(config), cfg.data
    assert config.decoder == model_of("resolution", "dynamic_3600").decoder
    assert config.max_patches <= row.num_patches and not row.num_patches % 128
    largest = layout.measure(16_000, 9_000)
    assert largest.tokens <= (2048 if variant in ("multicrop_s2", "dynamic_2048") else 3600) < row.length
    assert 4.6e9 < parameters(config) < 5.2e9


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_caps_are_a_36th(variant: str) -> None:
    config, full = (model_of(name, variant) for name in ("resolution_tiny", "resolution"))
    assert config.vision.encoder == full.vision.encoder and config.projector == full.projector
    tiny_layout, layout = make_layout(config), make_layout(full)
    small, large = tiny_layout.measure(8 * 80, 8 * 45), layout.measure(16 * 480, 16 * 270)
    assert small.tokens <= large.tokens / 36 * 1.01 and len(small.grids) == len(large.grids)


# ---------------------------------------------------------------------------------------------------------------------
# The same code for all.


@pytest.fixture
def processor(request: pytest.FixtureRequest) -> Processor:
    return Processor.small(narrow(request.param))


def random_model(config: ModelConfig) -> tuple[nnx.GraphDef, phivision.Params]:
    graphdef, state = phivision.abstract(config)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), nnx.to_pure_dict(state)
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("processor", SLOW_BUT_ONE, indirect=True)
def test_packed_equals_alone_and_answers_in_batches(processor: Processor, tmp_path: Path) -> None:
    config = processor.config
    dataset = write_dataset(tmp_path / "set", mixed_records(12), processor)
    graphdef, params = random_model(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def loss_and_gradients(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            value, aux = batch_loss(phivision.merge(graphdef, params), batch)
            return value * aux["weight"]

        return jax.value_and_grad(loss)(params)

    def total(rows: Any) -> Any:
        results = [loss_and_gradients(params, jax.tree.map(jnp.asarray, row)) for row in rows]
        return jax.tree.map(lambda *values: np.sum(values, axis=0), *results)

    shape = row_shape(config, 512, 1, max(256, config.max_patches))
    plan = make_plan([dataset], Mixture.from_directories("set"), processor, shape)
    packed = list(batches([dataset], plan, processor, batch_rows=1))
    assert max(len(info.record_ids[0]) for _, info in packed) > 2
    loss, gradients = total(batch for batch, _ in packed)
    loss_1, gradients_1 = total(fill_rows([[encode_record(r, processor)]], shape, config) for r in dataset)
    assert loss == pytest.approx(loss_1, rel=1e-5) and loss > 0
    for part in gradients:
        both = (np.concatenate([x.ravel() for x in jax.tree.leaves(g[part])]) for g in (gradients, gradients_1))
        assert cosine(*both) >= 0.99999, part
    assert loss_and_gradients._cache_size() == 1

    benchmark, model = DatasetBenchmark(), phivision.merge(graphdef, params)
    asked = [(benchmark, benchmark.items(str(dataset.directory)), 0)]

    def answers(slots: int) -> dict[str, Any]:
        evaluator = Evaluator(asked, processor, sampling=Sampling(max_new_tokens=3), slots=slots)
        return {result.item: (result.answer, result.error) for result in evaluator(model)}

    batched = answers(6)
    assert batched == answers(1) and len(batched) == 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, sizes=60)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_trains_evaluates_and_is_read_again(variant: str, data: Path, tmp_path: Path) -> None:
    sizes = [f"--config.model.{part}.{name}={n}" for part in ("vision", "decoder") for name, n in NARROW.items()]
    words = [sys.executable, "train.py", f"--config=configs/ablations/resolution_tiny.py:{variant}", *sizes]
    words += [f"--config.data.path={data}/train", f"--config.data.eval_path={data}/test", "--config.optim.steps=3"]
    words += ["--config.optim.warmup_steps=1", "--config.eval_examples=8", "--config.eval_batch=4"]
    words += ["--config.log_every=1", "--config.checkpoint_every=2"]
    output = finish([*words, f"--run={tmp_path}/first"])
    assert compilations(output, "step") == 1 and sorted(losses(tmp_path / "first")) == [1, 2, 3]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "first").values())
    assert [row["step"] for row in read_metrics(tmp_path / "first") if "eval/accuracy" in row] == [3]
    output = finish([*words, f"--run={tmp_path}/first", "--config.eval_every=0"])
    assert "continuing from step 3" in output
    # Its checkpoint, vision side included, is what another run starts from.
    output = finish([*words, f"--run={tmp_path}/second", f"--config.init_from={tmp_path}/first"])
    assert compilations(output, "step") == 1 and losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables of the documentation.


def test_flops_table_is_of_the_committed_counts() -> None:
    rows = json.loads(strategy_flops.RESULT.read_text())
    page = strategy_flops.PAGE.read_text()
    assert page == fill(page, "flops", strategy_flops.table(rows))
    assert [row["variant"] for row in rows] == [*VARIANTS] * len(strategy_flops.IMAGES)
    for row in rows:
        config = strategy_flops.model_of(row["variant"])
        size = make_layout(config).measure(*row["image"])
        assert (len(size.grids), size.patches, size.tokens) == (row["tiles"], row["patches"], row["tokens"])
        assert row["counted"] == strategy_flops.counted(config, size)
        positions = 2 * size.patches * config.vision.num_positions * config.vision.hidden_size
        assert row["compiled"] == pytest.approx(sum(row["counted"].values()) + positions, rel=1e-3)


def test_preflight_table_is_of_the_committed_reports() -> None:
    page = preflight_ablations.PAGE.read_text()
    assert page == fill(page, "preflight", preflight_ablations.table())
    for path in preflight_ablations.RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert (
            report["fits"] and report["effort"] == "default" and report["config"].endswith(path.stem.rpartition("_")[0])
        )
