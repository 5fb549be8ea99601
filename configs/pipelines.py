"""Four ways from a text model to a multimodal one that reasons: what the report compares before it chooses the last.

    python train.py --config=configs/pipelines.py:mixed/stage1 --run=runs/mixed-1 --config.init_from=start/reasoning
    python train.py --config=configs/pipelines.py:mixed/stage2 --run=runs/mixed-2 --config.init_from=runs/mixed-1

    pipeline         base               after stage1, which aligns the projector
    at_once          Phi-4              everything together, 20 % of it reasoning
    then_reasoning   Phi-4              direct answers alone, then reasoning alone
    reasoning_only   Phi-4-reasoning    reasoning alone
    mixed            Phi-4-reasoning    20 % reasoning, 80 % direct answers: the recipe, and chosen by the report

All are the recipe's stages 1 and 2 (``configs/phi4_rv_15b.py``) and differ by base and by stage of the mixture alone:
what differs in the result is owed to these. Stage 3 would follow any of them and is left out. A base is made with

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
        # A fifth of the examples, and what came before should not be undone: half the rates, a fifth of the warm-up.
        c.optim.update(learning_rate=1e-5, warmup_tokens=566_000_000)
    return c
