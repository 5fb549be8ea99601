"""TensorFlow Datasets without TensorFlow: data sets prepared in a format with random access (ArrayRecord, parquet).

Features become what ``items`` reads: images stay encoded files, texts become strings, class numbers their names, a
Sequence or Dataset of dicts a list of dicts.

A prepared data set names the Python classes of its features, and TFDS imports the modules of those that it does not
know. Here only classes of TFDS itself are accepted, so no code of a data set's author runs.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import identify
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import IDS, ItemReader
from phivision_jax.data.sources.source import Read
from phivision_jax.io.memory import LIMIT, limited_memory
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import read_json

try:
    import tensorflow_datasets as tfds
except ModuleNotFoundError:
    raise ModuleNotFoundError("TFDS needs its package: pip install 'phivision_jax[tfds]'") from None

_SEQUENCES = (tfds.features.Sequence, tfds.features.Dataset)
_FEATURES = dict(tfds.features.FeatureConnector._registered_features)  # TFDS's own, and their names in older versions


def _known_feature(cls: type, name: str) -> type:
    if name not in _FEATURES:
        raise ValueError(f"a feature has the class {shorten(name)}, which is none of TFDS's own, so it is not imported")
    return _FEATURES[name]


# All names of classes, in whatever form and depth a feature specification has them, are resolved by this one method.
tfds.features.FeatureConnector.cls_from_name = classmethod(_known_feature)


class TfdsSource:
    """Examples of one split."""

    def __init__(self, spec: str, options: ItemOptions, *, split: str = "train", name: str | None = None) -> None:
        """Find the data set.

        Args:
          spec: a directory with ``dataset_info.json``, or the name of a data set that is prepared in TFDS's own
            directory ("made/config:1.0.0").
          options: how examples become records.
          split: in TFDS's syntax, including "train[:10%]".
          name: name of the source; default: the data set's.

        Raises:
          ValueError: when there is no such data set or split, or its format has no random access.
        """
        self._spec, self._split, self._options = spec, split, options
        builder, examples = self._opened
        self.name, self._len, files = name or builder.info.name, len(examples), _files(builder)
        self._key = identify(files)
        self._memory = LIMIT + 2 * min(LIMIT, max((file.stat().st_size for file in files), default=0))

    def __len__(self) -> int:
        return self._len

    def key(self) -> Any:
        own = {"format": "tfds", "name": self.name, "of": self._spec, "split": self._split}
        return own | {"files": self._key, "options": self._options.key()}

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        builder, examples = self._opened
        reader = ItemReader(self.name, Path(builder.data_dir), self._options)
        for i in range(start, stop):
            place, where = f"{self.name}:{i + 1}", f"{self.name}, split {self._split}, example {i + 1}"
            example: dict[str, Any] = {}
            try:
                with limited_memory(self._memory):
                    example = examples[i]
                    item = _plain(builder.info.features, example)
            except Exception as error:  # of protobuf, array_record or TFDS
                own = {name: _decode(example[name], "replace") for name in IDS if name in example}
                yield reader.undecoded(error, "the example cannot be read", place, where, own)
            else:
                yield reader.read(item, place, where)

    @functools.cached_property
    def _opened(self) -> tuple[Any, Sequence[Any]]:
        """The builder of the data set, and the examples of the split."""
        try:
            is_directory = Path(self._spec).is_dir()
            for file in ("dataset_info.json", "features.json") if is_directory else ():
                read_json(Path(self._spec) / file)
            with limited_memory():
                builder = tfds.builder_from_directory(self._spec) if is_directory else tfds.builder(self._spec)
            files = _files(builder)
            # A process's first reader starts threads, and waits forever if their stacks exceed the limit on memory.
            ArrayRecordReader(os.devnull).ok()
            stored = sum(file.stat().st_size for file in files)
            with limited_memory(LIMIT + 2 * stored):  # TFDS reads parquet at once
                examples = builder.as_data_source(self._split, decoders=_decoders(builder.info.features))
            if not 0 < len(examples) <= 2**20 + stored:
                raise ValueError(f"it has {len(examples) or 'no'} examples by its dataset_info.json")
            return builder, examples
        except Exception as error:  # TFDS raises anything
            problem = shorten(str(error) or type(error).__name__, 300)
            raise ValueError(f"TFDS cannot open {self._spec}, split {self._split!r}: {problem}") from None


def _files(builder: Any) -> list[Path]:
    files = (Path(file) for split in builder.info.splits.values() for file in split.filepaths)
    return [file for file in files if file.is_file()]


class _Unchanged(tfds.decode.SkipDecoding):
    """TFDS's own class cannot handle sequences."""

    def decode_batch_example_np(self, example: Any) -> Any:
        return example

    decode_ragged_example_np = decode_batch_example_np


def _decoders(feature: Any) -> Any:
    """Decoders for a tree of features that leave images encoded."""
    if isinstance(feature, tfds.features.Image):
        return _Unchanged()
    if isinstance(feature, tfds.features.FeaturesDict):
        found = {name: _decoders(inner) for name, inner in feature.items()}
        return {name: decoder for name, decoder in found.items() if decoder} or None
    return _decoders(feature.feature) if isinstance(feature, _SEQUENCES) else None


def _plain(feature: Any, value: Any) -> Any:
    """A value of a feature in Python's own types.

    Raises:
      UnicodeDecodeError: for a text that is not UTF-8.
    """
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(inner, value[name]) for name, inner in feature.items() if name in value}
    if isinstance(feature, _SEQUENCES):
        rows = _transpose(value) if isinstance(value, Mapping) else value
        return [_plain(feature.feature, row) for row in rows]
    if isinstance(feature, tfds.features.Image):
        return value
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None
    return _decode(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def _transpose(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A list of dicts, from a dict (of dicts) of lists."""
    columns = {k: _transpose(column) if isinstance(column, Mapping) else column for k, column in columns.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _decode(value: Any, errors: str = "strict") -> Any:
    if isinstance(value, list):
        return [_decode(entry, errors) for entry in value]
    return value.decode(errors=errors) if isinstance(value, bytes) else value
