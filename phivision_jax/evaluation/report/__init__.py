"""The report of an evaluation: a page with its data beside it, a Markdown table, and all numbers as JSON."""

from phivision_jax.evaluation.report.write import write_report

__all__ = ["write_report"]
