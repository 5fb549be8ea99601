"""The model that ``phivision eval`` asks: a checkpoint on this machine, or one behind an OpenAI endpoint."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from phivision_jax.inference.endpoint import Endpoint

if TYPE_CHECKING:
    from phivision_jax.evaluation.judge import Judge
    from phivision_jax.evaluation.reply_cache import ReplyCache
    from phivision_jax.inference.requests import Generator, Request

_KEY, _JUDGE_KEY = "OPENAI_API_KEY", "JUDGE_API_KEY"


@dataclasses.dataclass(frozen=True)
class Local:
    """Settings of a checkpoint on this machine."""

    slots: int = 0
    """Number of sequences that are generated at the same time; 0: eval_batch of the configuration, or by the model's
    size."""
    length: int = 0
    """Most tokens of a slot, prompt and answer together; 0: what the longest item needs."""
    weights: Literal["int8"] | None = None
    """int8: the matrices in 8 bits, half the memory of bfloat16."""
    mesh: Annotated[dict[str, int], arg(metavar="AXIS SIZE ...")] = dataclasses.field(default_factory=dict)
    """Sizes of the mesh axes to shard over, as fsdp 4 tensor 2; default: all devices of this machine."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """Settings of a model behind OpenAI's chat API."""

    endpoint: Annotated[str, arg(metavar="URL")] = ""
    """Address of the API, as http://127.0.0.1:8000/v1, in place of CHECKPOINT; its key is read from OPENAI_API_KEY."""
    model: Annotated[str, arg(metavar="NAME")] = ""
    """Name of the model there."""
    parallel: int = 8
    """Requests in flight."""
    timeout: float = 600.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 4
    """Attempts at a request before it counts as failed."""


@dataclasses.dataclass(frozen=True)
class Judging:
    """Settings of a model that decides about answers where a benchmark's published rule asks one."""

    judge: Annotated[str, arg(metavar="URL")] = ""
    """Address of the judge's OpenAI API; its key is read from JUDGE_API_KEY, or else OPENAI_API_KEY. Without a judge
    such scores are those of a rule alone, and are labelled so."""
    judge_model: Annotated[str, arg(metavar="NAME")] = ""
    """Name of the judge there."""

    def check(self) -> None:
        """Raises ValueError when only one of address and name is given."""
        if bool(self.judge) != bool(self.judge_model):
            raise ValueError("a judge needs both: --judge=URL --judge-model=NAME")

    def open(self, cache: ReplyCache | None) -> Judge | None:
        """The judge, whose answers are cached as the model's are; None without one."""
        from phivision_jax.evaluation.judge import Judge

        if not self.judge:
            return None
        key = os.environ.get(_JUDGE_KEY) or os.environ.get(_KEY)
        endpoint = Endpoint(self.judge.rstrip("/"), self.judge_model, _headers(key), log=lambda line: None)
        return Judge(endpoint, self.judge_model, f"{self.judge_model} at {self.judge}", cache)


class RemoteModel:
    """A model behind an endpoint.

    Raises:
      ValueError: without a name.

    Attributes:
      name: in reports.
      identity: in run.json.
      key: in keys of the cache of replies.
    """

    patch = bytes

    def __init__(self, remote: Remote) -> None:
        if not remote.model:
            raise ValueError(f"--endpoint={remote.endpoint} needs the name of the model there: give --model=NAME")
        self._remote, self.name = remote, remote.model
        self.identity = self.key = f"{remote.model} at {remote.endpoint}"

    def measure(self, request: Request) -> None:
        """Nothing: the endpoint refuses what is too long."""

    def generator(self, *, cost: bool) -> Generator:
        """The endpoint; with ``cost`` one request at a time."""
        remote, headers = self._remote, _headers(os.environ.get(_KEY))
        settings: dict[str, Any] = {"attempts": remote.attempts, "timeout": remote.timeout, "log": lambda line: None}
        settings["parallel"] = 1 if cost else remote.parallel
        return Endpoint(remote.endpoint.rstrip("/"), remote.model, headers, **settings)


class LocalModel:
    """A checkpoint that is loaded onto the devices of this machine.

    Args:
      slots: default for ``local.slots``; 0: by the model's size.

    Raises:
      ValueError: as ``checkpoint.loading.load``.

    Attributes:
      name, identity, key: as of ``RemoteModel``; the key also has what may change an answer of the same weights.
      patch: lays out an image.
      measure: receives every request, for the length of slots.
    """

    def __init__(self, checkpoint: str, local: Local, slots: int) -> None:
        import jax

        import phivision_jax
        from phivision_jax.checkpoint import identity, layout, loading
        from phivision_jax.evaluation.slots import LongestRequest

        path = loading.locate(checkpoint)
        self.name, self._local, self._slots = checkpoint, local, local.slots or slots
        self.identity = " ".join(filter(None, (identity.fingerprint(path), local.weights)))
        self.key = f"{self.identity} {layout.code_version()} {jax.default_backend()}"
        self._model, self._processor = phivision_jax.load(str(path), mesh=local.mesh, weights=local.weights)
        self.patch, self.measure = self._processor.patch, LongestRequest(self._processor)

    def generator(self, *, cost: bool) -> Generator:
        """A generator whose slots hold the longest request; with ``cost`` by its protocol, and compiled ahead."""
        from phivision_jax.evaluation.cost import LOCAL
        from phivision_jax.evaluation.slots import make_generator
        from phivision_jax.io import progress

        longest = min(self.measure.tokens, self._local.length or self.measure.tokens)
        settings: dict[str, Any] = LOCAL if cost else {"slots": self._slots}
        generator = make_generator(self._model, self._processor, longest, **settings)
        if cost:
            with progress.bar("compile", len(generator.engine.shapes())) as advance:
                generator.warm_up(advance)
        return generator


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
