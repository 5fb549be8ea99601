"""A model of a few thousand random weights with the small tokenizer: it answers nonsense, and any text is possible.

python -m tests.support.small_model DIR      # writes it as a checkpoint, for phivision serve
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from phivision_jax.models import phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from tests.support.batches import QUICK, TINY
from tests.support.checkpoints import save_checkpoint

_TOKENS: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 507, "eos_token_id": 508, "pad_token_id": 509}
CONFIG = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, max_positions=1024, **_TOKENS))


def small_model() -> tuple[PhiVision, Processor]:
    """The model and its processor."""
    graphdef, _ = phivision.abstract(CONFIG)
    params = jax.jit(lambda: PhiVision(CONFIG, rngs=nnx.Rngs(0)).split()[1], compiler_options=QUICK)()
    return phivision.merge(graphdef, params), Processor.small(CONFIG)


def write_small_model(directory: Path) -> Path:
    """A checkpoint of it."""
    model, processor = small_model()
    save_checkpoint(directory, model.split()[1], CONFIG)
    processor.save(directory / "assets")
    return directory


if __name__ == "__main__":
    write_small_model(Path(sys.argv[1]).absolute())
