"""Devices of absent slices, and failures of the compiler's process. Nothing is compiled."""

import importlib.util

import pytest

from phivision_jax import sharding
from phivision_jax.hardware.topology import CHIPS, parse_topology
from phivision_jax.preflight import compiling


def meshes(advance, names):
    """Facts of the mesh on each slice (runs in a process of its own)."""
    found = {}
    for name in names:
        where = parse_topology(name)
        mesh = sharding.make_mesh(None, compiling.devices_of(where))
        found[name] = mesh.devices.flat[0].device_kind, mesh.size, mesh.shape["fsdp"]
    return found


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux on x86-64")
def test_every_kind_of_chip_makes_a_mesh():
    names = [f"{generation}:{chip.shapes[3]}" for generation, chip in CHIPS.items()]
    found = compiling.run_worker("meshes", meshes, names, shown=False)
    for name in names:
        where = parse_topology(name)
        assert found[name] == (where.chip.device_kind, where.devices, min(where.devices, sharding.FSDP_GROUP)), name


def test_failure_shortens_the_compilers_words():
    log = "I0000 something else\nF0000 Check failed: " + "internal " * 100 + "a.cc:31\nfatal"
    message = compiling._failure(-6, log)
    assert message.startswith("the compiler was killed by SIGABRT: F0000 Check failed: internal")
    assert message.endswith("a.cc:31") and len(message) < 250
    assert compiling._failure(1, "") == "the compiler failed with code 1: no output"
