"""Manifests looked into part by part, and by several processes."""

import subprocess
import sys

import pytest

from phivision_jax.checkpoint import manifest


@pytest.fixture
def checkpoint(tmp_path):
    for name in ("meta/metadata", "opt_state/d/0", "params/d/0", "params/d/1", "params_of_others/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / manifest.MANIFEST).write_bytes(manifest.render(manifest.describe(tmp_path)))
    return tmp_path


def test_only_the_parts_that_are_asked_for_matter(checkpoint):
    for name in ("opt_state/d/0", "params_of_others/0"):
        (checkpoint / name).write_text(name.upper())
    manifest.check(checkpoint, ["params", "meta"])
    assert manifest.damage(checkpoint) == "its file opt_state/d/0 does not hold the bytes that were written"
    (checkpoint / "meta" / "metadata").unlink()
    manifest.check(checkpoint, ["params"])
    with pytest.raises(ValueError, match=rf"{checkpoint} is damaged: its file meta/metadata is missing"):
        manifest.check(checkpoint, ["params", "meta"])


def test_one_process_sees_it_and_all_refuse(checkpoint):
    (checkpoint / "params" / "d" / "1").write_text("PARAMS/D/1")
    parts = ["params", "meta"]
    seen = [manifest.damage(checkpoint, share, 2, parts) for share in (0, 1)]
    assert [wrong is not None for wrong in seen] == [True, False]  # of meta/metadata, params/d/0, params/d/1
    for share in (0, 1):
        with pytest.raises(ValueError, match="its file params/d/1 does not hold"):
            manifest.check(checkpoint, parts, share, 2, lambda wrong: wrong or seen[0])


def test_without_a_manifest_it_is_taken_as_it_is(checkpoint):
    (checkpoint / manifest.MANIFEST).unlink()
    (checkpoint / "params" / "d" / "1").unlink()
    manifest.check(checkpoint, ["params"])


def test_a_damaged_manifest_vouches_for_nothing(checkpoint):
    path = checkpoint / manifest.MANIFEST
    path.write_bytes(path.read_bytes().replace(b"params/d/1", b"params/e/1"))
    with pytest.raises(ValueError, match="its file MANIFEST is damaged"):
        manifest.check(checkpoint, ["params"])


def test_the_converter_gets_no_jax_by_it():
    check = (
        "import sys; from phivision_jax.checkpoint import manifest; assert not {'jax', 'orbax'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
