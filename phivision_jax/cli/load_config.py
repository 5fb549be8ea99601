"""Read a run's configuration: a Python file, its variant, and fields changed on the command line.

    --config=configs/phi4_rv_15b.py:stage2 --config.optim.steps=500 --set remat=full data.batch_rows=64

A configuration file defines ``get_config()`` or ``get_config(variant)``, which returns an ``ml_collections.ConfigDict``
(or a plain dict) with the fields of ``RunConfig``. Values on the command line are read by their field's type: a string
needs no quotes, a tuple is a Python literal. Every value is checked, wherever it comes from.
"""

from __future__ import annotations

import argparse
import inspect
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from phivision_jax.config import Text
from phivision_jax.io import storage
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import read_json

if TYPE_CHECKING:
    from phivision_jax.training.run_config import RunConfig


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
      spec: ``FILE`` or ``FILE:VARIANT``, or the config.json of a run; empty for the defaults of ``RunConfig``.
      overrides: ``FIELD=VALUE``, as ``--set`` takes them; a leading ``config.`` marks one that was given as a flag.

    Raises:
      ValueError: for a file that cannot be run, an unknown variant or field, or a value of the wrong type.
    """
    from phivision_jax.training.run_config import RunConfig

    values: dict[str, Any] = {}
    if spec:
        values = read_json(storage.location(spec)) if spec.endswith(".json") else _run_file(spec)
    for override in overrides:
        flag = shorten(f"--{override}" if override.startswith("config.") else f"--set {override}")
        name, equals, text = override.removeprefix("config.").partition("=")
        if not equals:
            raise ValueError(f"{flag}: give a field and its value, as in data.batch_rows=512")
        *groups, field = name.split(".")
        inner = values
        for group in groups:
            inner[group] = dict(known) if isinstance(known := inner.get(group), dict) else {}
            inner = inner[group]
        inner[field] = Text(text, flag)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("--") else f"--config={spec}: {error}") from None


def prepare(words: Sequence[str]) -> list[str]:
    """Arguments of a subcommand, with all ``--config.FIELD=VALUE`` moved into one ``--set``.

    ``--config=FILE --help`` prints all fields of the configuration and ends the process.

    Raises:
      ValueError: for ``--config.FIELD`` without a value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--set", nargs="*", action="extend", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(words)
    for flag in [word for word in rest if word.startswith("--config.")]:
        if "=" not in flag:
            raise ValueError(f"{flag}: give the value after an equals sign, as in {flag}=VALUE")
        known.set.append(flag.removeprefix("--"))
        rest.remove(flag)
    if known.help and known.config:
        _print_fields(load_config(known.config, known.set))
    rest += ["--help"] * known.help + ["--config", known.config] * bool(known.config)
    return [*rest, "--set", *known.set] if known.set else rest


def _print_fields(cfg: RunConfig) -> None:
    import tyro

    from phivision_jax.training.run_config import RunConfig

    def fields(config: RunConfig = cfg) -> None:
        """Fields of the configuration and their values, which --config.FIELD=VALUE or --set FIELD=VALUE change."""

    fields.__annotations__["config"] = RunConfig
    tyro.cli(fields, args=["--help"], prog="phivision", use_underscores=True, config=(tyro.conf.AvoidSubcommands,))


def _run_file(spec: str) -> dict[str, Any]:
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config: {path} does not exist; give a file like configs/tiny.py or configs/tiny.py:long")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ValueError("it has no function get_config; configs/finetune.py is an example")
        if variant and not inspect.signature(get_config).parameters:
            raise ValueError(f"it has no variants; leave out {shorten(repr(':' + variant))}")
        config = get_config(variant) if variant else get_config()
        if not isinstance(config, ConfigDict | dict):
            raise ValueError(f"get_config must return a ConfigDict or a dict, not {type(config).__name__}")
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        place = f" (line {lines[-1]})" if lines and not isinstance(error, SyntaxError) else ""
        raise ValueError(f"--config={spec}: {kind}{' '.join(str(error).split())}{place}") from None
    return config.to_dict() if isinstance(config, ConfigDict) else config
