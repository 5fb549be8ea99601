import dataclasses
import json

import pytest

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.sharding import MESH_AXES
from phivision_jax.training.run_config import MeshConfig, RunConfig

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


def test_released_config_is_the_default():
    assert ModelConfig.from_hf(RELEASED) == ModelConfig()


def test_to_hf_keeps_what_it_does_not_know_and_how_numbers_are_spelt():
    base = RELEASED | {"mm_projector_lr": 2e-5, "eos_token_id": [100265]}
    assert ModelConfig.from_hf(base).to_hf(base) == base
    assert json.dumps(ModelConfig.from_hf(base).to_hf(base)) == json.dumps(base)  # 500000 does not become 500000.0


def test_to_hf_from_nothing_reads_back():
    model = ModelConfig(
        vision=VisionConfig(hidden_size=48, num_heads=4, num_layers=3, patch_size=8, intermediate_size=96),
        decoder=DecoderConfig(hidden_size=64, num_heads=8, num_kv_heads=2, vocab_size=512, num_layers=2),
        min_patches=4,
        max_patches=64,
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(model.to_hf()))) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.4),
        ("rope_scaling", {"type": "longrope"}),
        ("tie_word_embeddings", True),
        ("use_s2", True),
    ],
)
def test_from_hf_refuses_other_arithmetic(key, value):
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(RELEASED | {key: value})


def test_from_hf_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_hf(tmp_path)


def test_from_hf_refuses_a_text_only_model():
    with pytest.raises(ValueError, match="vision_config"):
        ModelConfig.from_hf({k: v for k, v in RELEASED.items() if k != "vision_config"})


def test_config_json_cannot_say_bidirectional():
    with pytest.raises(ValueError, match="bidirectional"):
        ModelConfig(image_attention="bidirectional").to_hf()


def test_misspelt_field_names_the_nearest():
    values = dataclasses.asdict(RunConfig())
    values["optim"]["learnig_rate"] = 1.0
    with pytest.raises(ValueError, match=r"optim\.learnig_rate.*'learning_rate'"):
        RunConfig.from_dict(values)


def test_run_config_survives_its_dict_and_is_hashable():
    cfg = RunConfig.from_dict({"optim": {"lr_rules": [["vision", 0.0]]}})
    assert cfg.optim.lr_rules == (("vision", 0.0),)
    assert RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg
    hash(cfg)


@pytest.mark.parametrize(
    ("mesh", "devices", "slices", "expected"),
    [
        (MeshConfig(), 8, 1, (1, 1, 8, 1, 1)),
        (MeshConfig(), 256, 1, (1, 8, 32, 1, 1)),
        (MeshConfig(), 256, 2, (2, 4, 32, 1, 1)),
        (MeshConfig(fsdp=4), 8, 1, (1, 2, 4, 1, 1)),
        (MeshConfig(data=2), 8, 1, (1, 2, 4, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2, context=2), 16, 2, (2, 1, 2, 2, 2)),
        (MeshConfig(slice=2), 8, 1, (2, 1, 4, 1, 1)),  # simulated
        (MeshConfig(slice=1, data=1, fsdp=8, context=1), 8, 1, (1, 1, 8, 1, 1)),
    ],
)
def test_mesh_sizes(mesh, devices, slices, expected):
    sizes = mesh.sizes(devices, slices)
    assert tuple(sizes) == MESH_AXES and tuple(sizes.values()) == expected


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(tensor=3), "8 devices do not divide into slice 1 x tensor 3 x context 1"),
        (MeshConfig(context=16), "8 devices do not divide into slice 1 x tensor 1 x context 16"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh.sizes(8)


@pytest.mark.parametrize(("axis", "size"), [("tensor", -1), ("tensor", 0), ("slice", 0), ("data", 0), ("fsdp", -2)])
def test_a_mesh_axis_that_cannot_be(axis, size):
    with pytest.raises(ValueError, match=rf"mesh\.{axis} is {size}"):
        MeshConfig(**{axis: size})
