"""Every road to route gives the same bits: the direct call, the dispatcher, autograd, inference
mode, autocast, torch.compile; and rows that lie further apart than 2**31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.route import route_reference
from tests import cases
from tests.route_oracle import GRADIENTS, gradients

CASES = [
    cases.RouteCase(37, 12, 3, "normal", {"renormalize": True}),
    cases.RouteCase(37, 12, 3, "masked", {"policy": "egs", "capacity": 5}, entropy="TE"),
    cases.RouteCase(37, 12, 3, "normal", {"adaptive": "bands", "bands": [0.3, 0.8]}),
    cases.RouteCase(1, 8, 2, "normal", {"policy": "sigmoid"}, bias=True),
]


def assert_same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mode_gives_the_same_bits(case):
    args, options = case.build()
    wanted = torch.ops.gose.route(*args, **options)
    given = args[: 1 + max(i for i, a in enumerate(args) if a is not None)]
    for call in (args, given):
        assert_same_bits(gk.route(*call, **options), wanted)
        with torch.no_grad():
            assert_same_bits(gk.route(*call, **options), wanted)
        with torch.inference_mode():
            out = gk.route(*call, **options)
            assert_same_bits(out, wanted)
            assert out[0].is_inference()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # scores keep their precision
            assert_same_bits(gk.route(*call, **options), wanted)


def with_gradient(route: Any, case: cases.RouteCase) -> tuple[tuple[Tensor, ...], Tensor]:
    args, options = case.build()
    at = 2 if case.entropy else 0
    args[at].requires_grad_()
    out = route(*args, **options)
    assert [o.requires_grad for o in out] == [i in GRADIENTS for i in range(6)]
    up = gradients(args, out, torch.float32)
    (grad,) = torch.autograd.grad([out[i] for i in GRADIENTS], args[at], up)
    return tuple(o.detach() for o in out), grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_direct_and_dispatched_gradients_are_the_same_bits(case):
    wanted, wanted_grad = with_gradient(torch.ops.gose.route, case)
    for _ in range(2):  # found, then remembered
        got, grad = with_gradient(gk.route, case)
        assert_same_bits(got, wanted)
        assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_without_a_graph_break(case):
    compiled = torch.compile(
        lambda *args, **options: gk.route(*args, **options), fullgraph=True, backend="aot_eager"
    )
    wanted, wanted_grad = with_gradient(gk.route, case)
    got, grad = with_gradient(compiled, case)
    assert_same_bits(got, wanted)
    assert torch.equal(grad, wanted_grad)
    args, options = case.build()
    with torch.no_grad():
        assert_same_bits(compiled(*args, **options), gk.route(*args, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 2.5}, "capacity must be an int, got 2.5"),
        ({"num_groups": "2"}, "num_groups must be an int, got '2'"),
        ({"mass": "all"}, "mass must be a number, got 'all'"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(options, message):
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            gk.route(torch.zeros(3, 4), 2, **options)


def test_arguments_by_name_and_misspelled():
    score_TE = cases.RouteCase(37, 12, 3).build()[0][0]
    with pytest.raises(TypeError, match="no argument named 'renormalise'"):
        gk.route(score_TE, 3, renormalise=True)
    with pytest.raises(TypeError, match="top_k"):
        gk.route(score_TE)
    assert_same_bits(
        gk.route(score_TE, top_k=3, renormalize=True), gk.route(score_TE, 3, renormalize=True)
    )


def test_an_option_that_was_refused_stays_refused_and_does_not_stick():
    score_TE = cases.RouteCase(37, 12, 3).build()[0][0]
    wanted = gk.route(score_TE, 3, capacity=4)
    for _ in range(2):
        with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
            gk.route(score_TE, 3, capacity=0)
        with pytest.raises(ValueError, match=r"top_k must be in \[1, E=12\], got 13"):
            gk.route(score_TE, 13, capacity=4)
        assert_same_bits(gk.route(score_TE, 3, capacity=4), wanted)


@pytest.fixture(scope="module")
def sparse() -> Tensor:
    """8 GiB of addresses, of which only what a test writes becomes memory."""
    return torch.empty(2**31 + 64)


@pytest.mark.parametrize("T", [3, 17])  # a token at a time; a vector of tokens at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_further_apart_than_int32(sparse, dtype, T):
    far = sparse.view(dtype)[: 2**31 + 64].as_strided((T, 40), (2**31 // (T - 1), 1))
    near = torch.randn(T, 40, generator=torch.Generator().manual_seed(T)).to(dtype)
    far.copy_(near)
    for top_k in (1, 8):
        got = gk.route(far, top_k, backend="cpu")
        assert_same_bits(got, gk.route(near, top_k, backend="cpu"))
        assert torch.equal(got[1], route_reference(near, top_k)[1])
        up = gradients((far, top_k), got, torch.float32)
        grads = [
            torch.ops.gose.route_backward(
                score, top_k, *[None] * 4, got[1], got[3], got[4], *up, backend="cpu"
            )
            for score in (far, near)
        ]
        assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["entropy_TE", "noise_TE"])
def test_second_inputs_further_apart_than_int32(sparse, name):
    far = sparse.as_strided((3, 40), (2**30, 1))
    near = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    far.copy_(near)
    policy = "egs" if name == "entropy_TE" else "softmax"
    score = torch.zeros(3, 40)
    got, wanted = (
        gk.route(score, 4, policy=policy, backend="cpu", **{name: value}) for value in (far, near)
    )
    assert_same_bits(got, wanted)
    assert torch.equal(got[1], near.topk(4, largest=policy == "softmax").indices.int())
