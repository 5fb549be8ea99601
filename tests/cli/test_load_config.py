"""Configurations from files and overrides: what is accepted, and one sentence for everything else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phivision_jax.cli.load_config import load_config, prepare
from phivision_jax.config import field_types, without_none
from phivision_jax.training.run_config import RunConfig

TINY, RECIPE = "configs/tiny.py", "configs/phi4_rv_15b.py"


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def refused(spec: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(spec, overrides)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


def test_load_config_variant_and_overrides():
    cfg = load_config(f"{RECIPE}:stage1", ("remat=full", "config.data.batch_rows=512", "mesh.fsdp=64"))
    assert (cfg.remat, cfg.data.batch_rows, cfg.mesh.fsdp, cfg.data.stage) == ("full", 512, 64, "stage1")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.learning_rate=1", lambda cfg: type(cfg.optim.learning_rate) is float and cfg.optim.learning_rate == 1),
        ("optim.learning_rate=3e-5", lambda cfg: cfg.optim.learning_rate == 3e-5),
        ("data.path=12", lambda cfg: cfg.data.path == "12"),  # a string needs no quotes, whatever it looks like
        ("data.path=a=b", lambda cfg: cfg.data.path == "a=b"),
        ("keep_best=", lambda cfg: cfg.keep_best == ""),
        ("dtype=bfloat16", lambda cfg: cfg.dtype == "bfloat16"),
        ("optim.lr_rules=[('vision', 0), ['.', 1.0]]", lambda cfg: cfg.optim.lr_rules == (("vision", 0.0), (".", 1.0))),
        ("mesh.data=-1", lambda cfg: cfg.mesh.data == -1),
    ],
)
def test_override_is_read_by_type(override, read):
    assert read(load_config(TINY, (override,)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.optim.steps=abc", "--config.optim.steps=abc: optim.steps must be an integer, not 'abc'"),
        ("optim.steps=1.5", "--set optim.steps=1.5: optim.steps must be an integer, not 1.5"),
        ("optim.steps=True", "--set optim.steps=True: optim.steps must be an integer, not True"),
        ("optim.b1=abc", "--set optim.b1=abc: optim.b1 must be a number, not 'abc'"),
        ("dtype=half", "--set dtype=half: dtype must be one of 'float32', 'bfloat16', not 'half'"),
        ("optim.stepz=3", "--config=configs/tiny.py: there is no field 'optim.stepz'; did you mean 'optim.steps'?"),
        ("optm.steps=3", "there is no field 'optm'; did you mean 'optim'?"),
        ("optim.steps.x=3", "optim.steps must be an integer, not {'x': '3'}"),
        ("optim=3", "--set optim=3: optim must be a group of fields, not 3"),
        ("remat", "--set remat: give a field and its value, as in data.batch_rows=512"),
        ("mesh.fsdp=0", "mesh.fsdp is 0; give a positive size, or -1"),
        ("optim.lr_rules=vision", "optim.lr_rules must be a list, each item a pair (a string, a number), not 'vision'"),
        ("optim.lr_rules=[('a', 'b')]", "optim.lr_rules[0][1] must be a number, not 'b'"),
        ("optim.lr_rules=['a']", "optim.lr_rules[0] must be a pair (a string, a number), not 'a'"),
    ],
)
def test_override_refused(override, message):
    assert message in refused(TINY, override)


def test_file_value_of_wrong_type(tmp_path):
    for line, message in (
        ("{'optim': {'steps': 'abc'}}", "optim.steps must be an integer, not 'abc'"),
        ("{'optim': {'stepz': 1}}", "there is no field 'optim.stepz'; did you mean 'optim.steps'?"),
        ("{'data': {'path': 3}}", "data.path must be a string, not 3"),
        ("3", "must return a ConfigDict or a dict, not int"),
    ):
        path = write(tmp_path, f"def get_config():\n    return {line}\n")
        error = refused(path)
        assert message in error and path in error
    shipped = Path(TINY).read_text().replace("return c", "c.optim.steps = 'abc'\n    return c")
    assert "optim.steps must be an integer, not 'abc'" in refused(write(tmp_path, shipped))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "mine.py: SyntaxError: '{' was never closed (mine.py, line 1)"),
        ("x = 1", "has no function get_config"),
        ("import nothing_here", "mine.py: ModuleNotFoundError: No module named 'nothing_here' (line 1)"),
        ("def get_config():\n    return {'seed': sed}", "mine.py: NameError: name 'sed' is not defined (line 2)"),
        ("raise SystemExit('over')", "mine.py: SystemExit: over (line 1)"),
        ("def get_config():\n    int('x')", "mine.py: invalid literal for int() with base 10: 'x' (line 2)"),
    ],
)
def test_file_that_fails(tmp_path, text, message):
    assert message in refused(write(tmp_path, text))


def test_file_that_cannot_be_read(tmp_path):
    assert "--config: nothing.py does not exist; give a file like" in refused("nothing.py")
    assert "does not exist" in refused(str(tmp_path))
    (tmp_path / "mine.md").write_text("# A page\n\nNot a program.")
    assert "mine.md: SyntaxError: invalid syntax" in refused(str(tmp_path / "mine.md"))
    (tmp_path / "mine.json").write_text("{}")
    assert "mine.json: it has no function get_config" in refused(str(tmp_path / "mine.json"))
    (tmp_path / "mine.bin").write_bytes(b"\0\1")
    assert "null bytes" in refused(str(tmp_path / "mine.bin"))


def test_variant_that_does_not_exist():
    assert "configs/tiny.py has the variants '' and 'long', not 'x'" in refused(f"{TINY}:x")
    assert refused("configs/finetune.py:x") == "--config=configs/finetune.py:x: it has no variants; leave out ':x'"


def test_prepare_gathers_overrides():
    words = ["--config=a.py", "--config.optim.steps=5", "--set", "a=1", "b=2", "--run=r", "--set=c=3", "--config.d=4"]
    overrides = ["a=1", "b=2", "c=3", "config.optim.steps=5", "config.d=4"]
    assert prepare(words) == ["--run=r", "--config", "a.py", "--set", *overrides]
    assert prepare(["--config", "a.py", "--replay", "3"]) == ["--replay", "3", "--config", "a.py"]
    assert prepare(["--help"]) == ["--help"]
    with pytest.raises(ValueError, match=r"--config\.optim\.steps: give the value after an equals sign"):
        prepare(["--config.optim.steps", "5"])


def test_load_config_defaults(tmp_path):
    assert load_config(write(tmp_path, "def get_config(): return {}")) == RunConfig() == load_config("")


def test_prepare_prints_every_field_of_a_configuration(capsys):
    with pytest.raises(SystemExit) as exit_:
        prepare(["--config=configs/tiny.py", "--config.data.epochs=7", "--help"])
    page = capsys.readouterr().out
    assert exit_.value.code == 0

    def flags(cls: Any, prefix: str) -> Iterator[str]:
        for name, hint in field_types(cls).items():
            hint = without_none(hint)
            yield from flags(hint, f"{prefix}.{name}") if dataclasses.is_dataclass(hint) else [f"{prefix}.{name}"]

    missing = [flag for flag in flags(RunConfig, "--config") if f"{flag} " not in page]
    assert missing == ["--config.model.projector.merge_size"]  # configs/tiny.py does not set this group
    assert re.search(r"--config\.data\.epochs INT[^-]*\(default: 7\)", page)
    undocumented = re.findall(r"(--config\.\S+) [^\n]*\n[│ ]*\(default", page)
    assert not undocumented
    assert "Seed for example order and the validation split." in page
