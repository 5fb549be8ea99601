"""The model of a run, completed from the checkpoint that it starts from."""

from __future__ import annotations

import dataclasses

import pytest

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.training.device_layout import resolve_for
from phivision_jax.training.run_config import ModelSettings, ResolvedConfig, RunConfig
from tests.support.batches import TINY

BIDIRECTIONAL = dataclasses.replace(TINY, image_attention="bidirectional", max_patches=64)


def test_model_settings_are_those_of_the_model():
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    assert [field.name for field in dataclasses.fields(ModelSettings)] == names
    assert all(value is None for value in vars(ModelSettings()).values())


@pytest.mark.parametrize("found", [TINY, BIDIRECTIONAL, ModelConfig()])
def test_with_checkpoint_takes_what_is_not_given(found):
    assert RunConfig().with_checkpoint(found, "there").model == found


@pytest.mark.parametrize("found", [TINY, BIDIRECTIONAL])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("patches", [64, ModelConfig.max_patches])
def test_with_checkpoint_obeys_what_is_given(found, attention, patches):
    """The released model's defaults are obeyed too: they are values like any other."""
    cfg = RunConfig.from_dict({"model": {"image_attention": attention, "max_patches": patches}})
    model = cfg.with_checkpoint(found, "there").model
    assert model == dataclasses.replace(found, image_attention=attention, max_patches=patches)
    assert cfg.with_checkpoint(model, "the run's own checkpoint").model == model


def test_with_checkpoint_refuses_another_architecture():
    deeper = RunConfig(model=ModelSettings(decoder=dataclasses.replace(TINY.decoder, num_layers=3)))
    message = r"model\.decoder\.num_layers is 3, but there has 2; omit model\.decoder"
    with pytest.raises(ValueError, match=message):
        deeper.with_checkpoint(TINY, "there")
    released = RunConfig(model=ModelSettings(decoder=DecoderConfig()))
    with pytest.raises(ValueError, match=r"model\.decoder\.vocab_size is 100352, but there has"):
        released.with_checkpoint(TINY, "there")
    same = RunConfig(model=ModelSettings(vision=TINY.vision, projector=TINY.projector, decoder=TINY.decoder))
    assert same.with_checkpoint(BIDIRECTIONAL, "there").model == BIDIRECTIONAL


def test_resolve_without_checkpoint_takes_the_released_model():
    cfg = resolve_for(RunConfig(model=ModelSettings(max_patches=1024)), "cpu", 1)
    assert isinstance(cfg, ResolvedConfig) and cfg.model == ModelConfig(max_patches=1024)
    assert resolve_for(cfg, "cpu", 1) == cfg
    assert resolve_for(RunConfig.from_dict(dataclasses.asdict(cfg)), "cpu", 1) == cfg
