"""``phivision data stats`` and ``phivision data show``: reports on datasets and plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor


def stats(
    datasets: Annotated[Positional[tuple[Path, ...]], arg(metavar="DATASET...")],
    /,
    checkpoint: Annotated[Path | None, arg(metavar="CHECKPOINT")] = None,
    length: int = 8192,
    vision_rows: int = 1,
    num_patches: int = 7168,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
) -> None:
    """Report sizes, lengths, modes and tasks of datasets, rejected items, and records that do not fit a row.

    Args:
        datasets: Dataset directories made by phivision data import.
            The tables have one column for each, and if there are several, one for all of them together.
        checkpoint: Checkpoint whose patch settings are used; default: those of the released model.
        length: T: tokens per row, text and images.
        vision_rows: R: vision rows per row.
        num_patches: P: patches per vision row.
        out: Also write stats.html (figure and tables in one file), stats.png and stats.json to this directory.
    """
    from phivision_jax.data.view import statistics, statistics_report
    from phivision_jax.io import html
    from phivision_jax.rows import row_shape

    opened, processor = _open(datasets, checkpoint, check=checkpoint is not None)
    shape = row_shape(processor.config, length, vision_rows, num_patches)
    computed = statistics.compute(opened, processor.config, shape)
    report = statistics_report.tables(computed)
    html.print_sections(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plots = statistics_report.figure(computed)
        title = "Statistics of " + ", ".join(map(str, datasets))
        page = html.page(title, [html.Section("Distributions", figures=[plots]), *report])
        (out / "stats.html").write_text(page, encoding="utf-8")
        (out / "stats.png").write_bytes(plots.png)
        (out / "stats.json").write_text(json.dumps(dataclasses.asdict(computed), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {out / 'stats.html'}, stats.png, stats.json")


def show(
    datasets: Annotated[Positional[tuple[Path, ...]], arg(metavar="DATASET...")],
    /,
    out: Annotated[Path, arg(metavar="FILE")],
    records: tuple[int, ...] = (),
    ids: tuple[str, ...] = (),
    sample: int = 6,
    seed: int = 0,
    plan: Annotated[Path | None, arg(metavar="DIR")] = None,
    rows: tuple[int, ...] = (),
    checkpoint: Annotated[Path | None, arg(metavar="CHECKPOINT")] = None,
    strategy: Annotated[str, arg(metavar="NAME[:CAP]")] = "",
) -> None:
    """Show records as the model receives them, and the tokens with a loss; or with --plan, how examples fill rows.

    Args:
        datasets: Dataset directory made by phivision data import; with --plan, all datasets of the plan, in its order.
        out: HTML file to write; it loads nothing from elsewhere.
        records: Numbers of the records to show.
        ids: Ids of the records to show.
        sample: Number of records to sample if neither --records nor --ids is given.
        seed: Seed for --sample.
        plan: Directory of a plan whose rows are shown, in place of records.
        rows: Numbers of the rows to show, with --plan; default: the first three.
        checkpoint: Checkpoint that the dataset was imported for; default: the small tokenizer of this project.
        strategy: Image strategy in place of the checkpoint's: naflex, multicrop, s2, multicrop_s2, dynamic_s2 or
            another registered layout, with the most tokens of an image after a colon. Shows tiles and numbers.
    """
    from phivision_jax.data.view import show as pages
    from phivision_jax.io import html

    if out.suffix != ".html":
        raise ValueError(f"--out {out}: show writes an HTML page; give a name that ends in .html")
    opened, processor = _open(datasets, checkpoint)
    if strategy:
        processor = processor.with_strategy(strategy)
    if plan is not None:
        from phivision_jax.data.plan.plan import Plan

        if records or ids:
            raise ValueError("--plan shows rows: choose them with --rows, or leave --plan out to show records")
        loaded = Plan.load(plan)
        _check_range("--rows", rows, loaded.num_rows, plan)
        title = f"Rows of {plan}"
        sections = [pages.row_section(loaded, opened, processor, row) for row in rows or range(min(3, loaded.num_rows))]
    else:
        from phivision_jax.data.shuffle import permutation

        if len(opened) > 1:
            raise ValueError("show takes the records of one dataset; several datasets need --plan")
        _check_range("--records", records, len(opened[0]), opened[0].directory)
        if sample < 1:
            raise ValueError(f"--sample must be 1 or more, not {sample}")
        sampled = sorted(permutation(len(opened[0]), seed)[:sample].tolist())
        numbers = [*records, *_find(opened[0], ids)] or sampled
        title = f"Records of {opened[0].directory}"
        shown = [pages.record_section(opened[0], processor, i, bool(strategy)) for i in numbers]
        sections = [pages.LEGEND, *shown]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html.page(title, sections), encoding="utf-8")
    print(f"wrote {out}")


def _open(paths: tuple[Path, ...], checkpoint: Path | None, check: bool = True) -> tuple[list[Dataset], Processor]:
    """Datasets and the processor for them; ``check`` that they were imported with its tokenizer and template."""
    from phivision_jax.cli.data import processor_for
    from phivision_jax.data.store.dataset import Dataset, check_processor

    if not paths:
        raise ValueError("name at least one dataset directory")
    opened, processor = [Dataset.open(path) for path in paths], processor_for(checkpoint)
    for dataset in opened if check else ():
        check_processor(dataset, processor)
    return opened, processor


def _check_range(flag: str, numbers: tuple[int, ...], count: int, where: Path) -> None:
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise ValueError(f"{flag} {wrong[0]}: {where} has {flag.strip('-')} 0 to {count - 1:,}")


def _find(dataset: Dataset, ids: tuple[str, ...]) -> list[int]:
    """The numbers of the records with these ids; reads the dataset until all are found."""
    from phivision_jax.io.progress import bar

    found: dict[str, int] = {}
    with bar("search ids", len(dataset), shown=bool(ids)) as advance:
        for i in range(len(dataset)):
            if found.keys() >= set(ids):
                break
            found.setdefault(dataset[i].id, i)
            advance(1)
    if missing := [record_id for record_id in ids if record_id not in found]:
        raise ValueError(f"--ids {missing[0]}: {dataset.directory} has no such record")
    return [found[record_id] for record_id in ids]
