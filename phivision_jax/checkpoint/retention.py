"""Which checkpoint of a run is the best, as ``keep_best`` has it: "eval/accuracy" is to be high, "-loss" to be low.

A step's value is stored with it (``metrics/metrics``) under the metric's name. So a run may change its mind: what was
rated by another metric is then not rated, rather than compared with what is something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from phivision_jax.training.run_config import RunConfig

_VALIDATION, _EVAL = "validation/", "eval/"


class Best(PreservationPolicy):
    """Keeps the step with the best value, of equal ones the newest; steps that are not rated are nothing to it.

    Args:
      keep_best: the metric, with a minus in front where less is better.
      say: told once when the metric is not among those that it should be among.
    """

    def __init__(self, keep_best: str, say: Callable[[str], None]) -> None:
        self._name, self._lowest, self._say = keep_best.removeprefix("-"), keep_best.startswith("-"), say
        self._settled = False
        """Whether the metric has been there, or was said not to be."""

    def rating(self, step: int, metrics: Mapping[str, float]) -> dict[str, float] | None:
        """What is stored of a step's metrics: the one that it is rated by; None: it is not rated."""
        value = metrics.get(self._name)
        if value is None:
            self._miss(step, metrics)
            return None
        self._settled = True
        return {self._name: float(value)} if math.isfinite(value) else None

    def _miss(self, step: int, metrics: Mapping[str, float]) -> None:
        """Most steps are not validated: what is measured then can be missed only where others of its kind are there."""
        kind = next((kind for kind in (_VALIDATION, _EVAL) if self._name.startswith(kind)), "")
        there = sorted(name for name in metrics if name.startswith(kind))
        if there and not self._settled:
            self._settled = True
            self._say(
                f"checkpoint {step} cannot be the best: keep_best asks for {self._name}, and its metrics are "
                + ", ".join(there)
            )

    def score(self, stored: Mapping[str, Any]) -> float | None:
        """What is to be highest, of what ``rating`` gave; None: the step was rated by another metric.

        Raises:
          ValueError or TypeError: when ``rating`` never gave such a thing.
        """
        if self._name not in stored:
            return None
        return -float(stored[self._name]) if self._lowest else float(stored[self._name])

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question: of each step (which has ``.metrics``, as stored, or None) whether it is kept."""
        scores = [None if step.metrics is None else self.score(step.metrics) for step in checkpoints]
        rated = [(score, i) for i, score in enumerate(scores) if score is not None]
        return [bool(rated) and i == max(rated)[1] for i in range(len(checkpoints))]


def check(cfg: RunConfig) -> None:
    """Refuse to keep the best by what is never measured.

    Raises:
      ValueError: naming ``keep_best`` and the data that there would have to be.
    """
    name, data = cfg.keep_best.removeprefix("-"), cfg.data
    missing = ""
    if name.startswith(_VALIDATION) and not (data.validation_path or data.validation_share):
        missing = "data.validation_path is empty and data.validation_share 0"
    if name.startswith(_EVAL) and not data.eval_path:
        missing = "data.eval_path is empty"
    if missing:
        raise ValueError(f"keep_best={cfg.keep_best} asks for what is never measured: {missing}; set one, or clear it")
