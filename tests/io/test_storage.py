"""Places in buckets and on this machine, alike; what goes wrong between us and a bucket is a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phivision_jax.io import storage
from tests.support.paths import ROOT

CONTENT = {"a.txt": b"hello", "empty": b"", "deep/er/b.bin": bytes(range(256)) * 40}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    return tmp_path / "there"


@pytest.fixture
def place(bucket, folder):
    place = storage.location(bucket)
    storage.upload(folder, place)
    return place


def test_what_is_a_place():
    assert storage.location("runs/a") == Path("runs/a") and type(storage.location("runs/a")) is type(Path())
    assert not storage.is_remote(storage.location("runs/a"))
    place = storage.location("gs://bucket/a")
    assert storage.is_remote(place) and str(place / "b") == "gs://bucket/a/b" and storage.location(place) is place
    for wrong, message in {"s3://a/b": "others are not known", "gs://": "no bucket", "gs:///a": "no bucket"}.items():
        with pytest.raises(ValueError, match=message):
            storage.location(wrong)


def test_a_local_place_imports_nothing():
    """Neither the package for buckets nor epath: a converter on a laptop stays what it was."""
    check = (
        "import sys; from phivision_jax.io import storage; from phivision_jax.checkpoint import layout;"
        "storage.files(storage.location('docs'));"
        "assert not {'gcsfs', 'fsspec', 'etils', 'aiohttp', 'jax'} & sys.modules.keys()"
    )
    root = ROOT
    subprocess.run([sys.executable, "-c", check], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_files_and_ranges(where, folder, request):
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


def test_there_and_back(place, folder, tmp_path):
    storage.download(place, tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in storage.files(tmp_path / "back")} == CONTENT
    storage.download(place, tmp_path / "one", ["a.txt"])
    assert storage.files(tmp_path / "one") == {"a.txt": 5}
    with pytest.raises(FileNotFoundError) as error:
        storage.download(place, tmp_path / "one", ["a.txt", "nowhere"])
    assert error.value.filename == f"{place}/nowhere"
    (folder / "a.txt").write_bytes(b"more than hello")
    storage.upload(folder, place, ["a.txt"])
    assert (place / "a.txt").read_bytes() == b"more than hello"
    storage.remove(place / "deep")
    assert storage.files(place) == {"a.txt": 15, "empty": 0}
    storage.remove(place / "nowhere")


def test_what_another_program_has_written_is_seen(place):
    """No listing is kept: TensorStore and other hosts write too."""
    import tensorstore

    assert not (place / "new" / "x").exists() and "new" not in {child.name for child in place.iterdir()}
    tensorstore.KvStore.open(f"{place}/new/").result().write("x", b"1").result()
    assert (place / "new" / "x").read_bytes() == b"1" and "new" in {child.name for child in place.iterdir()}


def test_no_bucket_is_a_sentence(bucket):
    place = storage.location("gs://nobody-s-bucket/runs/a")
    for look in (storage.check, storage.files):
        with pytest.raises(storage.StorageError, match="gs://nobody-s-bucket/runs/a: there is no bucket nobody-s-bu"):
            look(place)
    storage.check(storage.location(bucket) / "nowhere")  # a place where nothing is yet


def test_errors_of_the_packages_are_sentences():
    import aiohttp
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    told = {
        HttpError({"code": 401, "message": "Anonymous caller"}): "asks who you are .*gcloud auth application-default",
        google.auth.exceptions.RefreshError("expired"): "asks who you are",
        OSError("Forbidden: http://x/y\nno list access"): "may not do that .*Storage Object User",
        HttpError({"code": 403, "message": "no"}): "may not do that",
    }
    for error, sentence in told.items():
        with (
            pytest.raises(storage.StorageError, match=f"^gs://b/x: .*{sentence}") as raised,
            storage.wrap_storage_errors("gs://b/x"),
        ):
            raise error
        assert not isinstance(raised.value, storage.Unreachable) and "\n" not in str(raised.value)
    for error in (
        aiohttp.ClientConnectionError("refused"),
        TimeoutError(),
        HttpError({"code": 503, "message": "busy"}),
    ):
        with pytest.raises(storage.Unreachable, match="does not answer"), storage.wrap_storage_errors("gs://b/x"):
            raise error
    for error in (ValueError("ours"), FileNotFoundError("missing"), KeyError("a")):  # these are for whoever asked
        with pytest.raises(type(error)) as raised, storage.wrap_storage_errors("gs://b/x"):
            raise error
        assert raised.value is error
    with pytest.raises(TimeoutError), storage.wrap_storage_errors("/local/x"):
        raise TimeoutError
