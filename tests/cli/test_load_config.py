"""Configurations from files and overrides: what is accepted, and one sentence for everything else."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phivision_jax.cli.load_config import load_config, prepare
from phivision_jax.cli.main import main
from phivision_jax.config import field_types, without_none
from phivision_jax.training.run_config import RunConfig
from tests.support.mutations import damage_bytes
from tests.support.paths import ROOT

TINY, RECIPE = "configs/tiny.py", "configs/phi4_rv_15b.py"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Tests before this one may have used JAX, which then cannot look for other processes."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")


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
    (tmp_path / "mine.txt").write_text("{}")
    assert "mine.txt: it has no function get_config" in refused(str(tmp_path / "mine.txt"))
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


def test_numbers_out_of_range_and_long_values_are_refused_in_short(tmp_path):
    numbers = ["data.batch_rows=0", "data.length=-1", "microbatches=-1", "optim.learning_rate=nan", "eval_batch=0"]
    for override in [*numbers, "data.epochs=0", "guard.spike=inf", f"optim.steps={'9' * 4000}"]:
        name = override.partition("=")[0]
        assert re.fullmatch(
            rf"--config={TINY}: {name} is .{{1,101}}; give a number of at least \d", refused(TINY, override)
        )
    assert len(refused(TINY, f"dtype={'x' * 200_000}")) < 400
    assert "no field '1'" in refused(write(tmp_path, "def get_config(): return {1: 2}"))


@pytest.mark.parametrize("name", ["train", "preflight", "eval"])
def test_value_of_the_wrong_kind_is_the_same_sentence_in_every_command(name, capsys):
    words = {"train": ["--run=nowhere"], "preflight": ["--topology=v5e:2x2"], "eval": ["nowhere"]}[name]
    with pytest.raises(SystemExit) as ended:
        main([name, f"--config={TINY}", *words, "--set", "data.batch_rows=abc"])
    sentence = "phivision: --set data.batch_rows=abc: data.batch_rows must be an integer, not 'abc'\n"
    assert capsys.readouterr().err == sentence and ended.value.code == 1


def test_very_long_value_is_printed_in_part(capsys):
    for word in (f"--config={'x' * 5000}.py", f"--config={TINY}:{'x' * 5000}", f"--set=wandb.{'x' * 5000}=1"):
        with pytest.raises(SystemExit):
            main(["train", "--run=nowhere", f"--config={TINY}", word])
        assert len(capsys.readouterr().err) < 600


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_of_a_script_ends_well_and_loads_no_jax(script):
    code = (
        f"import runpy, sys\nsys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}', run_name='__main__')\n"
    )
    code += "finally: print('jax' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "False\n" and done.stdout.startswith("usage: phivision ")


def sentence_of(spec: str, *overrides: str) -> str:
    """The error of a configuration; empty for one that can be used."""
    try:
        load_config(spec, overrides)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mutated_configuration_is_one_sentence_that_names_the_file(tmp_path):
    """Python and JSON, 2,000 mutations in all; the seeds are fixed, so that no mutation runs forever."""
    python = Path(TINY).read_bytes().partition(b"def get_config")
    python = (python[0], b"".join(python[1:]))
    text = json.dumps(dataclasses.asdict(load_config(TINY)), indent=1).encode()
    refusals = 0
    for i in range(1_000):
        path = Path(write(tmp_path, ""))
        path.write_bytes(python[0] + damage_bytes(python[1], random.Random(i)))
        (tmp_path / "config.json").write_bytes(damage_bytes(text, random.Random(i)))
        for spec in (str(path), f"{tmp_path}/config.json"):
            if sentence := sentence_of(spec):
                refusals += 1
                assert sentence.startswith((f"--config={spec}", spec)), (i, sentence)
                assert "\n" not in sentence and len(sentence) < 1000, (i, sentence)
    assert refusals > 1_000


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mutated_override_is_one_sentence_that_names_the_flag(tmp_path):
    spec = f"{tmp_path}/config.json"
    Path(spec).write_text(json.dumps(dataclasses.asdict(load_config(TINY))))
    sound = [
        "optim.steps=500",
        "data.batch_rows=16",
        "optim.learning_rate=1e-4",
        "mesh.fsdp=2",
        "data.path=x",
        "remat=full",
    ]
    sound += [
        'optim.lr_rules=(("vision", 0.0), (".", 1.0))',
        "model.vision.num_heads=2",
        "guard.spike=3.5",
        "wandb=None",
    ]
    sound += ["optim.tokens=1000000", "data.length=128", "model.decoder.num_kv_heads=1", "lora.rank=8", "seed=3"]
    refusals = 0
    for i in range(2_000):
        override = damage_bytes(sound[i % len(sound)].encode(), random.Random(i)).decode(errors="replace")
        if sentence := sentence_of(spec, override):
            refusals += 1
            assert (
                sentence.startswith(("--set ", f"--config={spec}: ")) and "\n" not in sentence and len(sentence) < 1000
            ), (i, sentence)
    assert refusals > 1_000
