"""A model whose next token depends on the last one alone, so that every distribution and every answer is known."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phivision_jax.config import DecoderConfig, ModelConfig
from phivision_jax.models import phivision
from phivision_jax.models.phivision import PhiVision
from phivision_jax.processor import Processor
from tests.support.batches import TINY

V = 512
CONFIG = ModelConfig(
    vision=TINY.vision,
    decoder=DecoderConfig(
        vocab_size=V,
        hidden_size=V,  # an axis for every token
        intermediate_size=8,
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        bos_token_id=507,
        eos_token_id=508,
        pad_token_id=509,
    ),
    min_patches=1,
    max_patches=64,
)
IMPOSSIBLE = -60.0
"""The logit of a token that does not follow."""


@functools.cache
def processor() -> Processor:
    return Processor.small(CONFIG)


def markov_model(follows: Mapping[int, Mapping[int, float]]) -> PhiVision:
    """A model in which each token is followed by others with given probabilities; others by all, equally."""
    logits = np.full((V, V), -np.log(V))
    for token, chances in follows.items():
        logits[token] = IMPOSSIBLE
        logits[token, list(chances)] = np.log(list(chances.values()))
    graphdef, state = phivision.abstract(CONFIG)
    params = nnx.to_pure_dict(nnx.map(lambda _, leaf: np.zeros(leaf.shape, np.float32), state))
    # Layers add nothing. The norm scales an axis of length 1 by √V, but for its epsilon.
    decoder = params["decoder"]
    decoder["embed_tokens"]["embedding"] = np.eye(V, dtype=np.float32)
    decoder["norm"]["scale"] = np.ones(V, np.float32)
    scale = 1 / np.sqrt(1 / V + CONFIG.decoder.rms_norm_eps)
    decoder["lm_head"]["kernel"] = (logits.T / scale).astype(np.float32)
    return phivision.merge(graphdef, jax.tree.map(jnp.asarray, params))


def chain(*scripts: Sequence[int | str]) -> dict[int, dict[int, float]]:
    """``follows`` for scripts of texts and tokens: in all of them together a token is followed by one other."""
    follows: dict[int, dict[int, float]] = {}
    for script in scripts:
        ids = [i for part in script for i in ([part] if isinstance(part, int) else processor().tokenizer.encode(part))]
        for before, after in itertools.pairwise(ids):
            assert follows.get(before, {after: 1.0}) == {after: 1.0}, f"token {before} has two successors"
            follows[before] = {after: 1.0}
    return follows
