"""The rule that keeps the best checkpoint of a run by a metric: "eval/accuracy" highest, "-validation/loss" lowest.

The metrics of a step are stored in its metadata, so a run may change the metric between two starts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import PreservationPolicy

_VALIDATION, _EVAL = "validation/", "eval/"


class KeepBest(PreservationPolicy):
    """Keeps the step with the best value, of equal ones the newest; steps that lack the metric do not count.

    Args:
      keep_best: name of the metric, with a minus in front where less is better.
      log: receives one line when the metric is absent although others of its kind are measured.
    """

    def __init__(self, keep_best: str, log: Callable[[str], None]) -> None:
        self._name, self._sign = keep_best.removeprefix("-"), -1 if keep_best.startswith("-") else 1
        self._log = log
        self._scores: dict[int, float] = {}
        self._settled = False
        """The metric was found once, or reported missing."""

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rate a step by its metrics."""
        self._settled |= self._name in metrics
        value = metrics.get(self._name, math.nan)
        if math.isfinite(value):
            self._scores[step] = self._sign * value

    def report_missing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log, once, that the metric is not among a step's.

        Most steps are not validated, so it is missing only where others of its kind are present.
        """
        kind = next((kind for kind in (_VALIDATION, _EVAL) if self._name.startswith(kind)), "")
        present = ", ".join(sorted(name for name in metrics if name.startswith(kind)))
        if present and not self._settled:
            self._settled = True
            asked = f"keep_best asks for {self._name}, and its metrics are {present}"
            self._log(f"checkpoint {step} cannot be the best: {asked}")

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Keep the best step (Orbax's protocol: one answer per checkpoint, which has ``.step``)."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max((step for step in steps if step in self._scores), key=lambda s: (self._scores[s], s), default=None)
        return [step == best for step in steps]


def check_keep_best(keep_best: str, *, validates: bool, evaluates: bool) -> None:
    """Refuse a metric that is never measured.

    Args:
      validates: whether the run has validation data.
      evaluates: whether the run has evaluation data.

    Raises:
      ValueError: naming ``keep_best`` and the missing data.
    """
    validation = (_VALIDATION, validates, "data.validation_path is empty and data.validation_share is 0")
    for kind, measured, missing in (validation, (_EVAL, evaluates, "data.eval_path and eval_benchmarks are empty")):
        if keep_best.removeprefix("-").startswith(kind) and not measured:
            raise ValueError(f"keep_best={keep_best} is never measured: {missing}; set one of them, or clear keep_best")
