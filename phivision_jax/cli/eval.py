"""``phivision eval``: score a checkpoint on a dataset."""

from typing import Annotated, Literal

from tyro.conf import arg

from phivision_jax.cli import load_config

prepare = load_config.prepare


def eval(  # the name of the subcommand
    checkpoint: Annotated[str, arg(metavar="CHECKPOINT")],
    data: Annotated[str, arg(metavar="DATASET")] = "",
    out: Annotated[str, arg(metavar="DIR")] = "",
    mode: Literal["auto", "think", "nothink"] = "auto",
    examples: int = 0,
    batch: int = 0,
    max_new_tokens: int = 0,
    weights: Literal["int8"] | None = None,
    mesh: Annotated[dict[str, int], arg(metavar="AXIS SIZE ...")] = {},  # noqa: B006
    config: Annotated[str, arg(metavar="FILE[:VARIANT]")] = "",
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Generate an answer to every question of a dataset, compare it with the reference, and report the accuracy.

    Args:
        checkpoint: Run, checkpoint of this project or Hugging Face directory (also gs://…); with [hub] also an id.
        data: Dataset directory made by phivision data import; default: data.eval_path of the configuration.
        out: Directory (or gs://…) for report.json and answers.jsonl; default: only print the report.
        mode: auto: the model decides whether to think first; think: it must; nothink: it must not.
        examples: Number of examples to score, sampled evenly; 0 for all.
        batch: Number of questions answered at a time; 0: eval_batch of the configuration (8 without one).
        max_new_tokens: Maximum length of an answer in tokens; 0: that of the configuration (4096 without one).
        weights: int8: the matrices in 8 bits, half the memory of bfloat16.
        mesh: Sizes of the mesh axes to shard over, as fsdp 4 tensor 2; default: all devices of this machine.
        config: Configuration file with the evaluation settings.
        set: Change fields of the configuration, as in max_new_tokens=64.
    """
    import phivision_jax
    from phivision_jax.data.store.dataset import Dataset
    from phivision_jax.evaluation import accuracy, runner
    from phivision_jax.inference.local import MAX_NEW_TOKENS
    from phivision_jax.io import html, progress, storage

    cfg = load_config.load_config(config, set)
    data = data or cfg.data.eval_path
    if not data:
        raise ValueError("no dataset to score: give --data, or a --config with data.eval_path")
    directory = storage.location(out) if out else None
    if directory:
        storage.check(directory)  # before hours of work whose result could not be written
    model, processor = phivision_jax.load(checkpoint, mesh=mesh, weights=weights)
    # Without a configuration the model may think, and each question takes the memory of an answer of full length.
    defaults = (cfg.eval_batch, cfg.max_new_tokens) if config else (8, MAX_NEW_TOKENS)
    rows, limit = batch or defaults[0], max_new_tokens or defaults[1]
    dataset = Dataset.open(data)
    evaluator = runner.Evaluator(dataset, processor, rows=rows, max_new_tokens=limit, num_examples=examples, mode=mode)
    with progress.bar("evaluate", len(evaluator.records)) as advance:
        answers = evaluator(model, advance)
    html.print_sections([accuracy.accuracy_section(f"{checkpoint} on {data}, mode {mode}", answers)])
    if directory:
        accuracy.write_report(directory, answers, checkpoint=checkpoint, data=data, mode=mode)
        print(f"written: {out}/report.json, answers.jsonl")
