"""Score a checkpoint on a dataset: generate every answer, compare it with the reference, write a report.

python eval.py --checkpoint=runs/tiny --data=data/easy_vqa/test --out=runs/tiny/eval
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from absl import app, flags

import phivision_jax
from phivision_jax.data.store.dataset import Dataset
from phivision_jax.evaluation import accuracy_report
from phivision_jax.evaluation.runner import Evaluator
from phivision_jax.io import progress, storage
from phivision_jax.io.html import print_sections
from phivision_jax.io.storage import Location

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run, a checkpoint of ours, a Hugging Face directory; or gs://…"
)
_DATA = flags.DEFINE_string("data", None, "Dataset directory (phivision data import).")
_OUT = flags.DEFINE_string("out", None, "Directory (gs:// too) for report.json and answers.jsonl; default: only print.")
_MODE = flags.DEFINE_enum("mode", "auto", ["auto", "think", "nothink"], "Whether answers think.")
_EXAMPLES = flags.DEFINE_integer("examples", 0, "Score an even sample of this many; 0 for all.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 64, "Questions at a time.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 8, "Where an answer ends at the latest.", lower_bound=1)


def evaluate(checkpoint: str | Location, data: str | Path, **settings) -> accuracy_report.Report:
    """Load, answer, score. ``settings`` are ``Evaluator``'s."""
    model, processor = phivision_jax.load(checkpoint)
    evaluator = Evaluator(Dataset.open(data), processor, **settings)
    with progress.bar("evaluate", len(evaluator.records)) as advance:
        result = evaluator(model, advance)
    return accuracy_report.Report(str(checkpoint), str(data), evaluator.mode, result)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every file it reads
    try:
        if not _CHECKPOINT.value or not _DATA.value:
            raise ValueError("both --checkpoint and --data are needed")
        out = storage.location(_OUT.value) if _OUT.value else None
        if out:
            storage.check(out)  # before the work whose fruit would have no place
        made = evaluate(
            _CHECKPOINT.value,
            _DATA.value,
            rows=_BATCH.value,
            max_new_tokens=_NEW_TOKENS.value,
            num_examples=_EXAMPLES.value or None,
            mode=_MODE.value,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    print_sections([made.section()])
    if out:
        accuracy_report.write_report(made, out)
        print(f"written: {out}/report.json, answers.jsonl")


if __name__ == "__main__":
    app.run(main)
