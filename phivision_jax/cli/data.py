"""``phivision data …``: what can be done with data sets on the command line.

Each command is a typed function; what it needs is imported when it runs, so that ``--help`` does not wait for JAX.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from phivision_jax.cli.data_view import show, stats

if TYPE_CHECKING:
    from phivision_jax.data.sources.source import Source
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor

type Unit = Literal["pixels", "thousand", "unit"]


def import_(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    format: Literal["auto", "json", "parquet", "tfds", "array-record"] = "auto",
    split: str = "train",
    name: str | None = None,
    images: Path | None = None,
    also_allow: tuple[Path, ...] = (),
    rename: tuple[str, ...] = (),
    task: str = "general",
    default_mode: Literal["nothink", "think", "refuse"] = "nothink",
    system: Literal["template", "user", "drop"] = "template",
    boxes: Unit = "pixels",
    inline_boxes: Unit | None = None,
    allow_urls: bool = False,
    any_extension: bool = False,
    decode: bool = False,
    max_bad: float = 0.01,
    workers: int | None = None,
    checkpoint: Path | None = None,
    questions_per_record: int = 1,
    restart: bool = False,
) -> None:
    """Make a dataset of what you have: records with their images, and an index of their lengths.

    Reads LLaVA-style JSON and JSONL (image, conversations), messages in OpenAI's or Hugging Face's style, parquet as
    the Hugging Face hub keeps it, TensorFlow Datasets, ArrayRecord. Started again after an interruption, the same
    command goes on where it stopped. What cannot be used is named with its reason in OUT/quarantine.jsonl.

    Args:
        source: A file, a folder, tfds:NAME, or easy-vqa (a small real set: pip install easy-vqa; it makes OUT/train and
            OUT/test).
        out: Directory to make.
        format: How to read; auto looks at names.
        split: Of TFDS; of a folder, the files with it in their names; train: those with no split's name too.
        name: Of the source, for mixtures and reports; default: the file's or folder's.
        images: Folder in which the images' paths begin, and which none may leave; default: the data file's own.
        also_allow: Further folders in which images may lie, for symbolic links that lead there.
        rename: Fields that have other names in the data: theirs=ours, as in question=prompt.
        task: Of records that name none.
        default_mode: Of records that neither state nor show whether the answer comes after thinking.
        system: System messages: left to the checkpoint's template, put before the first user message, or dropped.
        boxes: What the numbers of the field objects count.
        inline_boxes: Also rewrite [x, y] and [x1, y1, x2, y2] in texts from this unit to [0, 1].
        allow_urls: Fetch images from http and https.
        any_extension: Let pass image files of another format than their names say.
        decode: Decode every image now, so that nothing is left for training to find.
        max_bad: The share of bad records that stops the import.
        workers: Processes; default: one per core. 0 imports in this one.
        checkpoint: Whose tokenizer and template to count with; default: the project's small ones.
        questions_per_record: Of easy-vqa: questions about one image per training conversation (test records have one).
        restart: Remove what an interrupted import has done, instead of going on with it. Without it one that was begun
            with other options is an error.
    """
    from phivision_jax.data.records import TASKS
    from phivision_jax.data.sources.items import ItemOptions
    from phivision_jax.data.sources.open_source import open_source
    from phivision_jax.data.store.dataset import MANIFEST
    from phivision_jax.data.store.importing import import_source

    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max-bad is a share between 0 and 1, not {max_bad}")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be 0 or more, not {workers}")
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise ValueError(f"--task {task}: {f'did you mean {near[0]}?' if near else f'known are {", ".join(TASKS)}'}")
    for option, folder in (("--images", images), *(("--also-allow", folder) for folder in also_allow)):
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"{option} {folder}: there is no such folder")
    if source == "easy-vqa":
        from phivision_jax.data.sources.easy_vqa import easy_vqa
        from phivision_jax.data.sources.memory import RecordsSource

        splits: dict[Literal["train", "test"], int] = {"train": questions_per_record, "test": 1}
        todo: list[tuple[Path, Source]] = [
            (out / part, RecordsSource(easy_vqa(part, questions_per_record=n), name=f"easy_vqa/{part}"))
            for part, n in splits.items()
        ]
    else:
        options = ItemOptions(
            images=images,
            also_allow=also_allow,
            default_mode=default_mode,
            task=task,
            system=system,
            rename=tuple(_pair(text) for text in rename),
            boxes=boxes,
            inline_boxes=inline_boxes,
            allow_urls=allow_urls,
            any_extension=any_extension,
        )
        opened = open_source(source, format=format, split=split, options=options, name=name)
        if Path(source).is_dir():
            _print_files(opened)
        todo = [(out, opened)]
    processor = processor_for(checkpoint)
    for directory, what in todo:
        there = (directory / MANIFEST).exists()
        dataset = import_source(
            what, directory, processor, workers=workers, decode=decode, max_bad=max_bad, restart=restart
        )
        if there:
            print(f"{directory} is there already")
        else:
            _summarise(dataset, processor)


def _print_files(source: Source) -> None:
    """Which files of a folder are read, and which are not: their names decided it."""
    from phivision_jax.data.sources.files import Files, shorten

    files: Files | None = getattr(source, "files", None)  # TFDS and ArrayRecord say themselves what belongs to them.
    if files is not None:
        left_out = f"; left out: {len(files.left_out):,} ({shorten(files.left_out)})" if files.left_out else ""
        print(f"reading {len(files.read):,} of its files ({shorten(files.read)}){left_out}")


def _pair(text: str) -> tuple[str, str]:
    theirs, equals, ours = text.partition("=")
    if not (theirs and equals and ours):
        raise ValueError(f"--rename {text}: write it as theirs=ours, the data's name first")
    return theirs, ours


def processor_for(checkpoint: Path | None) -> Processor:
    """The checkpoint's, or the project's own small one: patch settings do not matter, an index holds pixels."""
    from phivision_jax.config import DecoderConfig, ModelConfig
    from phivision_jax.processor import Processor

    if checkpoint:
        from phivision_jax.checkpoint import loading

        path = loading.locate(checkpoint)
        return loading.processor_of(path, loading.config_of(path))
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)
    return Processor.small(ModelConfig(decoder=decoder))


def _summarise(dataset: Dataset, processor: Processor) -> None:
    """What was imported; what its reader should think about goes to stderr."""
    from phivision_jax.data.quarantine import FILE

    manifest = dataset.manifest
    counts = manifest["counts"]
    rows = [
        ("records", f"{len(dataset):,}"),
        ("images", f"{manifest['images']:,}"),
        ("text tokens", f"{manifest['text_tokens']:,}"),
        ("modes", _list(counts["modes"])),
        ("modes are", _list(counts["mode_from"])),
        ("tasks", _list(counts["tasks"])),
    ]
    if counts["system_messages"]:
        kept = _keeps_system_messages(processor)
        fate = "the template keeps them" if kept else "the template drops them; --system user keeps their text"
        rows.append(("system messages", f"{counts['system_messages']:,}: {fate}"))
    if bad := counts["quarantined"]:
        rows.append(("quarantined", f"{_list(bad)}: {dataset.directory / FILE}"))
    print(f"{dataset.directory}:")
    for label, value in rows:
        print(f"  {label:<16} {value}")
    if default := counts["mode_from"].get("default", 0):
        print(
            f"note: {default:,} of {len(dataset):,} records neither state nor show their mode and got the default one. "
            "Training on direct answers alone may erode the model's own choice to think: mix in reasoning data (see "
            "phivision data plan)",
            file=sys.stderr,
        )


def _list(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"


def _keeps_system_messages(processor: Processor) -> bool:
    probe = "a system message that no template says by itself"
    text, _ = processor.template.render([{"role": "system", "content": probe}, {"role": "user", "content": "?"}])
    return probe in text


def export(
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    format: Literal["llava", "messages"] = "llava",
) -> None:
    """Write a dataset as JSON lines and image files, which import reads back to the same records.

    Args:
        dataset: Directory of an import.
        out: Directory to make.
        format: llava (image, conversations) or messages (OpenAI's, Hugging Face's).
    """
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.data.store.exporting import export

    print(f"{out}: {export(Dataset.open(dataset), out, format):,} records")


def validate(
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")],
    /,
    checkpoint: Path | None = None,
    headers_only: bool = False,
    workers: int | None = None,
    out: Path | None = None,
) -> None:
    """Check every byte, record and pixel of a dataset against its manifest and index; exits with 1 if one is wrong.

    Args:
        dataset: Directory of an import.
        checkpoint: That it was imported with, to count text tokens again; default: the project's small tokenizer.
        headers_only: Do not decode the images.
        workers: Processes; default: one per core.
        out: Also write what is wrong to this file, one JSON object per line.
    """
    from phivision_jax.data.store.dataset import read_manifest
    from phivision_jax.data.store.integrity import validate

    processor = processor_for(checkpoint)
    counted = checkpoint is not None or read_manifest(dataset)["text"] == processor.text_fingerprint
    report = validate(dataset, processor if counted else None, decode=not headers_only, workers=workers)
    if out is not None:
        out.write_bytes(b"".join(p.to_json().encode(errors="backslashreplace") + b"\n" for p in report.problems))
    print(f"{dataset}:")
    for label, value in (
        ("files", f"{report.files:,}"),
        ("records", f"{report.records:,}"),
        ("images", f"{report.images:,} ({'headers read' if headers_only else 'decoded'})"),
        ("text tokens", "counted again" if counted else "not counted again: give --checkpoint"),
        ("duplicate ids", f"{report.duplicates:,}" + "".join(f"  {i!r}" for i in report.duplicate_ids)),
        ("wrong", f"{len(report.problems):,}"),
    ):
        print(f"  {label:<16} {value}")
    for problem in report.problems:
        print(f"{problem.where}: {problem.id!r}: {problem.reason}: {problem.detail}")
    if report.problems:
        sys.exit(1)


def plan(
    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="MIXTURE.toml | DATASET...")],
    /,
    out: Path,
    checkpoint: Path | None = None,
    length: int = 8192,
    vision_rows: int = 1,
    num_patches: int = 7168,
    batch_rows: int = 8,
    epochs: float | None = None,
    examples: int | None = None,
    reasoning_share: float | None = None,
    stage: str | None = None,
    on_overflow: Literal["drop", "resize", "error"] = "drop",
    seed: int = 0,
    patch_size: int | None = None,
    min_patches: int | None = None,
    max_patches: int | None = None,
) -> None:
    """Decide what is in which row of a whole training, and write it down; prints what is drawn and what does not fit.

    train.py makes its plan at its start; one made beforehand is given with --config.data.plan=OUT, and must have been
    made with the training's row sizes, patch settings, tokenizer, mixture and seed.

    Args:
        sources: A mixture file (docs/data.md says what is in it), or dataset directories, drawn by their size.
        out: Directory to make; a plan that is there is replaced.
        checkpoint: Whose tokenizer, template and patch settings count; default: the project's small tokenizer and the
            released patch settings.
        length: T, text columns of a row; image columns count.
        vision_rows: R, vision rows of a row.
        num_patches: P, patches of a vision row.
        batch_rows: B, rows of a step: attention work is balanced between them.
        epochs: Passes over the data, where the mixture says nothing else; default 1.
        examples: How many examples instead.
        reasoning_share: Share of examples that think, where the mixture says nothing else.
        stage: Only this stage of the mixture.
        on_overflow: Records that no row takes: drop and name them, resize to fewer patches where that helps, error.
        seed: Of all orders.
        patch_size: Side of a patch in pixels, where it is not the checkpoint's.
        min_patches: The patches that small images are enlarged towards, likewise.
        max_patches: The most patches of an image, likewise.
    """
    from phivision_jax.data.plan.mixture import Mixture
    from phivision_jax.data.plan.plan import check_out, make_plan
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.rows import row_shape

    given = {"epochs": epochs, "examples": examples, "reasoning_share": reasoning_share}
    settings = {name: value for name, value in given.items() if value is not None}
    if len(sources) == 1:
        mixture = Mixture.read(sources[0], **settings)
    elif sources and not any(path.suffix == ".toml" for path in sources):
        mixture = Mixture.of(*sources, **settings)
    else:
        raise ValueError("give one mixture file (.toml), or one or more dataset directories")
    if stage is not None:
        mixture = mixture.only(stage)
    check_out(out)
    datasets = [Dataset.open(path) for _, path in mixture.sources]
    processor = processor_for(checkpoint).with_patches(patch_size, min_patches, max_patches)
    made = make_plan(
        datasets,
        mixture,
        processor,
        row_shape(processor.config, length, vision_rows, num_patches),
        batch_rows=batch_rows,
        seed=seed,
        on_overflow=on_overflow,
        progress=True,
    )
    made.save(out)
    print(f"{out}: plan {made.hash[:12]}, {made.num_steps(batch_rows):,} steps of {batch_rows} rows\n{made.summary()}")
    for s, i, _ in made.rejected[:_SHOWN_REJECTED].tolist():
        print(f"  does not fit: {datasets[s][i].id!r}, record {i} of {mixture.names[s]}")
    if (more := len(made.rejected) - _SHOWN_REJECTED) > 0:
        print(f"  and {more:,} more, in {out / 'rejected.npy'}")


_SHOWN_REJECTED = 5


COMMANDS: dict[str, Callable[..., Any]] = {
    "import": import_,
    "export": export,
    "validate": validate,
    "stats": stats,
    "show": show,
    "plan": plan,
}
"""By name, in the order of ``phivision data --help``."""
