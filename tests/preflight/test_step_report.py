"""Reports of made-up facts of a compiled step, with figures computed by hand."""

import dataclasses
import json

import pytest

from phivision_jax.checkpoint import loading
from phivision_jax.cli import preflight as cli
from phivision_jax.cli.load_config import load_config
from phivision_jax.config import ModelConfig
from phivision_jax.hardware.topology import GIB, parse_topology
from phivision_jax.preflight import compiling, step_report
from phivision_jax.preflight.memory import Buffer
from phivision_jax.preflight.model import layout_search, modelled_step
from phivision_jax.training.device_layout import resolve_for
from phivision_jax.training.run_config import OptimConfig
from tests.support import preflight_tables
from tests.support.paths import ROOT

WHERE = parse_topology("v5p:4x4x8")
CFG = resolve_for(load_config("configs/phi4_rv_15b.py:stage2"), WHERE.chip.device_kind, WHERE.devices)


def collective(kind="all-gather", axes=("fsdp",), size=100, times=2, wire=180.0, overlapped=True):
    return {
        "kind": kind,
        "name": "x",
        "result_bytes": size,
        "times": times,
        "wire_bytes": wire,
        "axes": list(axes),
        "overlapped": overlapped,
    }


def facts(**changes):
    base = {
        "mesh": dataclasses.asdict(CFG.mesh),
        "memory": {"parameters": 2 * GIB, "optimizer": 4 * GIB, "batch": GIB},
        "checkpoint_bytes": 170 * GIB,
        "fits": True,
        "compile_seconds": 12.0,
        "peak_bytes": 50 * GIB,
        "host_bytes": 0,
        "buffers": [Buffer(3 * GIB, "fusion.1 bf16[8192,17920] decoder/mlp/dot_general, backward")],
        "matmul_flops": modelled_step.executed(CFG, "v5p", modelled_step.Mix.of_recipe(CFG)).matmul_flops,
        "collectives": [collective(), collective(overlapped=False, size=300), collective("send", ("slice",), wire=7.0)],
    }
    return base | changes


def test_summary_fits():
    found = step_report.summary(CFG, WHERE, facts(), False)
    assert found["fits"] and found["peak_bytes_per_chip"] == 50 * GIB
    assert found["hbm_bytes_per_chip"] == WHERE.chip.hbm_bytes
    assert found["memory_bytes_per_chip"]["activations"] == 43 * GIB
    gathers, sends = found["collectives"]
    assert (gathers["times"], gathers["wire_bytes"], gathers["waited_wire_bytes"]) == (4, 360.0, 180.0)
    assert (gathers["result_bytes"], gathers["largest_result_bytes"]) == (800, 300) and sends["axes"] == ["slice"]
    assert found["matmul_flops_compiled"] == pytest.approx(found["matmul_flops_implied"])
    assert 0 < found["modelled_mfu"] < 1
    json.dumps(found)
    text = step_report.text(found)
    assert "nothing is overlapped" not in text
    assert "fits: peak 50.00 GiB" in text and "48% free" in text and "modelled, not measured" in text
    assert "    3.00 GiB  fusion.1 bf16[8192,17920] decoder/mlp/dot_general, backward\n" in text


def test_summary_does_not_fit(tmp_path):
    found = step_report.summary(CFG, WHERE, facts(fits=False, peak_bytes=100 * GIB), True)
    assert not found["fits"] and "modelled_mfu" not in found
    assert "4.26 GiB too much" in step_report.text(found)
    step_report.plot(found, tmp_path / "x.png")
    unknown = step_report.summary(CFG, WHERE, facts(fits=False, peak_bytes=None), True)
    assert "does not report by how much" in step_report.text(unknown)


def test_summary_compares_offloaded_bytes_with_the_host():
    limit = WHERE.chip.host_bytes
    found = step_report.summary(CFG, WHERE, facts(host_bytes=limit - 1), False)
    assert found["fits"] and "on the host   104.31 GiB of 104.31 GiB" in step_report.text(found)
    found = step_report.summary(CFG, WHERE, facts(host_bytes=limit), False)
    assert not found["fits"] and "DOES NOT FIT: offloads more than" in step_report.text(found)


def test_text_says_that_nothing_is_overlapped():
    waiting = facts(collectives=[collective(overlapped=False), collective("all-reduce", overlapped=False)])
    text = step_report.text(step_report.summary(CFG, WHERE, waiting, True))
    assert "\n  nothing is overlapped at low effort: the chips wait for all of it\n" in text


def test_summary_modelled_figures():
    found = step_report.summary(CFG, WHERE, facts(), False)
    seconds, tokens = found["modelled_step_seconds"], found["tokens_per_step"]
    assert tokens == pytest.approx(768 * 8192 * 0.99, rel=1e-4)
    assert found["modelled_tokens_per_second"] == pytest.approx(tokens / seconds)
    assert found["modelled_mfu"] == pytest.approx(found["flops_per_step"] / (seconds * 128 * 459e12))
    assert found["modelled_chip_hours"] == pytest.approx(188.5e9 / (tokens / seconds) * 128 / 3600)
    assert "188.5B tokens" in step_report.text(found)
    short = step_report.summary(dataclasses.replace(CFG, optim=OptimConfig(steps=10)), WHERE, facts(), False)
    assert (short["tokens"], short["modelled_chip_hours"]) == (10 * tokens, pytest.approx(10 * seconds * 128 / 3600))
    images = tokens / 3000  # one each
    assert found["modelled_images_per_second_per_host"] == pytest.approx(images / seconds / 32, rel=1e-3)


def test_speed_exposed_communication():
    def seconds(*found):
        return modelled_step.speed(CFG, WHERE, modelled_step.Mix.of_recipe(CFG), facts(collectives=list(found)))[
            "modelled_step_seconds"
        ]

    alone = seconds()
    assert seconds(collective(wire=6e11)) == pytest.approx(alone)
    assert seconds(collective(wire=6e11, overlapped=False)) == pytest.approx(alone + 1.0)  # 600 GB/s received
    assert seconds(collective("send", wire=6.25e9, overlapped=False)) == pytest.approx(alone + 1.0)  # DCN


@pytest.mark.parametrize("topology", ["v4:4x4x8", "tpu7x:4x4x8"])
def test_summary_not_modelled(topology):
    where = parse_topology(topology)
    found = step_report.summary(CFG, where, facts(), False)
    assert found["modelled_mfu"] is None and "no published runs" in step_report.text(found)


def test_search_takes_fastest_that_fits():
    tried, log = [], []

    def attempt(cfg, low_effort):
        """ "full" fits, "attention" at low effort only, the others not at all."""
        tried.append((cfg.remat, low_effort))
        return {"fits": cfg.remat == "full" or (cfg.remat == "attention" and low_effort), "free_share": 0.2, "cfg": cfg}

    found = layout_search.search(CFG, WHERE, attempt, log.append, 0.1)
    assert found is not None and found["cfg"].remat == "full" and tried[-1] == ("full", False)
    assert len(log) == len(tried) and tried[0] == ("none", True) and ("attention", False) in tried
    # A policy whose least demanding layout is too large is tried once; the layout that sends least wins.
    assert tried.count(("none", True)) == tried.count(("dots", True)) == 1
    assert found["cfg"].microbatches < 6
    assert layout_search.search(CFG, WHERE, lambda cfg, low: {"fits": False}, log.append, 0.1) is None


def test_search_survives_compiler_failure():
    def attempt(cfg, low_effort):
        if cfg.remat != "full":
            raise ValueError("the compiler was killed by SIGABRT")
        return {"fits": True, "free_share": 0.2, "cfg": cfg}

    log = []
    found = layout_search.search(CFG, WHERE, attempt, log.append, 0.1)
    assert found is not None and found["cfg"].remat == "full"
    assert log[0].endswith("does not compile at low effort: the compiler was killed by SIGABRT")


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    monkeypatch.setattr(compiling, "check_machine", lambda: None)
    monkeypatch.setattr(cli, "version", lambda package: f"of {package}")


def test_preflight_records_what_was_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "run_worker", lambda *arguments: facts())
    out = tmp_path / "new" / "out.json"
    cli.preflight("configs/phi4_rv_15b.py:stage2", "v5p:4x4x8", json=out, set=("data.stage=mine", "remat=full"))
    found = json.loads(out.read_text())
    assert found["config"] == "configs/phi4_rv_15b.py:stage2" and found["set"] == ["data.stage=mine", "remat=full"]
    assert found["stage"] == "mine" and found["remat"] == "full" and found["tokens"] == 1e9
    assert found["versions"] == {name: f"of {name}" for name in ("phivision_jax", "jax", "libtpu")}
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_search_keeps_what_was_tried_when_interrupted(monkeypatch, tmp_path, capsys):
    def run_worker(title, facts_of, cfg, where, low_effort):
        if not low_effort:
            raise KeyboardInterrupt
        if cfg.remat == "none":
            raise ValueError("the compiler failed")
        return facts(peak_bytes=80 * GIB)

    monkeypatch.setattr(compiling, "run_worker", run_worker)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        cli.preflight("configs/phi4_rv_15b.py:stage2", "v5p:4x4x8", search=True, json=out)
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["fits"] and found["remat"] == "dots" and found["effort"] == "low" and found["set"] == []
    assert found["tried"][0].endswith("remat none, 6 microbatches: does not compile at low effort: the compiler failed")
    assert "1 of at most 144: fsdp 128, remat none" in printed and "2 of at most 144: fsdp 128, remat dots" in printed
    assert "best so far: --config.mesh.fsdp=32" in printed


def test_preflight_takes_the_model_of_init_from(monkeypatch, capsys):
    def run_worker(title, facts_of, cfg, *arguments):
        seen.append(cfg.model)
        return facts()

    seen = []
    monkeypatch.setattr(compiling, "run_worker", run_worker)
    tiny = ROOT / "tests" / "golden" / "tiny"
    cli.preflight("configs/phi4_rv_15b.py:stage2", "v5p:4x4x8", set=(f"init_from={tiny}",))
    cli.preflight("configs/phi4_rv_15b.py:stage2", "v5p:4x4x8")
    assert [model.decoder for model in seen] == [loading.config_of(tiny).decoder, ModelConfig().decoder]
    assert seen[0].decoder != seen[1].decoder and "fits" in capsys.readouterr().out


def test_page_has_tables_of_results():
    page = preflight_tables.PAGE.read_text()
    assert preflight_tables.update_tables(page) == page
