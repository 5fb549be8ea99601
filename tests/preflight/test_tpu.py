"""The training step at full width, with two layers per tower, compiled by the TPU compiler for absent slices."""

import concurrent.futures
import importlib.util
import json

import pytest

from phivision_jax.cli.load_config import load_config
from phivision_jax.cli.preflight import preflight
from phivision_jax.hardware.topology import parse_topology
from phivision_jax.preflight import compiling, step_report
from phivision_jax.preflight.compiling import run_worker, train_facts
from phivision_jax.training import device_layout

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux on x86-64")

TABLE = 100_352 * 5120 * 4
"""Bytes of the vocabulary table in fp32, in which low effort gathers it."""
LAYER = 5120 * 17_920 * 2
"""Bytes of a layer's largest weight in bf16."""


TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x8")
TOO_LARGE = ("model.decoder.num_layers=16", "model.vision.num_layers=3", "microbatches=1", "remat=none")


@pytest.fixture(scope="module")
def compilations():
    """All at once, so that they keep all cores busy."""
    with concurrent.futures.ThreadPoolExecutor(len(TOPOLOGIES) + 1) as pool:
        changes = ("model.decoder.num_layers=2", "model.vision.num_layers=3")
        found = {topology: pool.submit(compiled, topology, changes) for topology in TOPOLOGIES}
        yield found | {"too large": pool.submit(compiled, "v5e:16x16", (*TOO_LARGE, "vision_remat=full"))}


def compiled(topology, changes):
    where = parse_topology(topology)
    cfg = load_config("configs/phi4_rv_15b.py:stage2", changes)
    cfg = device_layout.resolve_for(cfg, where.chip.device_kind, where.devices)
    facts = run_worker(topology, train_facts, cfg, where, True, shown=False)
    return step_report.summary(cfg, where, facts, True), facts, where


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_step_compiles_for_tpu(topology, compilations):
    found, facts, where = compilations[topology].result()
    assert found["fits"] and 0 < found["peak_bytes_per_chip"] < where.chip.hbm_bytes
    # Nothing larger than a layer's weight is gathered or summed, except the vocabulary's tables.
    large = [one for one in facts["collectives"] if one["result_bytes"] > LAYER]
    assert all(one["kind"] == "all-gather" and one["result_bytes"] <= TABLE for one in large)
    assert sum(one["times"] for one in large) <= 2
    assert not any(one["axes"] and "data" in one["axes"] for one in facts["collectives"] if one["kind"] == "all-gather")
    # The program multiplies what the model, its padding and the remat policy imply, and nothing twice.
    assert found["matmul_flops_compiled"] / found["matmul_flops_implied"] == pytest.approx(1, abs=0.03)
    assert found["modelled_mfu"] > 0 and "modelled" in step_report.text(found)
    # The largest buffers have the scopes of the model, or the path of a parameter or moment.
    named = [one["what"].split(" ", 2)[2:] for one in found["largest_buffers"]]
    assert sum(map(bool, named)) >= 10 and any("decoder/mlp/" in what for [what] in filter(None, named)), named


def test_preflight_exits_with_3_when_too_large(capsys, tmp_path, compilations, monkeypatch):
    _, facts, _ = compilations["too large"].result()
    monkeypatch.setattr(compiling, "run_worker", lambda *arguments: facts)
    with pytest.raises(SystemExit) as exit_:
        preflight(
            "configs/phi4_rv_15b.py:stage2", "v5e:16x16", low_effort=True, json=tmp_path / "out.json", set=TOO_LARGE
        )
    assert exit_.value.code == 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["fits"] is False and found["peak_bytes_per_chip"] > found["hbm_bytes_per_chip"]
    assert "DOES NOT FIT" in capsys.readouterr().out
