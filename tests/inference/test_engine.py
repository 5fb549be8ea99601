"""The engine against forward passes of the model over prompt and answer, without cache, slots and chunks."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from phivision_jax import sharding
from phivision_jax.inference import engine
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Reply, Request
from phivision_jax.models import phivision
from phivision_jax.processor import Processor
from tests.support.generation import encoded, generator_of, logits_after, random_image, request_of

MODES = ("causal", "bidirectional")
MARGIN = 1e-3
"""Between two logits; below, rounding may decide which token is chosen."""
SYSTEM = [7, 3, 56, 21] * 40


def in_mode(model, image_attention):
    """The same weights with another mask in images."""
    config = dataclasses.replace(model.config, image_attention=image_attention)
    return phivision.merge(phivision.abstract(config)[0], model.split()[1])


def on_mesh(model, **sizes):
    """The same model on the first devices of a mesh."""
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    graphdef, state = phivision.abstract(model.config)
    with sharding.generation_rules(model.config, mesh):
        shardings = sharding.param_shardings(state, mesh)
    return phivision.merge(graphdef, jax.tree.map(jax.device_put, model.split()[1], shardings))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as ids and images, and what is asked for."""

    ids: list[int]
    images: list
    settings: dict

    @property
    def request(self) -> Request:
        return request_of(self.ids, self.images, **self.settings)


def random_prompts(config, count, seed, most=24) -> list[Prompt]:
    """Prompts with none to four images of random sizes; some begin as others do, some are greedy, some are sampled."""
    rng = np.random.default_rng(seed)
    known = encoded(config, [random_image((8, 6), 0), random_image((16, 16), 1)])
    prompts: list[Prompt] = []
    for i in range(count):
        ids = rng.integers(1, 60, rng.integers(1, 100)).tolist()
        kind = rng.integers(4)
        if kind == 0 and prompts and len(prompts[-1].ids) < 150 and len(prompts[-1].images) < 3:  # another turn
            ids, images = [*prompts[-1].ids, *ids], prompts[-1].images
        else:
            sizes = 2 * rng.integers(1, 9, (i % 5, 2))
            images = encoded(config, [random_image(size, int(rng.integers(2**31))) for size in sizes.tolist()])
            images = [known[j] if rng.random() < 0.3 else image for j, image in zip((0, 1, 0, 1), images, strict=False)]
            for _ in images:
                ids.insert(rng.integers(0, len(ids) + 1), -200)
            ids = [*SYSTEM[: rng.integers(100, 160)], *ids] if kind == 1 else ids
        settings = {"max_new_tokens": int(rng.integers(1, most)), "logprobs": int(rng.integers(0, 6))}
        if rng.random() < 0.5:
            settings |= {"temperature": float(rng.uniform(0.1, 2)), "top_k": int(rng.integers(0, 9)), "seed": i}
        prompts.append(Prompt(ids, images, settings))
    return prompts


def check(model, prompt: Prompt, reply: Reply) -> None:
    """Greedy tokens are the most likely ones, and log-probabilities are those of the training forward pass."""
    assert len(reply.ids) == len(reply.logprobs) == prompt.settings["max_new_tokens"]
    logits = logits_after(model, prompt.ids, prompt.images, reply.ids)
    want = log_softmax(logits, axis=-1)
    if not prompt.settings.get("temperature"):
        chosen = np.take_along_axis(logits, np.array(reply.ids)[:, None], 1)[:, 0]
        assert (logits.max(-1) - chosen < MARGIN).all()
    order = np.argsort(-want, axis=-1)
    for row, best, token in zip(want, order, reply.logprobs, strict=True):
        k = prompt.settings["logprobs"]
        assert len(token.top) == k
        assert abs(token.logprob - row[token.id]) <= 1e-5
        for (i, logprob), j in zip(token.top, best, strict=False):
            assert abs(logprob - row[j]) <= 1e-5 and abs(row[i] - row[j]) <= 1e-5


@pytest.fixture(scope="module", params=MODES)
def model(request, tiny):
    return in_mode(tiny, request.param)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_answers_equal_forward_passes(model, share_prefixes):
    """More prompts than slots, in chunks of 128 tokens; every chosen and every likely token is compared."""
    prompts = random_prompts(model.config, 12, seed=3)
    generator = generator_of(model, share_prefixes=share_prefixes)
    assert len(prompts) > generator.engine.slots and {len(p.images) for p in prompts} == {0, 1, 2, 3, 4}
    replies = generator.generate(p.request for p in prompts)
    for prompt, (reply,) in zip(prompts, replies, strict=True):
        check(model, prompt, reply)
    assert (generator.stats()["shared_tokens"] > 0) == share_prefixes
    assert len({reply.ids for (reply,) in replies}) > 10


def same_ids(model, prompt: Prompt, got: Reply, alone: Reply) -> bool:
    """True if two answers have the same ids, up to the first step at which rounding may decide."""
    steps = len(alone.ids)
    if not prompt.settings.get("temperature"):
        first, second = np.sort(logits_after(model, prompt.ids, prompt.images, alone.ids), axis=-1)[:, :-3:-1].T
        close = np.flatnonzero(first - second < MARGIN)
        steps = close[0] if len(close) else steps
    return got.ids[:steps] == alone.ids[:steps]


def test_answers_on_a_mesh_equal_forward_passes(tiny):
    """Two rows of prompts, and two heads of keys for four devices of ``tensor``, which all hold both."""
    model = in_mode(tiny, "bidirectional")
    prompts = random_prompts(model.config, 8, seed=4)
    requests = [prompt.request for prompt in prompts]
    generator = generator_of(on_mesh(model, fsdp=2, tensor=4), slots=1)
    assert generator.engine.slots == generator.engine.shards == 2
    on_one_device = generator_of(model).generate(requests)
    for prompt, (reply,), (want,) in zip(prompts, generator.generate(requests), on_one_device, strict=True):
        check(model, prompt, reply)
        assert same_ids(model, prompt, reply, want)
    assert generator.stats()["shared_tokens"] > 0


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_questions_about_one_image_equal_forward_passes(tiny, sizes):
    """Twelve questions behind the same text and image, some of which begin alike: both are in each row once."""
    model, rng = in_mode(tiny, "bidirectional"), np.random.default_rng(5)
    image, begin = encoded(model.config, [random_image((16, 14), 3)]), [*SYSTEM[:20], -200]
    asked = [[*begin, *rng.integers(1, 60, 9).tolist()] for _ in range(6)]
    asked += [[*ids, *rng.integers(1, 60, 1 + n).tolist()] for n, ids in enumerate(asked)]
    prompts = [Prompt(ids, image, {"max_new_tokens": 4, "logprobs": 3}) for ids in asked]
    generator = generator_of(on_mesh(model, **sizes) if sizes else model, slots=12, chunk=384)
    replies = generator.generate(p.request for p in prompts)
    for prompt, (reply,) in zip(prompts, replies, strict=True):
        check(model, prompt, reply)
    if generator.engine.shards == 1:  # one row for all
        beginnings = {tuple(ids[:n]) for ids in asked for n in range(1, len(ids) + 1)}
        assert generator.stats()["prefilled_tokens"] == len(beginnings) - 1 + replies[0][0].image_tokens
    assert len({reply.ids for (reply,) in replies}) > 6


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_answers_of_scanned_layers_equal_forward_passes(tiny, monkeypatch, sizes):
    """The form for accelerators: layers in one array, and the first entries of all slots read at once."""
    monkeypatch.setattr(engine, "platform_of", lambda x: "gpu")
    model = in_mode(tiny, "causal")
    generator = LocalGenerator(
        on_mesh(model, **sizes) if sizes else model,
        Processor(None, None, model.config),
        slots=4,
        length=1024,
        chunk=256,
        stop_ids=(),
    )
    assert generator.engine.reads == [512, 1024] and generator.engine.program.layer is None
    prompts = random_prompts(model.config, 6, seed=6)
    for prompt, (reply,) in zip(prompts, generator.generate(p.request for p in prompts), strict=True):
        check(model, prompt, reply)


def test_few_sequences_of_many_slots_are_computed_alone(tiny, monkeypatch):
    """On CPUs, sequences in use are computed in few sizes, and other slots still hold the prefixes that they held."""
    generator = generator_of(tiny, slots=8)
    assert generator.engine.rows == [2, 4, 8]
    computed: list[list[int]] = []
    run = generator.engine._run

    def record(shape, arguments):
        if shape.program == "decode":
            computed[-1].append(shape.sizes[0])
        return run(shape, arguments)

    monkeypatch.setattr(generator.engine, "_run", record)
    prompts = [dataclasses.replace(p, settings=p.settings | {"max_new_tokens": 6 + 5 * i})
               for i, p in enumerate(random_prompts(tiny.config, 9, seed=7))]  # fmt: skip
    for group in ([prompts[0]], prompts[1:4], prompts, prompts):
        computed.append([])
        for prompt, (reply,) in zip(group, generator.generate(p.request for p in group), strict=True):
            check(tiny, prompt, reply)
    one, three, *all_of_them = map(set, computed)
    assert one == {2} and three == {2, 4} and all_of_them == [{2, 4, 8}] * 2
    assert generator.stats()["shared_tokens"] > 0


def test_int8_answers_do_not_depend_on_other_prompts(tiny):
    """Rows see keys and values as they will be stored, so chunks and prefixes change them by rounding alone."""
    prompts = random_prompts(tiny.config, 8, seed=5)
    requests = [dataclasses.replace(prompt.request, logprobs=2, temperature=0) for prompt in prompts]
    alone = generator_of(tiny, cache_dtype="int8", share_prefixes=False)
    exact = generator_of(tiny).generate(requests)
    differences = []
    for request, (got,), (other,) in zip(
        requests, generator_of(tiny, cache_dtype="int8").generate(requests), exact, strict=True
    ):
        ((want,),) = alone.generate([request])
        close = (i for i, t in enumerate(want.logprobs) if t.top[0][1] - t.top[1][1] < 5e-3)
        steps = next(close, len(want.ids))
        assert got.ids[:steps] == want.ids[:steps]
        for a, b in zip(got.logprobs[:steps], want.logprobs[:steps], strict=True):
            assert abs(a.logprob - b.logprob) < 1e-3
        differences.append(abs(got.logprobs[0].logprob - other.logprobs[0].logprob))
    assert 1e-4 < max(differences) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_many_answers_equal_those_of_each_prompt_alone(model, sizes):
    """64 prompts in six slots, with and without shared prefixes, against one slot with complete prompts in a row."""
    prompts = random_prompts(model.config, 64, seed=6, most=40)
    requests = [prompt.request for prompt in prompts]
    alone = generator_of(model, slots=1, chunk=512, share_prefixes=False).generate(requests)
    for share_prefixes in (True, False):
        placed = on_mesh(model, **sizes) if sizes else model
        generator = generator_of(placed, slots=6, share_prefixes=share_prefixes)
        for prompt, (reply,), (want,) in zip(prompts, generator.generate(requests), alone, strict=True):
            check(model, prompt, reply)
            assert same_ids(model, prompt, reply, want)
