"""Write a random bfloat16 checkpoint of about a given size in the released layout, without holding it in memory.

    python benchmarks/make_checkpoint.py DIR --gb 6

It has 40 decoder layers and 27 vision layers as released, and the width follows from the size. The values are random
bits with |x| < 2: incompressible, and never NaN.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.convert.hf import INDEX, plan_shards
from phivision_jax.convert.hf_config import config_json
from phivision_jax.convert.mapping import hf_shapes, model_leaves

_BLOCK = 16_000_000


def config_of(gigabytes: float) -> ModelConfig:
    """Configuration with the released proportions and the width D where 536·D² + 2·V·D parameters have this size."""
    vocab, want = DecoderConfig.vocab_size, gigabytes * 1e9 / 2
    width = (-2 * vocab + math.sqrt((2 * vocab) ** 2 + 4 * 536 * want)) / (2 * 536)
    d = max(64, round(width / 64) * 64)
    c = max(16, round(d * 1152 / 5120 / 16) * 16)
    return ModelConfig(
        vision=VisionConfig(hidden_size=c, intermediate_size=round(c * 4304 / 1152)),
        decoder=DecoderConfig(hidden_size=d, intermediate_size=d * 7 // 2, num_heads=32, num_kv_heads=8),
    )


def make(directory: tyro.conf.Positional[Path], gb: float = 6.0, shard_gb: float = 1.5, seed: int = 0) -> None:
    """Write the checkpoint.

    Args:
        directory: Output directory; must not exist.
        gb: Size of the weights in 10⁹ bytes.
        shard_gb: Largest size of a shard.
        seed: Seed of the random bits.
    """
    config = config_of(gb)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {name: (bfloat16, shape) for name, shape in hf_shapes(model_leaves(config)).items()}
    headers, index = plan_shards(tensors, int(shard_gb * 1e9))
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    total = 0
    for file, header in headers.items():
        entries = [value for name, value in json.loads(header[8:]).items() if name != "__metadata__"]
        left = max(value["data_offsets"][1] for value in entries)
        total += left
        with (directory / file).open("wb") as f:
            f.write(header)
            while left:
                bits = rng.integers(0, 1 << 16, min(left, _BLOCK) // 2, np.uint16) & np.uint16(0xBFFF)
                left -= f.write(bits.tobytes())
    if index is not None:
        (directory / INDEX).write_bytes(index)
    values = {**config_json(config), "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"{directory}: {len(tensors)} tensors in {len(headers)} shards, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    tyro.cli(make)
