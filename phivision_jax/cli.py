"""The one command, ``phivision``: each subcommand is a typed function (tyro), so ``--help`` says all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg


def data_import(
    source: Positional[Literal["easy-vqa"]],
    out: Positional[Path],
    /,
    checkpoint: Path | None = None,
    questions_per_record: int = 1,
) -> None:
    """Write a source as datasets: ArrayRecord shards, an index with every example's size, a manifest.

    Args:
        source: What to import. easy-vqa needs the package of that name (pip install easy-vqa).
        out: Directory to make; OUT/train and OUT/test for a source with splits.
        checkpoint: Whose tokenizer and template to count with; default: the project's small ones.
        questions_per_record: Questions about one image per training conversation (test records have one).
    """
    from phivision_jax import loading
    from phivision_jax.config import DecoderConfig, ModelConfig
    from phivision_jax.data.records import write_dataset
    from phivision_jax.data.sources import easy_vqa
    from phivision_jax.processor import Processor

    if checkpoint:
        path = loading.locate(checkpoint)
        processor = loading.processor_of(path, loading.config_of(path))
    else:
        # Patch settings do not matter here: the index holds sizes in pixels.
        decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)
        processor = Processor.small(ModelConfig(decoder=decoder))
    splits: dict[Literal["train", "test"], int] = {"train": questions_per_record, "test": 1}
    for split, count in splits.items():
        if (out / split / "manifest.json").exists():  # written last: what has one is whole
            print(f"{out / split} is there already")
        else:
            write_dataset(out / split, easy_vqa(split, questions_per_record=count), processor)


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
        checkpoint: A Hugging Face directory, a checkpoint of ours, a training run, or (with [hub]) an id.
        prompt: The question. <image> marks where a picture goes; without marks, pictures come first.
        image: Picture files, in order.
        mode: Whether the model thinks first: its own choice, always, never.
        max_new_tokens: Where the answer ends at the latest.
        temperature: 0 takes the likeliest token each time.
        top_p: Nucleus to draw from, at a temperature above 0.
        seed: Of the draws.
        save_picture: Also save the first picture with question and answer as a PNG.
    """
    import phivision_jax
    from phivision_jax.evaluation.report import picture_with_answer
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
        picture_with_answer(images[0], prompt, answer, save_picture, footer=checkpoint)


def main() -> None:
    data = tyro.extras.SubcommandApp()
    data.command(name="import")(data_import)
    app = tyro.extras.SubcommandApp()
    app.command(data, name="data", help="Datasets: import.")
    app.command(chat)
    try:
        app.cli(prog="phivision", description=__doc__)
    except FileNotFoundError as error:
        sys.exit(f"phivision: {error.filename} does not exist")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"phivision: {error}")


if __name__ == "__main__":
    main()
