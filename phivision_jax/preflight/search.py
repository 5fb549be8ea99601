"""The fastest layout that fits: our own count ranks the candidates, the compiler tries them in that order.

candidates    groups of 32, 64, 128 chips × remat policies × rows at a time
  → ranked by modelled step time by our count alone, in seconds
  → compiled at low effort until one fits with a margin, which overstates memory a little
  → the winner confirmed at default effort; if it does not fit there, on with the next
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from phivision_jax.models.remat import POLICIES
from phivision_jax.preflight import modelled
from phivision_jax.preflight.report import MARGIN
from phivision_jax.preflight.topology import Topology
from phivision_jax.training.config import MeshConfig, RunConfig

GROUPS = (32, 64, 128)


def candidates(cfg: RunConfig, where: Topology) -> list[tuple[float, RunConfig]]:
    """(modelled seconds by our own count, configuration), fastest first; of equally fast ones, what keeps less first.

    Args:
      cfg: with nothing left open (``training.layouts.resolve``).
    """
    found = []
    for mesh in _meshes(cfg, where):
        local = cfg.data.batch_rows // (mesh.slice * mesh.data * mesh.fsdp)
        for remat in POLICIES:
            for at_once in (n for n in range(1, min(local, 4) + 1) if local % n == 0):
                tried = dataclasses.replace(cfg, mesh=mesh, remat=remat, microbatches=local // at_once)
                seconds = modelled.speed(tried, where, modelled.Mix.of_recipe(tried), None)["modelled_step_seconds"]
                # Weights are gathered once per microbatch, which our count does not see.
                found.append((seconds, at_once, mesh.fsdp, tried))
    found.sort(key=lambda one: (round(one[0], 2), -one[1], one[2]))
    return [(seconds, tried) for seconds, *_, tried in found]


def _meshes(cfg: RunConfig, where: Topology) -> Iterator[MeshConfig]:
    mesh = cfg.mesh
    copies = where.devices // (mesh.slice * mesh.tensor * mesh.context)
    for fsdp in dict.fromkeys((*GROUPS, mesh.fsdp)):
        if copies % fsdp == 0:
            yield dataclasses.replace(mesh, fsdp=fsdp, data=copies // fsdp)


def search(
    cfg: RunConfig,
    where: Topology,
    attempt: Callable[[RunConfig, bool], dict[str, Any]],
    say: Callable[[str], None],
    most: int = 24,
) -> dict[str, Any] | None:
    """The report of the fastest candidate that fits with a margin at default effort; None if none does.

    Args:
      attempt: compiles a configuration, at low effort or not, and gives its report (``report.summary``).
      say: told about every attempt, in a sentence.
      most: low-effort compilations, at the most.
    """
    order = candidates(cfg, where)
    too_much: list[RunConfig] = []
    tried = 0
    for seconds, candidate in order:
        if tried == most:
            break
        if any(_needs_more(candidate, other) for other in too_much):
            continue
        tried += 1
        for low_effort in (True, False):
            report = attempt(candidate, low_effort)
            fits = report["fits"] and report["free_share"] >= MARGIN
            verdict = f"{'fits' if fits else 'too large'} at {'low' if low_effort else 'default'} effort"
            say(f"{_name(candidate)}, {seconds:.2f} s by our count: {verdict}")
            if not fits:
                too_much.append(candidate)
                break
        else:
            return report
    return None


# What one policy keeps, another keeps too: a policy that comes later keeps no less on the device.
_KEEPS = ("offload", "offload_attention", "full", "attention", "dots", "none")


def _needs_more(candidate: RunConfig, failed: RunConfig) -> bool:
    """Whether this one cannot fit because that one did not: groups no larger, as many rows at a time, no less kept."""
    return (
        candidate.mesh.fsdp <= failed.mesh.fsdp
        and candidate.microbatches <= failed.microbatches
        and _KEEPS.index(candidate.remat) >= _KEEPS.index(failed.remat)
    )


def _name(cfg: RunConfig) -> str:
    return f"fsdp {cfg.mesh.fsdp}, remat {cfg.remat}, {cfg.microbatches} microbatches"
