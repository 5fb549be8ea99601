"""``phivision report``: the report of an evaluation, from its rows."""

from typing import Annotated

from tyro.conf import Positional, arg


def report(
    out: Annotated[Positional[str], arg(metavar="OUT")],
    /,
    compare: Annotated[str, arg(metavar="OTHER")] = "",
    benchmarks: Annotated[str, arg(metavar="FILE,...")] = "",
) -> None:
    """Write the report of an evaluation: report.html with its data beside it, report.md and report.json.

    Args:
        out: Directory of an evaluation, as given to phivision eval --out; it may still be running.
        compare: Directory of another evaluation, to compare with item by item.
        benchmarks: Python files of the evaluation's own benchmarks, separated by commas.
    """
    from phivision_jax.evaluation.benchmarks.registry import find
    from phivision_jax.evaluation.dataset import DatasetBenchmark
    from phivision_jax.evaluation.report import tables, write_report
    from phivision_jax.io import html, storage

    own = [DatasetBenchmark(), *map(find, filter(None, benchmarks.split(",")))]
    other = storage.location(compare) if compare else None
    sections = write_report(storage.location(out), other, {benchmark.name: benchmark for benchmark in own})
    shown = [tables.brief(sections[0], "benchmark", "mode", "score", "95 % interval", "published", "items")]
    if compare:
        shown += [tables.brief(sections[1], "benchmark", "mode", "difference", "95 % interval", "p", "gained", "lost")]
    html.print_sections(shown)
    print(f"written: {out}/report.html, report.md, report.json")
