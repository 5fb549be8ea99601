"""Every test sees eight CPU devices: sharded code runs the same on them as on a mesh of accelerators."""

import os
import signal
import tempfile

# Before JAX is imported. A machine with an accelerator must give the same numbers, so only the CPU is asked for.
os.environ["JAX_PLATFORMS"] = "cpu"
_CACHES = tempfile.TemporaryDirectory()  # nothing of the user's is read or written
os.environ["XDG_CACHE_HOME"] = _CACHES.name
# Tests compile far more than they compute, so LLVM's costly passes are left out.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from collections.abc import Iterator

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.models import phivision
from phivision_jax.models.phivision import PhiVision
from tests.support.batches import QUICK, TINY
from tests.support.bucket_emulator import Emulator

# No test judges time: another machine, or a busy one, is slower.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Commands that run in this process install handlers of signals; no later test has them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny() -> PhiVision:
    """A model of a few thousand random weights in which every part matters: biases and scales are random too."""
    graphdef, _ = phivision.abstract(TINY)
    params = jax.jit(lambda: PhiVision(TINY, rngs=nnx.Rngs(0)).split()[1], compiler_options=QUICK)()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), params)
    return phivision.merge(graphdef, params)


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def bucket(emulator, monkeypatch, request) -> str:
    """An empty place in a bucket that is served on this machine, to this process and those that it starts."""
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    return f"gs://bucket/{request.node.name.replace('[', '_').replace(']', '')}"
