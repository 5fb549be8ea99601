"""The benchmarks that a user names, and where their data are."""

from collections.abc import Sequence
from pathlib import Path

from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.evaluation.benchmarks.registry import find


def choose(names: Sequence[str], places: Sequence[str]) -> list[tuple[Benchmark, str]]:
    """Benchmarks with the paths that their ``items`` take.

    Args:
      names: names of benchmarks, or paths of Python files that define one.
      places: directories with the data of each benchmark in a directory of its name, or NAME=PATH for one of them; for
        a single benchmark also the directory of its data. A benchmark that has none gets "", and downloads its data.

    Raises:
      ValueError: for an unknown benchmark, or one that is named twice.
      FileNotFoundError: for a Python file that does not exist.
    """
    benchmarks = [find(name) for name in names]
    given = [benchmark.name for benchmark in benchmarks]
    if repeated := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"benchmarks are named twice: {', '.join(repeated)}")
    return [(benchmark, _locate(benchmark.name, places, only=len(given) == 1)) for benchmark in benchmarks]


def _locate(benchmark: str, places: Sequence[str], *, only: bool) -> str:
    for place in places:
        name, equals, path = place.partition("=")
        if equals and name == benchmark:
            return path
        if not equals and (directory := Path(place) / benchmark).exists():
            return str(directory)
    plain = [place for place in places if "=" not in place]
    return plain[0] if only and plain else ""
