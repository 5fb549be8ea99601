"""Functions that the tasks name, those of lmms-eval's own tasks; they run in its environment."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.chartqa.utils import chartqa_doc_to_text, chartqa_doc_to_visual, chartqa_process_results
from lmms_eval.tasks.mmstar.utils import mmstar_doc_to_text, mmstar_doc_to_visual, mmstar_process_results

__all__ = ["chartqa_doc_to_text", "chartqa_doc_to_visual", "chartqa_process_results"]
__all__ += ["mmstar_doc_to_text", "mmstar_doc_to_visual"]


def mmstar_average(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The score of an item, without the categories."""
    return {"average": mmstar_process_results(doc, results)["average"]["score"]}
