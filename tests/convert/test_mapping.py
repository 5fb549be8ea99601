from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given

from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf_config import model_config
from phivision_jax.convert.mapping import Leaf, check, hf_shapes, model_leaves
from tests.support.parameter_trees import abstract_params, flatten, hf_tensors, tree_from_hf
from tests.support.released_layout import (
    SMALL,
    any_config,
    projector_shapes,
    random_tensors,
    shapes_of,
    text_shapes,
    vision_shapes,
)


def test_model_leaves_released_counts() -> None:
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


def test_build_tree_released_shapes() -> None:
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


def test_leaf_to_ours_by_hand() -> None:
    sizes = {"N": 2, "H": 3, "D": 4}
    q = Leaf("q", ("qkv",), "(N H) D -> D N H", sizes)
    theirs = np.arange(24).reshape(6, 4)
    assert q.to_ours(theirs).shape == (4, 2, 3)
    assert q.to_ours(theirs)[1, 1, 2] == theirs[1 * 3 + 2, 1]
    assert (q.layer_shape, q.num_rows, q.row_shape, q.row_axis, q.rows_per_index) == ((4, 2, 3), 6, (4,), 1, 3)
    assert q.to_ours(theirs[3:]).shape == (4, 1, 3)
    o = Leaf("o", ("o",), "D (N H) -> N H D", sizes)
    theirs = np.arange(24).reshape(4, 6)
    assert o.to_ours(theirs)[1, 2, 3] == theirs[3, 1 * 3 + 2]
    assert (o.layer_shape, o.num_rows, o.row_shape, o.row_axis, o.rows_per_index) == ((2, 3, 4), 4, (6,), 2, 1)
    bias = Leaf("b", ("b",), "(N H) -> N H", sizes)
    assert bias.to_ours(np.arange(6)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_leaves_split_fused_rows() -> None:
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


def test_vision_leaves_last_block_is_tail() -> None:
    tensors = random_tensors(shapes_of(SMALL), np.float32)
    tree = tree_from_hf(tensors.__getitem__, model_config(SMALL), vision_tail=True)
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight"
    assert tree["vision"]["layers"]["mlp"]["fc1"]["kernel"].shape[0] == 2
    np.testing.assert_array_equal(tree["vision"]["layers"]["mlp"]["fc1"]["kernel"][1], tensors[name.format(1)].T)
    np.testing.assert_array_equal(tree["vision_tail"]["layer"]["mlp"]["fc1"]["kernel"], tensors[name.format(2)].T)


@given(any_config())
def test_mapping_round_trips_any_config(values: dict[str, Any]) -> None:
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


def test_hf_tensors_without_tail_and_wrong_tree() -> None:
    config = model_config(SMALL)
    tree = tree_from_hf(random_tensors(shapes_of(SMALL), np.float32).__getitem__, config)
    names = dict(hf_tensors(tree, config))
    assert not any((".layers.2." in name and "vision" in name) or ".head." in name for name in names)
    assert len(names) == len(shapes_of(SMALL)) - 16 - 13  # the last block, and post-norm with head
    tree["decoder"]["norm"]["scale"] = np.zeros(5)
    with pytest.raises(ValueError, match=r"1 mis-shaped: decoder/norm/scale \[5\] \(expected \[16\]\)"):
        list(hf_tensors(tree, config))


def test_check_lists_faults_briefly() -> None:
    want: dict[str, tuple[int, ...]] = {f"w{i}": (2,) for i in range(20)}
    with pytest.raises(ValueError) as error:
        check({"w0": (3,), "x": (1,)}, want, "here")
    assert str(error.value) == (
        "here: 19 missing: w1, w2, w3, w4 … and 15 more; 1 extra: x; 1 mis-shaped: w0 [3] (expected [2])"
    )
