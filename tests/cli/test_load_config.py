"""Configurations from files and overrides: what is accepted, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from phivision_jax.cli.load_config import gather_overrides, load_config
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
        ("optim.stepz=3", "--set optim.stepz=3: there is no field 'optim.stepz'; did you mean 'optim.steps'?"),
        ("optm.steps=3", "--set optm.steps=3: there is no field 'optm'; did you mean 'optim'?"),
        ("optim.steps.x=3", "--set optim.steps.x=3: optim.steps is an integer and has no fields"),
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
        said = refused(path)
        assert message in said and path in said
    shipped = Path(TINY).read_text().replace("return c", "c.optim.steps = 'abc'\n    return c")
    assert "optim.steps must be an integer, not 'abc'" in refused(write(tmp_path, shipped))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "mine.py, line 1: '{' was never closed"),
        ("x = 1", "has no function get_config"),
        ("import nothing_here", "mine.py, line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("def get_config():\n    return {'seed': sed}", "mine.py, line 2: NameError: name 'sed' is not defined"),
        ("raise SystemExit('over')", "mine.py, line 1: SystemExit: over"),
        ("def get_config():\n    int('x')", "mine.py, line 2: ValueError: invalid literal"),
    ],
)
def test_file_that_fails(tmp_path, text, message):
    assert message in refused(write(tmp_path, text))


def test_file_that_cannot_be_read(tmp_path):
    assert "--config: nothing.py does not exist; give a file like" in refused("nothing.py")
    assert "does not exist" in refused(str(tmp_path))
    (tmp_path / "mine.json").write_text("{}")
    assert "mine.json is not a Python file" in refused(str(tmp_path / "mine.json"))


def test_variant_that_does_not_exist():
    assert "configs/tiny.py has the variants '' and 'long', not 'x'" in refused(f"{TINY}:x")
    assert "configs/finetune.py has no variants; leave out ':x'" in refused("configs/finetune.py:x")


def test_gather_overrides():
    words = ["--config=a.py", "--config.optim.steps=5", "--set", "a=1", "b=2", "--run=r", "--set=c=3", "--config.d=4"]
    assert gather_overrides(words) == [
        "--config=a.py",
        "--run=r",
        "--set",
        "config.optim.steps=5",
        "a=1",
        "b=2",
        "c=3",
        "config.d=4",
    ]
    assert gather_overrides(["--config", "a.py"]) == ["--config", "a.py"]
    with pytest.raises(ValueError, match=r"--config\.optim\.steps: give the value after an equals sign"):
        gather_overrides(["--config.optim.steps", "5"])


def test_load_config_without_a_file_s_fields_is_the_default(tmp_path):
    assert load_config(write(tmp_path, "def get_config(): return {}")) == RunConfig()
