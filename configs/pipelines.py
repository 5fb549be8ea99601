"""Four ways to train a multimodal model that reasons from a text model. The report compares them and chooses the last.

    python train.py --config=configs/pipelines.py:mixed/stage1 --run=runs/mixed-1 --config.init_from=start/reasoning
    python train.py --config=configs/pipelines.py:mixed/stage2 --run=runs/mixed-2 --config.init_from=runs/mixed-1

    pipeline         base model         training after stage1, which aligns the projector
    at_once          Phi-4              direct answers and reasoning together, 20 % of it reasoning
    then_reasoning   Phi-4              direct answers only, then reasoning only
    reasoning_only   Phi-4-reasoning    reasoning only
    mixed            Phi-4-reasoning    20 % reasoning, 80 % direct answers: the recipe, and chosen by the report

All pipelines are the recipe's stages 1 and 2 (``configs/phi4_rv_15b.py``) and differ only in the base model and the
stage of the mixture, so differences between their results are due to these. Stage 3 could follow any of them and is
left out. A base model is made with

    python -m convert to-jax start/reasoning --decoder PHI4_REASONING_DIR --vision SIGLIP2_DIR

The mixture is a file like ``configs/mixtures/recipe.toml``; docs/recipe.md separates published facts from choices.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

# Stage of this file → stage of the mixture.
PIPELINES = {
    "at_once": {"stage1": "stage1", "stage2": "stage2"},
    "then_reasoning": {"stage1": "stage1", "direct": "stage2_direct", "reasoning": "stage2_reasoning"},
    "reasoning_only": {"stage1": "stage1", "stage2": "stage2_reasoning"},
    "mixed": {"stage1": "stage1", "stage2": "stage2"},
}


def get_config(which: str = "mixed/stage2") -> ConfigDict:
    pipeline, _, stage = which.partition("/")
    if stage not in PIPELINES.get(pipeline, {}):
        known = ", ".join(f"{name}/{stage}" for name, stages in PIPELINES.items() for stage in stages)
        raise ValueError(f"configs/pipelines.py has {known}, not {which!r}")
    recipe = runpy.run_path(str(Path(__file__).with_name("phi4_rv_15b.py")))["get_config"]
    c = recipe("stage1" if stage == "stage1" else "stage2")
    c.data.update(path="configs/mixtures/recipe.toml", stage=PIPELINES[pipeline][stage])
    if (pipeline, stage) == ("then_reasoning", "reasoning"):
        # This half has a fifth of the examples and should not undo the first: half the rates, a fifth of the warm-up.
        c.optim.update(learning_rate=1e-5, warmup_tokens=566_000_000)
    return c
