"""Only the listed programs are compiled, and nothing once they are."""

import contextlib

import jax
import numpy as np
import pytest

from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import MAX_TOP_LOGPROBS, Request
from tests.support.generation import random_image
from tests.support.markov import markov_model, processor

T = processor().tokenizer
LETTERS = range(64, 90)


@contextlib.contextmanager
def compilations():
    """The number of programs that JAX compiles or loads, small ones between the engine's included."""
    counted = [0]

    def listener(event, duration, **_):
        counted[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def random_model():
    """Letters, thoughts and ends at random."""
    follows = {i: dict.fromkeys([*LETTERS, T.eos_id, T.end_think_id], 1 / 28) for i in [*LETTERS, T.think_id]}
    (separator,) = T.encode("<|im_sep|>")
    start = {separator: dict.fromkeys([T.think_id, T.nothink_id, *LETTERS], 1 / 28)}
    return markov_model(follows | dict.fromkeys([T.nothink_id, T.end_think_id], follows[T.think_id]) | start)


def random_requests(rng, count):
    """Requests of all lengths and settings."""
    images = [random_image((2 * int(w), 2 * int(h)), i) for i, (w, h) in enumerate(rng.integers(1, 9, (40, 2)))]
    for i in range(count):
        shown = [images[j] for j in rng.integers(0, len(images), rng.integers(0, 4))]
        question = "is it red? " * int(rng.integers(1, 40)) + f"{i if rng.random() < 0.5 else 7}"
        yield Request(
            question,
            shown,
            mode=("auto", "think", "nothink")[rng.integers(3)],
            max_new_tokens=int(rng.integers(1, 60)),
            thinking_budget=None if rng.random() < 0.5 else int(rng.integers(0, 20)),
            temperature=0.0 if rng.random() < 0.3 else float(rng.uniform(0, 3)),
            top_p=1.0 if rng.random() < 0.5 else float(rng.uniform(0.1, 1)),
            top_k=0 if rng.random() < 0.5 else int(rng.integers(0, 600)),
            seed=int(rng.integers(2**62)),
            stop=("a", "xy")[: rng.integers(0, 3)],
            n=int(rng.integers(1, 4)),
            logprobs=None if rng.random() < 0.5 else int(rng.integers(0, MAX_TOP_LOGPROBS + 1)),
        )


@pytest.mark.parametrize(
    ("count", "slots", "length", "chunk"), [(40, 3, 512, 128), pytest.param(1000, 5, 768, 512, marks=pytest.mark.slow)]
)
def test_nothing_is_compiled_after_warm_up(count, slots, length, chunk):
    """With numbers of slots that no other test has, so that programs of these sizes are new to JAX."""
    settings = {"slots": slots, "length": length, "chunk": chunk, "image_bytes": 2**20}
    generator = LocalGenerator(random_model(), processor(), **settings)
    steps: list[int] = []
    with compilations() as compiled:
        generator.warm_up(steps.append)
    shapes = generator.engine.shapes()
    assert len(set(shapes)) == len(shapes) == sum(steps) == generator.engine.compiled
    assert compiled[0] >= len(shapes)
    with compilations() as compiled:
        replies = generator.generate(random_requests(np.random.default_rng(count), count))
        generator.update(random_model())
        more = generator.generate(random_requests(np.random.default_rng(count + 1), 8))
    assert compiled[0] == 0 and generator.engine.compiled == len(shapes)
    assert {reply.finish_reason for samples in replies for reply in samples} == {"stop", "length"}
    assert {reply.mode for samples in replies + more for reply in samples} == {None, "think", "nothink"}


def test_programs_hold_no_copy_of_the_cache():
    """Above all those that read prefixes from the cache that they then write."""
    engine = LocalGenerator(random_model(), processor(), slots=256, length=128, chunk=128, image_bytes=2**20).engine
    cache = sum(x.nbytes for x in jax.tree.leaves(engine.state.cache))
    for shape in engine.shapes():
        program = engine.lower(shape, engine.example_arguments(shape)).compile()
        assert program.memory_analysis().temp_size_in_bytes < cache / 4, str(shape)
