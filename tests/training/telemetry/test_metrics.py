"""Metrics after a resume; the same numbers in TensorBoard and W&B; only the first process writes."""

import json
import sys
import threading
import types

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventFileWriter

from phivision_jax.checkpoint.layout import COMMAND, CONFIG
from phivision_jax.training.telemetry.metrics import MetricsWriter, read_metrics


def test_writer_drops_steps_beyond_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1 / step, "elapsed_s": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed here
    writer = MetricsWriter(tmp_path, 20)
    assert writer.elapsed == 20.0
    writer.write(30, {"loss": 7.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 7.0)]
    MetricsWriter(tmp_path).close()  # from the beginning
    assert read_metrics(tmp_path) == []


def test_writer_of_other_processes_does_nothing(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"loss": 1.0, "elapsed_s": 3.0})
    writer.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = MetricsWriter(tmp_path, 10, wandb="a project")
    other.write(20, {"loss": 2.0})
    other.write_images(20, "samples", [Image.new("RGB", (2, 2))])
    other.close()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert other.elapsed == 3.0  # all processes continue from there


def test_write_images_to_tensorboard(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(EventFileWriter, "add_event", lambda self, event: events.append(event))
    writer = MetricsWriter(tmp_path)
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    writer.write_images(5, "samples", [image, image.convert("L")])
    writer.close()
    values = [(event.step, value) for event in events for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [
        (5, "samples/0"),
        (5, "samples/1"),
    ]
    shown = values[0][1].image
    assert (shown.height, shown.width, shown.colorspace) == (2, 3, 3)
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "shown.png")), np.asarray(image))


def test_configuration_and_command_are_text_in_tensorboard(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(EventFileWriter, "add_event", lambda self, event: events.append(event))
    (tmp_path / CONFIG).write_text('{\n  "seed": 3\n}\n')
    (tmp_path / COMMAND).write_text("phivision train --run=r\n")
    MetricsWriter(tmp_path).close()
    texts = {v.tag: v.tensor.string_val[0].decode() for event in events for v in event.summary.value}
    assert texts["config/text_summary"] == '    {\n      "seed": 3\n    }\n'  # indented: code in Markdown
    assert texts["command/text_summary"] == "    phivision train --run=r\n"


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that records its calls."""
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: calls.append(("define_metric", args, kwargs)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: calls.append(("init", kwargs)) or run
    module.Image = lambda image: ("image", image.size)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_continues_under_one_id(tmp_path, wandb):
    for first in (0, 10):
        writer = MetricsWriter(tmp_path, first, wandb="phi", config={"seed": 3})
        writer.write(first + 10, {"loss": 1.5})
        writer.write_images(first + 10, "samples", [Image.new("RGB", (4, 2))])
        writer.close()
    inits = [call[1] for call in wandb if call[0] == "init"]
    assert inits[0] == inits[1]
    assert inits[0] | {"id": ""} == {
        "project": "phi",
        "id": "",
        "resume": "allow",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": {"seed": 3},
    }
    assert len(inits[0]["id"]) == 8 and inits[0]["id"] == (tmp_path / "wandb_id").read_text()
    # The step is an ordinary value: W&B's own counter cannot go back.
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb
    logs = [call[1] for call in wandb if call[0] == "log"]
    assert logs[0] == {"step": 10, "loss": 1.5} and logs[2] == {"step": 20, "loss": 1.5}
    assert logs[1] == {"step": 10, "samples": [("image", (4, 2))]}
    assert wandb[-1] == ("finish",)


def test_wandb_that_does_not_start(tmp_path, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ValueError, match=r"W&B does not start: No API key configured; run `wandb login`"):
        MetricsWriter(tmp_path, 0, wandb="phi")


def test_write_omits_values_that_are_not_finite(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0, "validation/loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_missing_wandb_package_drops_nothing(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"loss": 1.0})
    writer.write(20, {"loss": 1.0})
    writer.close()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"wandb is 'phi', but the package is not installed: pip install"):
        MetricsWriter(tmp_path, 10, wandb="phi")
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_full_disk_loses_events_of_tensorboard_only(tmp_path):
    """Its thread would die, and its queue of ten would block the next step forever."""
    writer = MetricsWriter(tmp_path)
    file = writer._board.file_writer.event_writer._ev_writer._py_recordio_writer

    def full(*_):
        raise OSError(28, "No space left on device")

    file.write = file.flush = file.close = full

    def train():
        for step in range(1, 41):
            writer.write(step, {"loss": 1.0, "weight": 2.0})
        writer.close()

    training = threading.Thread(target=train, daemon=True)
    training.start()
    training.join(60)
    assert not training.is_alive() and len(read_metrics(tmp_path)) == 40
