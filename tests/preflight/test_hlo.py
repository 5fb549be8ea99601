"""Parsing of HLO written by hand in the formats of XLA:CPU and of the TPU compiler."""

import pytest

from phivision_jax.preflight.hlo import Instruction, arrays, num_bytes, parse, sizes

TEXT = """HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %p = (s32[], f32[4]{0}) parameter(0)
}

%compare (a: s32[], b: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(40)
  ROOT %less = pred[] compare(%a, %limit), direction=LT
}

%condition (q: (s32[], f32[4])) -> pred[] {
  ROOT %fusion = pred[] fusion(%q), kind=kLoop, calls=%compare
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[]{:T(128)}, f32[4]{0:T(8,128)S(1)}, /*index=2*/s32[]) while(%t), condition=%condition, body=%body
  ROOT %y = f32[4]{0} fusion(%w, /*index=1*/%x), control-predecessors={%z}, calls=%compare, metadata={op_name="f(%z)"}
}
"""


def test_parse():
    module = parse(TEXT)
    assert (module.name, module.entry, module.devices) == ("jit_f", "main", 8)
    assert list(module.computations) == ["body", "compare", "condition", "main"]
    loop, last = module.computations["main"]
    assert (loop.name, loop.opcode, loop.attribute("body"), loop.called) == ("w", "while", "body", [])
    assert (last.opcode, last.type, last.operands, last.called) == ("fusion", "f32[4]{0}", ["w", "x"], ["compare"])
    assert (last.op_name, loop.op_name) == ("f(%z)", "")
    with pytest.raises(ValueError, match="fusion y has no body"):
        last.attribute("body")
    assert Instruction("b", "f32[]", "conditional", "%c), branch_computations={%one, %two.1}").called == [
        "one",
        "two.1",
    ]
    assert parse("ENTRY main (x: f32[]) -> f32[] {").devices == 1
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule empty")


UNROLLED = """HloModule jit_g

%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p = (f32[4]{0}, u32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two), control-predecessors={%x}
  ROOT %out = (f32[4]{0}, u32[]{:T(128)}) tuple(%x, %next)
}

%condition (q: (f32[4], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %at = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %w = (f32[4]{0}, u32[]) while(%t), condition=%condition, body=%body
}
"""


def test_trips_unrolled_loop():
    module = parse(UNROLLED)
    assert module.trips(module.computations["main"][0]) == 4  # at 0, 2, 4 and 6
    by_one = parse(UNROLLED.replace("constant(2)", "constant(1)"))
    assert by_one.trips(by_one.computations["main"][0]) == 7
    unknown = parse(UNROLLED.replace("add(%i, %two)", "fusion(%i)"))  # as in a scan, inside a fusion
    assert unknown.trips(unknown.computations["main"][0]) == 7


def test_trips_from_condition():
    module = parse(TEXT)
    loop = module.computations["main"][0]
    assert module.trips(loop) == 40  # the constant is in a fusion that the condition calls
    stated = Instruction("w", "s32[]", "while", loop.rest + ', backend_config={"known_trip_count":{"n":"7"}}')
    assert module.trips(stated) == 7
    with pytest.raises(ValueError, match=r"trips of loop w: its condition compares with \[\], not with one"):
        parse(TEXT.replace("constant(40)", "parameter(0)")).trips(loop)


def test_num_bytes():
    assert num_bytes("(f32[8,16]{1,0:T(8,128)}, bf16[4]{0:T(1024)(128)(2,1)})") == 520
    assert num_bytes("pred[3]") == 3
    assert num_bytes("s4[5]") == 3
    assert num_bytes("f32[]") == 4
    assert num_bytes("(u32[]{:S(2)}, token[])") == 4
    assert num_bytes("f8e4m3fn[10]") == 10
    assert arrays("(f32[8,16]{1,0}, s32[])") == [("f32", (8, 16)), ("s32", ())]
    assert sizes("((f32[2,3]{1,0}, s8[4]), u32[]{:S(2)})") == [24, 4, 4]
