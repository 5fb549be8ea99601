"""Compilations in processes of their own (``worker.py``), with a bar and their errors as sentences."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phivision_jax.io.progress import bar
from phivision_jax.preflight.worker import PHASES

# The compiler asks the machine about itself (there is no TPU: it would wait), and takes a lock that two compilations
# at once would fight over.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


def check_machine() -> None:
    """Raises:
    ValueError: where the TPU compiler does not run or is not installed.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(
            f"the TPU compiler (libtpu) exists for Linux on x86-64 only, and this is {platform.system()} on "
            f"{platform.machine()}: run preflight on such a machine, no TPU needed"
        )
    for package in ("libtpu", "tokamax"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{package} is not installed: pip install 'phivision_jax[tpu]'") from None


def compile_facts(request: Mapping[str, Any], title: str, *, shown: bool = True) -> dict[str, Any]:
    """What a worker finds out.

    Args:
      request: ``what`` ("train" or "generate") and the arguments of the worker's function of that name.
      title: of the bar.

    Raises:
      ValueError: when the request cannot be compiled; the message says why, or with which words the compiler died.
    """
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory, "facts.json"), Path(directory, "log")
        command = [sys.executable, "-m", "phivision_jax.preflight.worker", str(out)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | ENVIRONMENT,
            )
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(request))
                process.stdin.close()
                with bar(title, len(PHASES), shown=shown) as advance:
                    for line in process.stdout:  # each phase names itself as it begins
                        advance(PHASES.index(line.strip()) > 0 if line.strip() in PHASES else 0)
                    code = process.wait()
                    advance(code == 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
        if code:
            raise ValueError(f"{title}: {_last_words(code, log.read_text(errors='replace'))}")
        facts = json.loads(out.read_text())
    if "error" in facts:
        raise ValueError(facts["error"])
    return facts


def _last_words(code: int, log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    checks = [line for line in lines if "Check failed" in line or line.startswith("jax.errors.")]
    died = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    return f"the compiler {died}: " + ((checks or lines or ["it said nothing"])[-1]).strip()
