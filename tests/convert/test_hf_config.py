from __future__ import annotations

import json

import pytest

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert.hf_config import config_json, generation_json, model_config

# The decisive keys of the released config.json (microsoft/Phi-4-reasoning-vision-15B), which omits every default.
RELEASED = {
    "architectures": ["Phi4ForCausalLMV"],
    "model_type": "phi4-siglip",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
    "rope_theta": 500000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 32768,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "min_num_patches": 256,
    "max_num_patches": 3600,
    "use_s2": False,
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip2_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
}

IDS = {"bos_token_id": 507, "eos_token_id": 508, "pad_token_id": None}


def test_released_config_is_the_default():
    assert model_config(RELEASED) == ModelConfig()


def test_to_hf_keeps_what_it_does_not_know_and_how_numbers_are_spelt():
    base = RELEASED | {"mm_projector_lr": 2e-5, "eos_token_id": [100265]}
    assert config_json(model_config(base), base) == base
    assert json.dumps(config_json(model_config(base), base)) == json.dumps(base)  # 500000 does not become 500000.0


def test_to_hf_from_nothing_reads_back():
    model = ModelConfig(
        vision=VisionConfig(hidden_size=48, num_heads=4, num_layers=3, patch_size=8, intermediate_size=96),
        decoder=DecoderConfig(
            hidden_size=64, num_heads=8, num_kv_heads=2, vocab_size=512, num_layers=2, **IDS, stop_token_ids=(507,)
        ),
        min_patches=4,
        max_patches=64,
    )
    assert model_config(json.loads(json.dumps(config_json(model)))) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.4),
        ("rope_scaling", {"type": "longrope"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"factor": 4.0}),
        ("rope_scaling", "linear"),
        ("tie_word_embeddings", True),
        ("use_s2", True),
    ],
)
def test_from_hf_refuses_other_arithmetic(key, value):
    with pytest.raises(ValueError, match=key):
        model_config(RELEASED | {key: value})


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "default"}, {}])
def test_from_hf_accepts_default_rope_scaling(scaling):
    base = RELEASED | {"rope_scaling": scaling}
    assert model_config(base) == ModelConfig()
    assert config_json(ModelConfig(), base) == base


def test_from_hf_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        model_config(tmp_path)


def test_from_hf_refuses_a_text_only_model():
    with pytest.raises(ValueError, match="vision_config"):
        model_config({k: v for k, v in RELEASED.items() if k != "vision_config"})


def test_config_json_cannot_say_bidirectional():
    with pytest.raises(ValueError, match="bidirectional"):
        config_json(ModelConfig(image_attention="bidirectional"))


def test_stop_ids_of_both_files_are_kept(tmp_path):
    base = RELEASED | {"eos_token_id": [100265, 100257]}
    (tmp_path / "config.json").write_text(json.dumps(base))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [100257, 100349]}))
    model = model_config(tmp_path)
    assert model.decoder.stop_ids == (100265, 100257, 100349)
    assert config_json(model, base) == base
    assert config_json(model)["eos_token_id"] == [100265, 100257, 100349]
    assert generation_json(model)["eos_token_id"] == [100265, 100257, 100349]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 100352}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id 100352 is not in the vocabulary"):
        model_config(tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_null_ids_stay_null(missing):
    base = RELEASED | {"pad_token_id": None, "bos_token_id": None}
    given = {key: value for key, value in base.items() if not missing or value is not None}
    decoder = model_config(given).decoder
    assert (decoder.pad_token_id, decoder.bos_token_id) == (None, None)
    assert config_json(model_config(given), given) == given


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [100352, -1])
def test_id_beyond_vocabulary_is_refused(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} {value} is not in the vocabulary, 0 to 100351"):
        model_config(RELEASED | {key: value})


def test_config_without_end_token_is_refused():
    with pytest.raises(ValueError, match="has no eos_token_id"):
        model_config(RELEASED | {"eos_token_id": None})
