"""Our side of ``decode.py``: the engine of ``phivision_jax.inference``, in a separate process with the peer's protocol.

    {"do": "versions"}
    {"do": "load", "directory": "…", "dtype": "float32", "slots": 16, "length": 1024}    and compile: seconds of both
    {"do": "generate", "groups": [{"prompts": [[…]], "answers": […]}]}    seconds, CPU seconds, ids of every answer

A group is one call of ``generate``. Its answers have the lengths asked for, without a stop token; slots that have
finished are refilled within a group, not from the next one. With ``"fixed": true``, all slots are computed until the
longest answer of the group is complete.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import jax
import numpy as np
from peer_process import serve

import phivision_jax
from phivision_jax.inference.local import LocalGenerator
from phivision_jax.inference.requests import Request
from phivision_jax.rows import expand


class Ours:
    def versions(self) -> dict[str, Any]:
        return {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}

    def load(self, directory: str, dtype: str, slots: int, length: int) -> dict[str, Any]:
        start = time.perf_counter()
        model, processor = phivision_jax.load(directory, dtype=dtype)
        self.generator = LocalGenerator(model, processor, slots=slots, length=length, stop_ids=())
        loaded = time.perf_counter()
        self.generator.warm_up()
        self.rows = self.generator.engine.rows
        compiled = time.perf_counter() - loaded
        return {
            "dtype": dtype,
            "load_seconds": loaded - start,
            "compile_seconds": compiled,
            "programs": self.generator.engine.compiled,
        }

    def generate(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        ids: list[list[int]] = []
        start, cpu = time.perf_counter(), time.process_time()
        for group in groups:
            self.generator.engine.rows = self.rows[-1:] if group.get("fixed") else self.rows
            requests = [
                Request(expand(prompt, []), max_new_tokens=answer)
                for prompt, answer in zip(group["prompts"], group["answers"], strict=True)
            ]
            ids += [list(reply.ids) for (reply,) in self.generator.generate(requests)]
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "ids": ids}


if __name__ == "__main__":
    serve(Ours())
