"""Compute the arrays of this folder with PyTorch and transformers, or compare them with what is committed.

    python tests/golden/make.py                    write tiny/ and cases/
    python tests/golden/make.py --check            recompute everything and compare with what is committed
    python tests/golden/make.py --against DIR      compare the oracle itself with other released-layout reference
                                                   arrays (DIR/tiny, DIR/cases/fp32/*.npz) and print the differences

``checkpoint.py`` makes the random checkpoint, ``reference.py`` computes with it, and this file chooses the cases. Every
grid of patches is oblong, so that rows and columns cannot be confused.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

try:
    import long_positions
    import numpy as np
    import torch
    import transformers
    from checkpoint import CONFIG, SEED, weights, write_checkpoint
    from fixed_resolution import fixed_resolution
    from random_answers import random_answers
    from reference import IGNORE, IMAGE_TOKEN, Reference, normalise, summed_loss
    from transformers import Phi3Config, Phi3ForCausalLM
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
    from transformers.utils.chat_template_utils import render_jinja_template
except ImportError as error:
    raise SystemExit(
        f"make.py needs torch and transformers 5 ({error}): install phivision_jax[parity] in a separate environment."
    ) from None

HERE = Path(__file__).parent
SMALL_TEMPLATE = HERE.parents[1] / "phivision_jax" / "text" / "small" / "chat_template.jinja"
STEPS = 16
# For --check: another CPU sums in another order.
FLOAT_TOLERANCE, GRADIENT_TOLERANCE, LONG_TOLERANCE = 1e-5, 1e-4, 5e-5

# Each example: tokens before the first image, then per image its grid and the tokens after it. The last two thirds of
# the last run of tokens have a loss.
EXAMPLES: dict[str, list[tuple[int, list[tuple[tuple[int, int], int]]]]] = {
    "single_image": [(5, [((5, 7), 13)])],
    "text_only": [(24, [])],
    "two_images": [(3, [((4, 3), 6), ((2, 9), 11)])],
    "mixed_batch": [(4, [((6, 4), 15)]), (19, []), (2, [((1, 11), 0), ((7, 2), 9)])],
}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Where is it?"}],
    [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
    [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "Compare <image> and <image>."},
        {"role": "assistant", "content": '<think>\nOne is red & one is "blue".\n</think>  The first <b>is</b>.\n'},
        {"role": "user", "content": "\n Sûr ? 日本語 🙂"},
        {"role": "assistant", "content": "<|dummy_84|>Oui 🙂"},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": "{{ messages }} {% if %}"}],
]


def inputs(name: str) -> dict[str, np.ndarray]:
    """The inputs of a case: ids_i, labels_i per example; patches_j (u8), grid_j per image of the batch; images_of_i."""
    rng = np.random.default_rng([SEED, *name.encode()])
    out: dict[str, np.ndarray] = {}
    count = 0
    for i, (before, rest) in enumerate(EXAMPLES[name]):
        ids = list(rng.integers(0, 250, before))
        first = count
        for grid, after in rest:
            ids += [IMAGE_TOKEN, *rng.integers(0, 250, after)]
            # Noise with its own level and contrast per patch, so that patches differ like those of photographs.
            n = math.prod(grid)
            level, contrast = rng.uniform(60, 195, (n, 1, 3)), rng.uniform(5, 120, (n, 1, 1))
            pixels = level + contrast * rng.standard_normal((n, 256, 3))
            out[f"patches_{count}"] = pixels.clip(0, 255).round().astype(np.uint8).reshape(n, 768)
            out[f"grid_{count}"] = np.array(grid, np.int32)
            count += 1
        answer = (rest[-1][1] if rest else before) * 2 // 3
        out[f"ids_{i}"] = np.array(ids, np.int32)
        out[f"labels_{i}"] = np.array([IGNORE] * (len(ids) - answer) + ids[-answer:], np.int32)
        out[f"images_of_{i}"] = np.arange(first, count, dtype=np.int32)
    return out


def forward(model: Reference, case: dict[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The arrays of a case by name (features_j, projected_j, logits_i, loss), and each example's embeddings."""
    out: dict[str, torch.Tensor] = {}
    count = sum(key.startswith("patches_") for key in case)
    if count:
        pixels = [normalise(case[f"patches_{j}"]) for j in range(count)]
        grids = [tuple(case[f"grid_{j}"].tolist()) for j in range(count)]
        for j, features in enumerate(model.features(pixels, grids)):
            out[f"features_{j}"], out[f"projected_{j}"] = features, model.projector(features)
    total, targets, embedded = torch.zeros(()), 0, []
    for i in range(sum(key.startswith("ids_") for key in case)):
        images = [out[f"projected_{j}"] for j in case[f"images_of_{i}"]]
        embeddings, labels = model.splice(case[f"ids_{i}"], case[f"labels_{i}"], images)
        out[f"logits_{i}"] = model.logits(embeddings)
        loss, weighed = summed_loss(out[f"logits_{i}"], labels)
        total, targets = total + loss, targets + weighed
        embedded.append(embeddings)
    out["loss"] = total / targets
    return out, embedded


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def gradients(model: Reference, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of the mean loss by tensor name; tensors that never run have none and are left out."""
    for _, parameter in model.parameters():
        parameter.grad = None
    forward(model, case)[0]["loss"].backward()
    return {name: p.grad.numpy().copy() for name, p in model.parameters() if p.grad is not None}


def greedy(model: Reference) -> dict[str, np.ndarray]:
    """Per prompt i: ids_i [16] and generated_logits_i [16, V]. The prompts are the inputs of three cases, in order."""
    out: dict[str, np.ndarray] = {}
    for i, name in enumerate(("single_image", "text_only", "two_images")):
        ids, logits = model.greedy(forward(model, inputs(name))[1][0], STEPS)
        top = np.sort(logits, axis=-1)
        margin = float((top[:, -1] - top[:, -2]).min())
        if margin < 5e-3 or len(set(ids.tolist())) < 8:
            raise SystemExit(
                f"{name}: greedy ids {ids.tolist()}, margin {margin:.4f}, prove little: choose another seed"
            )
        out[f"generated_ids_{i}"], out[f"generated_logits_{i}"] = ids, logits
    return out


def position_embedding() -> dict[str, np.ndarray]:
    """A random 16x16 table of two channels resized to odd grids, flattened row by row: [h·w, 2] each."""
    table = np.random.default_rng([SEED, 1]).standard_normal((256, 2)).astype(np.float32)
    out = {"table": table}
    for h, w in ((80, 45), (214, 16), (1, 188), (3, 5)):
        resized = Siglip2VisionEmbeddings.resize_positional_embeddings(
            torch.from_numpy(table).reshape(16, 16, 2), torch.tensor([[h, w]]), max_length=h * w
        )
        out[f"resized_{h}x{w}"] = resized[0].numpy()
    return out


@torch.no_grad()
def long_rows() -> dict[str, np.ndarray]:
    """Inverse frequencies, and the logits at every 64th token of the rows of ``long_positions.inputs``."""
    c = long_positions
    config = Phi3Config(
        vocab_size=c.VOCAB, hidden_size=c.WIDTH, intermediate_size=c.MLP, num_hidden_layers=c.LAYERS,
        num_attention_heads=c.HEADS, num_key_value_heads=c.KV_HEADS, rope_theta=c.THETA, rms_norm_eps=c.EPS,
        max_position_embeddings=32_768, original_max_position_embeddings=32_768, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    given = {name: torch.from_numpy(array) for name, array in c.weights().items()}
    for name, parameter in model.named_parameters():
        for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if fused in name:
                given[name] = torch.cat([given[name.replace(fused, part)] for part in parts])
        parameter.copy_(given[name])
    out = {"inverse_frequencies": model.model.rotary_emb.inv_freq.numpy()}
    for name, row in c.inputs().items():
        ids, positions = (torch.from_numpy(array)[None].long() for array in row)
        # With a mask of ones, transformers does not take a jump of the positions for the start of a packed example.
        mask = torch.ones_like(ids)
        logits = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
        out[f"logits_{name}"] = logits[c.SHOWN].numpy()
    return out


def pixel_sizes() -> dict[str, Any]:
    """Image sizes and their grids under the released clamp; sides from 1 to 8000, evenly spaced in the logarithm."""
    rng = np.random.default_rng([SEED, 2])
    sizes = np.exp(rng.uniform(0, math.log(8000), (400, 2))).round().astype(int).tolist()
    rows = []
    for width, height in sizes:
        target = min(max((width // 16) * (height // 16), 256), 3600)
        high, wide = get_image_size_for_max_num_patches(height, width, 16, target)
        rows.append([width, height, target, high // 16, wide // 16])
    return {"columns": ["width", "height", "target_patches", "grid_rows", "grid_columns"], "rows": rows}


def chat() -> dict[str, Any]:
    """Conversations as transformers renders them, with the character spans of the assistant's text."""
    templates = {name: (HERE / f"cases/chat/{name}.jinja").read_text() for name in ("released_like", "whitespace")}
    if SMALL_TEMPLATE.exists():
        templates["small"] = SMALL_TEMPLATE.read_text()
    renderings = []
    for name, template in templates.items():
        for number, messages in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                (text,), (spans,) = render_jinja_template(
                    [messages],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=prompt,
                )
                renderings.append(
                    {
                        "template": name,
                        "conversation": number,
                        "add_generation_prompt": prompt,
                        "text": text,
                        "assistant_spans": [list(span) for span in spans],
                    }
                )
    return {"templates": templates, "conversations": CONVERSATIONS, "renderings": renderings}


def build() -> dict[str, dict[str, Any]]:
    """The contents of every file under cases/, by name."""
    tensors = {name: torch.from_numpy(array) for name, array in weights().items()}
    model = Reference(CONFIG)
    model.load(tensors)
    files: dict[str, dict[str, Any]] = {}
    for name in EXAMPLES:
        case = inputs(name)
        files[f"{name}.npz"] = {**case, **numpy(forward(model, case)[0])}
    mixed = inputs("mixed_batch")
    files["gradients.npz"] = gradients(model, mixed)
    files["greedy.npz"] = greedy(model)
    files["random_prompts.npz"] = random_answers(model)
    model.load({name: t.bfloat16().float() for name, t in tensors.items()})
    files["bf16_weights.npz"] = numpy(forward(model, mixed)[0])  # with the inputs of mixed_batch.npz
    files |= fixed_resolution()
    files["position_embedding.npz"] = position_embedding()
    files["long_positions.npz"] = long_rows()
    files["pixel_sizes.json"] = pixel_sizes()
    files["chat/renderings.json"] = chat()
    return files


def write() -> None:
    write_checkpoint(HERE / "tiny")
    for name, content in build().items():
        path = HERE / "cases" / name
        if path.suffix == ".npz":
            np.savez_compressed(path, **content)
        else:
            text = json.dumps(content, ensure_ascii=False, indent=None if "sizes" in name else 1)
            path.write_text(text + "\n", encoding="utf-8")


def difference(name: str, committed: np.ndarray, now: np.ndarray) -> str | None:
    """Describe how an array differs from the committed one; None if it does not."""
    if committed.shape != now.shape or committed.dtype != now.dtype:
        return f"{committed.dtype}{committed.shape} is now {now.dtype}{now.shape}"
    if committed.dtype.kind != "f":
        return None if np.array_equal(committed, now) else "differs"
    error = np.abs(committed - now).max(initial=0.0)
    allowed = FLOAT_TOLERANCE
    if name.startswith("gradients"):
        allowed = GRADIENT_TOLERANCE * float(np.abs(committed).max(initial=0.0)) + 1e-9
    if name in ("logits_near", "logits_far", "margins"):
        allowed = LONG_TOLERANCE
    return None if error <= allowed else f"differs by {error:.3g}, allowed {allowed:.3g}"


def check() -> list[str]:
    """One line for everything that differs from what is committed."""
    wrong = []
    with tempfile.TemporaryDirectory() as fresh:
        write_checkpoint(Path(fresh))
        names = sorted(path.name for path in Path(fresh).iterdir())
        _, differ, missing = filecmp.cmpfiles(fresh, HERE / "tiny", names, shallow=False)
        wrong += [f"tiny/{name}: differs" for name in differ] + [f"tiny/{name}: missing" for name in missing]
    for name, content in build().items():
        path = HERE / "cases" / name
        if not path.exists():
            wrong.append(f"cases/{name}: missing")
        elif path.suffix == ".json":
            if json.loads(path.read_text(encoding="utf-8")) != content:
                wrong.append(f"cases/{name}: differs")
        else:
            with np.load(path) as committed:
                if one_sided := sorted(set(committed.files) ^ content.keys()):
                    wrong.append(f"cases/{name}: arrays {one_sided} on one side only")
                    continue
                for key, now in content.items():
                    if reason := difference(name, committed[key], now):
                        wrong.append(f"cases/{name}: {key} {reason}")
    return wrong


@torch.no_grad()
def against(directory: Path) -> None:
    """Print the largest difference between this oracle and another set of reference arrays, per case and array."""
    model = Reference.from_directory(directory / "tiny")
    for path in sorted((directory / "cases" / "fp32").glob("*.npz")):
        with np.load(path) as stored:
            case = {key: stored[key] for key in stored.files}
        got: dict[str, np.ndarray] = {}
        projected: list[torch.Tensor] = []
        if "pixel_values" in case:
            lengths, grids = case["pixel_attention_mask"].sum(-1), [tuple(g) for g in case["spatial_shapes"].tolist()]
            pixels = [torch.from_numpy(p[:n]) for p, n in zip(case["pixel_values"], lengths, strict=True)]
            features = model.features(pixels, grids)
            projected = [model.projector(f) for f in features]
            for j, (f, p) in enumerate(zip(features, projected, strict=True)):
                got[f"vision_features_{j}"], got[f"projector_{j}"] = f.numpy(), p.numpy()
        embeddings, labels = model.splice(case["input_ids"][0], case["labels"][0], projected)
        logits = model.logits(embeddings)
        loss, targets = summed_loss(logits, labels)
        got |= {"merged_embeds": embeddings[None].numpy(), "merged_labels": labels[None].numpy()}
        got |= {"logits": logits[None].numpy(), "loss": (loss / targets).numpy()}
        got["generated_ids"], got["generated_logits"] = model.greedy(embeddings, len(case["generated_ids"]))
        for key, array in got.items():
            print(f"{path.stem:14} {key:18} max difference {np.abs(array - case[key]).max():.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="recompute and compare; write nothing")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare the oracle with reference arrays in DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    print(f"{versions}, Python {platform.python_version()}, {platform.machine()}")
    if args.against:
        against(args.against)
    elif args.check:
        wrong = check()
        raise SystemExit("\n".join(wrong) if wrong else print("everything as committed"))
    else:
        write()
        size = sum(f.stat().st_size for d in ("tiny", "cases") for f in (HERE / d).rglob("*") if f.is_file())
        print(f"wrote tiny/ and cases/: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
