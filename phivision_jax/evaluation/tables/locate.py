"""Find the files of a benchmark in a folder, and download the folder from the Hugging Face hub."""

import dataclasses
import re
from pathlib import Path

from phivision_jax.evaluation.tables.json_file import JsonFile
from phivision_jax.evaluation.tables.parquet_file import ParquetFile
from phivision_jax.evaluation.tables.tsv_file import TsvFile
from phivision_jax.io.messages import first_line
from phivision_jax.io.read_json import wrong_file

type Table = ParquetFile | TsvFile | JsonFile
DEEPEST = 3
"""Levels of folders in which files are looked for."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Names of a benchmark's files, by form; of several forms in a folder, the first counts."""

    parquet: tuple[str, ...] = ()
    """Beginnings of names of parquet files, or names of their folders, mostly the split."""
    tsv: tuple[str, ...] = ()
    """Names of VLMEvalKit's tables, of which any number may be present."""
    json: tuple[str, ...] = ()
    """Patterns of annotations, relative to the folder."""
    json_images: str = ""
    """Folder of their images, relative to the folder; where there is none, images are beside the annotations."""
    then: str = ""
    """Further instructions after the command of the download."""

    def __str__(self) -> str:
        expected = [*(f"{name}*.parquet" for name in self.parquet), *self.tsv, *self.json]
        return f"{', '.join(expected[:-1])} or {expected[-1]}" if expected[1:] else expected[0]


def locate(path: str, files: Files, *, title: str, download: str) -> list[Table]:
    """The tables of a benchmark.

    Args:
      path: a file, a folder, or "" to download the data set.
      title: name of the benchmark in messages.
      download: the data set, as "owner/name" of the Hugging Face hub, or the URL of a git repository.

    Raises:
      FileNotFoundError: where there are none; the message names what was expected and how to get it.
      ValueError: for a file that is none of these forms.
    """
    folder = Path(path) if path else fetch_folder(download, files, title)
    if folder.is_file():
        with folder.open("rb") as content:
            if known := wrong_file(content.read(512)):
                raise ValueError(f"{folder} {known}")
        return [_open(folder, folder.parent, files)]
    found = _named(folder, files) if folder.is_dir() else []
    if not found:
        problem = f"{folder} has no data of {title}: expected {files}"
        raise FileNotFoundError(f"{problem}; to get it: {command(download)}{files.then}")
    return [_open(file, folder, files) for file in found]


def fetch_folder(download: str, files: Files, title: str) -> Path:
    """Download the files of a data set into the hub's cache.

    Raises:
      FileNotFoundError: without the package, the network or the data set.
    """
    if download.startswith("https://"):
        raise FileNotFoundError(f"{title} needs data: give a folder; to get one: {command(download)}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        needed = "pip install 'phivision_jax[hub]' to download it, or give a folder"
        raise FileNotFoundError(f"{title} needs data: {needed}; to get one: {command(download)}") from None
    patterns = [f"*{name}*" for name in files.parquet] or ["*"]
    try:
        return Path(snapshot_download(download, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # many types: no network, no such data set, no permission
        problem = f"{download} could not be downloaded: {first_line(error)}"
        raise FileNotFoundError(f"{title}: {problem}; give a folder; to get one: {command(download)}") from None


def command(download: str) -> str:
    """The command that downloads a data set of the hub, or clones a repository that is given by its URL."""
    if download.startswith("https://"):
        return f"git clone {download}"
    return f"hf download {download} --repo-type dataset --local-dir DIR"


def _named(folder: Path, files: Files) -> list[Path]:
    """The files of the first form that is present, sorted."""
    tsv = [folder / name for name in files.tsv if (folder / name).is_file()]
    json = (file for pattern in files.json for file in folder.glob(pattern))
    return _parquet(folder, files.parquet) or tsv or sorted(set(json))


def _parquet(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The parquet files of a split, by their names ("test-00000-of-00001.parquet") or their folder's."""
    begins = re.compile(rf"({'|'.join(map(re.escape, names))})(?![A-Za-z_])")
    found = (file for depth in range(DEEPEST + 1) for file in folder.glob("*/" * depth + "*.parquet"))
    return sorted(file for file in found if names and (begins.match(file.name) or file.parent.name in names))


def _open(file: Path, folder: Path, files: Files) -> Table:
    if file.suffix == ".parquet":
        return ParquetFile(file, folder)
    if file.suffix == ".tsv":
        return TsvFile(file, folder)
    if file.suffix in (".json", ".jsonl"):
        images = (place / files.json_images for place in (folder, folder.parent) if files.json_images)
        return JsonFile(file, next(filter(Path.is_dir, images), file.parent))
    raise ValueError(f"{file} is not parquet, TSV, JSON or JSON lines")
