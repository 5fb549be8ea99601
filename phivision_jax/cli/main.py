"""The command ``phivision``: one module of this package per subcommand, imported when it is chosen."""

import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from phivision_jax.io.messages import did_you_mean, printable, shorten

COMMANDS = {
    "data": "Import, check, plan, view and export datasets.",
    "images": "Compare strategies that turn images into tokens, on an image.",
    "train": "Train a model, or continue a run.",
    "eval": "Score a model on benchmarks or on a dataset: scores, seconds and tokens.",
    "score": "Score predictions that another program has made.",
    "report": "Report an evaluation: scores, costs, answers to browse, and the comparison with another.",
    "convert": "Convert weights between Hugging Face and this project.",
    "chat": "Ask a checkpoint a question, with or without images, or talk to it.",
    "serve": "Serve a checkpoint: OpenAI's chat API, and a page for people.",
    "preflight": "Compile training or generation for TPUs that are not attached: memory, collectives, time.",
    "goodput": "Report how the wall time of runs was spent: steps, compiling, saving, lost work.",
}
"""Subcommand, the name of its module → description. A module has a function of the same name, or a tuple COMMANDS of
functions; tyro turns their parameters into flags. It may have ``prepare``, which changes the arguments first, and
``FAILURE``, the exit code of an error (default 1)."""
EXPECTED = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)
"""Exceptions whose message is for the user; others are faults of the program and show their traceback."""
USAGE = (
    "usage: phivision COMMAND …",
    "Train, fine-tune, convert and run Phi-4-reasoning-vision-15B in JAX.",
    "\n".join(f"  {command:<11}{description}" for command, description in COMMANDS.items()),
    "Run phivision COMMAND --help for the options of a command, phivision --version for the version.",
    "exit codes: 0 done, 1 error or difference, 2 usage (convert: any error), 3 too large, 75–77 restart, "
    "130 interrupted",
)
"""Paragraphs of the help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
      arguments: default: the process's own.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file
    failure = 1
    try:
        if name in ("--help", "-h", "--version"):
            versions = ", ".join(f"{package} {version(package)}" for package in ("phivision_jax", "jax"))
            print(versions if name == "--version" else "\n\n".join(USAGE), flush=True)
            return
        if name not in COMMANDS:
            _fail(f"there is no command {name!r}; {did_you_mean(name, COMMANDS)}", 2)
        module = importlib.import_module(f"phivision_jax.cli.{name}")
        failure = getattr(module, "FAILURE", 1)
        _run(module, name, rest)
    except KeyboardInterrupt as error:
        _fail("interrupted", 130, error)
    except BrokenPipeError:  # the reader has enough, as head has; there is nothing left to print, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except EXPECTED as error:
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        _fail(f"{missing} does not exist" if missing else str(error), failure, error)


def _run(module: Any, name: str, words: list[str]) -> None:
    import tyro

    words = module.prepare(words) if hasattr(module, "prepare") else words
    settings: dict[str, Any] = {"prog": f"phivision {name}", "args": words, "config": (tyro.conf.FlagCreatePairsOff,)}
    if hasattr(module, "COMMANDS"):
        commands = {command.__name__.rstrip("_").replace("_", "-"): command for command in module.COMMANDS}
        tyro.extras.subcommand_cli_from_dict(commands, description=COMMANDS[name], **settings)
    else:
        tyro.cli(getattr(module, name), **settings)


def _fail(what: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Print one sentence, and the notes that libraries have added to the exception; exit."""
    what = re.split(r"\s*\[(?:source locations|tensorstore_spec)", what)[0]  # TensorStore appends its own source code
    what = re.sub(r"\S{300,}", lambda value: shorten(value[0]), what)
    print(printable("\n".join([f"phivision: {what}", *getattr(error, "__notes__", ())])), file=sys.stderr)
    sys.exit(code)
