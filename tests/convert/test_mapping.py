from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.mapping import (
    Leaf,
    abstract_params,
    check,
    flatten,
    hf_shapes,
    hf_tensors,
    model_leaves,
    tree_from_hf,
)
from tests.support.released_layout import SMALL, projector_shapes, random_tensors, shapes_of, text_shapes, vision_shapes


def test_released_model_has_695_tensors_and_15_119_518_144_parameters() -> None:
    by_hand = text_shapes(5120, 17_920, 40, 40, 10, 100_352)
    assert (len(by_hand), sum(map(math.prod, by_hand.values()))) == (243, 14_659_507_200)
    vision = vision_shapes(1152, 4304, 27, 16, 256)
    assert (len(vision), sum(map(math.prod, vision.values()))) == (448, 427_888_064)
    by_hand |= vision | projector_shapes(1152, 5120)
    assert hf_shapes(model_leaves(ModelConfig())) == by_hand
    assert len(by_hand) == 695
    abstract = jax.tree.leaves(abstract_params(ModelConfig()))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract)
    assert sum(math.prod(leaf.shape) for leaf in abstract) == 15_119_518_144


def test_abstract_params_are_the_tree_of_the_contract() -> None:
    flat = dict(flatten(abstract_params(ModelConfig(), np.float16)))
    assert flat["decoder/layers/self_attn/q_proj/kernel"].shape == (40, 5120, 40, 128)
    assert flat["decoder/layers/self_attn/v_proj/kernel"].shape == (40, 5120, 10, 128)
    assert flat["decoder/layers/self_attn/o_proj/kernel"].shape == (40, 40, 128, 5120)
    assert flat["decoder/layers/mlp/gate_proj/kernel"].shape == (40, 5120, 17_920)
    assert flat["decoder/lm_head/kernel"].shape == (100_352, 5120)
    assert flat["vision/layers/self_attn/k_proj/bias"].shape == (26, 16, 72)
    assert flat["vision/layers/self_attn/out_proj/kernel"].shape == (26, 16, 72, 1152)
    assert flat["vision_tail/layer/mlp/fc1/kernel"].shape == (1152, 4304)
    assert flat["vision_tail/head/attention/in_proj/kernel"].shape == (1152, 3456)
    assert flat["vision_tail/head/probe"].shape == (1, 1, 1152)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(np.float16)}
    assert set(abstract_params(ModelConfig(), vision_tail=False)) == {"vision", "projector", "decoder"}


def test_transforms_by_hand() -> None:
    q = Leaf("q", ("qkv",), rows=(2, 3), rest=(4,), transposed=True)  # [D, N, H] = [4, 2, 3]
    theirs = np.arange(24).reshape(6, 4)
    assert q.to_ours(theirs).shape == (4, 2, 3)
    assert q.to_ours(theirs)[1, 1, 2] == theirs[1 * 3 + 2, 1]
    o = Leaf("o", ("o",), rows=(4,), rest=(2, 3), transposed=True)  # [N, H, D] = [2, 3, 4]
    theirs = np.arange(24).reshape(4, 6)
    assert o.to_ours(theirs)[1, 2, 3] == theirs[3, 1 * 3 + 2]
    bias = Leaf("b", ("b",), rows=(2, 3))
    assert bias.to_ours(np.arange(6)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_fused_rows_are_q_k_v_and_gate_up() -> None:
    tensors = random_tensors(shapes_of(SMALL), np.float32)
    decoder = tree_from_hf(tensors.__getitem__, model_config(SMALL))["decoder"]["layers"]
    qkv, gate_up = (
        tensors["model.layers.1.self_attn.qkv_proj.weight"],
        tensors["model.layers.1.mlp.gate_up_proj.weight"],
    )
    # D 16, 4 heads and 2 kv heads of 4: rows 0–15 are q, 16–23 k, 24–31 v.
    np.testing.assert_array_equal(decoder["self_attn"]["q_proj"]["kernel"][1].reshape(16, 16), qkv[:16].T)
    np.testing.assert_array_equal(decoder["self_attn"]["k_proj"]["kernel"][1].reshape(16, 8), qkv[16:24].T)
    np.testing.assert_array_equal(decoder["self_attn"]["v_proj"]["kernel"][1].reshape(16, 8), qkv[24:].T)
    np.testing.assert_array_equal(decoder["mlp"]["gate_proj"]["kernel"][1], gate_up[:24].T)
    np.testing.assert_array_equal(decoder["mlp"]["up_proj"]["kernel"][1], gate_up[24:].T)


def test_last_vision_block_is_the_tail() -> None:
    tensors = random_tensors(shapes_of(SMALL), np.float32)
    tree = tree_from_hf(tensors.__getitem__, model_config(SMALL), vision_tail=True)
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight"
    assert tree["vision"]["layers"]["mlp"]["fc1"]["kernel"].shape[0] == 2
    np.testing.assert_array_equal(tree["vision"]["layers"]["mlp"]["fc1"]["kernel"][1], tensors[name.format(1)].T)
    np.testing.assert_array_equal(tree["vision_tail"]["layer"]["mlp"]["fc1"]["kernel"], tensors[name.format(2)].T)


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    kv, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vision_heads, vision_head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width = vision_heads * vision_head_dim
    vision = SMALL["vision_config"] | {
        "hidden_size": width,
        "intermediate_size": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": vision_heads,
        "patch_size": draw(st.integers(1, 3)),
        "num_patches": draw(st.sampled_from([1, 4, 9])),
    }
    return SMALL | {
        "vocab_size": draw(st.integers(48, 70)),
        "hidden_size": kv * group * 2 * half,
        "intermediate_size": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "mm_hidden_size": width,
        "vision_config": vision,
    }


@given(configs())
def test_every_tensor_and_leaf_is_used_once_and_comes_back(values: dict[str, Any]) -> None:
    config, shapes = model_config(values), shapes_of(values)
    assert hf_shapes(model_leaves(config)) == shapes
    tensors = random_tensors(shapes, np.float32)
    tree = tree_from_hf(tensors.__getitem__, config, vision_tail=True)
    want = dict(flatten(abstract_params(config)))
    assert {path: leaf.shape for path, leaf in flatten(tree)} == {path: leaf.shape for path, leaf in want.items()}
    assert sum(leaf.size for _, leaf in flatten(tree)) == sum(map(math.prod, shapes.values()))
    back = dict(hf_tensors(tree, config))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_hf_tensors_takes_a_tree_without_the_tail_and_refuses_a_wrong_one() -> None:
    config = model_config(SMALL)
    tree = tree_from_hf(random_tensors(shapes_of(SMALL), np.float32).__getitem__, config)
    names = dict(hf_tensors(tree, config))
    assert not any((".layers.2." in name and "vision" in name) or ".head." in name for name in names)
    assert len(names) == len(shapes_of(SMALL)) - 16 - 13  # the last block, and post-norm with head
    tree["decoder"]["norm"]["scale"] = np.zeros(5)
    with pytest.raises(ValueError, match=r"1 mis-shaped: decoder/norm/scale \[5\] \(expected \[16\]\)"):
        list(hf_tensors(tree, config))


def test_check_lists_all_kinds_of_fault_shortly() -> None:
    want: dict[str, tuple[int, ...]] = {f"w{i}": (2,) for i in range(20)}
    with pytest.raises(ValueError) as error:
        check({"w0": (3,), "x": (1,)}, want, "here")
    assert str(error.value) == (
        "here: 19 missing: w1, w2, w3, w4 … and 15 more; 1 extra: x; 1 mis-shaped: w0 [3] (expected [2])"
    )
