"""``phivision chat``: ask a checkpoint one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def chat(
    checkpoint: Positional[str],
    prompt: Positional[str],
    /,
    image: Annotated[list[Path], arg(aliases=["-i"])] = [],  # noqa: B006
    mode: Literal["auto", "think", "nothink"] = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    save_image: Path | None = None,
) -> None:
    """Ask a checkpoint one question, with or without images, and print the answer.

    Args:
        checkpoint: A Hugging Face directory, a checkpoint of this project, a run (each may be gs://…), or (with [hub])
            a Hugging Face id.
        prompt: The question. <image> marks the place of an image; without marks, images come first.
        image: Image files, in order.
        mode: Let the model decide whether to think first (auto), or force it to (not to).
        max_new_tokens: Maximum length of the answer.
        temperature: Sampling temperature; 0 takes the most likely token each time.
        top_p: Sample from the most likely tokens that have this probability together (with a temperature above 0).
        seed: Seed for sampling.
        save_image: Also save the images with question and answer as a PNG.
    """
    import phivision_jax
    from phivision_jax.evaluation.answer_images import answer_image
    from phivision_jax.images.decode import open_image

    images = [open_image(path) for path in image]
    if save_image and not images:
        raise ValueError("--save-image needs an image: give one with --image")
    model, processor = phivision_jax.load(checkpoint)
    answer = phivision_jax.generate(
        model,
        processor,
        prompt,
        images,
        mode=mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    assert isinstance(answer, str)  # one prompt, one answer
    print(answer)
    if save_image:
        save_image.parent.mkdir(parents=True, exist_ok=True)
        answer_image(images, prompt, answer).save(save_image)
