"""Make the cases of ``cases/``: what the public scorers give for generated replies.

    python tests/evaluation/scoring/make_cases.py --out=DIRECTORY --lmms-eval=… --vlmevalkit=… --mmmu=… --we-math=… \
        --mathvista=… [--count=250] [--seed=0]

The five directories are clones of the projects. Needs what ``public_scorers`` needs, and no JAX.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
from pathlib import Path
from typing import Any

from generated import MAKERS, cases
from public_scorers import Public


def tables(rng: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Chains of We-Math: 360 with two steps, 165 with three, of one difficulty."""
    right = rng.uniform(0.2, 0.9)
    return tuple(
        [[int(rng.random() < right) for _ in range(length)] for _ in range(n)] for n, length in ((360, 3), (165, 4))
    )


def figures(rng: random.Random) -> list[dict[str, Any]]:
    """Rows of HallusionBench, with gaps."""
    right = rng.uniform(0.5, 0.99)
    return [
        {"category": category[:2], "l2_category": category, "set_id": s, "figure_id": f, "question_id": q, "correct": c}
        for category, s, f, q in itertools.product(("VD_ocr", "VS_ocr", "VD_math"), range(3), range(2), range(3))
        if rng.random() < 0.8
        for c in [int(rng.random() < right)]
    ]


def late(*_: Any) -> None:
    raise TimeoutError


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    projects = ("lmms_eval", "vlmevalkit", "mmmu", "we_math", "mathvista")
    for name in ("out", *projects):
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", nargs="*", default=[*MAKERS, "hallusion_groups", "wemath_four_dim"])
    args = parser.parse_args()
    public = Public(*(getattr(args, name) for name in projects))
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, late)  # some public scorers evaluate replies as Python
    for rule in args.rules:
        rows: list[dict[str, Any]] = []
        rng = random.Random(f"{rule} {args.seed}")
        if rule == "wemath_four_dim":
            for two_step, three_step in (tables(rng) for _ in range(min(args.count, 12))):
                value = public.wemath_four_dim(two_step, three_step)
                rows.append({"two_step": two_step, "three_step": three_step, "public": value})
        elif rule == "hallusion_groups":
            for records in (figures(rng) for _ in range(min(args.count, 8))):
                rows.append({"records": records, "public": public.hallusion_groups(records)})
        else:
            seen = set()
            for prediction, record in itertools.islice(cases(rule, args.seed), 8 * args.count):
                key = json.dumps([prediction, record], sort_keys=True)
                if key in seen:
                    continue
                seen.add(key)
                signal.alarm(5)
                try:
                    value = getattr(public, rule)(*([prediction] if rule == "think_strip" else [prediction, record]))
                except TimeoutError:
                    continue
                finally:
                    signal.alarm(0)
                rows.append({"prediction": prediction, "record": record, "public": value})
                if len(rows) == args.count:
                    break
        write(args.out / f"{rule}.jsonl", rows)
        print(rule, len(rows), flush=True)


if __name__ == "__main__":
    main()
