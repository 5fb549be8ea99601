"""``phivision data …``: datasets on the command line.

Each command is a typed function; it imports what it needs when it runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from phivision_jax.cli.data_view import show, stats
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.io.messages import printable

if TYPE_CHECKING:
    from phivision_jax.data.sources.source import Source
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.processor import Processor


def import_(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    options: Annotated[ItemOptions, arg(name="")] = ItemOptions(),  # noqa: B008
    format: Literal["auto", "json", "parquet", "tfds", "array-record"] = "auto",
    split: str = "train",
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    decode: bool = False,
    max_bad: float = 0.01,
    workers: Annotated[int | None, arg(metavar="INT")] = None,
    checkpoint: Annotated[Path | None, arg(metavar="CHECKPOINT")] = None,
    questions_per_record: int = 1,
    restart: bool = False,
) -> None:
    """Make a dataset from your data: records with their images, and an index of their lengths.

    Reads LLaVA-style JSON and JSONL (image, conversations), messages in the style of OpenAI or Hugging Face, parquet as
    the Hugging Face hub stores it, TensorFlow Datasets, and ArrayRecord. After an interruption the same command
    continues. Items that cannot be used are listed with a reason in OUT/quarantine.jsonl. The summary names fields that
    are not read; docs/data.md lists those that are.

    Args:
        source: File, folder, tfds:NAME, or easy-vqa.
            easy-vqa is a small real data set (pip install easy-vqa), which is written to OUT/train and OUT/test.
        out: Dataset directory to write.
        format: Format of the source; auto: determined from names of files.
        split: Split of a TFDS data set; of a folder, the files with this word in their names.
            train also selects files without the name of any split.
        name: Name of the source in mixtures and reports; default: the name of the file or folder.
        decode: Decode every image now, so that training finds no broken ones.
        max_bad: Share of bad items above which the import stops.
        workers: Number of worker processes; default: one per core. 0 imports in this process.
        checkpoint: Checkpoint that will be trained, whose tokenizer and template count the tokens;
            default: the small ones of this project.
        questions_per_record: For easy-vqa: questions about one image per training conversation (test records have one).
        restart: Start over after an interrupted import, instead of continuing it.
    """
    from phivision_jax.data.store.dataset import MANIFEST
    from phivision_jax.data.store.importing import import_source

    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max-bad is a share between 0 and 1, not {max_bad}")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be 0 or more, not {workers}")
    jobs: dict[Path, Source]
    if source == "easy-vqa":
        from phivision_jax.data.sources.easy_vqa import easy_vqa
        from phivision_jax.data.sources.source import RecordsSource

        parts = {"train": easy_vqa("train", questions_per_record=questions_per_record), "test": easy_vqa("test")}
        jobs = {out / part: RecordsSource(records, name=f"easy_vqa/{part}") for part, records in parts.items()}
    else:
        from phivision_jax.data.sources.open_source import open_source

        jobs = {out: open_source(source, format=format, split=split, options=options, name=name)}
        files = getattr(jobs[out], "files", None)  # the metadata of TFDS and ArrayRecord name their files
        if Path(source).is_dir() and files is not None:
            say(str(files))
    processor = processor_for(checkpoint)
    for directory, what in jobs.items():
        exists = (directory / MANIFEST).exists()
        settings: dict[str, Any] = {"workers": workers, "decode": decode, "max_bad": max_bad, "restart": restart}
        dataset = import_source(what, directory, processor, **settings)
        say(f"{directory} exists already") if exists else _summarise(dataset, processor, options.system)


def processor_for(checkpoint: Path | None) -> Processor:
    """The processor of a checkpoint, or the project's small one; an index needs no patch settings."""
    from phivision_jax.config import DecoderConfig, ModelConfig
    from phivision_jax.processor import Processor

    if checkpoint:
        from phivision_jax.checkpoint import loading

        path = loading.locate(checkpoint)
        return loading.processor_of(path, loading.config_of(path))
    decoder = DecoderConfig(vocab_size=512, bos_token_id=507, eos_token_id=508, pad_token_id=509)
    return Processor.small(ModelConfig(decoder=decoder))


def _summarise(dataset: Dataset, processor: Processor, system: str) -> None:
    """Print what was imported; a warning goes to stderr."""
    from phivision_jax.data.quarantine import FILE

    manifest = dataset.manifest
    counts = manifest["counts"]
    rows = {name: f"{manifest[name.replace(' ', '_')]:,}" for name in ("records", "images", "text tokens")}
    rows |= {"modes": _list(counts["modes"]), "modes are": _list(counts["mode_from"]), "tasks": _list(counts["tasks"])}
    if counts["system_messages"]:
        fates = {"user": "put before the first user message", "drop": "dropped (--system drop)"}
        kept = "keeps them" if _keeps_system_messages(processor) else "drops them; --system user keeps their text"
        fate = fates.get(system, f"the template {kept}")
        rows["system messages"] = f"{counts['system_messages']:,}: {fate}"
    if unread := sorted(counts.get("unread", {}).items(), key=lambda pair: (-pair[1][0], pair[0])):
        lines = [f"{name} {count:,} (e.g. {example})" for name, (count, example) in unread]
        if len(lines) > _SHOWN_UNREAD:
            more = f"and {len(lines) - _SHOWN_UNREAD:,} more, in {dataset.directory / 'manifest.json'}"
            lines[_SHOWN_UNREAD:] = [more]
        rows["not read"] = ("\n" + " " * 19).join(lines)
    if bad := counts["quarantined"]:
        rows["quarantined"] = f"{_list(bad)}: {dataset.directory / FILE}"
    _print_rows(dataset.directory, rows)
    if default := counts["mode_from"].get("default", 0):
        note = f"note: {default:,} of {len(dataset):,} records neither state nor show their mode and got the default. "
        erosion = "Training on direct answers alone may erode the model's own choice to think: mix in reasoning data "
        print(f"{note}{erosion}(see phivision data plan)", file=sys.stderr)


def _print_rows(title: Path, rows: dict[str, str]) -> None:
    say("\n".join([f"{title}:", *(f"  {label:<16} {value}" for label, value in rows.items())]))


def say(text: str) -> None:
    """Print text that may have names from the data in it."""
    print(printable(text))


def _list(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"


def _keeps_system_messages(processor: Processor) -> bool:
    probe = "a system message that is in no template"
    text, _ = processor.template.render([{"role": "system", "content": probe}, {"role": "user", "content": "?"}])
    return probe in text


def export(
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    format: Literal["llava", "messages"] = "llava",
) -> None:
    """Write a dataset as JSON lines and image files, from which phivision data import makes the same records again.

    Args:
        dataset: Dataset directory made by phivision data import.
        out: Directory to write.
        format: llava: fields image and conversations; messages: the form of OpenAI and Hugging Face.
    """
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.data.store.exporting import export

    say(f"{out}: {export(Dataset.open(dataset), out, format):,} records")


def validate(
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")],
    /,
    headers_only: bool = False,
    workers: Annotated[int | None, arg(metavar="INT")] = None,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Check every file, record and image of a dataset against its manifest and index.

    The exit code is 1 if anything is damaged.

    Args:
        dataset: Dataset directory made by phivision data import.
        headers_only: Check the headers of images only, without decoding them.
        workers: Number of worker processes; default: one per core.
        out: File to which the problems are also written, one JSON object per line.
    """
    from phivision_jax.data.store.integrity import validate

    report = validate(dataset, decode=not headers_only, workers=workers)
    if out is not None:
        out.write_bytes(b"".join(problem.to_line() for problem in report.problems))
    rows = {"files": f"{report.files:,}", "records": f"{report.records:,}"}
    rows["images"] = f"{report.images:,} ({'headers read' if headers_only else 'decoded'})"
    rows["duplicate ids"] = f"{report.duplicates:,}" + "".join(f"  {i!r:.100}" for i in report.duplicate_ids)
    _print_rows(dataset, rows | {"problems": f"{len(report.problems):,}"})
    for problem in report.problems:
        say(f"{problem.where}: {problem.id!r:.100}: {problem.reason}: {problem.detail}")
    if report.problems:
        print("copy the dataset again, or import its data again with --decode, which leaves out broken images")
        sys.exit(1)


def plan(
    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="MIXTURE.toml | DATASET...")],
    /,
    out: Annotated[Path, arg(metavar="DIR")],
    checkpoint: Annotated[Path | None, arg(metavar="CHECKPOINT")] = None,
    length: int = 8192,
    vision_rows: int = 1,
    num_patches: int = 7168,
    batch_rows: int = 8,
    epochs: Annotated[float | None, arg(metavar="FLOAT")] = None,
    examples: Annotated[int | None, arg(metavar="INT")] = None,
    reasoning_share: Annotated[float | None, arg(metavar="FLOAT")] = None,
    stage: Annotated[str | None, arg(metavar="NAME")] = None,
    on_overflow: Literal["drop", "resize", "error"] = "drop",
    seed: int = 0,
    patch_size: Annotated[int | None, arg(metavar="INT")] = None,
    min_patches: Annotated[int | None, arg(metavar="INT")] = None,
    max_patches: Annotated[int | None, arg(metavar="INT")] = None,
) -> None:
    """Plan which example is in which row of a training run; print the shares, and the records that do not fit.

    A training run makes its own plan, or uses this one with --config.data.plan=DIR. The run must have the same row
    sizes, patch settings, tokenizer, mixture and seed as the plan.

    Args:
        sources: One mixture file (docs/data.md), or dataset directories, which are sampled in proportion to their size.
        out: Directory to write; an existing plan in it is replaced.
        checkpoint: Checkpoint whose tokenizer, template and patch settings are used;
            default: the small tokenizer of this project and the released patch settings.
        length: T: tokens per row, text and images.
        vision_rows: R: vision rows per row.
        num_patches: P: patches per vision row.
        batch_rows: B: rows per step; the plan balances attention work between them.
        epochs: Number of passes over the data, unless the mixture sets it; default 1.
        examples: Number of examples, in place of epochs.
        reasoning_share: Share of examples with thinking, unless the mixture sets it.
        stage: Stage of the mixture to plan; default: all stages, one after the other.
        on_overflow: Action for records that fit no row: drop them and list them,
            resize their images to fewer patches if that helps, or stop with an error.
        seed: Seed for the order of examples.
        patch_size: Side of a patch in pixels; default: that of the checkpoint.
        min_patches: Number of patches to which smaller images are enlarged; default: that of the checkpoint.
        max_patches: Largest number of patches of an image; default: that of the checkpoint.
    """
    from phivision_jax.data.plan.mixture import Mixture
    from phivision_jax.data.plan.plan import check_out, make_plan
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.rows import row_shape

    given = {"epochs": epochs, "examples": examples, "reasoning_share": reasoning_share}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not sources or (len(sources) > 1 and any(path.suffix == ".toml" for path in sources)):
        raise ValueError("give one mixture file (.toml), or one or more dataset directories")
    read = Mixture.read if len(sources) == 1 else Mixture.from_directories
    mixture = read(*sources, **settings)
    if stage is not None:
        mixture = mixture.only(stage)
    check_out(out)
    datasets = [Dataset.open(path) for _, path in mixture.sources]
    processor = processor_for(checkpoint).with_patches(patch_size, min_patches, max_patches)
    shape = row_shape(processor.config, length, vision_rows, num_patches)
    options = {"batch_rows": batch_rows, "seed": seed, "on_overflow": on_overflow}
    plan = make_plan(datasets, mixture, processor, shape, progress=True, **options)
    plan.save(out)
    say(f"{out}: plan {plan.hash[:12]}, {plan.num_steps(batch_rows):,} steps of {batch_rows} rows\n{plan.summary()}")
    for s, i, _ in plan.rejected[:_SHOWN_REJECTED].tolist():
        say(f"  does not fit: {datasets[s][i].id!r:.100}, record {i} of {mixture.names[s]}")
    if (more := len(plan.rejected) - _SHOWN_REJECTED) > 0:
        say(f"  and {more:,} more, in {out / 'rejected.npy'}")


_SHOWN_REJECTED = 5
_SHOWN_UNREAD = 12


COMMANDS = (import_, export, validate, stats, show, plan)
"""In the order of ``phivision data --help``."""
