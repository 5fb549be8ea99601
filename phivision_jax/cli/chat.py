"""``phivision chat``: ask a checkpoint one question, or talk to it."""

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg


def chat(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    prompt: Annotated[Positional[str | None], arg(metavar="[QUESTION]")] = None,
    /,
    image: Annotated[list[Path], arg(aliases=["-i"], metavar="FILE...")] = [],  # noqa: B006
    mode: Literal["auto", "think", "nothink"] = "auto",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    weights: Literal["int8"] | None = None,
    mesh: Annotated[dict[str, int], arg(metavar="AXIS SIZE ...")] = {},  # noqa: B006
    save_image: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Ask a checkpoint one question, with or without images, and print the answer; or talk to it.

    Without a question, questions and commands are read from the terminal or from standard input, one per line; /help
    lists the commands. On a terminal, answers are printed while they are generated, and thoughts are dim.

    Args:
        checkpoint: Hugging Face directory, checkpoint of this project or run (also gs://…); with [hub] also an id.
        prompt: Question to ask. <image> marks the place of an image; without such marks, images come first.
        image: Image files, in the order of their marks; of a conversation, those of the first question.
        mode: auto: the model decides whether to think first; think: it must; nothink: it must not.
        max_new_tokens: Maximum length of the answer, in tokens; default: 4096, or what the model's positions leave.
        temperature: Sampling temperature; 0 always takes the most likely token.
        top_p: Sample from the most likely tokens whose probabilities add up to this (with a temperature above 0).
        seed: Seed for sampling.
        weights: int8: the matrices in 8 bits, half the memory of bfloat16.
        mesh: Sizes of the mesh axes to shard over, as fsdp 4 tensor 2; default: all devices of this machine.
        save_image: Also save the images with question and answer as this PNG file.
    """
    import phivision_jax
    from phivision_jax.cli.conversation import Conversation, show
    from phivision_jax.evaluation.answer_images import answer_image
    from phivision_jax.images.decode import open_image
    from phivision_jax.inference.local import LocalGenerator
    from phivision_jax.inference.requests import Request

    images = [open_image(path) for path in image]
    if save_image and not (images and prompt):
        raise ValueError("--save-image needs a question and an image: give one with --image")
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    settings |= {"mode": mode, "max_new_tokens": max_new_tokens}
    Request("", **settings)  # refuses settings before the weights are read
    model, processor = phivision_jax.load(checkpoint, mesh=mesh, weights=weights)
    if prompt is None:
        with contextlib.closing(LocalGenerator(model, processor, slots=1)) as generator:
            generator.start()  # on a thread of its own, which Ctrl-C does not interrupt
            return Conversation(generator, settings, [path.read_bytes() for path in image]).run()
    thought, answer = show(phivision_jax.generate(model, processor, prompt, images, stream=True, **settings))
    if save_image:
        save_image.parent.mkdir(parents=True, exist_ok=True)
        answer_image(images, prompt, f"<think>{thought}</think>{answer}" if thought else answer).save(save_image)
