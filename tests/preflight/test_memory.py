"""The compiler's tables of memory: written by hand with known peaks, and of a small compiled program."""

import jax
import jax.numpy as jnp
import pytest

from phivision_jax.preflight import hlo
from phivision_jax.preflight.memory import (
    Buffer,
    allocations,
    dump_options,
    dumped,
    needed,
    op_names,
    peak_buffers,
    scope,
)

ASSIGNMENT = """BufferAssignment:
allocation 0: size 1000, page 0, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <51 param.1 @0> (size=1000,offset=0): f32[250]{0:T(128)}
 value: <60 updated @0> (size=1000,offset=0): f32[250]{0:T(128)}
allocation 1: size 64, page 0, thread-local:
 value: <2 add.3 @0> (size=64,offset=0): f32[]{:T(128)}
allocation 2: size 900, page 0, preallocated-temp:
 value: <52 gathered @0> (size=600,offset=0): f32[10,15]{1,0:T(8,128)}
 value: <53 loop{1} @0> (size=300,offset=600): bf16[150]{0}
 value: <54 in_place @0> (size=200,offset=600): bf16[100]{0}
 value: <55 late @0> (size=700,offset=0): f32[175]{0}
allocation 3: size 5000, color 6, page 0, preallocated-temp:
 value: <56 registers @0> (size=5000,offset=0): s32[1250]{0}
"""
LIVE = """HloLiveRange (max 9):
  InstructionSequence:
    0:param.1
  BufferLiveRange:
    param.1{}:0-9
    gathered{}:1-3
    loop{1}:3-6
    in_place{}:2-6
    late{}:7-8
    registers{}:0-9
  Live ranges at 7 (peak):
    late{}: 700 bytes (cumulative: 700 bytes)
"""


SOURCES = {"param.1": "state['params']", "gathered": "jit(step)/transpose(jvp(decoder))/while/body/mlp/dot_general"}


def test_peak_buffers_by_hand():
    # Step 3 holds 600 + 300 (of which the update in place is part); step 7 holds 700.
    assert peak_buffers(ASSIGNMENT, LIVE, SOURCES) == [
        Buffer(1000, "param.1 f32[250] state['params']"),
        Buffer(600, "gathered f32[10,15] decoder/mlp/dot_general, backward"),
        Buffer(300, "loop{1} bf16[150]"),
        Buffer(64, "add.3 f32[]"),
    ]
    later = peak_buffers(ASSIGNMENT, LIVE.replace("gathered{}:1-3", "gathered{}:1-1"), {})
    assert [buffer.what for buffer in later] == ["param.1 f32[250]", "late f32[175]", "add.3 f32[]"]
    with pytest.raises(ValueError, match="has no allocations"):
        peak_buffers("", LIVE, {})


def test_peak_buffers_show_named_scopes(tmp_path):
    """A scanned, rematerialised layer compiled for CPU has parameters by path, activations by scope and pass."""

    def layer(x, w):
        with jax.named_scope("mlp"):
            return jnp.tanh(x @ w["up"]) @ w["down"], None

    def step(weights, x):
        def loss(weights):
            with jax.named_scope("decoder"):
                y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
            with jax.named_scope("loss"):
                return (y**2).sum()

        return jax.grad(loss)(weights)

    weights = {name: jnp.ones((3, *shape)) for name, shape in (("up", (8, 256)), ("down", (256, 8)))}
    compiled = jax.jit(step).lower(weights, jnp.ones((1024, 8))).compile(dump_options(tmp_path))
    module = hlo.parse(compiled.as_text())
    buffers = peak_buffers(*dumped(tmp_path, module.name), op_names(module))
    widest = [buffer.what for buffer in buffers if buffer.bytes >= 1024 * 256 * 4]
    assert widest and all("f32[1024,256] decoder/mlp/" in what for what in widest), widest
    assert {what.rpartition(", ")[2] for what in widest} <= {"backward", "recomputed"}, widest
    assert any(buffer.what.endswith("weights['up']") for buffer in buffers), buffers


LOOP = """HloModule jit_f

%fused (a: f32[4]) -> f32[4] {
  ROOT %dot = f32[4]{0} negate(%a), metadata={op_name="jit(f)/mlp/neg"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="weights"}
  %copy = f32[4]{0} copy(%x)
  %buffer = f32[9,4]{1,0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="broadcast.7"}
  %fusion = f32[4]{0} fusion(%copy), kind=kLoop, calls=%fused
  %state = (f32[9,4]{1,0}, f32[4]{0}) tuple(%buffer, %fusion)
  ROOT %loop = (f32[9,4]{1,0}, f32[4]{0}) while(%state), metadata={op_name="jit(f)/decoder/while"}
}
"""


def test_op_names_without_metadata():
    """The op_name comes from a callee, an operand or a user."""
    names = op_names(hlo.parse(LOOP))
    assert {names["x"], names["copy"]} == {"weights"}
    assert (names["fusion"], names["buffer"]) == ("jit(f)/mlp/neg", "jit(f)/decoder/while")


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/jvp(loss)/mul", "loss/mul"),
        ("jit(step)/transpose(jvp(decoder))/while", "decoder, backward"),
        (
            "jit(step)/transpose(jvp(decoder))/while/body/eval_jaxpr/checkpoint/rematted_computation/mlp/jit(silu)/add",
            "decoder/mlp/add, recomputed",
        ),
        ("jit(step)/optimizer/mul", "optimizer/mul"),
        ("jit(step)/while", "while"),
        ("state['params']['decoder']", "state['params']['decoder']"),
        ("", ""),
    ],
)
def test_scope(op_name, expected):
    assert scope(op_name) == expected


def test_dumped(tmp_path):
    assert dump_options(tmp_path)["xla_dump_to"] == str(tmp_path)
    for table in ("buffer-assignment", "live-range", "buffer-assignment-values"):
        (tmp_path / f"module_0000.jit_step.cl_1.after_optimizations-{table}.txt").write_text(table)
    assert dumped(tmp_path, "jit_step") == ("buffer-assignment", "live-range")
    with pytest.raises(FileNotFoundError, match="has 0 tables of jit_other instead of 2"):
        dumped(tmp_path, "jit_other")
    (tmp_path / "module_0001.jit_step.cl_1.after_optimizations-live-range.txt").write_text("again")
    with pytest.raises(FileNotFoundError, match="has 3 tables of jit_step instead of 2"):
        dumped(tmp_path, "jit_step")


ERROR = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.02G of 15.75G hbm.

Program hbm requirement 16.02G:
    HLO temp         16.02G (99.9% utilization: Unpadded (15.9G) Padded (15.9G), 0.3% fragmentation (47.78M))

  Largest program allocations in hbm:

  1. Size: 1.34G
     Operator: op_name="jit(step)/jvp(mlp)/dot_general" source_file="phi4.py" source_line=206
     Shape: f32[16,2048,11008]{2,1,0:T(8,128)}
     Unpadded size: 1.34G
     XLA label: fusion.1858.remat4 = fusion(fusion.936), kind=kOutput, calls=fused_computation.1624
     Allocation type: HLO temp
     ==========================

  2. Size: 570.00M
     Shape: f32[29184,1,2560]{2,1,0:T(2,128)}
     Extra memory due to padding: 285.00M (2.0x expansion)
     XLA label: %fusion.11 = f32[29184,1,2560]{2,1,0:T(2,128)} fusion(u32[29184,2,2560] %rng)
     Allocation type: HLO temp
     ==========================
"""


def test_allocations():
    assert allocations(ERROR) == [
        Buffer(round(1.34 * 2**30), "fusion.1858.remat4 f32[16,2048,11008] mlp/dot_general"),
        Buffer(570 * 2**20, "fusion.11 f32[29184,1,2560]"),
    ]
    assert allocations("total memory required for HLO temporaries (32.29G) exceeds available HBM (15.75G).") == []


def test_needed_from_either_message():
    late = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert needed(late) == 20.5 * 2**30
    early = "RESOURCE_EXHAUSTED: the program's temporaries (512.0M) exceeds"
    assert needed(early) == 512 * 2**20
    assert needed("RESOURCE_EXHAUSTED: something else") is None
