"""Run compilations in separate processes, with a progress bar and readable errors.

The TPU compiler may abort the process that it runs in, and takes gigabytes.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import platform
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from phivision_jax.io.progress import bar
from phivision_jax.preflight.worker import PHASES

# Without these the compiler waits for a metadata server, and two compilations at once fail on a lock file.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


def check_machine() -> None:
    """Check that the TPU compiler runs on this machine.

    Raises:
      ValueError: when it does not, or is not installed.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(
            f"the TPU compiler (libtpu) runs on Linux x86-64 only, and this is {platform.system()} on "
            f"{platform.machine()}; run preflight on a Linux machine, no TPU needed"
        )
    for package in ("libtpu", "tokamax"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'phivision_jax[tpu]'")


def run_worker(title: str, facts_of: Callable[..., dict[str, Any]], *arguments: Any, shown: bool = True) -> dict:
    """Call a function of ``worker.py`` in a new process and return its facts.

    Args:
      title: text beside the progress bar.
      facts_of: the function; it receives a callback for its phases, then ``arguments``.

    Raises:
      ValueError: when the program cannot be compiled; the message gives the reason, or the compiler's last line.
    """
    os.environ.update(ENVIRONMENT)  # the new process inherits them
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as log, bar(title, len(PHASES), shown=shown) as advance:
        process = context.Process(target=_send_facts, args=(sender, log.name, facts_of, arguments))
        process.start()
        sender.close()
        try:
            while isinstance(found := receiver.recv(), str):
                advance(PHASES.index(found) > 0)
            advance(1)
        except EOFError:
            process.join()
            raise ValueError(f"{title}: {_failure(process.exitcode or 0, log.read())}") from None
        finally:
            process.kill()
            process.join()
    if isinstance(found, ValueError):
        raise found
    return found


def _send_facts(sender: Connection, log: str, facts_of: Callable[..., dict[str, Any]], arguments: tuple) -> None:
    gc.disable()  # tracing makes millions of small objects, nearly all of which stay
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    try:
        sender.send(facts_of(sender.send, *arguments))
    except ValueError as error:
        sender.send(ValueError(str(error)))  # subclasses may not pickle


def _failure(code: int, log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    checks = [line for line in lines if "Check failed" in line or line.startswith("jax.errors.")]
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    return f"the compiler {ended}: " + ((checks or lines or ["no output"])[-1]).strip()
