"""Named scopes in the operations of a compiled training step: profiles and preflight's buffers are read by them."""

import dataclasses
import re

import pytest

from tests.support.train_steps import RUN, compile_quickly, step_on

FORWARD = ("vision/.*norm", "vision/.*attention", "vision/.*mlp", "projector", "embed", "splice")
FORWARD += ("decoder/.*norm", "decoder/.*attention", "decoder/.*mlp", "loss", "loss/.*head")


@pytest.fixture(scope="module", params=["none", "full"])
def op_names(request) -> set[str]:
    """The op names of a compiled step; scanned layers with and without rematerialisation."""
    cfg = dataclasses.replace(RUN, remat=request.param, vision_remat=request.param)
    text = compile_quickly(step_on(cfg, {}, 1)).as_text()
    return set(re.findall(r'op_name="([^"]*)"', text))


@pytest.mark.parametrize("scope", FORWARD)
def test_forward_and_backward_operations_have_scope(op_names, scope):
    """JAX writes a forward scope as jvp(scope), and its backward pass as transpose(jvp(scope))."""
    first, *rest = scope.split("/.*", 1)
    inner = "".join(rf".*\b{part}/" for part in rest)
    forward = rf"/jvp\({first}\)/{inner}"
    backward = rf"/transpose\(jvp\({first}\)\)/{inner}"
    for pattern in (forward, backward):
        assert any(re.search(pattern, name) for name in op_names), sorted(op_names)


def test_update_operations_have_scope(op_names):
    assert any(re.search(r"/optimizer/\w+", name) for name in op_names)


def test_most_products_are_in_a_scope(op_names):
    """Every matrix product, forward and backward, is attributable to one of them."""
    products = {name for name in op_names if name.endswith("/dot_general")}
    scopes = "attention|mlp|projector|vision|head|loss|optimizer"
    assert products and not [name for name in products if not re.search(rf"\b({scopes})\b", name)]
