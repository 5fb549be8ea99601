"""``phivision data`` as users type it: output and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phivision_jax.cli import data
from phivision_jax.cli.main import main
from phivision_jax.data.sources import easy_vqa
from phivision_jax.data.store.dataset import Dataset
from tests.support.records import png

COMMAND = [sys.executable, "-m", "phivision_jax.cli", "data"]


def test_closed_pipe_is_no_error():
    """As in ``phivision data import --help | head -1``."""
    process = subprocess.Popen([*COMMAND, "import", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)


@dataclasses.dataclass
class Done:
    code: Any
    stdout: str
    stderr: str


@pytest.fixture
def phivision(monkeypatch, capsys) -> Callable[..., Done]:
    """Runs the command in this process: starting another takes seconds."""

    def call(*words: str | Path, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["phivision", "data", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        found = 0
        try:
            main()
        except SystemExit as ended:
            found = ended.code
        printed = capsys.readouterr()
        assert found == code, printed
        return Done(found, printed.out, printed.err)

    return call


def write_llava(folder: Path, n: int, bad: int = 0) -> Path:
    """Write data.json in LLaVA's form and its images, of which ``bad`` are missing."""
    (folder / "images").mkdir(parents=True)
    for i in range(5):
        (folder / "images" / f"{i}.png").write_bytes(png(8 * (i + 1), 16, seed=i))
    items = [
        {
            "id": f"item-{i}",
            "image": f"images/{i % 5}.png" if i >= bad else "images/missing.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nis shape {i} red?"},
                {"from": "gpt", "value": "<think>red</think>yes" if i % 4 == 0 else "no"},
            ],
        }
        for i in range(n)
    ]
    (folder / "data.json").write_text(json.dumps(items))
    return folder / "data.json"


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_import_validate_export_and_import(phivision, tmp_path):
    source = write_llava(tmp_path / "llava", 40)
    done = phivision("import", source, tmp_path / "set", "--task", "math", "--name", "shapes", "--workers", "0")
    assert [line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("  ")] == [
        ["records", "40"],
        ["images", "40"],
        ["text", f"tokens      {Dataset.open(tmp_path / 'set').manifest['text_tokens']:,}"],
        ["modes", "nothink 30, think 10"],
        ["modes", "are        default 30, inferred 10"],
        ["tasks", "math 40"],
    ]
    assert "30 of 40 records neither state nor show their mode" in done.stderr
    assert "erode the model's own choice to think" in done.stderr
    again = phivision("import", source, tmp_path / "set", "--task", "math", "--name", "shapes")
    assert f"{tmp_path / 'set'} exists already" in again.stdout
    other = phivision("import", source, tmp_path / "set", code=1)
    assert "made from other data or with other options; remove it" in other.stderr
    assert '  source.name: "shapes", now "data"\n  source.options.task: "math", now "general"' in other.stderr

    done = phivision("validate", tmp_path / "set", "--workers", "0")
    assert "problems         0" in done.stdout and "40 (decoded)" in done.stdout
    assert "40 records" in phivision("export", tmp_path / "set", tmp_path / "out", "--format", "messages").stdout
    phivision("import", tmp_path / "out" / "data.jsonl", tmp_path / "back", "--workers", "0")
    first, back = Dataset.open(tmp_path / "set"), Dataset.open(tmp_path / "back")
    assert first.hash == back.hash and [first[i] for i in range(40)] == [back[i] for i in range(40)]


def test_import_stops_at_bad_share(phivision, tmp_path):
    source = write_llava(tmp_path / "llava", 40, bad=3)
    done = phivision("import", source, tmp_path / "set", "--workers", "0", code=1)
    assert "3 of 40 records are bad, more than the 1.00%" in done.stderr
    assert "e.g. 'item-0'" in done.stderr and "continues from there" in done.stderr
    other = phivision("import", source, tmp_path / "set", "--workers", "0", "--max-bad", "0.1", "--task", "ocr", code=1)
    assert (
        f"{tmp_path / '.set.partial'} has the chunks of an interrupted run" in other.stderr
        and "--restart" in other.stderr
    )
    assert '  source.options.task: "general", now "ocr"' in other.stderr
    words = ["--workers", "0", "--max-bad", "0", "--task", "ocr", "--restart"]
    assert "continuing" not in phivision("import", source, tmp_path / "set", *words, code=1).stdout
    words = ["--workers", "0", "--max-bad", "0", "--restart"]
    assert "continuing" not in phivision("import", source, tmp_path / "set", *words, code=1).stdout
    done = phivision("import", source, tmp_path / "set", "--workers", "0", "--max-bad", "0.1")
    assert "continuing: 1 of 1 chunks are complete" in done.stdout
    assert f"image-missing 3: {tmp_path / 'set' / 'quarantine.jsonl'}" in done.stdout
    lines = (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["item-0", "item-1", "item-2"]


def test_validate_lists_damage(phivision, tmp_path):
    phivision("import", write_llava(tmp_path / "llava", 8), tmp_path / "set", "--workers", "0")
    index = tmp_path / "set" / "index" / "modes.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\7")
    done = phivision(
        "validate", tmp_path / "set", "--headers-only", "--workers", "0", "--out", tmp_path / "wrong.jsonl", code=1
    )
    assert "index/modes.npy: '': file: its sha256 is not the manifest's" in done.stdout
    assert json.loads((tmp_path / "wrong.jsonl").read_text())["reason"] == "file"
    index.write_bytes(index.read_bytes()[:-1])
    done = phivision("validate", tmp_path / "set", "--headers-only", "--workers", "0", code=1)
    assert "index/modes.npy: '': file: it cannot be read: " in done.stdout and "cut-off copy" in done.stdout


def test_validate_of_broken_images_names_the_remedy(phivision, tmp_path):
    write_llava(tmp_path / "llava", 4)
    for image in (tmp_path / "llava").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:-100])
    phivision("import", tmp_path / "llava" / "data.json", tmp_path / "set", "--workers", "0")
    done = phivision("validate", tmp_path / "set", "--workers", "0", code=1)
    assert "image-broken" in done.stdout
    assert done.stdout.endswith("import its data again with --decode, which leaves out broken images\n")


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["import", "nowhere.json", "out"], 1, "nowhere.json"),
        (["import", "data.json", "out", "--rename", "question"], 1, "write it as theirs=ours"),
        (["import", "data.json", "out", "--task", " "], 1, "must be a name of 1 to 64"),
        (["import", "data.json", "out", "--max-bad", "2"], 1, "between 0 and 1"),
        (["import", "data.json", "out", "--images", "nowhere"], 1, "--images nowhere: there is no such folder"),
        (
            ["import", "data.json", "out", "--also-allow", ".", "data.json"],
            1,
            "--also-allow data.json: there is no such",
        ),
        (["import", "data.json", "out", "--workers", "-1"], 1, "0 or more"),
        (["import", "data.json", "out", "--formt", "json"], 2, "--formt"),
        (["import", "data.json", "out", "--checkpoint", "nowhere"], 1, "nowhere"),
        (["import", "data.json"], 2, "OUT"),
        (["validate", "nowhere"], 1, "no dataset in nowhere"),
        (["export", "nowhere", "out"], 1, "no dataset in nowhere"),
    ],
)
def test_mistakes_are_one_sentence(phivision, tmp_path, monkeypatch, words, code, message):
    write_llava(tmp_path / "llava", 3)
    monkeypatch.chdir(tmp_path / "llava")
    done = phivision(*words, code=code)
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "llava" / "out").exists()


def test_import_prints_files_of_folder(phivision, tmp_path):
    folder = tmp_path / "llava"
    source = write_llava(folder, 4)
    (folder / "test-0.json").write_bytes(source.read_bytes())
    source.rename(folder / "part-0.json")
    done = phivision("import", folder, tmp_path / "set", "--workers", "0")
    assert "reading 1 file of the folder (part-0.json); left out: 1 (test-0.json)" in done.stdout
    assert len(Dataset.open(tmp_path / "set")) == 4
    done = phivision("import", folder / "part-0.json", tmp_path / "other", "--workers", "0")
    assert "of the folder" not in done.stdout


def test_import_quarantines_contradicting_modes(phivision, tmp_path):
    answers = {"stated": "<think>a</think>b", "r1": "a</think>b", "mentioned": "<|dummy_84|>write <think>"}
    items = [
        {"id": id, "question": "?", "answer": answer, **({"mode": "nothink"} if id == "stated" else {})}
        for id, answer in answers.items()
    ]
    (tmp_path / "data.json").write_text(json.dumps(items))
    phivision("import", tmp_path / "data.json", tmp_path / "set", "--workers", "0", "--max-bad", "1")
    lines = map(json.loads, (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines())
    assert [(line["id"], line["reason"]) for line in lines] == [("stated", "mode"), ("mentioned", "mode")]
    dataset = Dataset.open(tmp_path / "set")
    assert dataset[0].messages[1]["content"] == "<think>a</think>b"
    assert dataset.manifest["counts"]["mode_from"] == {"inferred": 1}


def test_import_reports_system_messages(phivision, tmp_path, monkeypatch):
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "a", "messages": messages, "mode": "nothink"}) + "\n")
    done = phivision("import", tmp_path / "data.jsonl", tmp_path / "set", "--workers", "0")
    assert "system messages  1: the template keeps them" in done.stdout and "erode" not in done.stderr
    monkeypatch.setattr(data, "_keeps_system_messages", lambda processor: False)
    done = phivision("import", tmp_path / "data.jsonl", tmp_path / "other", "--workers", "0")
    assert "1: the template drops them; --system user keeps" in done.stdout
    done = phivision("import", tmp_path / "data.jsonl", tmp_path / "user", "--workers", "0", "--system", "user")
    assert "system messages  1: put before the first user message" in done.stdout
    done = phivision("import", tmp_path / "data.jsonl", tmp_path / "drop", "--workers", "0", "--system", "drop")
    assert "system messages  1: dropped (--system drop)" in done.stdout


def test_import_names_fields_that_it_does_not_read(phivision, tmp_path):
    source = write_llava(tmp_path / "llava", 8)
    items = json.loads(source.read_text())
    for i, item in enumerate(items):
        item |= {"note": f"n{i}", "difficulty": 3} | ({"\x1b[31m": [i]} if i > 5 else {})
        item["conversations"][0]["emotion"] = "calm"
    items[1]["rejected"] = "no"
    source.write_text(json.dumps(items))
    done = phivision("import", source, tmp_path / "set", "--workers", "0", "--max-bad", "0.5")
    lines = done.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  not read"))
    assert lines[first : first + 3] == [
        "  not read         emotion of messages 7 (e.g. 'calm')",
        "                   note 7 (e.g. 'n0')",
        "                   ?[31m 2 (e.g. [6])",
    ]
    assert "unread 1" in done.stdout
    assert Dataset.open(tmp_path / "set").manifest["counts"]["unread"]["note"] == [7, "'n0'"]


def test_import_easy_vqa(phivision, tmp_path, monkeypatch):
    """The command of the README and the demo, with the first images of the real set."""
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(easy_vqa, "easy_vqa", functools.partial(easy_vqa.easy_vqa, max_images=5))
    words = ["import", "easy-vqa", tmp_path / "data", "--questions-per-record", "3", "--workers", "0"]
    phivision(*words)
    train, test = Dataset.open(tmp_path / "data" / "train"), Dataset.open(tmp_path / "data" / "test")
    assert len(train[0].messages) == 6 and len(test[0].messages) == 2
    assert (train[0].source, train.manifest["counts"]["mode_from"]) == ("easy_vqa/train", {"stated": len(train)})
    done = phivision(*words)
    assert done.stdout.splitlines() == [f"{tmp_path / 'data' / part} exists already" for part in ("train", "test")]
    done = phivision(*words[:3], "--workers", "0", code=1)
    assert "made from other data or with other options" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_import_interrupted(tmp_path, sent):
    """A signal to the process group, as from a terminal or a scheduler: one line, and the chunks stay."""
    source = write_llava(tmp_path / "llava", 9_000)
    process = subprocess.Popen(
        [*COMMAND, "import", str(source), str(tmp_path / "set"), "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Background jobs of a shell ignore Ctrl-C, and so would their children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    chunks = tmp_path / ".set.partial" / "chunks"
    while process.poll() is None and not list(chunks.glob("*")):
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, out + err
    assert err.splitlines()[-2:] == [
        "phivision: interrupted",
        f"completed chunks are in {tmp_path / '.set.partial'}; the same command continues from there",
    ]
    assert "Traceback" not in err and list(chunks.glob("*")) and not (tmp_path / "set").exists()


@pytest.mark.slow
def test_import_survives_ten_kills(tmp_path):
    """SIGKILL to the process group at ten random moments, each time with another number of workers."""
    source = write_llava(tmp_path / "llava", 40_000, bad=20)
    subprocess.run([*COMMAND, "import", source, tmp_path / "undisturbed", "--workers", "2"], check=True)
    rng, chunks = random.Random(0), tmp_path / ".set.partial" / "chunks"
    hit = 0
    for kill in range(10):
        before = len(list(chunks.glob("*")))
        process = subprocess.Popen(
            [*COMMAND, "import", str(source), str(tmp_path / "set"), "--workers", str(kill % 3)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        more = rng.choice([0, 0, 1, 2])
        while process.poll() is None and len(list(chunks.glob("*"))) < min(before + more, 20):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.killpg(process.pid, signal.SIGKILL)
            hit += 1
        process.wait()
        print(f"kill {kill}: {before} chunks before, {len(list(chunks.glob('*')))} after")
    assert hit >= 8
    subprocess.run([*COMMAND, "import", source, tmp_path / "set"], check=True)
    assert content(tmp_path / "set") == content(tmp_path / "undisturbed")
    assert Dataset.open(tmp_path / "set").hash == Dataset.open(tmp_path / "undisturbed").hash
