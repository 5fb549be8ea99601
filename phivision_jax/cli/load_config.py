"""Read a run's configuration: a Python file, its variant, and fields changed on the command line.

    --config=configs/phi4_rv_15b.py:stage2 --config.optim.steps=500 --set remat=full data.batch_rows=64

A configuration file defines ``get_config()`` or ``get_config(variant)``, which returns an ``ml_collections.ConfigDict``
(or a plain dict) with the fields of ``RunConfig``. Values on the command line are read by their field's type: a string
needs no quotes, a tuple is a Python literal. Every value is checked, wherever it comes from.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from phivision_jax.config import (
    check_value,
    dataclass_from_dict,
    field_types,
    unknown_field,
    wanted_value,
    without_none,
)

if TYPE_CHECKING:
    from phivision_jax.training.run_config import RunConfig

FLAG = "--config."
EXAMPLE = "give a file like configs/tiny.py or configs/phi4_rv_15b.py:stage2"


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
      spec: ``FILE`` or ``FILE:VARIANT``; empty for the defaults of ``RunConfig``.
      overrides: ``FIELD=VALUE``, as ``--set`` takes them; a leading ``config.`` marks one that was given as a flag.

    Raises:
      ValueError: for a file that cannot be run, an unknown variant or field, or a value of the wrong type.
    """
    from phivision_jax.training.run_config import RunConfig

    path, _, variant = spec.partition(":")
    values = _values(path, variant) if spec else {}
    with _prefix_errors(path):
        dataclass_from_dict(RunConfig, values)
    for override in overrides:
        with _prefix_errors(f"--{override}" if override.startswith("config.") else f"--set {override}"):
            _override(RunConfig, values, override.removeprefix("config."))
    return RunConfig.from_dict(values)


def gather_overrides(words: Sequence[str]) -> list[str]:
    """Command-line words with every ``--config.FIELD=VALUE`` and ``--set …`` as one ``--set`` at the end, in order.

    Raises:
      ValueError: for a flag without a value.
    """
    for word in words:
        if word.startswith(FLAG) and "=" not in word:
            raise ValueError(f"{word}: give the value after an equals sign, as in {word}=VALUE")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", nargs="*", action="extend", default=[])
    as_set = [f"--set={word.removeprefix('--')}" if word.startswith(FLAG) else word for word in words]
    found, rest = parser.parse_known_args(as_set)
    return [*rest, "--set", *found.set] if found.set else rest


def prepare(words: Sequence[str]) -> list[str]:
    """Arguments of a subcommand that takes a configuration: ``gather_overrides``, and --help for a configuration.

    With ``--config`` and ``--help``, the page of all its fields is printed and the process ends.
    """
    words = gather_overrides(words)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--help", "-h", action="store_true")
    found, _ = parser.parse_known_args(words)
    if found.config and found.help:
        from phivision_jax.cli import config_help

        print(config_help.text(load_config(found.config, found.set)))
        sys.exit(0)
    return words


@contextlib.contextmanager
def _prefix_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


def _values(path: str, variant: str) -> dict[str, Any]:
    """The dict that a configuration file's ``get_config`` returns."""
    if not Path(path).is_file():
        raise ValueError(f"--config: {path} does not exist; {EXAMPLE}")
    if Path(path).suffix != ".py":
        raise ValueError(f"--config: {path} is not a Python file; {EXAMPLE}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ValueError(f"{path} has no function get_config; configs/finetune.py is an example")
        if variant and not inspect.signature(get_config).parameters:
            raise ValueError(f"{path} has no variants; leave out {':' + variant!r}")
        config = get_config(variant) if variant else get_config()
    except SyntaxError as error:
        raise ValueError(f"--config: {error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and Path(path).name in str(error):  # a sentence such as those above
            raise ValueError(f"--config: {error}") from None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"--config: {where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return config
    raise ValueError(f"--config: get_config of {path} must return a ConfigDict or a dict, not {type(config).__name__}")


def _override(cls: Any, values: dict[str, Any], override: str) -> None:
    """Put ``FIELD=VALUE`` into the nested dicts of a configuration."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError("give a field and its value, as in data.batch_rows=512")
    parts = name.split(".")
    for i, part in enumerate(parts, 1):
        known = field_types(cls)
        if part not in known:
            raise ValueError(unknown_field(cls, ".".join(parts[:i])))
        hint = without_none(known[part])
        if i == len(parts):
            values[part] = check_value(_parse(text, hint), known[part], name)
        elif not dataclasses.is_dataclass(hint):
            raise ValueError(f"{'.'.join(parts[:i])} is {wanted_value(known[part])} and has no fields")
        else:
            if not isinstance(values.get(part), dict):
                values[part] = {}
            cls, values = hint, values[part]


def _parse(text: str, hint: Any) -> Any:
    """A value from its text. Text that is not of the field's type stays text, and the check of types refuses it."""
    if hint is str:
        return None if text == "None" else text
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        return float(text) if hint is float and text != "None" else ast.literal_eval(text)
    return text
