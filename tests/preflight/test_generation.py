"""Preflight of generation: arithmetic by hand, and the search for the most slots, without a compiler."""

import dataclasses
import functools

import pytest

from phivision_jax.cli.load_config import load_config
from phivision_jax.config import DecoderConfig
from phivision_jax.hardware.topology import GIB, parse_topology
from phivision_jax.preflight import generation
from phivision_jax.training.device_layout import resolve_for

WHERE = parse_topology("v6e:2x4")
CFG = resolve_for(load_config("configs/phi4_rv_15b.py:stage2"), WHERE.chip.device_kind, WHERE.devices)
LAYERS = 40 * (5120 * (5120 * 2 + 2 * 1280) + 3 * 5120 * 17_920)
TABLE = 100_352 * 5120


@functools.cache
def planned(where=WHERE, length=4096, slots=None, weights=None, cache="bfloat16", cfg=CFG):
    return generation.plan(cfg, where, length, slots, weights, cache)


def test_plan():
    found = planned()
    # 15,119,518,144 parameters less the vision tower's unused last block, post-norm and pooling head, in bf16 halves.
    weights = 2 * found["weights_bytes_per_device"]
    assert 28 * GIB < weights < 28.2 * GIB
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    # Keys and values of 40 layers, 10 heads of 128, 2 bytes: 204,800 a token, of which a device has half of the heads.
    assert found["cache_bytes_per_token"] == 204_800 // 2
    norms = 81 * 5120
    assert found["read_weights_bytes_per_device"] == LAYERS + TABLE + norms  # two bytes, two devices
    working = 2 * 2048 * (4 * 5120 + 2 * 17_920 / 2)
    room = 0.9 * 31.25 * GIB - weights / 2 - 512 * 2**20 - working
    assert found["slots_per_device"] == room // (102_400 * 4352) and found["slots"] == 4 * found["slots_per_device"]


def test_plan_int8_and_given_slots():
    found = planned(parse_topology("v6e:1x1"), slots=3, weights="int8", cache="int8")
    assert found["slots"] == 3 and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    # A byte each, and a scale of four bytes for each token and head.
    assert found["cache_bytes_per_token"] == 2 * 40 * 10 * (128 + 4)
    assert found["read_weights_bytes_per_device"] == pytest.approx(LAYERS + TABLE, rel=2e-3)  # scales and norms
    assert planned(slots=9)["slots"] == 12  # as many on every replica


def facts(per_slot, slots, hbm, base):
    peak = base + slots * per_slot
    one = {"fits": peak <= hbm, "compile_seconds": 1.0, "peak_bytes": peak, "temporary_bytes": 7, "copies": []}
    one |= {"memory": {"cache": slots * per_slot}, "moved_bytes": 40e9, "wire_bytes": 1e6}
    return {"admit": one | {"peak_bytes": peak - 1}} | ({"decode": one} if peak - 1 <= hbm else {})


@pytest.mark.parametrize("start", [1, 3, 30, 37, 38, 60])
@pytest.mark.parametrize("extra", [0, 0.02, -0.02])
def test_largest_number_of_slots(start, extra):
    """Whatever the estimate was, and if a slot needs a little more or less than its part of the cache."""
    chosen, hbm, tried = planned(), 31.25 * GIB, []
    per_slot = chosen["cache_bytes_per_token"] * 4096 * (1 + extra)
    base = 0.9 * hbm - 37.5 * per_slot

    def attempt(plan):
        tried.append(plan["slots_per_device"])
        assert plan["slots"] == 4 * plan["slots_per_device"]
        return facts(per_slot, plan["slots_per_device"], hbm, base)

    found = generation.largest(chosen | {"slots_per_device": start, "slots": 4 * start}, WHERE, attempt)
    assert found["fits"] and found["slots_per_device"] == 37 and len(tried) == len(set(tried)) <= 4


def test_nothing_fits():
    chosen = planned()
    found = generation.largest(chosen, WHERE, lambda plan: facts(GIB, plan["slots_per_device"], 31.25 * GIB, 60 * GIB))
    assert not found["fits"] and found["slots_per_device"] == 1
    assert "DOES NOT FIT: peak 61.00 GiB" in generation.text(found)


def test_times():
    chosen = planned(slots=40)
    found = generation.checked(chosen, WHERE, lambda plan: facts(GIB, 10, 31 * GIB, 0))
    needed = LAYERS + TABLE + 81 * 5120 + 10 * 4096 * 102_400
    assert found["decode_bytes_over_bound"] == pytest.approx(40e9 / needed)
    found |= generation.times(CFG, WHERE, found)
    step = found["modelled_decode_step_seconds"]
    assert step == pytest.approx(40e9 / 1600e9 + 1e6 / 400e9)  # received: half of 800 GB/s
    assert found["modelled_decode_time_over_bound"] == pytest.approx(step / (needed / 1600e9))
    assert found["modelled_decode_tokens_per_second"] == pytest.approx(40 / step)
    # Prefill multiplies each token of a row with the decoder's layers, and patches with the tower's too.
    least = 2 * LAYERS / 2 / (918e12 * 0.7668)
    assert 1 < 4 / found["modelled_prefill_tokens_per_second"] / least < 1.3
    shown = generation.text(found)
    assert "no copy of it" in shown and "slots             40 (10 a device)" in shown
    copied = generation.text(found | {"decode_copies": ["copy copy.1 bf16[40,10]"]})
    assert "1 copies as large as a layer of it: copy copy.1 bf16[40,10]" in copied


def test_plan_and_times_errors():
    with pytest.raises(ValueError, match="leave no room for a slot of 4,096 tokens; take more chips, fewer tokens, or"):
        planned(parse_topology("v5e:1x1"))
    where = parse_topology("v4:2x2x1")
    found = planned(where) | {"decode_moved_bytes": 1, "decode_wire_bytes": 0, "decode_bound_bytes": 1}
    with pytest.raises(ValueError, match="no published runs"):
        generation.times(CFG, where, found)
    odd = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, decoder=DecoderConfig(num_kv_heads=5)))
    assert planned(cfg=odd)["mesh"]["tensor"] == 1
