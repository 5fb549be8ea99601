"""Mixtures: the proportions in which examples come from several datasets, as a TOML file.

    reasoning_share = 0.2                 # 20 % of the examples think, whatever the sources hold

    [[sources]]
    path = "math"                         # a dataset directory, relative to this file; its name is the folder's
    repeat = 3                            # each of its records three times

    [[sources]]
    path = "gui"

    [[stages]]                            # optional; one after the other, each with its own settings
    name = "align"
    sources = ["gui"]
    examples = 100_000

    [[stages]]
    name = "instruct"
    weights = { math = 0.3, gui = 0.7 }   # shares; without weights, sources count by their size
    epochs = 2

A stage may also rehearse: with ``replay = { base = 0.1 }`` every tenth example is from the source "base", and the other
settings apply to the other nine. A share of every source can be held out for validation. Which records these are
follows from their indices and the seed alone, so no other setting ever moves a record between training and validation.

``example_order`` derives the order of the examples.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phivision_jax.config import dataclass_from_dict
from phivision_jax.data.shuffle import sample

Unit = Literal["examples", "tokens"]
# Purposes of a seed are numbered over all modules of ``data.plan``.
HELD_OUT = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """The selection of examples for one stretch of a plan."""

    name: str = "all"
    sources: tuple[str, ...] = ()
    """Names of the sources to use; empty for all that are not replayed."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of each source, in any scale; empty for size times ``repeat``."""
    repeat: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Number of times that each record of a source counts; 1 for sources not named."""
    unit: Unit = "examples"
    """Unit of weights, caps and temperature: examples, or tokens (those of images included)."""
    reasoning_share: float | None = None
    """Share of examples that think; None for the sources' own."""
    reasoning_unit: Unit = "examples"
    """Unit of the reasoning share."""
    task_temperature: float = 1.0
    """Exponent of the tasks' shares, against over-represented tasks: 1 keeps them, 0 makes all tasks equal."""
    task_caps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The largest share of a task; the excess goes to the other tasks in proportion."""
    replay: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of the examples that comes from each of these sources, to which no other setting applies."""
    epochs: float | None = None
    """Passes over the sources (times ``repeat``), not over the replayed ones; default 1. Give this or ``examples``."""
    examples: int | None = None
    """Total number of examples, replayed ones included."""

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if not self.name:
            raise ValueError("a stage needs a name that is not empty")
        if self.epochs is not None and self.examples is not None:
            raise ValueError(f"{where}: give epochs or examples, not both")
        limits: list[tuple[str, float | None, float, float]] = [
            ("reasoning_share", self.reasoning_share, 0, 1),
            ("task_temperature", self.task_temperature, 0, math.inf),
            *((f"weights of {name!r}", value, 0, math.inf) for name, value in self.weights.items()),
            *((f"repeat of {name!r}", value, 0, math.inf) for name, value in self.repeat.items()),
            *((f"the cap of task {task!r}", cap, 1e-9, 1) for task, cap in self.task_caps.items()),
            *((f"replay of {name!r}", value, 1e-9, 1) for name, value in self.replay.items()),
            ("epochs", self.epochs, 1e-9, math.inf),
            ("examples", self.examples, 1, math.inf),
        ]
        for name, value, low, high in limits:
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                kind = "a share" if high == 1 else "a number"
                least = "above 0" if low else "from 0 to 1" if high == 1 else "of 0 or more"
                raise ValueError(f"{where}: {name} must be {kind} {least}, not {value!r}")
        if self.replay and self.own_share <= 0:
            raise ValueError(f"{where}: replay takes every example; its shares must add up to less than 1")

    @property
    def own_share(self) -> float:
        """Share of the examples that are not replayed."""
        return 1 - math.fsum(self.replay.values())

    @property
    def splits_modes(self) -> bool:
        """True where shares distinguish records of one source by mode."""
        return self.reasoning_share is not None

    @property
    def splits_tasks(self) -> bool:
        """True where shares distinguish records of one source by task."""
        return bool(self.task_caps) or self.task_temperature != 1

    def chosen(self, names: Sequence[str]) -> list[int]:
        """Indices of the sources that this stage uses, replayed ones excluded.

        Raises:
          ValueError: for an unknown source, or weights for some sources but not for all.
        """
        for field in ("sources", "weights", "repeat", "replay"):
            for name in getattr(self, field):
                if name not in names:
                    raise ValueError(f"stage {self.name!r}: {field} names {name!r}; the sources are {', '.join(names)}")
        if both := [name for name in self.replay if name in (*self.sources, *self.weights, *self.repeat)]:
            raise ValueError(f"stage {self.name!r}: {both[0]!r} is replayed; leave it out of sources, weights, repeat")
        chosen = self.sources or [name for name in names if name not in self.replay]
        if self.weights and (missing := [name for name in names if name in chosen and name not in self.weights]):
            raise ValueError(f"stage {self.name!r}: weights leave out {', '.join(missing)}; weigh all sources or none")
        used = {name for name in chosen if self.weights.get(name, 1) > 0 and self.repeat.get(name, 1) > 0}
        return [s for s, name in enumerate(names) if name in used]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Named datasets, and the stages that use them."""

    sources: tuple[tuple[str, Path], ...]
    """Name and directory of each."""
    stages: tuple[Stage, ...] = (Stage(),)
    held_out: float = 0.0
    """Share of the records of each source that is kept for validation."""
    part: Literal["train", "validation"] = "train"
    """The records that the stages use: "validation" for those held out, "train" for all others."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"the share of records held out must be from 0 to below 1, not {self.held_out!r}")
        if self.part == "validation" and not self.held_out:
            raise ValueError("no records are held out, so there are none to validate on")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sources)

    def eligible(self, num_records: int, seed: int) -> np.ndarray:
        """[records] bool: the records of a source that are in this mixture's part.

        It follows from indices and seed alone: a dataset that occurs under two names holds out the same records.
        """
        held_out = sample(num_records, self.held_out, seed, HELD_OUT)
        return held_out if self.part == "validation" else ~held_out

    def with_replay(self, path: str | os.PathLike[str], share: float) -> Mixture:
        """This mixture with another dataset, from which every stage takes the given share of its examples."""
        name = f"replay/{Path(path).resolve().name}"
        if name in self.names:
            raise ValueError(f"a source is called {name!r} already; give it another name")
        _check_directory(Path(path))
        replays = ({other: old * (1 - share) for other, old in stage.replay.items()} for stage in self.stages)
        pairs = zip(self.stages, replays, strict=True)
        stages = tuple(dataclasses.replace(stage, replay=replay | {name: share}) for stage, replay in pairs)
        return dataclasses.replace(self, sources=(*self.sources, (name, Path(path))), stages=stages)

    def validation(self) -> Mixture:
        """The held-out records of the sources that the stages use, each once.

        Records of replayed sources are held out as well (they may be the same data), but not validated on.
        """
        names = {self.names[s] for stage in self.stages for s in stage.chosen(self.names)}
        stage = Stage("validation", sources=tuple(name for name in self.names if name in names))
        return dataclasses.replace(self, stages=(stage,), part="validation")

    def only(self, stage: str) -> Mixture:
        """This mixture with one of its stages.

        Raises:
          ValueError: for an unknown stage.
        """
        kept = tuple(s for s in self.stages if s.name == stage)
        if not kept:
            raise ValueError(f"no stage {stage!r}; the mixture has {', '.join(s.name for s in self.stages)}")
        return dataclasses.replace(self, stages=kept)

    @classmethod
    def from_directories(cls, *directories: str | os.PathLike[str], **settings: Any) -> Mixture:
        """Datasets by their directories, in one stage with these ``settings``."""
        return cls(_named([{"path": Path(d)} for d in directories]), (Stage(**settings),))

    @classmethod
    def read(cls, path: str | os.PathLike[str], **settings: Any) -> Mixture:
        """Read a ``.toml`` file as in the module's docstring, or take a single dataset directory.

        Args:
          settings: defaults of the stages.

        Raises:
          FileNotFoundError: for a ``.toml`` file that does not exist.
          ValueError: for a file that is not TOML or has an unknown field (naming the nearest).
        """
        path = Path(path)
        if path.suffix != ".toml":
            return cls.from_directories(path, **settings)
        try:
            return cls._from_dict(tomllib.loads(path.read_text(encoding="utf-8")), path.parent, settings)
        except ValueError as error:
            of_toml = isinstance(error, tomllib.TOMLDecodeError | UnicodeDecodeError)
            raise ValueError(f"{path}{' is not TOML' if of_toml else ''}: {error}") from None

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any], folder: Path, defaults: Mapping[str, Any]) -> Mixture:
        values = _override(defaults, values)
        entries, tables = values.pop("sources", []), values.pop("stages", [{}])
        for name, found in (("sources", entries), ("stages", tables)):
            if not isinstance(found, list) or not found or not all(isinstance(table, dict) for table in found):
                raise ValueError(f"a mixture needs [[{name}]], tables of which each begins with that line")
        for entry in entries:
            if not isinstance(entry.get("path"), str):
                raise ValueError("each of [[sources]] needs a path, as text")
            if unknown := entry.keys() - {"path", "name", "weight", "repeat"}:
                raise ValueError(f"a source has path, name, weight and repeat, not {', '.join(sorted(unknown))}")
        sources = _named([{**entry, "path": folder / entry["path"]} for entry in entries])
        for field, key in (("weights", "weight"), ("repeat", "repeat")):
            own = {name: e[key] for (name, _), e in zip(sources, entries, strict=True) if key in e}
            values[field] = own | values.get(field, {})
        stages = []
        for i, table in enumerate(tables):
            settings = _override({**values, "name": f"stage {i + 1}" if len(tables) > 1 else "all"}, table)
            if kept := settings.get("sources"):
                for field in {"weights", "repeat"} - table.keys():  # the file's, for the sources that this stage has
                    settings[field] = {name: value for name, value in settings[field].items() if name in kept}
            stages.append(dataclass_from_dict(Stage, settings))
        _check_names([stage.name for stage in stages], "stages")
        return cls(sources, tuple(stages))


def _override(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``; epochs and examples exclude each other."""
    if "epochs" in values or "examples" in values:
        defaults = {key: value for key, value in defaults.items() if key not in ("epochs", "examples")}
    return {**defaults, **values}


def _named(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Path], ...]:
    """Name and path of each source; folders with equal names have their parents' names in front."""
    paths = [entry["path"] for entry in entries]
    for path in paths:
        _check_directory(path)
    for depth in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        folders = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        names = [str(entry.get("name") or folder) for entry, folder in zip(entries, folders, strict=True)]
        if len(set(names)) == len(names):
            break
    _check_names(names, "sources")
    return tuple(zip(names, paths, strict=True))


def _check_names(names: Sequence[str], kind: str) -> None:
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two {kind} are called {min(doubled)!r}; give each a name of its own")


def _check_directory(path: Path) -> None:
    """Raise ValueError for a file: a source is the directory that an import has made, not the imported file."""
    if path.is_file():
        remedy = "import its records once, then train on the directory that this makes (docs/data.md)"
        command = f"phivision data import {path} {path.with_suffix('')} --images FOLDER --checkpoint CHECKPOINT"
        raise ValueError(f"{path} is a file; {remedy}:\n    {command}")
