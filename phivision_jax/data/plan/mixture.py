"""How much of what: several datasets drawn in stated proportions, as a file.

    reasoning_share = 0.2                 # of examples: 20 % think, whatever the sources hold

    [[sources]]
    path = "math"                         # a dataset directory, from this file on; its name is the folder's
    repeat = 3                            # each of its records three times

    [[sources]]
    path = "gui"

    [[stages]]                            # optional; one after the other, each with settings of its own
    name = "align"
    sources = ["gui"]
    examples = 100_000

    [[stages]]
    name = "instruct"
    weights = { math = 0.3, gui = 0.7 }   # shares; without any, sources count by their size
    epochs = 2

Beside all that a stage may rehearse: ``replay = { base = 0.1 }`` makes every tenth example one of the source "base",
and the other nine what the stage says without it. And a share of every source can be held out: which records these are
follows from their numbers and the seed alone, so no other setting ever moves one between training and validation.

How an order follows from all this: ``order.py``.
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
from phivision_jax.data.records import TASKS
from phivision_jax.data.shuffle import sample

Unit = Literal["examples", "tokens"]
# What a seed is used for; ``order`` and ``plan`` have numbers of their own, 0 and 1.
HELD_OUT = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """How examples are drawn for one stretch of a plan."""

    name: str = "all"
    sources: tuple[str, ...] = ()
    """Names of the sources to draw from; none: all that are not replayed."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of each source, in any scale; none: by size times ``repeat``."""
    repeat: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How often each record of a source counts; 1 for those not named."""
    unit: Unit = "examples"
    """What the weights, caps and temperature count: examples, or tokens (text columns, images included)."""
    reasoning_share: float | None = None
    """Share that thinks; None: as the sources hold it."""
    reasoning_unit: Unit = "examples"
    task_temperature: float = 1.0
    """Task shares to this power: 1 leaves them, 0 makes all tasks alike; against over-represented ones."""
    task_caps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The largest share of a task; what is cut goes to the others in proportion."""
    replay: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of the examples that comes from each of these sources, to which nothing else here applies."""
    epochs: float | None = None
    """Passes over the sources (times ``repeat``), not over the replayed ones; default 1. Give this or ``examples``."""
    examples: int | None = None
    """How many in all, replayed ones included."""

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a stage's name must be a text, not {self.name!r}")
        if self.epochs is not None and self.examples is not None:
            raise ValueError(f"{where}: give epochs or examples, not both")
        if self.examples is not None and not (isinstance(self.examples, int) and self.examples > 0):
            raise ValueError(f"{where}: examples must be a whole number above 0, not {self.examples!r}")
        limits: list[tuple[str, Any, float, float]] = [
            ("reasoning_share", self.reasoning_share, 0, 1),
            ("task_temperature", self.task_temperature, 0, math.inf),
            *((f"weights of {name!r}", value, 0, math.inf) for name, value in self.weights.items()),
            *((f"repeat of {name!r}", value, 0, math.inf) for name, value in self.repeat.items()),
            *((f"the cap of task {task!r}", cap, 1e-9, 1) for task, cap in self.task_caps.items()),
            *((f"replay of {name!r}", value, 1e-9, 1) for name, value in self.replay.items()),
            ("epochs", self.epochs, 1e-9, math.inf),
        ]
        for what, value, low, high in limits:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high and math.isfinite(value)):
                kind = "a share" if high == 1 else "a number"
                least = "above 0" if low else "from 0 to 1" if high == 1 else "of 0 or more"
                raise ValueError(f"{where}: {what} must be {kind} {least}, not {value!r}")
        if self.replay and self.share_of_own <= 0:
            raise ValueError(f"{where}: replay takes every example; its shares must add up to less than 1")
        for task in self.task_caps:
            if task not in TASKS:
                raise ValueError(f"{where}: unknown task {task!r} in task_caps; known are {', '.join(TASKS)}")

    @property
    def share_of_own(self) -> float:
        """Of the examples that are not replayed."""
        return 1 - math.fsum(self.replay.values())

    def chosen(self, names: Sequence[str]) -> list[int]:
        """Numbers of the sources that this stage draws from, replayed ones not counted.

        Raises:
          ValueError: for a name that is no source's, or weights for some sources but not for all.
        """
        for field in ("sources", "weights", "repeat", "replay"):
            for name in getattr(self, field):
                if name not in names:
                    raise ValueError(f"stage {self.name!r}: {field} names {name!r}; the sources are {', '.join(names)}")
        if both := [name for name in self.replay if name in (*self.sources, *self.weights, *self.repeat)]:
            raise ValueError(f"stage {self.name!r}: {both[0]!r} is replayed; leave it out of sources, weights, repeat")
        chosen = [
            s for s, name in enumerate(names) if (name in self.sources if self.sources else name not in self.replay)
        ]
        if self.weights and (missing := [names[s] for s in chosen if names[s] not in self.weights]):
            raise ValueError(f"stage {self.name!r}: weights leave out {', '.join(missing)}; weigh all sources or none")
        return [s for s in chosen if self.weights.get(names[s], 1) > 0 and self.repeat.get(names[s], 1) > 0]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Named datasets, and the stages that draw from them."""

    sources: tuple[tuple[str, Path], ...]
    """Name and directory of each."""
    stages: tuple[Stage, ...] = (Stage(),)
    held_out: float = 0.0
    """Share of the records of each source that is kept for validation."""
    part: Literal["train", "validation"] = "train"
    """Whether the stages draw from all other records, or from those."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"the share of records held out must be from 0 to below 1, not {self.held_out!r}")
        if self.part == "validation" and not self.held_out:
            raise ValueError("no records are held out, so there are none to validate on")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sources)

    def draws(self, records: int, seed: int) -> np.ndarray:
        """[records] bool: which of a source's records can be drawn at all.

        By their numbers and the seed alone: a dataset that is there under two names holds out the same records.
        """
        held = sample(records, self.held_out, seed, HELD_OUT)
        return held if self.part == "validation" else ~held

    def with_replay(self, path: str | os.PathLike[str], share: float) -> Mixture:
        """With another dataset, from which this share of the examples of every stage is drawn."""
        name = f"replay/{Path(path).resolve().name}"
        if name in self.names:
            raise ValueError(f"a source is called {name!r} already; give it another name")
        _check_directory(Path(path))
        stages = []
        for stage in self.stages:
            kept = stage.share_of_own * (1 - share)
            replay = {**{other: old * (1 - share) for other, old in stage.replay.items()}, name: share}
            if stage.replay and kept <= 0:
                raise ValueError(f"stage {stage.name!r}: replay leaves nothing of its own")
            stages.append(dataclasses.replace(stage, replay=replay))
        return dataclasses.replace(self, sources=(*self.sources, (name, Path(path))), stages=tuple(stages))

    def validation(self) -> Mixture:
        """The held-out records of the sources that the stages draw from, each once.

        Those of replayed sources are held out as well (they may be the same data), and not drawn here.
        """
        names = {self.names[s] for stage in self.stages for s in stage.chosen(self.names)}
        stage = Stage("validation", sources=tuple(name for name in self.names if name in names))
        return dataclasses.replace(self, stages=(stage,), part="validation")

    def only(self, stage: str) -> Mixture:
        """With one of the stages alone.

        Raises:
          ValueError: when there is none of that name.
        """
        kept = tuple(s for s in self.stages if s.name == stage)
        if not kept:
            raise ValueError(f"no stage {stage!r}; the mixture has {', '.join(s.name for s in self.stages)}")
        return dataclasses.replace(self, stages=kept)

    @classmethod
    def of(cls, *directories: str | os.PathLike[str], **settings: Any) -> Mixture:
        """Datasets by their directories, in one stage of these ``settings``."""
        return cls(_named([{"path": Path(d)} for d in directories]), (Stage(**settings),))

    @classmethod
    def read(cls, path: str | os.PathLike[str], **settings: Any) -> Mixture:
        """A dataset directory alone, or a ``.toml`` file as the module's docstring shows; ``settings`` are defaults.

        Raises:
          FileNotFoundError: when there is no such file.
          ValueError: for a file that is not TOML, and for a field that does not exist, with the nearest that does.
        """
        path = Path(path)
        if path.suffix != ".toml":
            return cls.of(path, **settings)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        try:
            return cls._of_dict(values, path.parent, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _of_dict(cls, values: Mapping[str, Any], folder: Path, defaults: Mapping[str, Any]) -> Mixture:
        values = _over(defaults, values)
        entries, stages = values.pop("sources", []), values.pop("stages", [{}])
        for name, tables in (("sources", entries), ("stages", stages)):
            if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
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
        made = []
        for i, stage in enumerate(stages):
            settings = _over({**values, "name": f"stage {i + 1}" if len(stages) > 1 else "all"}, stage)
            if settings.get("sources"):
                kept = set(settings["sources"])
                for field in ("weights", "repeat"):
                    if field not in stage:  # what the file says of all sources, as far as this stage has them
                        settings[field] = {n: v for n, v in settings[field].items() if n in kept}
            made.append(dataclass_from_dict(Stage, settings))
        called = [stage.name for stage in made]
        if doubled := {name for name in called if called.count(name) > 1}:
            raise ValueError(f"two stages are called {min(doubled)!r}; give each a name of its own")
        return cls(sources, tuple(made))


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``defaults``; epochs and examples are two ways to say one thing."""
    if "epochs" in values or "examples" in values:
        defaults = {key: value for key, value in defaults.items() if key not in ("epochs", "examples")}
    return {**defaults, **values}


def _named(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Path], ...]:
    """Name and path of each source; of folders with one name, with their parents' names in front."""
    paths = [Path(entry["path"]) for entry in entries]
    for path in paths:
        _check_directory(path)
    depth = 1
    while True:
        names = [
            str(entry.get("name") or "/".join(path.resolve().parts[-depth:]))
            for entry, path in zip(entries, paths, strict=True)
        ]
        doubled = {name for name in names if names.count(name) > 1}
        if not doubled:
            return tuple(zip(names, paths, strict=True))
        if depth > max(len(path.resolve().parts) for path in paths):
            raise ValueError(f"two sources are called {min(doubled)!r}; give each a name of its own")
        depth += 1


def _check_directory(path: Path) -> None:
    """A file of records is what an import reads, not what it writes."""
    if path.is_file():
        raise ValueError(
            f"{path} is a file; records are imported once, and the directory that makes is what is drawn from:\n"
            f"    phivision data import {path} {path.with_suffix('')} --images FOLDER --checkpoint CHECKPOINT\n"
            f"then give {path.with_suffix('')} instead (docs/data.md)"
        )
