"""The released computation, stage by stage, against the arrays of ``tests/golden``.

The tests are in the order of the computation, so the first failure names the first wrong stage: chat template and
image sizes, position embedding, vision features, vision tokens, logits, loss, gradients, greedy decoding. They do not
need PyTorch: the arrays were made by ``tests/golden/make.py``.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import phivision_jax
from phivision_jax.batch import Batch
from phivision_jax.images.layout import PatchedImage
from phivision_jax.images.naflex import grid_of
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request
from phivision_jax.models.phivision import PhiVision, merge
from phivision_jax.models.siglip2 import interpolation_weights
from phivision_jax.processor import Processor
from phivision_jax.rows import batch_from_ids, expand
from phivision_jax.text.template import ChatTemplate
from phivision_jax.training.loss import batch_loss
from tests.golden import random_prompts
from tests.support.parameter_trees import hf_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
WITH_IMAGES = ("single_image", "two_images", "mixed_batch")
CASES = ("text_only", *WITH_IMAGES)
PROMPTS = ("single_image", "text_only", "two_images")
"""The cases whose inputs are the prompts of ``greedy.npz``, in its order."""

# About ten times the differences within the reference (eager, fused and float64 attention). Never to be widened.
VISION, LOGITS, LOSS, POSITIONS, GRADIENT = 2e-5, 1e-4, 2e-5, 1e-5, 1e-3

type Case = dict[str, np.ndarray]


@functools.cache
def case(name: str) -> Case:
    with np.load(GOLDEN / "cases" / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@functools.cache
def model() -> PhiVision:
    return phivision_jax.load(GOLDEN / "tiny")[0]


def numbered(arrays: Case, prefix: str) -> list[np.ndarray]:
    """prefix_0, prefix_1, …"""
    return [arrays[f"{prefix}_{i}"] for i in range(sum(key.startswith(f"{prefix}_") for key in arrays))]


def token_lists(arrays: Case, prefix: str) -> list[list[int]]:
    return [tokens.tolist() for tokens in numbered(arrays, prefix)]


def images_of(arrays: Case) -> list[list[PatchedImage]]:
    """Per example, its images."""
    return [
        [PatchedImage(arrays[f"patches_{j}"], (tuple(arrays[f"grid_{j}"].tolist()),)) for j in of_example]
        for of_example in numbered(arrays, "images_of")
    ]


def lay_out(ids: list[list[int]], images: list[list[PatchedImage]], labels: list[list[int]] | None = None) -> Batch:
    """One example per row, right padded to the same shapes throughout, so that few programs are compiled."""
    num_patches = 48 if any(images) else 0
    return batch_from_ids(ids, images, labels, config=model().config, length=72, num_patches=num_patches)


def batch_of(arrays: Case) -> Batch:
    return lay_out(token_lists(arrays, "ids"), images_of(arrays), token_lists(arrays, "labels"))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, batch: Batch) -> dict[str, jax.Array]:
    """Everything the model computes of a batch."""
    built = merge(graphdef, params)
    out = {"logits": built(batch), "loss": batch_loss(built, batch)[0]}
    if batch.patches.shape[2]:
        out |= {"features": built.vision_features(batch), "projected": built.vision_tokens(batch)}
    return out


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    return jax.device_get(forward(*model().split(), batch_of(case(name))))


def close(what: str, got: np.ndarray, want: np.ndarray, limit: float) -> None:
    """Assert equal shapes and differences within ``limit``, NaN included; name the worst element."""
    assert got.shape == want.shape, f"{what} has shape {got.shape}, golden {want.shape}"
    error = np.abs(np.asarray(got, np.float64) - want)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= limit, f"{what} differs by {error[worst]:.3g} at {tuple(map(int, worst))}, over {limit:.3g}"


def images_in_batch(name: str) -> Iterator[tuple[int, int, slice]]:
    """(image of the case, its row of the batch, its patches in the row), in the order of the prompts."""
    arrays = case(name)
    for row, of_example in enumerate(numbered(arrays, "images_of")):
        start = 0
        for j in of_example.tolist():
            stop = start + len(arrays[f"patches_{j}"])
            yield j, row, slice(start, stop)
            start = stop


def test_chat_templates():
    golden = json.loads((GOLDEN / "cases" / "chat" / "renderings.json").read_text("utf-8"))
    templates = {name: ChatTemplate(source) for name, source in golden["templates"].items()}
    assert len(golden["renderings"]) == 2 * len(templates) * len(golden["conversations"])
    for want in golden["renderings"]:
        text, spans = templates[want["template"]].render(
            golden["conversations"][want["conversation"]], generation_prompt=want["add_generation_prompt"]
        )
        assert text == want["text"]
        assert [list(span) for span in spans] == want["assistant_spans"], text


def test_image_sizes():
    golden = json.loads((GOLDEN / "cases" / "pixel_sizes.json").read_text("utf-8"))
    assert len(golden["rows"]) == 400
    for width, height, _, rows, columns in golden["rows"]:
        assert grid_of(width, height, 16, 256, 3600) == (rows, columns), f"{width}x{height}"


@pytest.mark.parametrize("grid", [(80, 45), (214, 16), (1, 188), (3, 5)])
def test_position_embedding(grid):
    h, w = grid
    arrays = case("position_embedding")
    rows = interpolation_weights(jnp.arange(h), jnp.full(h, h), 16)
    columns = interpolation_weights(jnp.arange(w), jnp.full(w, w), 16)
    resized = np.einsum("hr,wc,rcC->hwC", rows, columns, arrays["table"].reshape(16, 16, 2)).reshape(h * w, 2)
    close(f"{h}x{w}", resized, arrays[f"resized_{h}x{w}"], POSITIONS)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_vision_features(name):
    features = outputs(name)["features"]
    for j, row, patches in images_in_batch(name):
        want = case(name)[f"features_{j}"]
        close(f"features of image {j}", features[row, 0, patches], want, VISION)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_projected_tokens(name):
    tokens = outputs(name)["projected"]
    for j, row, patches in images_in_batch(name):
        want = case(name)[f"projected_{j}"]
        close(f"vision tokens of image {j}", tokens[row, patches], want, VISION)


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    logits = outputs(name)["logits"]
    for i, want in enumerate(numbered(case(name), "logits")):
        close(f"logits of example {i}", logits[i, : len(want)], want, LOGITS)


@pytest.mark.parametrize("name", CASES)
def test_loss(name):
    close("loss", outputs(name)["loss"], case(name)["loss"], LOSS)


def test_gradients():
    graphdef, params = model().split()
    batch = batch_of(case("mixed_batch"))
    gradients = jax.jit(jax.grad(lambda p: batch_loss(merge(graphdef, p), batch)[0]))(params)
    got = dict(hf_tensors(gradients, model().config))
    golden = case("gradients")
    assert golden.keys() <= got.keys()
    # A key bias adds the same to all scores of a query, so its gradient is zero up to rounding: its error is compared
    # with a millionth of the largest gradient instead of with itself.
    largest = max(np.linalg.norm(g) for g in golden.values())
    for name, tensor in got.items():
        want = golden.get(name, np.zeros_like(tensor))  # the blocks that never run have no gradient
        assert tensor.shape == want.shape, name
        error, size = np.linalg.norm(tensor - want), np.linalg.norm(want)
        allowed = GRADIENT * size if size > 1e-6 * largest else 1e-6 * largest
        assert error <= allowed, f"gradient of {name} is {error / max(size, 1e-30):.2g} off (relative L2)"


def test_logits_of_bf16_weights(tmp_path):
    write_bf16_copy(GOLDEN / "tiny", tmp_path)
    rounded = phivision_jax.load(tmp_path)[0]
    logits = np.asarray(forward(*rounded.split(), batch_of(case("mixed_batch")))["logits"])
    for i, want in enumerate(numbered(case("bf16_weights"), "logits")):
        close(f"logits of example {i}", logits[i, : len(want)], want, LOGITS)


def prompts() -> tuple[list[list[int]], list[list[PatchedImage]]]:
    """Ids and images of the three prompts: one image, none, two."""
    cases = [case(name) for name in PROMPTS]
    return [token_lists(c, "ids")[0] for c in cases], [images_of(c)[0] for c in cases]


@functools.cache
def generator() -> LocalGenerator:
    """Fewer slots than prompts, and rows of several prompts."""
    processor = Processor(None, None, model().config)
    return LocalGenerator(model(), processor, slots=6, length=256, chunk=256, stop_ids=())


def greedy_ids(ids: list[list[int]], images: list[list[PatchedImage]], steps: int) -> list[list[int]]:
    """The answers to prompts that are asked for together."""
    requests = [Request(expand(prompt, shown), max_new_tokens=steps) for prompt, shown in zip(ids, images, strict=True)]
    return [list(reply.ids) for (reply,) in generator().generate(requests)]


def test_greedy_ids():
    """All three together; the reference answered each alone."""
    assert greedy_ids(*prompts(), 16) == [want.tolist() for want in numbered(case("greedy"), "generated_ids")]


def test_greedy_ids_of_random_prompts():
    """20 prompts of different lengths with none to three images, together; transformers answered each alone.

    Ids are compared up to the first step at which rounding may decide.
    """
    given, golden = random_prompts.prompts(), case("random_prompts")
    images = [[PatchedImage(patches, (grid,)) for patches, grid in zip(p.patches, p.grids, strict=True)] for p in given]
    got = greedy_ids([p.ids for p in given], images, random_prompts.STEPS)
    for i, (row, want, margins) in enumerate(zip(got, golden["ids"], golden["margins"], strict=True)):
        steps = random_prompts.decided(margins)
        assert row[:steps] == want[:steps].tolist(), f"prompt {i}"


def test_logits_along_greedy_ids():
    """One pass over prompt and answer gives the logits that the reference computed token by token with its cache."""
    ids, images = prompts()
    answers, wanted = numbered(case("greedy"), "generated_ids"), numbered(case("greedy"), "generated_logits")
    batch = lay_out([[*p, *a[:-1].tolist()] for p, a in zip(ids, answers, strict=True)], images)
    logits = np.asarray(forward(*model().split(), batch)["logits"])
    for i, want in enumerate(wanted):
        end = int(batch.segment_ids[i].sum())  # segment 1 is the row's only example
        close(f"logits after prompt {i}", logits[i, end - len(want) : end], want, LOGITS)


def write_bf16_copy(source: Path, target: Path) -> None:
    """Copy a checkpoint with weights rounded to bf16, which safetensors' NumPy functions cannot write."""
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
            continue
        header, body = {}, b""
        for name, tensor in load_file(path).items():
            data = tensor.astype(ml_dtypes.bfloat16).tobytes()
            header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (len(body), len(body) + len(data))}
            body += data
        head = json.dumps(header).encode()
        (target / path.name).write_bytes(len(head).to_bytes(8, "little") + head + body)
