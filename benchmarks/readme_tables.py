"""The README's tables: hardware and memory, compiled by ``phivision preflight``, and what the benchmarks measured.

python benchmarks/readme_tables.py              # compiles about forty programs, half an hour on two cores
python benchmarks/readme_tables.py --tables     # only writes the tables, from docs/results
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks.tables import fill, markdown
from phivision_jax.hardware.topology import GIB, parse_topology

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, GENERATION = ROOT / "docs/results", ROOT / "README.md", ROOT / "docs/generation.md"
FINETUNE = "configs/finetune.py"
LORA, RECOMPUTE = ("lora.rank=16",), ("remat=full", "vision_remat=full")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of the released model on one slice."""

    task: str
    topology: str
    changes: tuple[str, ...] = ()

    @property
    def result(self) -> Path:
        return RESULTS / "hardware" / f"{self.task.split(',')[0].replace(' ', '_').lower()}_{self.topology}.json"

    @property
    def command(self) -> list[str]:
        words = [f"--config={FINETUNE}", f"--topology={self.topology}"]
        words += ["--generate"] if self.task.startswith("Inference") else ["--low-effort"]
        words += ["--weights=int8", "--cache=int8"] if self.task.endswith("int8") else []
        return words + (["--set", *self.changes] if self.changes else [])


CASES = (
    Case("Inference", "v5litepod-4"),
    Case("Inference", "v5litepod-8"),
    Case("Inference", "v6e-1"),
    Case("Inference", "v6e-4"),
    Case("Inference", "v5p-8"),
    Case("Inference in int8", "v5litepod-1"),
    Case("Inference in int8", "v5litepod-4"),
    Case("Inference in int8", "v6e-1"),
    Case("Inference in int8", "v5p-8"),
    Case("LoRA, rank 16", "v5litepod-16", LORA),
    Case("LoRA, rank 16", "v6e-8", LORA),
    Case("LoRA, rank 16", "v5p-8", LORA),
    Case("Full fine-tuning", "v5litepod-64", ("data.batch_rows=64",)),
    Case("Full fine-tuning", "v6e-16"),
    Case("Full fine-tuning", "v5p-8", RECOMPUTE),
)


def compile_case(case: Case) -> None:
    case.result.parent.mkdir(exist_ok=True)
    program = [sys.executable, "-m", "phivision_jax.cli", "preflight", *case.command, f"--json={case.result}"]
    code = subprocess.run(program, cwd=ROOT).returncode
    if code not in (0, 3):  # 3: it does not fit, which is a result
        raise SystemExit(f"{' '.join(program)} ended with {code}")
    case.result.with_suffix(".png").unlink(missing_ok=True)


def hardware_table() -> str:
    """Every compiled case, and stage 2 of the recipe on three pods (``benchmarks/preflight.py``)."""
    results = [(case.task, case.topology, case.result) for case in CASES]
    for topology in ("v5e:16x16", "v6e:16x16", "v5p:4x4x8"):
        result = RESULTS / "preflight" / f"stage2_{topology.partition(':')[0]}.json"
        results.append(("Full training, stage 2 of the recipe", topology, result))
    rows = []
    for task, topology, result in results:
        if not result.exists():
            continue
        found = json.loads(result.read_text())
        chips = parse_topology(topology).chips
        hbm, peak = found["hbm_bytes_per_chip"] / GIB, found["peak_bytes_per_chip"]
        needs = f"{peak / GIB:.1f} of {hbm:.1f} GiB" if peak else f"more than {hbm:.1f} GiB"
        rows.append(
            (
                task,
                f"{topology} ({chips} chip{'s' * (chips > 1)})",
                needs,
                "yes" if found["fits"] else "no",
                _size(found),
            )
        )
    return markdown(("", "slice", "needed per chip", "fits", "batch"), rows)


def _size(found: dict[str, Any]) -> str:
    if "slots" in found:
        return f"{found['slots']} × {found['length']:,} tokens"
    return f"{found['batch_rows']} rows of {found['length']:,} tokens, remat {found['remat']}"


def measured_table() -> str:
    step, packing = _read("step"), _read("packing")
    loader, conversion, kill, damage = _read("loader"), _read("conversion"), _read("kill"), _read("damage")
    packers = packing["packers"]
    grain = min(one["text_padding"] for name, one in packers.items() if name.startswith("Grain"))
    decode = [row["ratio"] for row in loader["rows"] if row["decode"] and row["peer"] == "pil"]
    speeds = {row["step"]: row for row in conversion["steps"]}
    newest = damage["outcomes"]["run, newest of two"]
    rows = [
        ("Training step, packed batches of the recipe's mix", f"{_mix(step):.2f}× transformers + PyTorch, unpacked"),
        ("Padding of packed text rows", f"{packers['ours']['text_padding']:.2%}; Grain's best packer {grain:.1%}"),
        ("Image loading", f"{min(decode):.1f}–{max(decode):.1f}× the reference processor, the same pixels"),
        ("Conversion of a 6 GB checkpoint", _conversion(speeds)),
        (
            f"{kill['kills']} kills and {kill['terms']} requests to stop in {kill['steps']:,} steps",
            f"{len(kill['differences'])} differences to an undisturbed run",
        ),
        (f"{damage['flips']} flipped bits in the newest checkpoint", _damage(newest["flip"])),
    ]
    if (RESULTS / "decode.json").exists():
        rows.insert(1, ("Generation on CPU, 1 and 16 sequences at a time", _generation(_read("decode"))))
    return markdown(("what", "result"), rows)


def _generation(decode: dict[str, Any]) -> str:
    ranges = []
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        ratios = [row["ratio"] for row in decode["rows"] if row["work"].startswith("batch") and row["dtype"] == dtype]
        ends = dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios)))  # one, if they are equal
        ranges.append(f"{'–'.join(ends)}× in {name}")
    return f"{', '.join(ranges)}, the tokens per second of transformers' `generate`"


def decode_table() -> str:
    """Every comparison of ``decode.py``."""
    rows = []
    for row in _read("decode")["rows"]:
        speeds = row["tokens_per_s"]
        if row["work"] == "first token":
            shown = [f"{1 / speeds[side]:.2f} s" for side in ("ours", "other")]
        else:
            shown = [f"{speeds[side]:,.1f} tokens/s" for side in ("ours", "other")]
        low, high = row["ratio_range"]
        rows.append((row["model"], row["work"], row["dtype"], *shown, f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})"))
    return markdown(("model", "work", "dtype", "ours", "other", "ratio (range)"), rows)


def _mix(step: dict[str, Any]) -> float:
    return next(side["ratio"] for side in step["mix"]["sides"] if side["name"] == "ours, packed")


def _conversion(steps: dict[str, dict[str, Any]]) -> str:
    both = [steps[name] for name in ("to-jax", "to-hf --like")]
    speed = " and ".join(f"{one['mb_per_s']:,.0f}" for one in both)
    return (
        f"{speed} MB/s there and back, identical files, at most {max(s['peak_rss_gb'] for s in both):.2f} GB resident"
    )


def _damage(outcomes: dict[str, int]) -> str:
    return "; ".join(f"{count} times: {outcome}" for outcome, count in outcomes.items())


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main(tables: bool = False) -> None:
    """Compile the cases of the hardware table; write both tables into README.md, and one into docs/generation.md.

    Args:
        tables: Only write the tables.
    """
    for case in () if tables else CASES:
        compile_case(case)
    page = fill(PAGE.read_text(), "hardware", hardware_table())
    PAGE.write_text(fill(page, "measured", measured_table()))
    if (RESULTS / "decode.json").exists():
        GENERATION.write_text(fill(GENERATION.read_text(), "decode", decode_table()))


if __name__ == "__main__":
    tyro.cli(main)
