"""The one command, ``phivision``: each subcommand is a typed function (tyro), so ``--help`` says all."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from phivision_jax.cli.data import COMMANDS as data_commands
from phivision_jax.cli.goodput import goodput
from phivision_jax.cli.preflight import preflight


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
    save_picture: Path | None = None,
) -> None:
    """Ask a checkpoint one question, about pictures or not, and print the answer.

    Args:
        checkpoint: A Hugging Face directory, a checkpoint of ours, a training run (each may be gs://…), or (with
            [hub]) an id.
        prompt: The question. <image> marks where a picture goes; without marks, pictures come first.
        image: Picture files, in order.
        mode: Whether the model thinks first: its own choice, always, never.
        max_new_tokens: Where the answer ends at the latest.
        temperature: 0 takes the likeliest token each time.
        top_p: Nucleus to draw from, at a temperature above 0.
        seed: Of the draws.
        save_picture: Also save the images with question and answer as a PNG.
    """
    import phivision_jax
    from phivision_jax.evaluation.answer_images import answer_image
    from phivision_jax.images.decode import open_image

    images = [open_image(path) for path in image]
    if save_picture and not images:
        raise ValueError("--save-picture needs a picture: give one with --image")
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
    if save_picture:
        save_picture.parent.mkdir(parents=True, exist_ok=True)
        answer_image(images, prompt, answer).save(save_picture)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    data = tyro.extras.SubcommandApp()
    for name, function in data_commands.items():
        data.command(name=name)(function)
    app = tyro.extras.SubcommandApp()
    app.command(data, name="data", help="Datasets: " + ", ".join(data_commands) + ".")
    app.command(chat)
    app.command(preflight)
    app.command(goodput)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app.cli(prog="phivision", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    except KeyboardInterrupt as error:
        _fail("interrupted", error, 130)
    except BrokenPipeError:  # whoever read this has enough, as head has; nothing is left to say, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FileNotFoundError as error:
        _fail(f"{error.filename} does not exist" if error.filename else str(error), error, 1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _fail(str(error), error, 1)


def _fail(what: str, error: BaseException, code: int) -> NoReturn:
    """One sentence, and what the library has to add to it."""
    print("\n".join([f"phivision: {what}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
