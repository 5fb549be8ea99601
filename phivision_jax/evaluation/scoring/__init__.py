"""Rules that score a prediction against a record: ``rule(prediction, record) -> Score``, as pure functions."""

from phivision_jax.evaluation.scoring.chartqa import chartqa_relaxed
from phivision_jax.evaluation.scoring.choices import mcq
from phivision_jax.evaluation.scoring.exact import exact_match
from phivision_jax.evaluation.scoring.hallusion import hallusion_groups, hallusion_yesno
from phivision_jax.evaluation.scoring.lmms_choices import ai2d_lmms, mmstar_lmms, vstar_lmms
from phivision_jax.evaluation.scoring.mathvision import mathvision_equal
from phivision_jax.evaluation.scoring.mathvista import mathvista_normalize, mathvista_prefetch
from phivision_jax.evaluation.scoring.mmmu import mmmu_mc, mmmu_open
from phivision_jax.evaluation.scoring.ocrbench import ocrbench
from phivision_jax.evaluation.scoring.score import UNPARSED, Score
from phivision_jax.evaluation.scoring.screenspot import screenspot_bbox, screenspot_pixel_click, screenspot_point
from phivision_jax.evaluation.scoring.thoughts import think_strip
from phivision_jax.evaluation.scoring.wemath import wemath_four_dim, wemath_letter
from phivision_jax.evaluation.scoring.zerobench import zerobench_braces

__all__ = [
    "UNPARSED",
    "Score",
    "ai2d_lmms",
    "chartqa_relaxed",
    "exact_match",
    "hallusion_groups",
    "hallusion_yesno",
    "mathvision_equal",
    "mathvista_normalize",
    "mathvista_prefetch",
    "mcq",
    "mmmu_mc",
    "mmmu_open",
    "mmstar_lmms",
    "ocrbench",
    "screenspot_bbox",
    "screenspot_pixel_click",
    "screenspot_point",
    "think_strip",
    "vstar_lmms",
    "wemath_four_dim",
    "wemath_letter",
    "zerobench_braces",
]
