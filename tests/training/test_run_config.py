"""Whose model is trained, and what --help says."""

from __future__ import annotations

import dataclasses

import pytest

from phivision_jax.cli import config_help
from phivision_jax.config import ModelConfig
from phivision_jax.training.run_config import DataConfig, OptimConfig, RunConfig
from tests.support.batches import TINY

FOLLOW = RunConfig(model_from="init_from")


def settings(model: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(model, **changes)


def test_the_checkpoint_s_model_is_taken_whatever_it_is():
    assert FOLLOW.with_model(TINY, "there").model == TINY
    assert FOLLOW.with_model(ModelConfig(), "there").model == ModelConfig()
    # A setting that is not the default's was meant.
    said = dataclasses.replace(FOLLOW, model=ModelConfig(max_patches=1024, image_attention="bidirectional"))
    assert said.with_model(TINY, "there").model == settings(TINY, max_patches=1024, image_attention="bidirectional")
    again = said.with_model(said.with_model(TINY, "there").model, "the run's own checkpoint")
    assert again.model == said.with_model(TINY, "there").model


def test_an_architecture_of_one_s_own_is_refused_and_named():
    deeper = dataclasses.replace(ModelConfig().decoder, num_layers=3)
    said = dataclasses.replace(FOLLOW, model=ModelConfig(decoder=deeper))
    with pytest.raises(ValueError, match=r"model\.decoder\.num_layers is 2 there, 3 here; leave model as it is"):
        said.with_model(TINY, "there")
    with pytest.raises(ValueError, match=r"there holds another .* model\.vision\.hidden_size is 24 there, 1152 here"):
        RunConfig().with_model(TINY, "there")


def test_a_model_of_one_s_own_keeps_its_settings():
    """Stage 1 takes smaller pictures than stage 2, which starts from it."""
    assert RunConfig().with_model(ModelConfig(max_patches=1024), "stage 1").model == ModelConfig()
    cfg = RunConfig(model=settings(TINY, max_patches=32))
    assert cfg.with_model(TINY, "there").model == cfg.model
    assert dataclasses.replace(cfg, model=TINY).with_model(cfg.model, "there").model == TINY


def test_help_reads_what_stands_below_the_fields():
    @dataclasses.dataclass
    class Made:
        """Of ``two``."""

        first: int = 3
        """What it is,
        on two lines."""
        second: str = "x"

    assert config_help.docs_of(Made) == {"first": "What it is, on two lines."}
    assert config_help.text(Made()) == "  --config.first=3\n      What it is, on two lines.\n  --config.second='x'"


def test_help_has_every_field_its_value_and_a_meaning():
    cfg = RunConfig(data=DataConfig(epochs=7))
    said = config_help.text(cfg)
    assert "--config.data.epochs=7" in said and "--config.init_from=''" in said
    assert said.index("--config.data.path") < said.index("--config.model.vision.hidden_size")
    for part in (cfg, cfg.data, cfg.optim, cfg.lora, cfg.guard, cfg.mesh):
        fields = {f.name for f in dataclasses.fields(part) if not dataclasses.is_dataclass(getattr(part, f.name))}
        assert fields <= config_help.docs_of(type(part)).keys()
    assert config_help.docs_of(OptimConfig)["tokens"].startswith("Length of the training in tokens")
    assert "``" not in said and max(map(len, said.splitlines())) <= 120


def test_help_is_asked_for_in_the_usual_ways():
    assert config_help.asked_for(["train.py", "--config=x", "--help"]) and config_help.asked_for(["train.py", "-h"])
    assert not config_help.asked_for(["train.py", "--config=x", "--run=help"])
