"""Read a run's configuration: a Python file, its variant, and fields changed on the command line.

    --config=configs/phi4_rv_15b.py:stage2 --config.optim.steps=500 --set remat=full data.batch_rows=64

A configuration file defines ``get_config()`` or ``get_config(variant)``, which returns an ``ml_collections.ConfigDict``
(or a plain dict) with the fields of ``RunConfig``. Values on the command line are read by their field's type: a string
needs no quotes, a tuple is a Python literal. Every value is checked, wherever it comes from.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
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
    values = _call(_execute(path), path, variant) if spec else {}
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
    rest: list[str] = []
    overrides: list[str] = []
    in_set = False
    for word in words:
        if word.startswith(FLAG):
            if "=" not in word:
                raise ValueError(f"{word}: give the value after an equals sign, as in {word}=VALUE")
            overrides.append(word.removeprefix("--"))
        elif word == "--set" or word.startswith("--set="):
            overrides += [word.removeprefix("--set=")] if "=" in word else []
        elif in_set and not word.startswith("-"):
            overrides.append(word)
            continue
        else:
            rest.append(word)
        in_set = word == "--set"
    return [*rest, "--set", *overrides] if overrides else rest


def prepare(words: Sequence[str]) -> list[str]:
    """Arguments of a subcommand that takes a configuration: ``gather_overrides``, and --help for a configuration.

    With ``--config`` and ``--help``, the page of all its fields is printed and the process ends.
    """
    words = gather_overrides(words)
    specs = [
        following if word == "--config" else word.removeprefix("--config=")
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word == "--config" or word.startswith("--config=")
    ]
    if specs and {"-h", "--help"} & set(words):
        from phivision_jax.cli import config_help

        overrides = words[words.index("--set") + 1 :] if "--set" in words else []
        print(config_help.text(load_config(specs[-1], overrides)))
        sys.exit(0)
    return words


@contextlib.contextmanager
def _prefix_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


def _execute(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ValueError(f"--config: {path} does not exist; {EXAMPLE}")
    found = importlib.util.spec_from_file_location("config", path)
    if found is None or found.loader is None:
        raise ValueError(f"--config: {path} is not a Python file; {EXAMPLE}")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"--config: {path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(_place(error, path)) from None
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"--config: {path} has no function get_config; configs/finetune.py is an example")
    return module


def _call(module: ModuleType, path: str, variant: str) -> dict[str, Any]:
    if variant and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config: {path} has no variants; leave out {':' + variant!r}")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except ValueError as error:  # a sentence of the file's own, such as one that lists its variants
        raise ValueError(f"--config: {error}" if Path(path).name in str(error) else _place(error, path)) from None
    except (Exception, SystemExit) as error:
        raise ValueError(_place(error, path)) from None
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return config
    raise ValueError(f"--config: get_config of {path} must return a ConfigDict or a dict, not {type(config).__name__}")


def _place(error: BaseException, path: str) -> str:
    """The sentence for an exception raised by a configuration file, with the innermost line of that file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    where = f"{path}, line {lines[-1]}" if lines else path
    return f"--config: {where}: {type(error).__name__}: {' '.join(str(error).split())}"


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
