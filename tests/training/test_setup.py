"""Checks before a run starts or continues: its model, its rows, its settings."""

import dataclasses
import json
import random
import sys
from types import SimpleNamespace

import jax
import pytest

from phivision_jax import sharding
from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.layout import CHECKPOINTS
from phivision_jax.checkpoint.manager import CheckpointError, RunCheckpoints
from phivision_jax.config import LoraConfig
from phivision_jax.training import setup
from phivision_jax.training.device_layout import resolve_for
from phivision_jax.training.run_config import DataConfig, GuardConfig, ModelSettings, OptimConfig, RunConfig
from tests.support.batches import TINY
from tests.support.damage import NEW, OLD, flip, make_state, make_tail
from tests.support.recipe import PODS, STAGES, recipe

CFG = dataclasses.replace(RunConfig(), model=TINY)


# ---------------------------------------------------------------------------------------------------------------------
# The model.


@pytest.fixture
def run(tmp_path):
    """Two steps whose models differ in ``max_patches``, which shows which one was read."""
    (tmp_path / "assets").mkdir()
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    for step in (OLD, NEW):
        model = dataclasses.asdict(dataclasses.replace(TINY, max_patches=step))
        checkpoints.save(make_state(step), make_tail(), {"model": model, "run": {}}, tmp_path / "assets")
    checkpoints.close()
    return tmp_path


FOLLOW = RunConfig(init_from="nowhere")


def test_with_checkpoint_of_the_newest_intact_step(run):
    """With damaged metadata that is the step before; ``init_from`` need not exist any more."""
    assert setup.with_checkpoint(FOLLOW, RunCheckpoints(run, keep=2)).model.max_patches == NEW
    for step, after in ((NEW, OLD), (OLD, None)):
        flip(run / CHECKPOINTS / str(step) / "meta" / "metadata", random.Random(0))
        checkpoints = RunCheckpoints(run, keep=2)
        if after:
            assert setup.with_checkpoint(FOLLOW, checkpoints).model.max_patches == after
        else:
            with pytest.raises(CheckpointError, match="holds no intact checkpoint: in 20, its file meta/metad"):
                setup.with_checkpoint(FOLLOW, checkpoints)


def test_random_weights_need_an_architecture(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    assert setup.with_checkpoint(CFG, checkpoints) == CFG
    for model in (ModelSettings(), ModelSettings(max_patches=64), ModelSettings(vision=TINY.vision)):
        with pytest.raises(ValueError, match=r"init_from is empty: give --config\.init_from=CHECKPOINT"):
            setup.with_checkpoint(RunConfig(model=model), checkpoints)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "devices", "slices"), [*PODS, ("TPU v5", 256, 1)])
def test_check_rows_of_the_recipe(stage, kind, devices, slices):
    """It has no evaluation, so ``eval_batch`` may stay 64, fewer than the devices of a pod."""
    cfg = resolve_for(recipe(stage), kind, devices, slices)
    assert not cfg.data.eval_path and cfg.eval_batch == 64
    mesh = jax.sharding.AbstractMesh(dataclasses.astuple(cfg.mesh), sharding.MESH_AXES)
    setup.check_rows(cfg, mesh)
    if sharding.num_shards(mesh, "batch") > 64:
        evaluated = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, eval_path="somewhere"))
        with pytest.raises(ValueError, match=r"eval_batch is 64, which does not divide over \d+ devices"):
            setup.check_rows(evaluated, mesh)


def test_check_rows_refuses():
    mesh = jax.sharding.AbstractMesh((2, 1, 3, 5, 1), sharding.MESH_AXES)  # slice 2 x fsdp 3 x tensor 5
    cfg = dataclasses.replace(CFG, eval_batch=12, data=DataConfig(batch_rows=18, eval_path="somewhere"))
    setup.check_rows(cfg, mesh)
    for bad in (
        dataclasses.replace(cfg, eval_batch=10),
        dataclasses.replace(cfg, data=DataConfig(batch_rows=15, eval_path="somewhere")),
    ):
        with pytest.raises(ValueError, match=r"(data\.batch_rows is 15|^eval_batch is 10), .* 6 devices"):
            setup.check_rows(bad, mesh)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes that need neither a plan nor a compiler.


def checked(folder, run, **settings):
    values = {"batch_rows": 8, "path": f"{folder}/train"} | settings.pop("data", {})
    cfg = dataclasses.replace(CFG, data=DataConfig(**values), **settings)
    return setup.check(cfg, str(run))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": {"loss_weights": (("thnik", 2.0),)}}, "data.loss_weights: 'thnik' matches no mode and task"),
        ({"data": {"loss_weights": (("x y" * 9000, 2.0),)}}, "yx y' matches no mode and task"),
        ({"data": {"eval_path": "nowhere"}}, "no dataset in nowhere"),
        ({"data": {"validation_path": "nowhere"}}, "nowhere"),
        ({"optim": OptimConfig(lr_rules=(("porjector", 1.0),))}, "optim.lr_rules: 'porjector' matches no parameter"),
        ({"optim": OptimConfig(lr_rules=(("x y" * 9000, 1.0),))}, "yx y' matches no parameter"),
        ({"optim": OptimConfig(lr_rules=((".", 0.0),))}, "optim.lr_rules freeze every parameter"),
        ({"optim": OptimConfig(moment_dtype="bfloat16", b2=0.999)}, "needs optim.b2 <= 0.99"),
        ({"guard": GuardConfig(patience=0)}, "guard: spike must not be negative"),
        ({"lora": LoraConfig(rank=2, targets="q_porj")}, "q_porj"),
        ({"remat": "half"}, "half"),
        ({"microbatches": 3}, "data.batch_rows is 8, which does not divide over"),
        ({"profile": "3"}, "profile is '3'"),
        ({"keep_best": "eval/accuracy"}, "data.eval_path and eval_benchmarks are empty"),
        ({"wandb": "mine"}, "wandb is 'mine', but the package is not installed"),
    ],
)
def test_mistake_is_found_before_the_run_has_a_file(data, tmp_path, monkeypatch, settings, sentence):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(setup, "make_plan", None)
    run = tmp_path / "run"
    with pytest.raises((ValueError, OSError, ModuleNotFoundError)) as caught:
        checked(data, run, **settings)
    assert sentence in str(caught.value) and not run.exists()


def test_check_of_a_sound_configuration_writes_nothing(data, tmp_path):
    assert len(checked(data, tmp_path / "run")[2]) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["assets", "plan", "config.json"])
def test_check_refuses_a_directory_that_a_start_would_overwrite(data, tmp_path, name):
    """Of a model, a data set or a plan of the user's. A run is known by its command or its checkpoints."""
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds {name}, but no run: use another --run"):
        checked(data, tmp_path)
    for mark in ("command.txt", "checkpoints"):
        (tmp_path / mark).mkdir()
        checked(data, tmp_path)
        (tmp_path / mark).rmdir()


def test_changed_setting_of_a_continued_run_is_found_before_the_plan(data, run):
    meta = {"model": dataclasses.asdict(TINY), "run": dataclasses.asdict(CFG)}
    checkpoints = RunCheckpoints(run, keep=5)
    checkpoints.save(make_state(NEW + 1), make_tail(), json.loads(json.dumps(meta)), run / "assets")
    checkpoints.close()
    checked(data, run)
    with pytest.raises(ValueError, match=r"optim\.learning_rate is 2e-05 there, 1\.0 here: this run was started"):
        checked(data, run, optim=OptimConfig(learning_rate=1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a continued run.


def prepared(cfg=CFG, plan="a" * 64):
    """The parts of a ``Prepared`` that are read here."""
    return setup.Prepared(cfg, None, None, [], SimpleNamespace(hash=plan), 10, None, None)


def meta_of(cfg=CFG, **more):
    """A checkpoint's metadata."""
    meta = {"step": 40, "run": dataclasses.asdict(cfg), "plan": "a" * 64, "code": layout.code_version()}
    return json.loads(json.dumps(meta | more))


def logged(now, meta):
    messages = []
    setup.check_unchanged(now, meta, messages.append)
    return messages


def test_check_unchanged_logs_nothing():
    assert logged(prepared(), meta_of()) == []


def test_check_unchanged_ignores_other_settings():
    other = dataclasses.replace(CFG, checkpoint_every=7, log_every=3, eval_batch=8, keep_checkpoints=9, remat="full")
    assert logged(prepared(other), meta_of()) == []


def test_check_unchanged_logs_another_guard():
    (message,) = logged(prepared(dataclasses.replace(CFG, guard=GuardConfig(spike=0.0))), meta_of())
    assert message.startswith("guard is {'spike': 0.0, ") and "and was {'spike': 8.0, " in message
    assert message.endswith(" when checkpoint 40 was written")


def test_check_unchanged_logs_another_code_version():
    here = layout.code_version()
    assert logged(prepared(), meta_of(code="0.0.1")) == [
        f"code is {here}, and was 0.0.1 when checkpoint 40 was written"
    ]
    before = meta_of()
    del before["code"]
    assert logged(prepared(), before) == []


def replaced(**parts):
    return dataclasses.replace(
        CFG, **{name: dataclasses.replace(getattr(CFG, name), **values) for name, values in parts.items()}
    )


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (replaced(optim={"learning_rate": 1.0}), "optim.learning_rate is {optim.learning_rate} there, 1.0 here"),
        (replaced(optim={"b2": 0.5}), "optim.b2 is {optim.b2} there, 0.5 here"),
        (replaced(model={"max_patches": 7}), "model.max_patches is {model.max_patches} there, 7 here"),
        (replaced(lora={"rank": 4}), "lora.rank is 0 there, 4 here"),
        (dataclasses.replace(CFG, seed=5), "seed is 0 there, 5 here"),
        (replaced(data={"loss_weights": (("think", 2.0),)}), "data.loss_weights is "),
    ],
)
def test_check_unchanged_refuses(now, sentence):
    with pytest.raises(ValueError) as caught:
        logged(prepared(now), meta_of())
    assert str(caught.value).startswith(sentence.format(optim=CFG.optim, model=CFG.model))
    assert str(caught.value).endswith(": this run was started otherwise; keep it as it was, or use a new --run")


def test_check_unchanged_refuses_another_plan():
    with pytest.raises(
        ValueError, match=r"checkpoint 40 of this run was trained with plan a{12}, and its plan/ is now b{12}:"
    ):
        logged(prepared(plan="b" * 64), meta_of())
