"""Benchmarks by name, or from a Python file of one's own, which is a program and is run."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from phivision_jax.evaluation.benchmark import Benchmark
from phivision_jax.io.messages import did_you_mean, first_line, shorten

NAMES = (
    *("ai2d", "chartqa", "cuactspot", "hallusionbench", "mathverse", "mathvision", "mathvista", "mmmu", "mmstar"),
    *("ocrbench", "screenspot_pro", "screenspot_v2", "vstar", "wemath", "zerobench"),
)
"""Names of modules, and of the benchmarks in them."""


def find(name_or_path: str) -> Benchmark:
    """A benchmark.

    Args:
      name_or_path: one of ``NAMES``, or the path of a Python file that defines one subclass of ``Benchmark``.

    Raises:
      ValueError: for an unknown name, with the nearest one, and for a file that defines none or several, or fails.
      FileNotFoundError: for a file that does not exist.
    """
    if name_or_path in NAMES:
        return _only(importlib.import_module(f"{__package__}.{name_or_path}"), name_or_path)
    path = Path(name_or_path)
    if path.suffix != ".py":
        hint = did_you_mean(name_or_path, NAMES)
        raise ValueError(f"there is no benchmark {shorten(name_or_path)!r}; {hint} A file of your own ends in .py.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: --benchmarks takes names and Python files")
    return _only(_run(path), str(path))


def _run(path: Path) -> ModuleType:
    name = f"phivision_benchmark_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for their modules there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything that its author wrote
        del sys.modules[name]
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {first_line(error)}") from error
    return module


def _only(module: ModuleType, source: str) -> Benchmark:
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Benchmark) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ValueError(f"{source} must define one subclass of Benchmark; it defines {names}")
    if missing := sorted(classes[0].__abstractmethods__):
        raise ValueError(f"{source}: {classes[0].__name__} has no {' and no '.join(missing)}")
    for attribute in ("name", "title"):
        if not isinstance(getattr(classes[0], attribute, None), str):
            raise ValueError(f"{source}: {classes[0].__name__} has no {attribute}, a text")
    return classes[0]()
