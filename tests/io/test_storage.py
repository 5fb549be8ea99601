"""Places in buckets and on disk behind one interface; errors of a bucket are sentences."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf import HFDirectory
from phivision_jax.io import storage
from phivision_jax.io.storage import wrap_storage_errors
from phivision_jax.processor import Processor
from phivision_jax.training.run_directory import RunDirectory
from tests.support.paths import ROOT

CONTENT = {"a.txt": b"hello", "empty": b"", "deep/er/b.bin": bytes(range(256)) * 40}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def place(bucket, folder):
    place = storage.location(bucket)
    storage.upload(folder, place)
    return place


def test_location_parses_places():
    assert storage.location("runs/a") == Path.cwd() / "runs/a" and type(storage.location("runs/a")) is type(Path())
    assert not storage.is_remote(storage.location("runs/a"))
    place = storage.location("gs://bucket/a")
    assert storage.is_remote(place) and str(place / "b") == "gs://bucket/a/b" and storage.location(place) == place
    wrong = {"s3://a/b": "other schemes are not supported", "gs://": "no bucket", "gs:///a": "no bucket"}
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            storage.location(text)


def test_location_is_absolute_and_does_not_climb(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    for text, path in {
        "../run": "run", "./run": "a/run", "b/../../x": "x", "..": "", "../linked/../run": "a/run", "../linked": "a/b",
    }.items():  # fmt: skip
        assert storage.location(text) == storage.location(Path(text)) == (tmp_path / path if path else tmp_path)
    monkeypatch.chdir(tmp_path)
    assert storage.location("linked") == tmp_path / "linked"  # as the user calls it


@pytest.mark.parametrize("key", ["a/../b", "..", "a//b", "./a", "a\\b", "a/./b/"])
def test_location_in_a_bucket_does_not_climb(key):
    with pytest.raises(ValueError, match="which is no path below a directory"):
        storage.location(f"gs://bucket/{key}")


def test_local_place_imports_nothing():
    """Neither the package for buckets nor epath: the converter on a laptop stays small."""
    script = (
        "import sys; from phivision_jax.io import storage; from phivision_jax.checkpoint import checksums, layout;"
        "storage.files(storage.location('docs'));"
        "assert not {'gcsfs', 'fsspec', 'etils', 'aiohttp', 'jax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_files_children_and_ranges(where, folder, request):
    place = folder if where == "local" else request.getfixturevalue("place")
    assert storage.files(place) == {name: len(content) for name, content in CONTENT.items()}
    assert storage.files(place / "deep") == {"er/b.bin": 10240} and storage.files(place / "nowhere") == {}
    assert {child.name for child in storage.children(place)} == {"a.txt", "empty", "deep"}
    assert storage.children(place / "nowhere") == []
    for start, count in ((0, 5), (1, 3), (3, 100), (250, 20), (0, 0), (10239, 1)):
        content = CONTENT["deep/er/b.bin"]
        assert storage.read_range(place / "deep" / "er" / "b.bin", start, count) == content[start : start + count]
    with pytest.raises(FileNotFoundError) as error:
        storage.read_range(place / "nowhere", 0, 1)
    assert error.value.filename == str(place / "nowhere")


def test_upload_download_remove(place, folder, tmp_path):
    storage.download(place, tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in storage.files(tmp_path / "back")} == CONTENT
    storage.download(place, tmp_path / "one", ["a.txt"])
    assert storage.files(tmp_path / "one") == {"a.txt": 5}
    storage.download(place, tmp_path / "one", [])
    with pytest.raises(FileNotFoundError) as error:
        storage.download(place, tmp_path / "one", ["a.txt", "nowhere"])
    assert error.value.filename == f"{place}/nowhere"
    (folder / "a.txt").write_bytes(b"more than hello")
    storage.upload(folder, place, ["a.txt"])
    assert (place / "a.txt").read_bytes() == b"more than hello"
    storage.remove(place / "deep")
    assert storage.files(place) == {"a.txt": 15, "empty": 0}
    storage.remove(place / "nowhere")


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_create_succeeds_once(where, bucket, tmp_path):
    path = (tmp_path if where == "disk" else storage.location(bucket)) / "file"
    assert storage.create(path, b"first") and not storage.create(path, b"second")
    assert path.read_bytes() == b"first"
    path.unlink()
    assert storage.create(path, b"third") and path.read_bytes() == b"third"


def test_transfers_show_progress(place, tmp_path, capsys):
    storage.download(place, tmp_path / "back", description="download")
    assert "download" in capsys.readouterr().out


def test_listings_are_not_cached(place):
    """TensorStore and other hosts write too."""
    import tensorstore

    assert not (place / "new" / "x").exists() and "new" not in {child.name for child in place.iterdir()}
    tensorstore.KvStore.open(f"{place}/new/").result().write("x", b"1").result()
    assert (place / "new" / "x").read_bytes() == b"1" and "new" in {child.name for child in place.iterdir()}


def test_missing_bucket_is_one_sentence(bucket):
    place = storage.location("gs://nobody-s-bucket/runs/a")
    for look in (storage.check, storage.files):
        with pytest.raises(storage.StorageError, match="gs://nobody-s-bucket/runs/a: there is no bucket nobody-s-bu"):
            look(place)
    storage.check(storage.location(bucket) / "nowhere")  # an empty place in a bucket that exists


def test_wrap_storage_errors_suggests_a_remedy():
    import aiohttp
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    denied = {
        HttpError({"code": 401, "message": "Anonymous caller"}): "not authenticated .*gcloud auth application-default",
        google.auth.exceptions.RefreshError("expired"): "not authenticated",
        OSError("Forbidden: http://x/y\nno list access"): "access denied .*Storage Object User",
        HttpError({"code": 403, "message": "no"}): "access denied",
    }
    for error, message in denied.items():
        with pytest.raises(storage.StorageError, match=f"^gs://b/x: .*{message}") as raised:  # noqa: SIM117
            with wrap_storage_errors("gs://b/x"):
                raise error
        assert not isinstance(raised.value, storage.Unreachable) and "\n" not in str(raised.value)
    refused, busy = aiohttp.ClientConnectionError("refused"), HttpError({"code": 503, "message": "busy"})
    for error in (refused, TimeoutError(), busy):
        with pytest.raises(storage.Unreachable, match="does not answer"), wrap_storage_errors("gs://b/x"):
            raise error


def test_wrap_storage_errors_passes_other_errors():
    for error in (ValueError("ours"), FileNotFoundError("missing"), KeyError("a")):
        with pytest.raises(type(error)) as raised, wrap_storage_errors("gs://b/x"):
            raise error
        assert raised.value is error
    with pytest.raises(TimeoutError), wrap_storage_errors("/local/x"):
        raise TimeoutError


HOSTILE = ["../x", "a/../../x", "a/..", "./x", "a//x", "/etc/x", "a\\..\\x", "..", "nul\0x", "a/../../../tmp/x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_no_paths_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^here has an object '.*', which is no path below a directory; remove it"):
        storage.check_names(["a", name], "here")
    with pytest.raises(ValueError, match="no path below a directory"):
        storage.download(storage.location("gs://bucket/a"), tmp_path / "to", ["b", name])
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_file_and_a_directory_are_refused():
    storage.check_names(["a", "ab/c", "b/a", "b/c", "b.", "...", "..a"], "here")
    for names in (["a/b", "a"], ["a", "x", "a/b/c"]):
        with pytest.raises(ValueError, match=r"'a/.*below another object, which cannot be a file and a directory"):
            storage.check_names(names, "here")


@pytest.mark.parametrize("name", [*HOSTILE[:7], "a.txt/x"], ids=range(8))
def test_bucket_with_hostile_names_is_not_read(bucket, tmp_path, monkeypatch, name):
    """A listing as Cloud Storage gives it; the emulator has no objects with such names."""

    class FileSystem:
        def find(self, root, detail):
            return {f"{root}{each}": {"size": 1} for each in ("a.txt", name)}

        def get(self, *_, **__):
            pytest.fail("something was fetched")

    monkeypatch.setattr(storage, "_fs", FileSystem)
    place = storage.location(bucket)
    readers = {
        "listing": storage.files,
        "download": lambda place: storage.download(place, tmp_path / "to" / "deep" / "er"),
        "conversion": HFDirectory,
        "processor": lambda place: Processor.from_directory(place, ModelConfig()),
        "run": lambda place: RunDirectory(str(place)).__enter__(),
        "replay": lambda place: RunDirectory(str(place), readonly=True).__enter__(),
    }
    for read in readers.values():
        with pytest.raises(ValueError, match=r"has an object '.*', (which is no path below|below another object)"):
            read(place)
    assert not (tmp_path / "to").exists() and not (tmp_path / "x").exists()


def link(folder, name, target) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret", "deep/../../secret", "../", "/nowhere", "out"])
def test_link_out_of_a_directory_is_refused(folder, target):
    """To a file, a directory, nothing, or another link."""
    (folder.parent / "secret").write_text("private")
    link(folder, "out", "../secret")
    link(folder, "deep/x.json", target if target[0] != "o" else "../out")
    for look in (storage.check_links, storage.files):
        with pytest.raises(ValueError, match=r"(x.json|out) is a link to /.*, outside of its directory; if it can be"):
            look(folder)


def test_links_within_a_directory_and_to_a_cache_s_blobs_are_read(folder, tmp_path):
    link(folder, "b.txt", "a.txt")
    link(folder, "deep/c.txt", "../a.txt")
    assert storage.files(folder)["deep/c.txt"] == 5
    (tmp_path / "named").symlink_to(folder)
    assert storage.files(tmp_path / "named")["b.txt"] == 5
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1f").write_text("{}")
    link(cache, "snapshots/abc/config.json", "../../blobs/1f")
    assert storage.files(cache / "snapshots" / "abc") == {"config.json": 2}
    (cache / "refs").write_text("private")
    link(cache, "snapshots/abc/x", "../../refs")
    with pytest.raises(ValueError, match=r"abc/x is a link to .*refs, outside"):
        storage.files(cache / "snapshots" / "abc")


def test_blobs_that_are_a_link_themselves_are_refused(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("k")
    (tmp_path / "m").mkdir()
    link(tmp_path / "m", "blobs", "../private")
    link(tmp_path / "m", "snapshots/abc/config.json", "../../blobs/key")
    with pytest.raises(ValueError, match=r"config.json is a link to .*private/key"):
        storage.files(tmp_path / "m" / "snapshots" / "abc")
