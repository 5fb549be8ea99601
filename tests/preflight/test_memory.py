"""The compiler's tables of memory, in its own spelling, with peaks that can be added up by hand."""

import pytest

from phivision_jax.preflight.memory import Buffer, allocations, dump_options, dumped, needed, peak_buffers

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


def test_the_moment_with_the_most():
    # Step 3 holds 600 + 300 (of which the update in place is part); step 7 holds 700.
    assert peak_buffers(ASSIGNMENT, LIVE) == [
        Buffer(1000, "param.1 f32[250]"),
        Buffer(600, "gathered f32[10,15]"),
        Buffer(300, "loop{1} bf16[150]"),
        Buffer(64, "add.3 f32[]"),
    ]
    later = peak_buffers(ASSIGNMENT, LIVE.replace("gathered{}:1-3", "gathered{}:1-1"))
    assert [buffer.what for buffer in later] == ["param.1 f32[250]", "late f32[175]", "add.3 f32[]"]
    with pytest.raises(ValueError, match="has no allocations"):
        peak_buffers("", LIVE)


def test_tables_of_one_program(tmp_path):
    assert dump_options(tmp_path)["xla_dump_to"] == str(tmp_path)
    for table in ("buffer-assignment", "live-range", "buffer-assignment-values"):
        (tmp_path / f"module_0000.jit_step.cl_1.after_optimizations-{table}.txt").write_text(table)
    assert dumped(tmp_path, "jit_step") == ("buffer-assignment", "live-range")
    with pytest.raises(FileNotFoundError, match="holds 0 tables buffer-assignment of jit_other"):
        dumped(tmp_path, "jit_other")
    (tmp_path / "module_0001.jit_step.cl_1.after_optimizations-live-range.txt").write_text("again")
    with pytest.raises(FileNotFoundError, match="holds 2 tables live-range of jit_step"):
        dumped(tmp_path, "jit_step")


ERROR = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.02G of 15.75G hbm.

Program hbm requirement 16.02G:
    HLO temp         16.02G (99.9% utilization: Unpadded (15.9G) Padded (15.9G), 0.3% fragmentation (47.78M))

  Largest program allocations in hbm:

  1. Size: 1.34G
     Operator: op_name="jit(step)/dot_general" source_file="phi4.py" source_line=206
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


def test_the_table_of_an_error():
    assert allocations(ERROR) == [
        (round(1.34 * 2**30), "fusion.1858.remat4 f32[16,2048,11008] jit(step)/dot_general"),
        (570 * 2**20, "fusion.11 f32[29184,1,2560]"),
    ]
    assert allocations("total memory required for HLO temporaries (32.29G) exceeds available HBM (15.75G).") == []


def test_what_is_missing_is_said_by_either_text():
    late = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert needed(late, held=7) == 20.5 * 2**30
    early = "RESOURCE_EXHAUSTED: the program's temporaries (512.0M) exceeds"
    assert needed(early, held=7) == 7 + 512 * 2**20
    assert needed("RESOURCE_EXHAUSTED: something else", held=7) is None
