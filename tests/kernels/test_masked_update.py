from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from gose_kernels import masks
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
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


FROZEN = 5  # position of the masks in an op's arguments


def arguments(case: cases.UpdateCase, dtype: torch.dtype, step: float = 3.0) -> tuple[Any, ...]:
    """Positional arguments of the case's op, in mid-training."""
    param, grad, states, frozen, lr, scale = case.build(dtype)
    counts = [torch.tensor(step) for _ in param] if case.op == "masked_adam_" else []
    used = num_states(case.op, case.options)
    state = [t for moment in states[:used] for t in moment]
    return param, grad, state, counts, [], frozen, [], lr, scale


def num_states(op: str, options: Mapping[str, Any]) -> int:
    if op == "masked_adam_":
        return 3 if options.get("amsgrad") else 2
    return 1 if op == "masked_lion_" or options.get("momentum") else 0


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
    frozen, _, lr, scale = args[FROZEN:]
    count = len(args[0])
    state = [t.clone() for t in args[2]]
    lists = [copied(args)[0], *(state[i : i + count] for i in range(0, len(state), count))]
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
    got = [*args[0], *args[2]]
    for a, b in zip(got, [t for tensors in expected for t in tensors], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if case.op == "masked_adam_":
        scalar_masks = [m.dim() == 0 and bool(m) for m in args[FROZEN]] or [False] * 4
        assert [float(c) for c in args[3]] == [3.0 if kept else 4.0 for kept in scalar_masks]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.masked_update, ids=str)
def test_float32_steps_match_the_float64_reference(case, backend):
    args = arguments(case, torch.float32)
    truth, same = copied(args, to_double), copied(args)
    truth = (*truth[:3], copied(args)[3], *truth[4:])  # counts are float32
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
    if dtype == torch.float64 and backend != "torch":
        refusal = rf"{backend}: takes float32 . bfloat16, got float64 in"
        with pytest.raises(ValueError, match=refusal):
            getattr(gk, case.op)(*args, **case.options, backend=backend)
        return
    before = copied(args)
    for _ in range(3):
        getattr(gk, case.op)(*args, **case.options, backend=backend)
    frozen, count = args[FROZEN], len(args[0])
    for n, p in enumerate(args[0]):
        mask = frozen[n].expand(p.shape) if frozen else torch.zeros(p.shape, dtype=torch.bool)
        for new, old in zip(
            [p, *args[2][n::count]], [before[0][n], *before[2][n::count]], strict=True
        ):
            assert torch.equal(new.view(BITS[dtype])[mask], old.view(BITS[dtype])[mask])
        if case.grad == "normal":
            assert bool((p != before[0][n])[~mask].all())
    for unchanged, old in zip([*args[1], *frozen], [*before[1], *before[FROZEN]], strict=True):
        assert torch.equal(unchanged.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_counts_of_the_shape_of_the_mask_restart_bias_correction(backend):
    """A released element takes exactly the first step that a fresh one takes."""
    param, grad = torch.zeros(2, 3), torch.tensor([[0.5, -2.0, 3.0]] * 2)
    step = torch.tensor([[100.0], [0.0]])
    m, v = torch.zeros(2, 3), torch.zeros(2, 3)
    frozen = torch.tensor([[True], [False]])
    lr = torch.tensor(0.1)
    gk.masked_adam_([param], [grad], [m, v], [step], [], [frozen], [], lr, backend=backend)
    assert step.tolist() == [[100.0], [1.0]]
    assert param[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(param[1], -0.1 * grad[1].sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_correction_keeps_its_precision_at_the_first_step(backend):
    # 1 - 0.999**1 in float32 is off by 1e-5; a first step of lr * g / |g| is not.
    param, grad = torch.zeros(3), torch.tensor([0.1, -1.0, 7.0])
    state, step = [torch.zeros(3), torch.zeros(3)], [torch.zeros(())]
    lr = torch.tensor(1.0, dtype=torch.float64)
    gk.masked_adam_([param], [grad], state, step, [], [], [], lr, eps=0.0, backend=backend)
    torch.testing.assert_close(param, -grad.sign(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_nan_spreads_and_lists_may_be_empty(backend):
    param, grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    lr = torch.tensor(0.5)
    gk.masked_sgd_([param], [grad], [], [], [], [], [], lr, backend=backend)
    assert param.isnan().tolist() == [False, True, False]
    gk.masked_sgd_([], [], [], [], [], [], [], lr, backend=backend)
    empty = torch.ones(0, 3)
    frozen = [torch.zeros(0, 1, dtype=torch.bool)]
    gk.masked_lion_(
        [empty], [empty.clone()], [empty.clone()], [], [], frozen, [], lr, backend=backend
    )


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
        return param, grad, states[0], [], [], frozen, [], lr, scale
    step = [torch.tensor(2.0) for _ in param]
    if counts == "mask":
        columns = {(70, 1), (129,), (1, 3)}
        step = [
            step[n] if shape in columns else torch.randint(1, 20, shape, generator=random).float()
            for n, (_, shape) in enumerate(LARGE)
        ]
    return param, grad, [t for s in states for t in s], step, [], frozen, [], lr, scale


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
        for threads in (1, 2, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            results.append(copied(given))
            getattr(gk, op)(*results[-1], **OPTIONS[op], backend=backend)
    finally:
        torch.set_num_threads(before)
    for got, wanted, *others in zip(
        *map(tensors_of, (results[0], same, *results[1:])), strict=True
    ):
        assert all(torch.equal(got, other) for other in others)
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_is_twice_in_a_list_steps_twice(backend):
    param, grad, lr = torch.ones(100_000), torch.ones(100_000), torch.tensor(0.25)
    gk.masked_sgd_([param] * 2, [grad] * 2, [], [], [], [], [], lr, backend=backend)
    assert bool((param == 0.5).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_elements_count_their_steps(backend):
    param, frozen = [torch.ones(3, 0)] * 4, torch.tensor([[True], [False], [False]])
    step = torch.tensor([[4.0], [5.0], [6.0]])
    lr = torch.tensor(0.1)
    gk.masked_adam_(param[:1], param[1:2], param[2:], [step], [], [frozen], [], lr, backend=backend)
    assert step.flatten().tolist() == [4.0, 6.0, 7.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_a_saved_parameter_changed(backend):
    param = torch.ones(3, requires_grad=True)
    loss = (param * param).sum()
    with torch.no_grad():
        gk.masked_sgd_(
            [param], [torch.ones(3)], [], [], [], [], [], torch.tensor(0.5), backend=backend
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_kernel_refuses_counts_by_columns():
    p, step = [torch.zeros(4, 5)], [torch.zeros(1, 5)]
    frozen = [torch.zeros(1, 5, dtype=torch.bool)]
    lr = torch.tensor(0.1)
    reasons = gk.OPS["masked_adam_"].reasons(p, p, p * 2, step, [], frozen, [], lr)
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
        counts = [step] if op == "masked_adam_" else []
        used = states[: num_states(op, options)]
        getattr(gk, op)([p], [grad], used, counts, [], [frozen], [], lr, scale, **options)
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
    row = [torch.tensor([0, -1, 1, -1], dtype=torch.int32)]
    two = [torch.zeros(2, 5)]
    for args, message in [
        ((p, [], m, [], [], mask, [], lr), r"grad must have 1 tensors, got 0"),
        ((p, g, [], [], [], mask, [], lr), r"state must have 1 tensors, got 0"),
        ((p, g, m, step, [], mask, [], lr), r"step must have 0 tensors, got 1"),
        ((p, g, m, [], m * 2, mask, [], lr), r"master must have 1 tensors, got 2"),
        ((p, g, m, [], [], mask * 2, [], lr), r"frozen must have 1 tensors, got 2"),
        (
            ([p[0].half()], g, m, [], [], mask, [], lr),
            r"param\[0\] must be float32, bfloat16 or float64, got torch.float16",
        ),
        (
            ([*p, p[0].bfloat16()], g * 2, m * 2, [], [], [], [], lr),
            r"param\[1\] must have the dtype of param\[0\], got torch.bfloat16",
        ),
        (
            (p, [g[0].double()], m, [], [], mask, [], lr),
            r"grad\[0\] must be torch.float32 of shape \(4, 5\)",
        ),
        (
            (p, [g[0].t()], m, [], [], mask, [], lr),
            r"grad\[0\] must be .* got torch.float32 of shape \(5, 4\)",
        ),
        (
            (p, g, [m[0][0]], [], [], mask, [], lr),
            r"state\[0\] must be .* got torch.float32 of shape \(5,\)",
        ),
        (
            (p, g, m, [], [], [mask[0].int()], [], lr),
            r"frozen\[0\] must be bool, uint8 .* or float32 .*, got torch.int32",
        ),
        (
            (p, g, m, [], [], [mask[0].t()[:, :3]], [], lr),
            r"frozen\[0\] must have sizes that divide those of param\[0\] \(4, 5\), got \(1, 3\)",
        ),
        (
            (p, g, m, [], [], [mask[0].to(torch.uint8)], [], lr),
            r"frozen\[0\] of packed bits must have shape \(3,\), got \(4, 1\)",
        ),
        (
            (p, g, m, [], [], [mask[0].float()], [], lr),
            r"threshold must have 1 numbers, got 0",
        ),
        (
            (p, g, two, [], [], mask, [row[0][:3]], lr),
            r"row\[0\] must be torch.int32 of shape \(4,\), got torch.int32 of shape \(3,\)",
        ),
        *(
            (
                (p, g, two, [], [], mask, [row[0] + 1], lr),
                r"row\[0\] must hold slots in \[0, 2\) or -1, got 2",
            )
            for _ in range(backend in ("cpu", "torch"))  # others do not wait for the slots
        ),
        (
            (p, g, m, [], [], mask, [], lr.int()),
            r"lr must be a float32 or float64 tensor of shape \(\), got",
        ),
        (
            (p, g, m, [], [], mask, [], lr.view(1)),
            r"lr must be .* of shape \(\), got torch.float32 .*\(1,\)",
        ),
        (
            (p, g, m, [], [], mask, [], lr, lr.int()),
            r"grad_scale must be a float32 or float64 tensor",
        ),
    ]:
        with pytest.raises(ValueError, match="masked_lion_: " + message):
            gk.masked_lion_(*args, **options)
    rest = ([], mask, [], lr)
    for numbers in ({"seed": [1, 2]}, {"start": [1, 2]}):
        with pytest.raises(ValueError, match=r"(seed|start) must have 1 numbers, got 2"):
            gk.masked_lion_(p, g, m, [], *rest, **numbers, **options)
    with pytest.raises(ValueError, match=r"seed must be empty where there are master copies"):
        gk.masked_lion_(p, g, m, [], m, mask, [], lr, seed=[1], **options)
    with pytest.raises(ValueError, match=r"state must have 0 tensors, got 1"):
        gk.masked_sgd_(p, g, m, [], *rest, **options)
    with pytest.raises(ValueError, match=r"nesterov needs momentum > 0, got 0"):
        gk.masked_sgd_(p, g, [], [], *rest, nesterov=True, **options)
    with pytest.raises(ValueError, match=r"state must have 3 tensors, got 2"):
        gk.masked_adam_(p, g, m * 2, step, *rest, amsgrad=True, **options)
    with pytest.raises(ValueError, match=r"step must have 1 tensors, got 0"):
        gk.masked_adam_(p, g, m * 2, [], *rest, **options)
    with pytest.raises(
        ValueError, match=r"step\[0\] must be .*or of its mask \(4, 1\), got .*\(4, 5\)"
    ):
        gk.masked_adam_(p, g, m * 2, m, *rest, **options)


def packed(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bits one by one, the oracle of masks.pack."""
    bits = masks.spread(mask, shape).flatten().tolist()
    out = [sum(bit << j for j, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8)]
    return torch.tensor(out, dtype=torch.uint8)


def scores(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scores of which those from 0.5 on are frozen; one that is NaN is not."""
    out = torch.where(mask, 0.5 + torch.rand(mask.shape), 0.4999 - torch.rand(mask.shape))
    return torch.where(~mask & (torch.rand(mask.shape) < 0.1), math.nan, out)


MASK_KINDS = {"bool": lambda mask, shape: mask, "packed": packed, "scores": scores}
# Sizes that divide the parameter's: expert, row, column, blocks in either and both dimensions.
MASK_SHAPES = [
    ((4, 6, 40), (4, 1, 1)),
    ((4, 6, 40), (6, 1)),
    ((4, 6, 40), (4, 3, 1)),
    ((4, 6, 40), (2, 3, 5)),
    ((4, 6, 40), (1, 1, 5)),
    ((4, 6, 40), (4, 6, 20)),
    ((130, 64), (65, 4)),
    ((9000,), (9,)),
    ((37, 3), (37, 3)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_every_kind_of_mask_freezes_what_it_says(op, kind, backend):
    torch.manual_seed(3)
    for shape, mask_shape in MASK_SHAPES:
        mask = torch.rand(mask_shape) < 0.5
        whole = mask
        for dim, size in enumerate(shape[len(shape) - mask.dim() :]):
            whole = whole.repeat_interleave(size // mask_shape[dim], dim)
        whole = whole.expand(shape)
        p, g = torch.randn(shape), torch.randn(shape)
        state = [torch.rand(shape) for _ in range(num_states(op, OPTIONS[op]))]
        step = [torch.tensor(2.0)] if op == "masked_adam_" else []
        lr = torch.tensor(0.1)
        expected = [t.clone() for t in (p, *state)]
        REFERENCES[op](
            [expected[0]], [g], expected[1:], [c.clone() for c in step], [], [], [], lr,
            **OPTIONS[op],
        )  # fmt: skip
        before = [t.clone() for t in (p, *state)]
        given, threshold = MASK_KINDS[kind](mask, shape), [0.5] if kind == "scores" else []
        getattr(gk, op)(
            [p], [torch.where(whole, math.nan, g)], state, step, [], [given], [], lr,
            threshold=threshold, **OPTIONS[op], backend=backend,
        )  # fmt: skip
        for new, old, free in zip((p, *state), before, expected, strict=True):
            assert torch.equal(new[whole].view(torch.int32), old[whole].view(torch.int32))
            torch.testing.assert_close(new[~whole], free[~whole], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_by_bits_and_scores_go_up_where_live(backend):
    torch.manual_seed(4)
    p, g, m = torch.randn(5, 7), torch.randn(5, 7), [torch.zeros(5, 7), torch.zeros(5, 7)]
    mask, lr = torch.rand(5, 7) < 0.5, torch.tensor(0.1)
    count = torch.randint(0, 5, (5, 7)).float()
    old, start = count.clone(), p.clone()
    bits = [packed(mask, (5, 7))]
    gk.masked_adam_([p], [g], m, [count], [], bits, [], lr, backend=backend)
    assert torch.equal(count, torch.where(mask, old, old + 1))
    for i in range(35):
        alone = [start.view(-1)[i : i + 1].clone()], [g.view(-1)[i : i + 1]]
        state, step = [torch.zeros(1), torch.zeros(1)], [old.view(-1)[i].clone()]
        gk.masked_adam_(*alone, state, step, [], [], [], lr, backend="torch")
        wanted = start.view(-1)[i] if mask.view(-1)[i] else alone[0][0][0]
        torch.testing.assert_close(p.view(-1)[i], wanted, rtol=1e-6, atol=1e-7)
    rows, count = torch.tensor([[0.7], [0.2], [0.5], [math.nan], [0.1]]), torch.zeros(5, 1)
    gk.masked_adam_([p], [g], m, [count], [], [rows], [], lr, threshold=[0.5], backend=backend)
    assert count.flatten().tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_state_of_live_units_alone_gives_the_same_bits(op, half, backend):
    """Slots in any order; a unit without a slot is frozen whatever its mask says."""
    torch.manual_seed(5)
    for shape, mask_shape in MASK_SHAPES[:2] + MASK_SHAPES[5:8]:
        mask = masks.spread(torch.rand(mask_shape) < 0.5, masks.unit_shape(mask_shape, shape))
        units = mask.numel()
        row = torch.full((units,), -1, dtype=torch.int32)
        has = (~mask).flatten() | (torch.rand(units) < 0.3)
        has[0] = False
        row[has] = torch.randperm(int(has.sum())).int()
        whole = masks.spread(mask, shape) | masks.spread((row < 0).view(mask.shape), shape)
        p = torch.randn(shape).to(torch.bfloat16 if half else torch.float32)
        g = torch.randn(shape).to(p.dtype)
        states = num_states(op, OPTIONS[op])
        dense = [torch.rand(shape) for _ in range(states + half)]
        slots = [torch.zeros(int(has.sum()), p.numel() // units) for _ in dense]
        for s, d in zip(slots, dense, strict=True):
            s[row[has].long()] = d.view(units, -1)[has]
        step = [torch.tensor(2.0)] if op == "masked_adam_" else []
        lr, q = torch.tensor(0.1), p.clone()
        getattr(gk, op)(
            [q], [g], dense[:states], [c.clone() for c in step], dense[states:], [whole], [], lr,
            **OPTIONS[op], backend=backend,
        )  # fmt: skip
        getattr(gk, op)(
            [p], [g], slots[:states], step, slots[states:], [mask], [row], lr,
            **OPTIONS[op], backend=backend,
        )  # fmt: skip
        assert torch.equal(p, q)
        for s, d in zip(slots, dense, strict=True):
            assert torch.equal(s[row[has].long()], d.view(units, -1)[has])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_bfloat16_rounds_a_float32_copy_to_nearest(op, backend):
    torch.manual_seed(6)
    shapes = [(70, 33), (5,), (4, 3, 20)]
    exact = [torch.randn(s) for s in shapes]
    p, master = [t.bfloat16() for t in exact], [t.clone() for t in exact]
    g = [torch.randn(s).bfloat16() for s in shapes]
    frozen = [torch.rand(70, 1) < 0.5, torch.rand(5) < 0.5, torch.rand(4, 3, 20) < 0.5]
    whole = [m.expand(s) for m, s in zip(frozen, shapes, strict=True)]
    for q, mask in zip(p, whole, strict=True):
        q[mask] = 77.0  # not the rounding of its master: it must stay nevertheless
    count = num_states(op, OPTIONS[op])
    state = [torch.rand(s) for _ in range(count) for s in shapes]
    twins, twin_state = [t.clone() for t in exact], [t.clone() for t in state]
    lr, step = torch.tensor(0.01), [torch.tensor(1.0)] * 3 if op == "masked_adam_" else []
    step = [c.clone() for c in step]
    wide = [t.float() for t in g]
    for _ in range(5):
        twin_step = [c.clone() for c in step]
        getattr(gk, op)(twins, wide, twin_state, twin_step, [], frozen, [], lr, **OPTIONS[op])
        getattr(gk, op)(p, g, state, step, master, frozen, [], lr, **OPTIONS[op], backend=backend)
    for q, m, twin, mask in zip(p, master, twins, whole, strict=True):
        torch.testing.assert_close(m, twin, rtol=1e-6, atol=1e-6)
        assert torch.equal(q[~mask], m.bfloat16()[~mask])
        assert bool((q[mask] == 77.0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_follows_the_draws_of_the_whole_tensor(backend):
    """Each element rounds up where its lane and the half cut off pass 2**16, also in a piece."""
    torch.manual_seed(7)
    exact = torch.randn(3, 100)
    exact[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    lane = gk.philox.lanes(300, 11, 5).view(3, 100)
    p, lr = torch.zeros(3, 100).bfloat16(), torch.tensor(-1.0)
    # 0 + g * scale: a bfloat16 gradient times a scale has bits to cut off
    grad = exact.bfloat16()
    scale = torch.tensor(1.0 + 2.0**-12)
    wanted = grad.float() * scale
    low, high = wanted.view(torch.int32) & 0xFFFF, wanted.view(torch.int32) >> 16
    bits = (high + (low + lane >= 65536).int()).to(torch.int16)
    options = {"seed": [11], "draw": 5, "backend": backend}
    q = p.clone()
    gk.masked_sgd_([q], [grad], [], [], [], [], [], lr, scale, **options)
    finite = grad.isfinite()
    assert torch.equal(q.view(torch.int16)[finite], bits[finite])
    assert q[0, :3].tolist()[:2] == [math.inf, -math.inf] and bool(q[0, 2].isnan())
    assert 0 < int((q != wanted.bfloat16())[finite].sum()) < 100
    piece = p[1:].clone()
    gk.masked_sgd_([piece], [grad[1:]], [], [], [], [], [], lr, scale, start=[100], **options)
    assert torch.equal(piece, q[1:])
    masked, mask = p.clone(), torch.rand(3, 100) < 0.5
    gk.masked_sgd_([masked], [grad], [], [], [], [mask], [], lr, scale, **options)
    assert torch.equal(masked[~mask].view(torch.int16), q[~mask].view(torch.int16))
    assert bool((masked[mask] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_keeps_small_steps_on_average(backend):
    p, grad = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    nearest, lr = p.clone(), torch.tensor(1e-3)
    for step in range(16):
        options = {"seed": [3], "draw": step, "backend": backend}
        gk.masked_sgd_([p], [grad], [], [], [], [], [], lr, **options)
        gk.masked_sgd_([nearest], [grad], [], [], [], [], [], lr, backend=backend)
    assert bool((nearest == 1).all())
    assert float(p.float().mean()) == pytest.approx(1 - 16e-3, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", sorted(REFERENCES))
def test_bits_are_the_same_for_any_number_of_threads_with_gaps_and_draws(op, dtype):
    """Several pieces a thread, rows of an odd width, half of them without state."""
    torch.manual_seed(8)
    rows, width = 9001, 61
    mask = torch.rand(rows, 1) < 0.5
    row = torch.where(mask.flatten(), -1, (~mask).flatten().cumsum(0) - 1).int()
    p, g = [torch.randn(rows, width).to(dtype) for _ in range(2)]
    slots = int((~mask).sum())
    state = [torch.rand(slots, width) for _ in range(num_states(op, OPTIONS[op]))]
    step = [torch.randint(1, 4, (rows, 1)).float()] if op == "masked_adam_" else []
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q, own = p.clone(), [t.clone() for t in state]
            getattr(gk, op)(
                [q], [g], own, [c.clone() for c in step], [], [mask], [row], torch.tensor(0.1),
                seed=[4], draw=9, **OPTIONS[op], backend="cpu",
            )  # fmt: skip
            results.append((q, *own))
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert torch.equal((results[0][0] != p).any(dim=1), ~mask[:, 0])
