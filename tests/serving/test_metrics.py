"""Prometheus' text format, by hand."""

from __future__ import annotations

from phivision_jax.inference.requests import Reply, Timings
from phivision_jax.serving.metrics import Metrics


def values(metrics: Metrics) -> dict[str, float]:
    lines = metrics.text({"slots": 2, "kind": "fake", "ready": True}).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_histogram_is_cumulative():
    metrics = Metrics()
    for seconds in (0.03, 0.05, 700.0):
        metrics.time("queue", seconds)
    found = values(metrics)
    bucket = 'phivision_queue_seconds_bucket{{le="{}"}}'
    assert [found[bucket.format(bound)] for bound in ("0.025", "0.05", "600.0", "+Inf")] == [0, 2, 2, 3]
    assert found["phivision_queue_seconds_count"] == 3 and found["phivision_queue_seconds_sum"] == 700.08
    assert found["phivision_engine_slots"] == 2 and not {"phivision_engine_kind", "phivision_engine_ready"} & set(found)


def test_samples_of_a_request_have_one_prompt():
    metrics = Metrics()
    for index in (1, 0):
        metrics.observe(
            Reply("", "", "think", "stop", (1, 2, 3), 10, 4, 2, 1, Timings(1.0, 2.0, 3.0), index=index),
        )
    found = values(metrics)
    counts = {
        kind: found[f'phivision_tokens_total{{kind="{kind}"}}'] for kind in ("prompt", "image", "thought", "answer")
    }
    assert counts == {"prompt": 10, "image": 4, "thought": 4, "answer": 2}
    sums = [found[f"phivision_{name}_seconds_sum"] for name in ("queue", "first_token", "per_token")]
    assert sums == [2.0, 6.0, 3.0]
