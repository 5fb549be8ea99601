"""Rules that score a prediction against a record: ``rule(prediction, record) -> Score``, as pure functions."""

from phivision_jax.evaluation.scoring.exact import exact_match
from phivision_jax.evaluation.scoring.score import Score

__all__ = ["Score", "exact_match"]
