"""The configuration files: each loads, and has the values that it documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from flax import nnx

from phivision_jax.cli.load_config import load_config
from phivision_jax.config import LoraConfig, ModelConfig
from phivision_jax.data.plan.mixture import Mixture
from phivision_jax.models import phivision
from phivision_jax.training import optim
from phivision_jax.training.run_config import ModelSettings
from tests.support.batches import TINY

ROOT = Path(__file__).parents[1]
STAGES = ("stage1", "stage2", "stage3")
PIPELINES = {
    "at_once/stage1": "stage1",
    "at_once/stage2": "stage2",
    "then_reasoning/stage1": "stage1",
    "then_reasoning/direct": "stage2_direct",
    "then_reasoning/reasoning": "stage2_reasoning",
    "reasoning_only/stage1": "stage1",
    "reasoning_only/stage2": "stage2_reasoning",
    "mixed/stage1": "stage1",
    "mixed/stage2": "stage2",
}


def read(name: str):
    return load_config(str(ROOT / "configs" / name))


def rates(cfg, **lora) -> dict[str, set[float]]:
    """Peak learning rates of each module, without frozen parameters."""
    params = nnx.to_pure_dict(phivision.abstract(TINY, lora=LoraConfig(**lora))[1])
    found: dict[str, set[float]] = {}
    for path, multiplier in optim.multipliers(params, cfg.optim).items():
        if multiplier:
            found.setdefault(path[0], set()).add(round(multiplier * cfg.optim.learning_rate, 12))
    return found


@pytest.mark.parametrize(
    ("stage", "expected", "warmup"),
    [
        ("stage1", {"projector": {1e-3}}, 60),
        ("stage2", {"projector": {2e-5}, "vision": {2e-5}, "decoder": {1e-5}}, 450),
        ("stage3", {"projector": {1e-5}, "vision": {1e-5}, "decoder": {5e-6}}, 50),
    ],
)
def test_recipe_learning_rates(stage, expected, warmup):
    cfg = read(f"phi4_rv_15b.py:{stage}")
    assert rates(cfg) == expected and cfg.optim.warmup_steps == warmup and cfg.optim.steps == 0
    assert cfg.data.stage == stage


def test_recipe_sizes():
    """Tokens of a step are about the report's samples times their mean length."""
    sizes = {s: read(f"phi4_rv_15b.py:{s}").data for s in STAGES}
    tokens = {s: data.batch_rows * data.length for s, data in sizes.items()}
    assert tokens == {"stage1": 786_432, "stage2": 6_291_456, "stage3": 7_340_032}
    assert read("phi4_rv_15b.py:stage1").model.max_patches == 1024


def test_finetune_learning_rates():
    cfg = read("finetune.py")
    assert rates(cfg) == {"projector": {2e-5}, "vision": {2e-5}, "decoder": {1e-5}}
    assert rates(cfg, rank=2) == {"decoder": {1e-4}}
    assert rates(cfg, rank=2, targets="_proj") == {"decoder": {1e-4}, "vision": {1e-4}}
    assert cfg.model == ModelSettings() and not cfg.init_from and not cfg.data.path
    assert cfg.data.num_patches >= ModelConfig().max_patches


@pytest.mark.parametrize("which", PIPELINES)
def test_pipelines_follow_the_recipe(which):
    cfg, mixture = read(f"pipelines.py:{which}"), Mixture.read(ROOT / "configs/mixtures/recipe.toml")
    assert cfg.data.path == "configs/mixtures/recipe.toml" and cfg.data.stage == PIPELINES[which]
    assert mixture.only(cfg.data.stage).stages[0].chosen(mixture.names)
    recipe = read(f"phi4_rv_15b.py:{'stage1' if which.endswith('stage1') else 'stage2'}")
    changes = {"path": cfg.data.path, "stage": cfg.data.stage}
    assert cfg.data == dataclasses.replace(recipe.data, **changes) and cfg.model == recipe.model
    if which != "then_reasoning/reasoning":
        assert cfg.optim == recipe.optim


def test_recipe_mixture():
    mixture = Mixture.read(ROOT / "configs/mixtures/recipe.toml")
    shares = {stage.name: stage.reasoning_share for stage in mixture.stages}
    assert shares == {"stage1": None, "stage2": 0.2, "stage2_direct": 0.0, "stage2_reasoning": 1.0, "stage3": 0.2}
    assert [mixture.names[s] for s in mixture.only("stage1").stages[0].chosen(mixture.names)] == ["captions"]


def test_unknown_variants():
    with pytest.raises(ValueError, match=r"at_once/stage1, .*, not 'mixed/stage3'"):
        read("pipelines.py:mixed/stage3")
    with pytest.raises(ValueError, match="not 'stage4'"):
        read("phi4_rv_15b.py:stage4")
