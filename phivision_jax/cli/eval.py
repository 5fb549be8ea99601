"""``phivision eval``: score a checkpoint, or any model behind an OpenAI endpoint, on benchmarks and datasets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from tyro.conf import OmitArgPrefixes, Positional, arg

from phivision_jax.cli import load_config
from phivision_jax.cli.eval_model import Judging, Local, LocalModel, Remote, RemoteModel
from phivision_jax.evaluation.benchmark import Benchmark, Item
from phivision_jax.evaluation.task import Sampling
from phivision_jax.io.messages import did_you_mean
from phivision_jax.text.constants import PromptMode

if TYPE_CHECKING:
    from phivision_jax.evaluation.mirror import Mirror
    from phivision_jax.evaluation.output import Output
    from phivision_jax.evaluation.results import Result
    from phivision_jax.evaluation.run import Receive

prepare = load_config.prepare


def eval(  # the name of the subcommand
    checkpoint: Annotated[Positional[str], arg(metavar="[CHECKPOINT]")] = "",
    /,
    benchmarks: Annotated[str, arg(metavar="NAME,NAME,…")] = "",
    modes: Annotated[str, arg(metavar="MODE,MODE,…")] = "auto",
    benchmark_data: Annotated[tuple[str, ...], arg(metavar="DIR...")] = (),
    data: Annotated[str, arg(metavar="DATASET")] = "",
    out: Annotated[str, arg(metavar="DIR")] = "",
    limit: int = 0,
    cost: bool = False,
    restart: bool = False,
    shard: Annotated[str, arg(metavar="I/N")] = "",
    cache: Annotated[str, arg(metavar="DIR")] = "",
    no_cache: bool = False,
    sampling: OmitArgPrefixes[Sampling] = Sampling(),  # noqa: B008
    local: OmitArgPrefixes[Local] = Local(),  # noqa: B008
    remote: OmitArgPrefixes[Remote] = Remote(),  # noqa: B008
    judging: OmitArgPrefixes[Judging] = Judging(),  # noqa: B008
    config: Annotated[str, arg(metavar="FILE[:VARIANT]")] = "",
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE")] = (),
) -> None:
    """Ask a model the items of benchmarks or of a dataset; report scores, seconds and tokens.

    Results are written while it runs. The same command continues after a kill, and asks failed requests again.

    Args:
        checkpoint: Run, checkpoint of this project or Hugging Face directory (also gs://…); with [hub] also an id.
        benchmarks: Names of benchmarks, or paths of Python files that define one; see docs/evaluation.md.
        modes: auto: the model decides whether to think first; think: it must; nothink: it must not.
        benchmark_data: Directories with the data of each benchmark in a directory of its name, or NAME=PATH; default:
            downloaded, with [hub].
        data: Dataset directory made by phivision data import, scored by equality with its last answers; default
            without benchmarks: data.eval_path of the configuration.
        out: Directory (or gs://…) for results, images and reports; default: only print the scores.
        limit: Size of a random sample of each benchmark; 0 for all items.
        cost: Measure seconds and tokens as published: 100 items of four benchmarks, one at a time, without caches.
        restart: Remove the results of an earlier start in --out.
        shard: This process's share of the items, from 0/N to N-1/N; all write to the same --out. Default:
            JAX_PROCESS_ID/JAX_NUM_PROCESSES, if they are set.
        cache: Directory of replies that equal requests use again; default: ~/.cache/phivision_jax/replies.
        no_cache: Ask the model everything.
        sampling: Settings of the requests.
        local: Settings of a checkpoint.
        remote: Settings of an endpoint.
        judging: Settings of a judge.
        config: Configuration file with max_new_tokens, eval_batch and data.eval_path of an evaluation.
        set: Change fields of the configuration, as in max_new_tokens=64.
    """
    from phivision_jax.checkpoint.layout import code_version
    from phivision_jax.evaluation import cost as protocol
    from phivision_jax.evaluation.choice import choose
    from phivision_jax.evaluation.dataset import DatasetBenchmark
    from phivision_jax.evaluation.mirror import Mirror
    from phivision_jax.evaluation.output import ABOUT, Output
    from phivision_jax.evaluation.reply_cache import ReplyCache, default_directory
    from phivision_jax.evaluation.run import Runner
    from phivision_jax.evaluation.task import survey

    # Everything that can be refused is refused before the weights are read.
    if bool(checkpoint) == bool(remote.endpoint):
        raise ValueError("give a CHECKPOINT, or --endpoint=URL with --model=NAME")
    cfg = load_config.load_config(config, set)
    asked_modes, (index, count) = parse_modes(modes), parse_shard(shard)
    names = list(filter(None, benchmarks.split(",")))
    if cost:
        names, limit = names or [*protocol.BENCHMARKS], limit or protocol.ITEMS
    if config and sampling.max_new_tokens is None:
        sampling = dataclasses.replace(sampling, max_new_tokens=cfg.max_new_tokens)
    chosen: list[tuple[Benchmark, str]] = choose(names, benchmark_data)
    if data := data or ("" if names else cfg.data.eval_path):
        chosen.append((DatasetBenchmark(limit, sampling.seed), data))
    if not chosen:
        raise ValueError("nothing to score: give --benchmarks or --data, or a --config with data.eval_path")
    items = [benchmark.items(path) for benchmark, path in chosen]
    judging.check()

    model: RemoteModel | LocalModel
    if remote.endpoint:
        model = RemoteModel(remote)
    else:
        model = LocalModel(checkpoint, local, slots=cfg.eval_batch if config else 0)
    tasks = [
        survey(benchmark, found, sampling, limit=limit, seed=sampling.seed, measure=model.measure)
        for (benchmark, _), found in zip(chosen, items, strict=True)
    ]
    settings: dict[str, Any] = {
        "model": model.identity,
        "benchmarks": {t.name: {"items": len(t.chosen), "fingerprint": t.fingerprint} for t in tasks},
        "modes": asked_modes,
        "sampling": dataclasses.asdict(sampling),
        "judge": judging.judge_model,
        "cost": cost,
        "shards": count,
        ABOUT: {"model": model.name, "code": code_version(), "data": {b.name: path for b, path in chosen}},
    }
    with contextlib.ExitStack() as stack:
        place = out or stack.enter_context(tempfile.TemporaryDirectory())
        mirror = stack.enter_context(Mirror(place, index, restart=restart))
        with contextlib.ExitStack() as files:
            output = files.enter_context(Output(mirror.directory, settings, shard=index, restart=restart))
            replies = None
            if not (no_cache or cost):
                replies = ReplyCache(Path(cache) if cache else default_directory())
                files.enter_context(contextlib.closing(replies))
            generator, mine = model.generator(cost=cost), [task.shard(index, count) for task in tasks]
            total = len(asked_modes) * sum(len(task.chosen) for task in mine)
            if cost and len(output.values) < total:
                protocol.warm_up(generator, mine, asked_modes, sampling)
            runner = Runner(
                generator,
                files.enter_context(shown(output, mirror, total)),
                modes=asked_modes,
                sampling=sampling,
                cache=replies,
                model=model.key,
                judge=judging.open(replies),
                patch=model.patch,
                by_mode=cost,
            )
            runner.run(mine, skip=frozenset(output.values))
        mirror.pull()
        report(mirror.directory, {benchmark.name: benchmark for benchmark, _ in chosen}, model.name)
        if out:
            print(f"written: {out}/report.html, report.md, report.json, results")


@contextlib.contextmanager
def shown(output: Output, mirror: Mirror, total: int) -> Iterator[Receive]:
    """Write results, and show a bar with the accuracy so far and the time left."""
    from phivision_jax.io import progress

    value = sum(output.values.values())
    with progress.bar("evaluate", total, done=len(output.values)) as advance:

        def receive(result: Result, item: Item) -> None:
            nonlocal value
            output.write(result, item)
            mirror.push(due=True)
            value += result.value
            advance(1, note=f"accuracy {value / len(output.values):.1%}")

        yield receive


def report(directory: Path, benchmarks: Mapping[str, Benchmark], model: str) -> None:
    """Print the figures of an evaluation and write its reports; with several shards, of the results so far."""
    from phivision_jax.evaluation import cost, summary
    from phivision_jax.evaluation.report import write_report
    from phivision_jax.evaluation.results import load_results

    settings, results = load_results(directory)
    summaries = summary.summarize(results, benchmarks)
    summary.print_summaries(model, summaries)
    for line in summary.failures(results):
        print(line)
    expected = len(settings["modes"]) * sum(each["items"] for each in settings["benchmarks"].values())
    if len(results) < expected:
        print(f"{len(results):,} of {expected:,} results: other shards have not finished")
    write_report(directory, benchmarks=benchmarks)
    if settings["cost"]:
        cost.write_cost(directory, summaries)


def parse_modes(text: str) -> list[PromptMode]:
    """Modes separated by commas.

    Raises:
      ValueError: for another name, or one that is given twice.
    """
    modes: list[Any] = text.split(",")
    for mode in modes:
        if mode not in get_args(PromptMode):
            raise ValueError(
                f"--modes={text}: there is no mode {mode!r:.50}; {did_you_mean(mode, get_args(PromptMode))}"
            )
        if modes.count(mode) > 1:
            raise ValueError(f"--modes={text}: {mode} is given twice")
    return modes


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count of shards in "I/N"; without text those of JAX's environment variables.

    Raises:
      ValueError: for anything else.
    """
    text = text or f"{os.environ.get('JAX_PROCESS_ID') or 0}/{os.environ.get('JAX_NUM_PROCESSES') or 1}"
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard={text}: give the number of this process and of all, from 0/N to N-1/N, as in 0/4")
    return int(index), int(count)
