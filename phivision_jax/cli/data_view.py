"""``phivision data stats`` and ``phivision data show``: numbers and pictures of datasets and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset


def stats(
    datasets: Annotated[Positional[tuple[Path, ...]], arg(metavar="DATASET...")],
    /,
    checkpoint: Path | None = None,
    length: int = 8192,
    vision_rows: int = 1,
    num_patches: int = 7168,
    out: Path | None = None,
) -> None:
    """Print what datasets hold: sizes, lengths, modes, tasks, what was not imported, what will not fit a row.

    Args:
        datasets: Directories of imports; several get a column each and their sum.
        checkpoint: Whose patch settings count; default: the released ones.
        length: T, text columns of a row; image columns count.
        vision_rows: R, vision rows of a row.
        num_patches: P, patches of a vision row.
        out: Also write stats.png, stats.html (one file, figure and tables) and stats.json into this directory.
    """
    from phivision_jax.cli.data import processor_for
    from phivision_jax.data.plan.record_sizes import check_processor
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.data.view.statistics import compute
    from phivision_jax.data.view.statistics_tables import print_stats
    from phivision_jax.rows import row_shape

    if not datasets:
        raise ValueError("name at least one dataset directory")
    opened = [Dataset.open(path) for path in datasets]
    processor = processor_for(checkpoint)
    if checkpoint is not None:
        for dataset in opened:
            check_processor(dataset, processor)
    counted = compute(opened, processor.config, row_shape(processor.config, length, vision_rows, num_patches))
    print_stats(counted)
    if out is not None:
        from phivision_jax.data.view.statistics_page import plot_png, write_html

        out.mkdir(parents=True, exist_ok=True)
        (out / "stats.json").write_text(json.dumps(counted.to_json(), indent=1) + "\n", encoding="utf-8")
        plot_png(counted, out / "stats.png")
        write_html(counted, out / "stats.html")
        print(f"written: {out / 'stats.html'}, stats.png, stats.json")


def show(
    datasets: Annotated[Positional[tuple[Path, ...]], arg(metavar="DATASET...")],
    /,
    out: Path,
    records: tuple[int, ...] = (),
    ids: tuple[str, ...] = (),
    sample: int = 6,
    seed: int = 0,
    plan: Path | None = None,
    rows: tuple[int, ...] = (0, 1, 2),
    checkpoint: Path | None = None,
) -> None:
    """Draw examples as the model gets them, what the loss sees in colour; or with --plan, whose columns a row holds.

    Args:
        datasets: Directory of an import; with --plan, all that the plan was made from, in its order.
        out: The PNG to write.
        records: Numbers of the records to draw.
        ids: Their ids instead.
        sample: So many at random, where neither is given.
        seed: Of --sample.
        plan: Directory of a plan: draw rows of it.
        rows: Which rows of the plan.
        checkpoint: Whose tokenizer, template and patch settings the dataset was imported with; default: the project's
            small ones.
    """
    from phivision_jax.cli.data import processor_for
    from phivision_jax.data.plan.record_sizes import check_processor
    from phivision_jax.data.shuffle import permutation
    from phivision_jax.data.store.dataset import Dataset

    if not datasets:
        raise ValueError("name at least one dataset directory")
    opened = [Dataset.open(path) for path in datasets]
    processor = processor_for(checkpoint)
    for dataset in opened:
        check_processor(dataset, processor)
    if plan is not None:
        from phivision_jax.data.plan.plan import Plan
        from phivision_jax.data.view.show_rows import rows_sheet

        if records or ids:
            raise ValueError("--plan draws rows: choose them with --rows, or leave --plan out to draw records")
        made = Plan.load(plan)
        if made.inputs["sources"] != [dataset.hash for dataset in opened]:
            raise ValueError(f"{plan} was made from {', '.join(made.inputs['names'])}: name these, in this order")
        wrong = [row for row in rows if not 0 <= row < made.num_rows]
        if wrong:
            raise ValueError(f"--rows {wrong[0]}: the plan has rows 0 to {made.num_rows - 1:,}")
        rows_sheet(made, opened, processor, rows, out)
    else:
        from phivision_jax.data.view.show_records import examples_sheet

        if len(opened) > 1:
            raise ValueError("records are drawn from one dataset at a time; several go with --plan")
        dataset = opened[0]
        if records and ids:
            raise ValueError("give --records or --ids, not both")
        if not records and not ids and sample < 1:
            raise ValueError(f"--sample must be 1 or more, not {sample}")
        wrong = [i for i in records if not 0 <= i < len(dataset)]
        if wrong:
            raise ValueError(f"--records {wrong[0]}: {dataset.directory} has records 0 to {len(dataset) - 1:,}")
        chosen = records or _numbers_of(dataset, ids) or sorted(permutation(len(dataset), seed)[:sample].tolist())
        examples_sheet(dataset, processor, chosen, out)
    print(f"drawn: {out}")


def _numbers_of(dataset: Dataset, ids: tuple[str, ...]) -> list[int]:
    """Where the records with these ids are; reads the dataset until all are found."""
    from phivision_jax.io.progress import bar

    found: dict[str, int] = {}
    if ids:
        with bar("looking for ids", len(dataset)) as advance:
            for i in range(len(dataset)):
                own = dataset[i].id
                if own in ids:
                    found.setdefault(own, i)
                advance(1)
                if len(found) == len(set(ids)):
                    break
    if missing := [own for own in ids if own not in found]:
        raise ValueError(f"--ids {missing[0]}: {dataset.directory} has no such record")
    return [found[own] for own in ids]
