from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels.ops.masked_update import (
    masked_adam_reference_,
    masked_lion_reference_,
    masked_sgd_reference_,
)
from tests import cases
from tests.checks import assert_close_to_truth, backends_of

REFERENCES = {
    "masked_sgd_": masked_sgd_reference_,
    "masked_adam_": masked_adam_reference_,
    "masked_lion_": masked_lion_reference_,
}
BACKENDS = backends_of("masked_adam_")
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def arguments(case: cases.UpdateCase, dtype: torch.dtype, step: float = 3.0) -> tuple[Any, ...]:
    """Positional arguments of the case's op, in mid-training."""
    param, grad, states, frozen, lr, scale = case.build(dtype)
    if case.op == "masked_sgd_":
        momentum = states[0] if case.options.get("momentum") else []
        return param, grad, momentum, frozen, lr, scale
    if case.op == "masked_lion_":
        return param, grad, states[0], frozen, lr, scale
    highest = states[2] if case.options.get("amsgrad") else []
    counts = [torch.tensor(step) for _ in param]
    return param, grad, *states[:2], highest, counts, frozen, lr, scale


def tensors_of(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for a in args:
        yield from a if isinstance(a, list) else ([a] if isinstance(a, Tensor) else [])


def copied(args: tuple[Any, ...], cast: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    return tuple([cast(t) for t in a] if isinstance(a, list) else a for a in args)


def to_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.clone()


def sgd_oracle(p, g, m, lr, *, momentum=0.0, weight_decay=0.0, nesterov=False):
    g += weight_decay * p
    if momentum:
        m = momentum * m + g
        g = g + momentum * m if nesterov else m
    return p - lr * g, m


def adam_oracle(
    p, g, m, v, w, step, lr, *, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
    decoupled=True, amsgrad=False,
):  # fmt: skip
    if decoupled:
        p *= 1 - lr * weight_decay
    else:
        g += weight_decay * p
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w = max(w, v) if amsgrad else v
    denominator = math.sqrt(w) / math.sqrt(1 - beta2**step) + eps
    return p - lr / (1 - beta1**step) * m / denominator, m, v, w


def lion_oracle(p, g, m, lr, *, beta1=0.9, beta2=0.99, weight_decay=0.0):
    mixed = beta1 * m + (1 - beta1) * g
    sign = (mixed > 0) - (mixed < 0)
    return p * (1 - lr * weight_decay) - lr * sign, beta2 * m + (1 - beta2) * g


def expected_by_elements(case: cases.UpdateCase, args: tuple[Any, ...]) -> list[list[Tensor]]:
    """[param, states ...] after one step, element by element in Python floats."""
    options = dict(case.options)
    sign = -1.0 if options.pop("maximize", False) else 1.0
    frozen, lr, scale = args[-3:]
    lists = [copied(args)[0], *(list(map(Tensor.clone, s)) for s in args[2:-3] if s)]
    if case.op == "masked_adam_":
        lists.pop()  # step is checked apart
    for n, p in enumerate(args[0]):
        mask = frozen[n].expand(p.shape) if frozen else torch.zeros(p.shape, dtype=torch.bool)
        for at in torch.cartesian_prod(*map(torch.arange, p.shape)).view(-1, p.dim()).tolist():
            index = tuple(at)
            if mask[index]:
                continue
            g = sign * float(args[1][n][index]) * (1.0 if scale is None else float(scale))
            values = [float(a[n][index]) for a in lists]
            if case.op == "masked_sgd_":
                moment = values[1] if len(values) > 1 else 0.0
                new = sgd_oracle(values[0], g, moment, float(lr), **options)
            elif case.op == "masked_lion_":
                new = lion_oracle(values[0], g, values[1], float(lr), **options)
            else:
                highest = values[3] if len(values) > 3 else 0.0
                new = adam_oracle(
                    values[0], g, values[1], values[2], highest, 4.0, float(lr), **options
                )
            for tensors, value in zip(lists, new, strict=False):
                tensors[n][index] = value
    return lists


@pytest.mark.parametrize("case", cases.masked_update, ids=str)
def test_the_float64_reference_equals_the_element_loop(case):
    args = arguments(case, torch.float64)
    expected = expected_by_elements(case, args)
    REFERENCES[case.op](*args, **case.options)
    got = [args[0], *(s for s in args[2:-3] if s)]
    for tensors, wanted in zip(got, expected, strict=False):
        for a, b in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if case.op == "masked_adam_":
        scalar_masks = [m.dim() == 0 and bool(m) for m in args[-3]] or [False] * 4
        assert [float(c) for c in args[5]] == [3.0 if kept else 4.0 for kept in scalar_masks]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.masked_update, ids=str)
def test_float32_steps_match_the_float64_reference(case, backend):
    args = arguments(case, torch.float32)
    truth, same = copied(args, to_double), copied(args)
    truth = (*truth[:5], copied(args)[5], *truth[6:]) if case.op == "masked_adam_" else truth
    REFERENCES[case.op](*truth, **case.options)
    REFERENCES[case.op](*same, **case.options)
    getattr(gk, case.op)(*args, **case.options, backend=backend)
    for got, reference, exact in zip(*map(tensors_of, (args, same, truth)), strict=True):
        if got.is_floating_point() and got.dim():
            assert_close_to_truth(got.nan_to_num(), reference.nan_to_num(), exact.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.masked_update, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_elements_and_all_inputs_keep_their_bits(case, dtype, backend):
    args = arguments(case, dtype)
    if dtype == torch.float64 and backend == "cpu":
        with pytest.raises(ValueError, match=r"cpu: takes float32, got float64 in param\[0\]"):
            getattr(gk, case.op)(*args, **case.options, backend=backend)
        return
    before = copied(args)
    for _ in range(3):
        getattr(gk, case.op)(*args, **case.options, backend=backend)
    frozen = args[-3]
    states = [s for s in args[2:-3] if s and s[0].shape == args[0][0].shape]
    old_states = [s for s in before[2:-3] if s and s[0].shape == args[0][0].shape]
    for n, p in enumerate(args[0]):
        mask = frozen[n].expand(p.shape) if frozen else torch.zeros(p.shape, dtype=torch.bool)
        for new, old in zip([args[0], *states], [before[0], *old_states], strict=True):
            new_bits, old_bits = new[n].view(BITS[dtype]), old[n].view(BITS[dtype])
            assert torch.equal(new_bits[mask], old_bits[mask])
        if case.grad == "normal":
            assert bool((p != before[0][n])[~mask].all())
    for unchanged, old in zip([*args[1], *frozen], [*before[1], *before[-3]], strict=True):
        assert torch.equal(unchanged.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_counts_of_the_shape_of_the_mask_restart_bias_correction(backend):
    """A released element takes exactly the first step that a fresh one takes."""
    param, grad = torch.zeros(2, 3), torch.tensor([[0.5, -2.0, 3.0]] * 2)
    step = torch.tensor([[100.0], [0.0]])
    m, v = torch.zeros(2, 3), torch.zeros(2, 3)
    frozen = torch.tensor([[True], [False]])
    lr = torch.tensor(0.1)
    gk.masked_adam_([param], [grad], [m], [v], [], [step], [frozen], lr, backend=backend)
    assert step.tolist() == [[100.0], [1.0]]
    assert param[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(param[1], -0.1 * grad[1].sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_correction_keeps_its_precision_at_the_first_step(backend):
    # 1 - 0.999**1 in float32 is off by 1e-5; a first step of lr * g / |g| is not.
    param, grad = torch.zeros(3), torch.tensor([0.1, -1.0, 7.0])
    state = [torch.zeros(3)], [torch.zeros(3)], [], [torch.zeros(())]
    lr = torch.tensor(1.0, dtype=torch.float64)
    gk.masked_adam_([param], [grad], *state, [], lr, eps=0.0, backend=backend)
    torch.testing.assert_close(param, -grad.sign(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_nan_spreads_and_lists_may_be_empty(backend):
    param, grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    lr = torch.tensor(0.5)
    gk.masked_sgd_([param], [grad], [], [], lr, backend=backend)
    assert param.isnan().tolist() == [False, True, False]
    gk.masked_sgd_([], [], [], [], lr, backend=backend)
    empty = torch.ones(0, 3)
    frozen = [torch.zeros(0, 1, dtype=torch.bool)]
    gk.masked_lion_([empty], [empty.clone()], [empty.clone()], frozen, lr, backend=backend)


# Shapes that span several chunks of a kernel and whole vectors plus a rest, and masks of each.
LARGE = [
    ((3, 70, 129), (3, 70, 129)),
    ((3, 70, 129), (3, 1, 1)),
    ((3, 70, 129), (3, 70, 1)),
    ((3, 70, 129), (70, 1)),
    ((3, 70, 129), (129,)),
    ((5000, 3), (5000, 1)),
    ((5000, 3), (1, 3)),
    ((9001,), (9001,)),
    ((9001,), (1,)),
    ((37,), ()),
]
OPTIONS = {
    "masked_sgd_": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "masked_adam_": {"amsgrad": True, "weight_decay": 0.1},
    "masked_lion_": {"weight_decay": 0.1, "maximize": True},
}


def large_arguments(op: str, *, masked: bool, counts: str = "tensor") -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(5)

    def draws() -> list[Tensor]:
        return [torch.randn(shape, generator=random) for shape, _ in LARGE]

    param, grad, states = draws(), draws(), [[t.abs() for t in draws()] for _ in range(3)]
    frozen = [torch.rand(shape, generator=random) < 0.6 for _, shape in LARGE] if masked else []
    lr, scale = torch.tensor(0.1), torch.tensor(0.5)
    if op != "masked_adam_":
        return param, grad, states[0], frozen, lr, scale
    step = [torch.tensor(2.0) for _ in param]
    if counts == "mask":
        columns = {(70, 1), (129,), (1, 3)}
        step = [
            step[n] if shape in columns else torch.randint(1, 20, shape, generator=random).float()
            for n, (_, shape) in enumerate(LARGE)
        ]
    return param, grad, *states, step, frozen, lr, scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["no mask", "one count", "counts by mask"])
@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_large_lists_match_the_reference_for_any_number_of_threads(op, kind, backend):
    counts = "mask" if kind == "counts by mask" else "tensor"
    given = large_arguments(op, masked=kind != "no mask", counts=counts)
    same = copied(given)
    REFERENCES[op](*same, **OPTIONS[op])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(copied(given))
            getattr(gk, op)(*results[-1], **OPTIONS[op], backend=backend)
    finally:
        torch.set_num_threads(before)
    for got, other, third, wanted in zip(*map(tensors_of, (*results, same)), strict=True):
        assert torch.equal(got, other)
        assert torch.equal(got, third)
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_is_twice_in_a_list_steps_twice(backend):
    param, grad, lr = torch.ones(100_000), torch.ones(100_000), torch.tensor(0.25)
    gk.masked_sgd_([param, param], [grad, grad], [], [], lr, backend=backend)
    assert bool((param == 0.5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_elements_count_their_steps(backend):
    param, frozen = [torch.ones(3, 0)] * 4, torch.tensor([[True], [False], [False]])
    step = torch.tensor([[4.0], [5.0], [6.0]])
    lists = [[t] for t in param]
    gk.masked_adam_(*lists, [], [step], [frozen], torch.tensor(0.1), backend=backend)
    assert step.flatten().tolist() == [4.0, 6.0, 7.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_a_saved_parameter_changed(backend):
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    with torch.no_grad():
        gk.masked_sgd_([param], [torch.ones(3)], [], [], torch.tensor(0.5), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_kernel_refuses_counts_by_columns():
    p, step = [torch.zeros(4, 5)], [torch.zeros(1, 5)]
    frozen = [torch.zeros(1, 5, dtype=torch.bool)]
    reasons = gk.OPS["masked_adam_"].reasons(p, p, p, p, [], step, frozen, torch.tensor(0.1))
    assert reasons["cpu"] == "takes counts per expert, row or element, got (1, 5) in step[0]"


@settings(deadline=None, max_examples=60)
@given(
    op=st.sampled_from(sorted(REFERENCES)),
    seed=st.integers(0, 2**31),
    hostile=st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 0.0, 1e-45]),
    weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
    flags=st.lists(st.booleans(), min_size=4, max_size=4),
    rows=st.booleans(),
)
def test_frozen_bits_survive_random_options_masks_and_gradients(
    op, seed, hostile, weight_decay, flags, rows
):
    random = torch.Generator().manual_seed(seed)
    p = torch.randn(8, 4, generator=random)
    p[0, 0], p[1, 1] = math.nan, -0.0  # bits, not values
    states = [torch.randn(8, 4, generator=random).abs() for _ in range(3)]
    options: dict[str, Any] = {"weight_decay": weight_decay, "maximize": flags[0]}
    step = torch.zeros(())
    if op == "masked_sgd_":
        options |= {"momentum": 0.9 * flags[1], "nesterov": flags[1] and flags[2]}
    elif op == "masked_adam_":
        options |= {"decoupled": flags[1], "amsgrad": flags[2]}
    lr = torch.tensor(0.1)
    scale = torch.tensor(0.5) if flags[3] else None
    for _ in range(5):
        frozen = torch.rand(8, 1 if rows else 4, generator=random) < 0.5
        grad = torch.randn(8, 4, generator=random)
        mask = frozen.expand(8, 4)
        grad[mask] = hostile
        before = [t.view(torch.int32).clone() for t in (p, *states)]
        if op == "masked_sgd_":
            momentum = states[:1] if flags[1] else []
            gk.masked_sgd_([p], [grad], momentum, [frozen], lr, scale, **options)
        elif op == "masked_lion_":
            gk.masked_lion_([p], [grad], states[:1], [frozen], lr, scale, **options)
        else:
            highest = states[2:] if flags[2] else []
            gk.masked_adam_(
                [p], [grad], states[:1], states[1:2], highest, [step], [frozen], lr, scale,
                **options,
            )  # fmt: skip
        for old, new in zip(before, (p, *states), strict=True):
            assert torch.equal(old[mask], new.view(torch.int32)[mask])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.masked_update[::3], ids=str)
def test_opcheck(case, backend):
    args = arguments(case, torch.float32)
    for g in args[1]:
        g.nan_to_num_()  # opcheck compares with itself, and NaN differs from NaN
    overload = getattr(torch.ops.gose, case.op).default
    torch.library.opcheck(overload, args, {**case.options, "backend": backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend):
    p, g, m = [torch.zeros(4, 5)], [torch.ones(4, 5)], [torch.zeros(4, 5)]
    lr, step = torch.tensor(0.1), [torch.zeros(())]
    mask, options = [torch.zeros(4, 1, dtype=torch.bool)], {"backend": backend}
    for args, message in [
        ((p, [], m, mask, lr), r"grad must have 1 tensors, got 0"),
        ((p, g, [], mask, lr), r"exp_avg must have 1 tensors, got 0"),
        ((p, g, m, mask * 2, lr), r"frozen must have 1 tensors, got 2"),
        (
            ([p[0].bfloat16()], g, m, mask, lr),
            r"param\[0\] must be float32 or float64, got .*bfloat",
        ),
        ((p, [g[0].double()], m, mask, lr), r"grad\[0\] must be torch.float32 of shape \(4, 5\)"),
        ((p, [g[0].t()], m, mask, lr), r"grad\[0\] must be .* got torch.float32 of shape \(5, 4\)"),
        ((p, g, [m[0][0]], mask, lr), r"exp_avg\[0\] must be .* got torch.float32 of shape \(5,\)"),
        ((p, g, m, [mask[0].int()], lr), r"frozen\[0\] must be bool, got torch.int32"),
        ((p, g, m, [mask[0].t()], lr), r"frozen\[0\] must broadcast .* \(4, 5\), got \(1, 4\)"),
        ((p, g, m, mask, lr.int()), r"lr must be a float32 or float64 tensor of shape \(\), got"),
        ((p, g, m, mask, lr.view(1)), r"lr must be .* of shape \(\), got torch.float32 .*\(1,\)"),
        ((p, g, m, mask, lr, lr.int()), r"grad_scale must be a float32 or float64 tensor"),
    ]:
        with pytest.raises(ValueError, match="masked_lion_: " + message):
            gk.masked_lion_(*args, **options)
    with pytest.raises(ValueError, match=r"momentum_buffer must have 0 tensors, got 1"):
        gk.masked_sgd_(p, g, m, mask, lr, **options)
    with pytest.raises(ValueError, match=r"nesterov needs momentum > 0, got 0"):
        gk.masked_sgd_(p, g, [], mask, lr, nesterov=True, **options)
    with pytest.raises(ValueError, match=r"max_exp_avg_sq must have 1 tensors, got 0"):
        gk.masked_adam_(p, g, m, m, [], step, mask, lr, amsgrad=True, **options)
    with pytest.raises(ValueError, match=r"step must have 1 tensors, got 0"):
        gk.masked_adam_(p, g, m, m, [], [], mask, lr, **options)
    with pytest.raises(
        ValueError, match=r"step\[0\] must be .*or of its mask \(4, 1\), got .*\(4, 5\)"
    ):
        gk.masked_adam_(p, g, m, m, [], m, mask, lr, **options)
