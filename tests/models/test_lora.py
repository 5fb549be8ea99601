"""Adapters in the model and in training; their export and loading is in ``tests/convert/test_lora.py``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from phivision_jax import sharding
from phivision_jax.config import LoraConfig
from phivision_jax.models import lora, phivision
from phivision_jax.models.layers import Linear
from phivision_jax.training import optim
from phivision_jax.training.run_config import OptimConfig
from phivision_jax.training.step import init_params
from tests.support.batches import EXAMPLES, TINY, random_rows
from tests.support.forward import logits
from tests.support.train_steps import RUN, compile_quickly, first_moments, rows_across, run, step_on

# Every kind of kernel: [in, out], heads among the outputs, heads among the inputs, stacked and not.
ALL = LoraConfig(rank=3, alpha=6.0, targets="_proj|fc[12]")
STARTED = dataclasses.replace(RUN, lora=LoraConfig(rank=2, alpha=8.0))


@pytest.fixture(scope="module")
def adapted(tiny):
    """(structure, parameters) of the model ``tiny`` with random A and B on every linear layer."""
    graphdef, state = phivision.abstract(TINY, lora=ALL)
    params, rng = optim.flatten(tiny.split()[1]), np.random.default_rng(0)
    for path, leaf in optim.flatten(nnx.to_pure_dict(state)).items():
        if lora.is_adapter(path):
            params[path] = jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
    return graphdef, optim.unflatten(params)


@pytest.fixture(scope="module")
def batch():
    return random_rows(np.random.default_rng(3), TINY, [EXAMPLES[:3], EXAMPLES[3:]])


def by_hand():
    layer = Linear("D,DF->F", (2, 2), ("embed", "mlp"), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    layer.adapt(1, 3.0, nnx.Rngs(0))
    layer.lora_a[...] = jnp.array([[1.0], [-1.0]])
    layer.lora_b[...] = jnp.array([[2.0, 5.0]])
    return layer


def test_linear_with_adapter_by_hand():
    """[1 2]·W = [7 10]; [1 2]·A = −1, ·B = [−2 −5], times 3/1 = [−6 −15]."""
    np.testing.assert_array_equal(by_hand()(jnp.array([1.0, 2.0])), [1.0, -5.0])
    assert by_hand()(jnp.array([1.0, 2.0], jnp.bfloat16)).dtype == jnp.bfloat16


def test_adapter_scale_is_alpha_over_rank():
    layer = Linear("D,DF->F", (1, 1), ("embed", "mlp"), rngs=nnx.Rngs(0))
    layer.adapt(4, 2.0, nnx.Rngs(0))
    layer.kernel[...], layer.lora_a[...], layer.lora_b[...] = jnp.zeros((1, 1)), jnp.ones((1, 4)), jnp.ones((4, 1))
    assert float(layer(jnp.ones(1))[0]) == 4 * 2.0 / 4
    merged = lora.merge({"x": nnx.to_pure_dict(nnx.state(layer))}, LoraConfig(rank=4, alpha=2.0))
    assert set(merged["x"]) == {"kernel"} and float(merged["x"]["kernel"][0, 0]) == 4 * 2.0 / 4


def test_merge_by_hand():
    """W + 3 · [[1] [−1]] · [[2 5]]; in the second layer of a stack 2 · W + 12 · A · B; other leaves unchanged."""
    tree = nnx.to_pure_dict(nnx.state(by_hand()))
    want = [[7.0, 17.0], [-3.0, -11.0]]
    np.testing.assert_array_equal(lora.merge(tree, LoraConfig(rank=1, alpha=3.0))["kernel"], want)
    stacked = {"fc": jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree), "norm": {"scale": np.ones(2)}}
    merged = lora.merge(stacked, LoraConfig(rank=1, alpha=3.0))
    np.testing.assert_array_equal(merged["fc"]["kernel"], [want, [[26.0, 64.0], [-18.0, -52.0]]])
    assert merged["norm"]["scale"] is stacked["norm"]["scale"] and set(merged["fc"]) == {"kernel"}
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    assert lora.merge(halves, LoraConfig(rank=1, alpha=3.0))["kernel"].dtype == jnp.bfloat16


def test_add_names_shapes_and_shardings():
    _, state = phivision.abstract(TINY, lora=LoraConfig(rank=3, targets=r"(q|o)_proj|decoder.*up_proj"))
    shardings = sharding.param_shardings(state, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    params, layers = nnx.to_pure_dict(state), shardings["decoder"]["layers"]
    assert {"/".join(path[:-1]) for path in optim.flatten(params) if lora.is_adapter(path)} == {
        "decoder/layers/self_attn/q_proj",
        "decoder/layers/self_attn/o_proj",
        "decoder/layers/mlp/up_proj",
        "vision/layers/self_attn/q_proj",
    }
    q, o = params["decoder"]["layers"]["self_attn"]["q_proj"], params["decoder"]["layers"]["self_attn"]["o_proj"]
    assert (q["lora_a"].shape, q["lora_b"].shape) == ((2, 32, 3), (2, 3, 4, 8))
    assert (o["lora_a"].shape, o["lora_b"].shape) == ((2, 4, 8, 3), (2, 3, 32))
    spec = {name: (x["lora_a"].spec, x["lora_b"].spec) for name, x in layers["self_attn"].items() if "lora_a" in x}
    assert spec["q_proj"] == (PartitionSpec(None, "fsdp", None), PartitionSpec(None, None, "tensor", None))
    assert spec["o_proj"] == (PartitionSpec(None, "tensor", None, None), PartitionSpec(None, None, "fsdp"))
    assert layers["mlp"]["up_proj"]["lora_b"].spec == PartitionSpec(None, None, "tensor")


def test_new_adapters_change_no_bit(tiny, adapted, batch):
    """B is initially zero."""
    flat = optim.flatten(adapted[1])
    params = {path: jnp.zeros_like(leaf) if path[-1] == lora.B else leaf for path, leaf in flat.items()}
    before, after = logits(*tiny.split(), batch), logits(adapted[0], optim.unflatten(params), batch)
    np.testing.assert_array_equal(np.asarray(before).view(np.uint32), np.asarray(after).view(np.uint32))


def test_merge_keeps_logits(tiny, adapted, batch):
    graphdef, base = tiny.split()
    want, merged = logits(*adapted, batch), lora.merge(adapted[1], ALL)
    assert np.abs(logits(graphdef, merged, batch) - want).max() <= 1e-4
    assert np.abs(logits(graphdef, base, batch) - want).max() > 0.1  # they have an effect
    assert jax.tree.structure(merged) == jax.tree.structure(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "up_porj"}, r"lora\.targets: 'up_porj' matches no linear layer \(they look like '.*up_proj'\)"),
        ({"targets": "lm_head|norm|kernel"}, "matches no linear layer"),  # not Linear; paths end at the layer
        ({"targets": "("}, r"lora\.targets: '\(' is not a regular expression"),
        ({"rank": -1}, r"lora\.rank is -1; give at least 1"),
    ],
)
def test_add_rejects_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        phivision.abstract(TINY, lora=dataclasses.replace(ALL, **changes))


def test_merge_rejects_other_rank():
    with pytest.raises(ValueError, match=r"fc/lora_a has rank 1, lora\.rank is 2; give the training run's"):
        lora.merge({"fc": nnx.to_pure_dict(nnx.state(by_hand()))}, LoraConfig(rank=2))


class TestTraining:
    def test_lr_rules_scale_adapters_and_freeze_base(self, adapted):
        scale = optim.multipliers(adapted[1], OptimConfig(lr_rules=(("vision", 0.0), ("mlp", 2.0))))
        assert {path: m for path, m in scale.items() if not lora.is_adapter(path) and m} == {}
        found = {optim.path_name(path): m for path, m in scale.items() if lora.is_adapter(path)}
        assert found["decoder/layers/mlp/up_proj/lora_a"] == 2.0
        assert found["decoder/layers/self_attn/q_proj/lora_b"] == 1.0
        assert found["vision/layers/mlp/fc1/lora_a"] == 0.0

    def test_lr_rules_must_leave_an_adapter(self, adapted):
        with pytest.raises(ValueError, match=r"freeze every adapter \(with lora.rank, only adapters train\)"):
            optim.partition(adapted[1], OptimConfig(lr_rules=(("lora", 0.0),)))

    @pytest.fixture(scope="class")
    def begun(self, tiny):
        """A step on fsdp 4 × tensor 2, and its initial parameters, from a base without adapters."""
        step = step_on(STARTED, {"fsdp": 4, "tensor": 2}, 8)
        return step, init_params(STARTED, step, tiny.split()[1])

    def test_base_keeps_every_bit_and_has_no_moments(self, tiny, begun):
        step, start = begun
        before, first = (optim.flatten(jax.tree.map(np.asarray, tree)) for tree in (tiny.split()[1], start))
        losses, _, state = run(step, compile_quickly(step), start, [rows_across(0, "causal")] * 3)
        after = optim.flatten(jax.tree.map(np.asarray, state["params"]))
        for path, leaf in before.items():
            np.testing.assert_array_equal(leaf.view(np.uint32), after.pop(path).view(np.uint32), optim.path_name(path))
        assert len(after) == 2 * 7
        for path, leaf in after.items():
            assert np.abs(leaf - first[path]).max() > 1e-4, optim.path_name(path)
        assert losses[2] < losses[0]
        moments, shardings = first_moments(state), optim.flatten(step.shardings["params"])
        assert moments.keys() == after.keys()
        for path, leaf in moments.items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), optim.path_name(path)
        assert sum(x.size for x in jax.tree.leaves(state["opt_state"])) <= 2 * sum(map(np.size, after.values())) + 16

    def test_init_params_from_base_is_the_same_on_any_mesh(self, tiny, begun):
        one = optim.flatten(init_params(STARTED, step_on(STARTED, {}, 1), tiny.split()[1]))
        for path, leaf in optim.flatten(begun[1]).items():
            np.testing.assert_array_equal(leaf, one[path], optim.path_name(path))
        assert not any(leaf.any() for path, leaf in one.items() if path[-1] == lora.B)

    def test_a_is_uniform_within_one_over_sqrt_inputs(self, begun):
        """The inputs are all contracted axes, without layers and the rank."""
        initial = {path: np.asarray(leaf) for path, leaf in optim.flatten(begun[1]).items() if path[-1] == lora.A}
        assert len(initial) == 7
        for path, a in initial.items():
            bound = np.prod(a.shape[1:-1]) ** -0.5  # [L, in…, rank]
            assert 0.9 * bound < np.abs(a).max() <= bound, optim.path_name(path)
            assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.12), optim.path_name(path)
            assert not np.array_equal(a[0], a[1])

    @pytest.mark.slow  # random truncated normals take long to compile
    def test_init_params_do_not_depend_on_adapters(self):
        plain, adapted = (optim.flatten(init_params(cfg, step_on(cfg, {}, 1))) for cfg in (RUN, STARTED))
        for path, leaf in plain.items():
            np.testing.assert_array_equal(leaf, adapted[path], optim.path_name(path))
        other = dataclasses.replace(STARTED, seed=STARTED.seed + 1)
        again, others = (
            optim.flatten(init_params(cfg, step_on(cfg, {}, 1), optim.unflatten(plain))) for cfg in (STARTED, other)
        )
        for path, leaf in adapted.items():
            np.testing.assert_array_equal(leaf, again[path], optim.path_name(path))
            assert path[-1] != lora.A or (leaf != others[path]).any()
