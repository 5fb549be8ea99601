"""Numbers of a server in Prometheus' text format."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from phivision_jax.inference.requests import Reply

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)  # seconds


class Metrics:
    """Numbers that ``/metrics`` shows beside those of the engine.

    Attributes:
      in_flight: samples of chat requests that are being read, wait, or are being generated.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._values: Counter[str] = Counter()  # by names with labels, as they are printed

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter, named with its labels."""
        self._values[f"phivision_{name}"] += amount  # type: ignore[assignment]

    def time(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        for bound in _BUCKETS:
            self.count(f'{name}_seconds_bucket{{le="{bound}"}}', seconds <= bound)
        for sample, amount in (('bucket{le="+Inf"}', 1), ("sum", seconds), ("count", 1)):
            self.count(f"{name}_seconds_{sample}", amount)

    def observe(self, reply: Reply) -> None:
        """Count a sample that has ended; the samples of a request have one prompt."""
        for kind in ("thought", "answer") if reply.index else ("thought", "answer", "prompt", "image"):
            self.count(f'tokens_total{{kind="{kind}"}}', getattr(reply, f"{kind}_tokens"))
        self.time("queue", reply.timings.queue)
        if reply.ids:
            self.time("first_token", reply.timings.queue + reply.timings.prefill)
            self.time("per_token", reply.timings.per_token(len(reply.ids)))

    def text(self, engine: Mapping[str, Any]) -> str:
        """The page of metrics; of the engine's numbers by name, other values are left out."""
        numbers = {f"phivision_engine_{name}": v for name, v in engine.items() if type(v) in (int, float)}
        numbers |= {"phivision_samples_in_flight": self.in_flight, **self._values}
        return "".join(
            f"{name} {value}\n" for name, value in sorted(numbers.items(), key=lambda item: item[0].partition("{")[0])
        )
