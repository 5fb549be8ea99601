"""The recipe's three stages in sequence at the small size, from a text model, a SigLIP-2 and a fresh projector."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert.hf_config import config_json
from phivision_jax.data.records import Record
from phivision_jax.data.sources.easy_vqa import easy_vqa
from phivision_jax.processor import Processor
from phivision_jax.training.telemetry.metrics import read_metrics
from tests.support.datasets import write_dataset
from tests.support.paths import ROOT
from tests.support.released_layout import random_tensors, text_shapes, vision_shapes, write_hf
from tests.support.runs import environment, finish

VISION = VisionConfig(hidden_size=128, intermediate_size=256, num_layers=4, num_heads=2, patch_size=8)
DECODER = DecoderConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=3, num_heads=2, num_kv_heads=1,
    bos_token_id=507, eos_token_id=508, pad_token_id=509, rope_theta=10_000.0, max_positions=1024,
)  # fmt: skip
MODEL = ModelConfig(vision=VISION, decoder=DECODER, min_patches=64, max_patches=64)
RATES = {"stage1": 1e-3, "stage2": 2e-5, "stage3": 1e-5}
RULES = {
    "stage1": '(("projector", 1.0), (".", 0.0))',
    "stage2": '(("projector", 1.0), ("vision", 1.0), ("decoder", 0.5))',
    "stage3": '(("projector", 1.0), ("vision", 1.0), ("decoder", 0.5))',
}
SIZES = {"stage1": (8, 240, 128), "stage2": (8, 480, 256), "stage3": (8, 16_384, 9_984)}
STEPS = {"stage1": 6, "stage2": 4, "stage3": 2}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint composed of a text model and a SigLIP-2."""
    folder = tmp_path_factory.mktemp("start")

    def sensible(shapes: dict) -> dict[str, np.ndarray]:
        """Norms 1, biases 0, matrices that keep the scale."""
        tensors = random_tensors(shapes, np.float32)
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensor[:] = "norm" in name and name.endswith("weight")
            else:
                tensor *= tensor.shape[-1] ** -0.5
        return tensors

    text = DECODER.hidden_size, DECODER.intermediate_size, DECODER.num_layers, DECODER.num_heads, DECODER.num_kv_heads
    both = config_json(MODEL)
    vision_config = both.pop("vision_config")
    config = {name: value for name, value in both.items() if "mm_" not in name and "patches" not in name}
    decoder = write_hf(
        folder / "text", config | {"model_type": "phi3"}, sensible(text_shapes(*text, DECODER.vocab_size)), 2
    )
    Processor.small(MODEL).save(folder / "assets")
    for file in (folder / "assets").iterdir():
        (decoder / file.name).write_bytes(file.read_bytes())
    sizes = VISION.hidden_size, VISION.intermediate_size, VISION.num_layers, VISION.patch_size, VISION.num_positions
    vision = sensible(vision_shapes(*sizes, prefix="vision_model"))
    siglip = write_hf(folder / "siglip", {"model_type": "siglip2", "vision_config": vision_config}, vision, 1)
    out = folder / "start"
    finish([sys.executable, "-m", "convert", "to-jax", str(out), "--decoder", str(decoder), "--vision", str(siglip)])
    return out


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Real images with questions, and text-only records that think."""
    folder = tmp_path_factory.mktemp("data")
    processor = Processor.small(MODEL)

    def thought(i: int) -> Record:
        answer = f"<think>{i} and {i + 1} make {2 * i + 1}</think>{2 * i + 1}"
        messages = ({"role": "user", "content": f"{i} + {i + 1}?"}, {"role": "assistant", "content": answer})
        return Record(str(i), "sums", (), messages, "think", "math", {})

    images = easy_vqa("train", questions_per_record=3, max_images=300)
    write_dataset(folder / "images", images, processor)
    write_dataset(folder / "sums", [thought(i) for i in range(3000)], processor)
    (folder / "mix.toml").write_text(
        '[[sources]]\npath = "images"\n[[sources]]\npath = "sums"\n'
        '[[stages]]\nname = "stage1"\nsources = ["images"]\nepochs = 2\n'
        '[[stages]]\nname = "stage2"\nreasoning_share = 0.2\nepochs = 2\n'
        '[[stages]]\nname = "stage3"\nreasoning_share = 0.2\nepochs = 20\n'
    )
    return folder / "mix.toml"


def words(stage: str, run: Path, init_from: Path, mixture: Path) -> list[str]:
    rows, length, patches = SIZES[stage]
    return [
        sys.executable, "train.py", "--config=configs/tiny.py", f"--run={run}", f"--config.init_from={init_from}",
        f"--config.data.path={mixture}", f"--config.data.stage={stage}", "--config.data.eval_path=",
        "--config.model.vision.num_positions=256", "--config.model.min_patches=64", "--config.model.max_patches=64",
        f"--config.data.batch_rows={rows}", f"--config.data.length={length}", f"--config.data.num_patches={patches}",
        f"--config.optim.learning_rate={RATES[stage]}", f"--config.optim.lr_rules={RULES[stage]}",
        f"--config.optim.steps={STEPS[stage]}", "--config.optim.warmup_steps=2", "--config.log_every=1",
    ]  # fmt: skip


@pytest.mark.slow
def test_three_stages_from_two_models(start, mixture, tmp_path):
    pytest.importorskip("easy_vqa")
    before = start
    for stage in SIZES:
        run = tmp_path / stage
        command = words(stage, run, before, mixture)
        assert "fsdp 8" in finish(command, environment(devices=8))
        rows = [row for row in read_metrics(run) if "loss" in row]
        assert len(rows) == STEPS[stage] and all(row["tokens"] > 0.8 * np.prod(SIZES[stage][:2]) for row in rows)
        # Rates are the stage's: each module's share of the peak after the warm-up.
        shares = {"stage1": (1.0, 0.0, 0.0)}.get(stage, (1.0, 1.0, 0.5))
        peak = max(row["lr/projector"] for row in rows)
        assert peak == pytest.approx(RATES[stage])
        for name, share in zip(("projector", "vision", "decoder"), shares, strict=True):
            assert [row[f"lr/{name}"] for row in rows] == pytest.approx([share * row["lr/projector"] for row in rows])
        if stage != "stage1":
            assert any("loss/think/math" in row for row in rows) and any("loss/nothink/general" in row for row in rows)
        if stage == "stage1":
            differing = subprocess.run(
                [sys.executable, "-m", "convert", "verify", str(start), str(run)],
                cwd=ROOT, env=environment(), capture_output=True, text=True,
            )  # fmt: skip
            names = re.findall(r"different: (\S+),", differing.stdout + differing.stderr)
            assert sorted(names) == [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("bias", "weight")]
        before = run
