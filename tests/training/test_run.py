"""Parts of a run that need no model: its metrics of a step."""

import numpy as np

from phivision_jax.training.run import loss_metrics


def test_step_without_a_target_token_has_no_loss_in_the_metrics():
    sums = {"group_loss": np.zeros(1, np.float32), "group_weight": np.zeros(1, np.float32)}
    host = {"loss": np.float32(0), "weight": np.float32(0), "correct": np.float32(0), "grad_norm": np.float32(0)}
    assert loss_metrics(host | sums, ["think/math"]) == {"weight": 0.0, "grad_norm": 0.0}
    sums = {"group_loss": np.float32([6]), "group_weight": np.float32([4])}
    row = loss_metrics(host | sums | {"loss": np.float32(1.5), "weight": np.float32(4)}, ["think/math"])
    assert (row["loss"], row["loss/think/math"], row["token_accuracy"]) == (1.5, 1.5, 0.0)
