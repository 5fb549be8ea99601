"""Preflight of generation: arithmetic by hand, without a compiler."""

import dataclasses

import pytest

from phivision_jax.cli.load_config import load_config
from phivision_jax.config import DecoderConfig
from phivision_jax.hardware.topology import GIB, parse_topology
from phivision_jax.preflight import generation
from phivision_jax.training.device_layout import resolve_for

WHERE = parse_topology("v6e:2x4")
CFG = resolve_for(load_config("configs/phi4_rv_15b.py:stage2"), WHERE.chip.device_kind, WHERE.devices)


def test_plan():
    found = generation.plan(CFG, WHERE, prompt=4096, new_tokens=1024)
    # 15,119,518,144 parameters less the vision tower's unused last block, post-norm and pooling head, in bf16 halves.
    weights = 2 * found["weights_bytes_per_chip"]
    assert 28 * GIB < weights < 28.2 * GIB
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    # Keys and values of 40 layers, 10 heads of 128, 2 bytes: 204,800 a token.
    assert found["cache_bytes_per_row"] == 204_800 * 5120
    working = 2 * 4096 * (4 * 5120 + 2 * 17_920 / 2)
    room = 0.9 * 31.25 * GIB - weights / 2
    assert found["rows_per_device"] == room // (204_800 * 5120 + working)
    assert found["batch_rows"] == 4 * found["rows_per_device"]


def test_times():
    chosen = generation.plan(CFG, WHERE, prompt=4096, new_tokens=1024)
    found = generation.times(CFG, WHERE, chosen)
    rows = chosen["rows_per_device"]
    read = (chosen["weights_bytes_per_chip"] + rows * 204_800 * 5120 / 2) / 1600e9
    decoder = 40 * (5120 * (5120 * 2 + 2 * 1280) + 3 * 5120 * 17_920) + 100_352 * 5120
    multiplied = rows * 2 * decoder / 2 / (918e12 * 0.7668)
    assert found["modelled_decode_step_seconds"] == pytest.approx(read + multiplied, rel=1e-4)
    step = found["modelled_decode_step_seconds"]
    assert found["modelled_decode_tokens_per_second"] == pytest.approx(chosen["batch_rows"] / step)
    # Prefill multiplies each token of the prompt with the decoder's weights, and patches with the tower's too.
    tokens = rows * 4096 * 2 * (decoder - 100_352 * 5120) / 2 / (918e12 * 0.7668)
    assert tokens < found["modelled_prefill_seconds"] < 1.3 * tokens


def test_times_gathered_weights():
    one = generation.plan(CFG, WHERE, prompt=4096, new_tokens=1024)
    four = one | {
        "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
        "weights_bytes_per_chip": one["weights_bytes_per_chip"] / 4,
    }
    more = [generation.times(CFG, WHERE, chosen)["modelled_decode_step_seconds"] for chosen in (one, four)]
    assert more[1] - more[0] == pytest.approx(
        0.75 * one["weights_bytes_per_chip"] / 400e9
    )  # received: half of 800 GB/s


def test_confirm_shrinks_batch():
    tried = []

    def attempt(planned):
        tried.append((planned["rows_per_device"], planned["batch_rows"]))
        fits = planned["rows_per_device"] <= 6
        return {"fits": fits, "compile_seconds": 1.0, "peak_bytes": (5 if fits else 50) * GIB}

    chosen = generation.plan(CFG, WHERE, 4096, 1024) | {"rows_per_device": 12, "batch_rows": 48}
    found = generation.confirm(chosen, WHERE, attempt)
    assert tried == [(12, 48), (9, 36), (6, 24)] and found["fits"] and found["batch_rows"] == 24
    found |= generation.times(CFG, WHERE, found)
    assert "batch             24 prompts (6 a device); more may fit" in generation.text(found)
    large = generation.confirm(
        chosen, WHERE, lambda planned: attempt(planned) | {"fits": False, "peak_bytes": 50 * GIB}
    )
    assert large["rows_per_device"] == 1 and "DOES NOT FIT: peak 50.00 GiB" in generation.text(
        large | found["mesh"] | {"not_modelled": "x"}
    )


def test_plan_and_times_errors():
    with pytest.raises(ValueError, match="leave no room for one prompt of 4,096 tokens"):
        generation.plan(CFG, parse_topology("v5e:1x1"), 4096, 1024)
    where = parse_topology("v4:2x2x1")
    with pytest.raises(ValueError, match="no published runs"):
        generation.times(CFG, where, generation.plan(CFG, where, 1024, 64))
    odd = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, decoder=DecoderConfig(num_kv_heads=5)))
    assert generation.plan(odd, WHERE, 1024, 64)["mesh"]["tensor"] == 1
