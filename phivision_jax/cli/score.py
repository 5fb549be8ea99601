"""``phivision score``: score predictions that another program has made."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from phivision_jax.cli.eval import report
from phivision_jax.cli.eval_model import Judging


def score(
    predictions: Annotated[Positional[Path], arg(metavar="PREDICTIONS")],
    /,
    benchmark: Annotated[str, arg(metavar="NAME")],
    benchmark_data: Annotated[tuple[str, ...], arg(metavar="DIR...")] = (),
    out: Annotated[str, arg(metavar="DIR")] = "",
    model: str = "",
    cache: Annotated[str, arg(metavar="DIR")] = "",
    judging: OmitArgPrefixes[Judging] = Judging(),  # noqa: B008
) -> None:
    """Score predictions of any model by the rules of phivision eval, and write the same reports.

    Args:
        predictions: JSON lines with item and prediction, samples of lmms-eval (.jsonl), or a table of VLMEvalKit (.tsv,
            .csv, .json).
        benchmark: Name of a benchmark, or path of a Python file that defines one.
        benchmark_data: Directory or file of its data; default: downloaded, with [hub].
        out: Directory for results, images and reports, which replace earlier ones; default: only print the scores.
        model: Name of the model in reports; default: name of the file.
        cache: Directory of the judge's replies; default: ~/.cache/phivision_jax/replies.
        judging: Settings of a judge.
    """
    from phivision_jax.evaluation.choice import choose
    from phivision_jax.evaluation.output import ABOUT, Output
    from phivision_jax.evaluation.predictions import read_predictions
    from phivision_jax.evaluation.reply_cache import ReplyCache, default_directory
    from phivision_jax.evaluation.run import Runner
    from phivision_jax.evaluation.task import Sampling, survey

    judging.check()
    ((rules, path),) = choose([benchmark], benchmark_data)
    items, model = rules.items(path), model or predictions.stem
    found = read_predictions(predictions, items)
    task = dataclasses.replace(survey(rules, items, Sampling()), chosen=found.numbers)
    settings: dict[str, Any] = {
        "model": model,
        "benchmarks": {task.name: {"items": len(task.chosen), "fingerprint": task.fingerprint}},
        "modes": ["auto"],
        "sampling": dataclasses.asdict(Sampling()),
        "judge": judging.judge_model,
        "cost": False,
        "shards": 1,
        ABOUT: {"model": model, "predictions": str(predictions), "data": {task.name: path}},
    }
    with contextlib.ExitStack() as stack:
        directory = Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
        replies = stack.enter_context(contextlib.closing(ReplyCache(Path(cache) if cache else default_directory())))
        with Output(directory, settings, restart=True) as output:
            Runner(found, output.write, judge=judging.open(replies)).run([task])
        report(directory, {task.name: rules}, model)
        if missing := len(items) - len(found.numbers):
            print(f"{missing:,} of {len(items):,} items have no prediction, and are left out")
