"""Search for the fastest layout that fits: the modelled time ranks remat policies, the compiler decides what fits.

for each policy, fastest first by modelled step time (our own count, in seconds)
  the least demanding of its layouts at low effort: largest group, one row at a time
    too large → the policy cannot fit at all, on with the next
    fits      → layouts that send less first: more rows at a time, smaller groups; each at low effort, then at default
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from phivision_jax.hardware.topology import Topology
from phivision_jax.models.remat import POLICIES
from phivision_jax.preflight.model import modelled_step
from phivision_jax.training.run_config import ResolvedConfig

GROUPS = (16, 32, 64, 128)

type Attempt = Callable[[ResolvedConfig, bool], dict[str, Any]]


def candidates(cfg: ResolvedConfig, where: Topology) -> list[list[ResolvedConfig]]:
    """Configurations by policy, fastest policy first; within a policy, those that send least first.

    Args:
      cfg: with nothing left open (``training.device_layout.resolve``).
    """
    mesh = cfg.mesh
    replicas = where.devices // (mesh.slice * mesh.tensor * mesh.context)
    local = cfg.data.batch_rows // (mesh.slice * replicas)
    layouts = []
    for fsdp in (fsdp for fsdp in dict.fromkeys((*GROUPS, mesh.fsdp)) if replicas % fsdp == 0):
        mesh = dataclasses.replace(mesh, fsdp=fsdp, data=replicas // fsdp)
        for at_once in (n for n in range(1, min(local, 4) + 1) if local % n == 0):
            # The compiler (libtpu 0.0.50) fails on an offloading tower that takes several rows at a time.
            vision = "full" if at_once > 1 and "offload" in cfg.vision_remat else cfg.vision_remat
            layouts.append(dataclasses.replace(cfg, mesh=mesh, vision_remat=vision, microbatches=local // at_once))
    # Weights are gathered once per microbatch; a larger group gathers more of them from further away.
    layouts.sort(key=lambda one: (one.microbatches, one.mesh.fsdp))
    by_policy = [[dataclasses.replace(one, remat=remat) for one in layouts] for remat in POLICIES]
    mix = modelled_step.Mix.of_recipe(cfg)
    return sorted(by_policy, key=lambda one: modelled_step.speed(one[0], where, mix, None)["modelled_step_seconds"])


def search(
    cfg: ResolvedConfig, where: Topology, attempt: Attempt, log: Callable[[str], None], margin: float
) -> dict[str, Any] | None:
    """The report of the fastest candidate that fits at default effort; None if none does.

    Args:
      attempt: compiles a configuration, at low effort or not, and returns its report (``step_report.summary``); raises
        ValueError where the compiler fails.
      log: receives a line about every attempt.
      margin: share of the memory that must stay free.
    """

    def fitting(tried: ResolvedConfig, low_effort: bool) -> dict[str, Any] | None:
        name = f"fsdp {tried.mesh.fsdp}, remat {tried.remat}, {tried.microbatches} microbatches"
        effort = "low" if low_effort else "default"
        try:
            report = attempt(tried, low_effort)
        except ValueError as error:  # the compiler fails on some layouts; the search goes on
            log(f"{name}: does not compile at {effort} effort: {error}")
            return None
        fits = report["fits"] and report["free_share"] >= margin
        log(f"{name}: {'fits' if fits else 'too large'} at {effort} effort")
        return report if fits else None

    for layouts in candidates(cfg, where):
        least = max(layouts, key=lambda one: (one.mesh.fsdp, one.microbatches))
        for tried in layouts if fitting(least, True) else ():
            if (tried is least or fitting(tried, True)) and (report := fitting(tried, False)):
                return report
    return None
