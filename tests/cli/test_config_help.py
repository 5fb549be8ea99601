"""``--help`` for a configuration: every field with its value and meaning."""

from __future__ import annotations

import dataclasses

from phivision_jax.cli import config_help
from phivision_jax.config import DecoderConfig, ProjectorConfig, VisionConfig
from phivision_jax.training.run_config import DataConfig, OptimConfig, RunConfig


@dataclasses.dataclass
class Small:
    """A configuration of ``two`` fields."""

    first: int = 3
    """The first field,
    documented on two lines."""
    second: str = "x"


def test_field_docs():
    assert config_help.field_docs(Small) == {"first": "The first field, documented on two lines."}


def test_text_lists_flag_value_and_meaning():
    expected = "  --config.first=3\n      The first field, documented on two lines.\n  --config.second='x'"
    assert config_help.text(Small()) == expected


def test_every_field_is_documented():
    cfg = RunConfig()
    parts = (cfg, cfg.data, cfg.optim, cfg.lora, cfg.guard, cfg.mesh)
    for part in (*parts, cfg.model, VisionConfig(), ProjectorConfig(), DecoderConfig()):
        groups = {"model", "data", "optim", "lora", "guard", "mesh", "vision", "projector", "decoder"}
        fields = {field.name for field in dataclasses.fields(part)} - groups
        assert fields <= config_help.field_docs(type(part)).keys()
    assert config_help.field_docs(OptimConfig)["tokens"].startswith("Length of training in tokens")


def test_text_of_a_run_config():
    page = config_help.text(RunConfig(data=DataConfig(epochs=7)))
    assert "--config.data.epochs=7" in page and "--config.init_from=''" in page
    assert "--config.model.image_attention=None" in page
    # Groups after plain fields, the model last, its architecture listed although it is not set.
    assert (
        page.index("--config.seed") < page.index("--config.data.path") < page.index("--config.model.vision.patch_size")
    )
    assert "``" not in page and max(map(len, page.splitlines())) <= 120
