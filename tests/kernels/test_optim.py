from __future__ import annotations

import copy
import functools
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

import gose_kernels as gk
from gose_kernels import masks
from gose_kernels.optim import MaskedAdamW, MaskedLion, MaskedSGD
from gose_kernels.optim.clip import clip_scale, live_norm

MASKED = (MaskedAdamW, MaskedSGD, MaskedLion)


class LionOracle:
    """Program 1 of the paper on one tensor."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        (self.param,), self.lr, self.betas = params, lr, betas
        self.weight_decay, self.sign = weight_decay, -1 if maximize else 1
        self.m = torch.zeros_like(self.param)

    @torch.no_grad()
    def step(self):
        (b1, b2), g = self.betas, self.sign * self.param.grad
        update = (b1 * self.m + (1 - b1) * g).sign()
        self.param -= self.lr * (update + self.weight_decay * self.param)
        self.m = b2 * self.m + (1 - b2) * g


PAIRS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01}, {}),
    "adamw-decay": (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}, {}),
    "adamw-options": (
        MaskedAdamW,
        torch.optim.AdamW,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True, "maximize": True},
        {},
    ),
    "adam": (
        MaskedAdamW,
        torch.optim.Adam,
        {"lr": 0.01, "weight_decay": 0.1},
        {"decoupled_weight_decay": False},
    ),
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.1}, {}),
    "sgd-momentum": (MaskedSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, {}),
    "sgd-nesterov": (
        MaskedSGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {},
    ),
    "lion": (MaskedLion, LionOracle, {"lr": 0.01, "weight_decay": 0.1}, {}),
    "lion-maximize": (MaskedLion, LionOracle, {"lr": 0.01, "maximize": True}, {}),
}


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    random = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=random, dtype=dtype))


def train(optimizer: Any, param: Tensor, steps: int, *, first: int = 0) -> list[Tensor]:
    """The parameter after each step with gradients drawn by step number."""
    path = []
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(1000 + step)
        drawn = torch.randn(param.shape, generator=random, dtype=torch.float64)
        param.grad = drawn.to(param.dtype)
        optimizer.step()
        path.append(param.detach().clone())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", PAIRS)
def test_with_nothing_frozen_the_trajectory_is_torchs(pair, dtype):
    ours, theirs, options, extra = PAIRS[pair]
    a, b = parameter(7, 5, dtype=dtype), parameter(7, 5, dtype=dtype)
    path, expected = (
        train(ours([a], **options, **extra), a, 100),
        train(theirs([b], **options), b, 100),
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for got, wanted in zip(path, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    start = parameter(7, 5, dtype=dtype).detach()
    assert float((path[-1] - start).abs().mean()) > 0.05


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", [(7, 5), (7, 1), (1, 5), (5,), ()])
def test_live_elements_move_as_if_alone_and_frozen_bits_stay(pair, shape):
    ours, theirs, options, extra = PAIRS[pair]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.5
    a, b, start = parameter(7, 5), parameter(7, 5), parameter(7, 5).detach()
    frozen = mask.expand(7, 5)
    path = train(ours([a], **options, **extra, frozen={a: mask}), a, 50)
    expected = train(theirs([b], **options), b, 50)
    assert torch.equal(path[-1].view(torch.int32)[frozen], start.view(torch.int32)[frozen])
    torch.testing.assert_close(path[-1][~frozen], expected[-1][~frozen], rtol=2e-6, atol=2e-6)


def test_masking_gradients_alone_would_not_have_frozen_anything():
    """What this module is for: torch's AdamW moves elements whose gradients are set to zero."""
    a, start = parameter(4, 4), parameter(4, 4).detach()
    optimizer = torch.optim.AdamW([a], lr=0.01)
    train(optimizer, a, 3)
    before = a.detach().clone()
    a.grad = torch.zeros(4, 4)
    optimizer.step()
    assert bool((a != before).all())
    assert bool((a != start).all())


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(MASKED),
    seed=st.integers(0, 2**31),
    freeze_state=st.sampled_from(["paused", "dropped"]),
    max_grad_norm=st.sampled_from([None, 0.1]),
)
def test_frozen_bits_hold_while_masks_move_at_random_steps(kind, seed, freeze_state, max_grad_norm):
    random = torch.Generator().manual_seed(seed)
    params = [parameter(6, 4, seed=1), parameter(3, 2, 5, seed=2), parameter(8, seed=3)]
    options = {"momentum": 0.9} if kind is MaskedSGD else {}
    optimizer = kind(
        params,
        lr=0.1,
        weight_decay=0.1,
        freeze_state=freeze_state,
        max_grad_norm=max_grad_norm,
        **options,
    )
    live = moved = 0
    for _ in range(12):
        for p in params:
            if torch.rand((), generator=random) < 0.3:
                kept = [s if torch.rand((), generator=random) < 0.6 else 1 for s in p.shape]
                mask = torch.rand(kept, generator=random) < 0.5
                optimizer.set_frozen(p, None if torch.rand((), generator=random) < 0.2 else mask)
            p.grad = torch.randn(p.shape, generator=random)
            if p in optimizer.frozen:
                p.grad[optimizer.frozen[p].expand(p.shape)] = math.nan
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            mask = optimizer.frozen.get(p, torch.tensor(False)).expand(p.shape)
            new_bits, old_bits = p.detach().view(torch.int32), old.view(torch.int32)
            assert torch.equal(new_bits[mask], old_bits[mask])
            assert bool(p.isfinite().all())
            live += int((~mask).sum())
            moved += int((p != old)[~mask].sum())
    assert moved >= live - 2  # now and then an update is smaller than the rounding of p


def schedule(
    optimizer: Any, p: Tensor, masks: dict[int, Tensor | None], steps: int
) -> list[Tensor]:
    """The parameter after each step; masks[s] is set before step s."""
    path = []
    for step in range(steps):
        if step in masks:
            optimizer.set_frozen(p, masks[step])
        path += train(optimizer, p, 1, first=step)
    return path


def adam_by_element(
    start: Tensor, masks: dict[int, Tensor | None], steps: int, freeze_state: str
) -> Tensor:
    """AdamW where every element has its own optimizer, paused or restarted with its mask."""
    out = start.clone()
    for index in range(start.numel()):
        p = nn.Parameter(start.view(-1)[index : index + 1].clone())
        make = functools.partial(torch.optim.AdamW, [p], lr=0.01, weight_decay=0.1)
        optimizer, is_frozen = make(), False
        for step in range(steps):
            if step in masks:
                mask = masks[step]
                is_frozen = mask is not None and bool(mask.expand(start.shape).reshape(-1)[index])
                if is_frozen and freeze_state == "dropped":
                    optimizer = make()
            random = torch.Generator().manual_seed(1000 + step)
            drawn = torch.randn(start.shape, generator=random, dtype=torch.float64)
            p.grad = drawn.float().view(-1)[index : index + 1]
            if not is_frozen:
                optimizer.step()
        out.view(-1)[index] = p.detach()[0]
    return out


_ELEMENT = torch.tensor([[True, False, True], [False, False, True]])
_ROW = torch.tensor([[True], [False]])
_COLUMN = torch.tensor([False, True, True])
SCHEDULES: dict[str, dict[int, Tensor | None]] = {
    "grow": {0: _ROW, 4: _ROW | _ELEMENT, 9: _ROW | _ELEMENT | _COLUMN},
    "release": {0: _ELEMENT, 5: None},
    "move": {3: _ROW, 6: ~_ROW, 11: _COLUMN, 14: _ELEMENT, 17: None},
    "whole": {2: torch.tensor(True), 6: torch.tensor(False), 9: torch.tensor(True), 12: _ROW},
    "whole-then-element": {
        2: torch.tensor(True),
        5: torch.ones(2, 3, dtype=torch.bool),
        8: _ELEMENT,
    },
    "same-again": {0: _ELEMENT, 3: _ELEMENT, 5: _ELEMENT.clone(), 8: ~_ELEMENT},
}


@pytest.mark.parametrize("freeze_state", ["paused", "dropped"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_element_has_the_history_of_its_own_steps(name, freeze_state):
    """Bias correction and moments are right for each element through any sequence of masks."""
    p = parameter(2, 3)
    optimizer = MaskedAdamW([p], lr=0.01, weight_decay=0.1, freeze_state=freeze_state)
    expected = adam_by_element(p.detach().clone(), SCHEDULES[name], 20, freeze_state)
    path = schedule(optimizer, p, SCHEDULES[name], 20)
    torch.testing.assert_close(path[-1], expected, rtol=2e-6, atol=2e-6)


def test_a_mask_that_only_grows_and_drops_state_keeps_one_step_count():
    p = parameter(6, 4)
    optimizer = MaskedAdamW(
        [p], frozen={p: torch.zeros(6, 1, dtype=torch.bool)}, freeze_state="dropped"
    )
    for rows in (1, 2, 4):
        train(optimizer, p, 2)
        mask = torch.arange(6)[:, None] < rows
        optimizer.set_frozen(p, mask)
        assert optimizer.state[p]["step"].dim() == 0
        assert not optimizer.state[p]["exp_avg"][:rows].any()
        assert bool(optimizer.state[p]["exp_avg"][rows:].all())


def test_masks_are_copied():
    p = parameter(3)
    mask = torch.tensor([True, False, False])
    optimizer = MaskedSGD([p], lr=0.1, frozen={p: mask})
    mask.fill_(True)
    start = p.detach().clone()
    train(optimizer, p, 1)
    assert (p != start).tolist() == [False, True, True]


@pytest.mark.parametrize("kind", MASKED)
def test_groups_schedulers_missing_gradients_and_closures(kind):
    a, b, unused = parameter(3, 2, seed=1), parameter(4, seed=2), parameter(5, seed=3)
    mask = torch.tensor([True, False, False, True])
    groups = [{"params": [a], "lr": 0.5}, {"params": [b, unused], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.25, frozen={b: mask})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    start = [p.detach().clone() for p in (a, b, unused)]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == pytest.approx(
        float(start[0].square().sum() + start[1].square().sum())
    )
    assert bool((a != start[0]).all())
    assert (b != start[1]).tolist() == [False, True, True, False]
    assert torch.equal(unused, start[2])
    assert unused not in optimizer.state
    scheduler.step()  # lr = 0
    moved = [p.detach().clone() for p in (a, b)]
    optimizer.step(closure)
    assert torch.equal(a, moved[0])
    assert torch.equal(b, moved[1])


def test_lr_may_be_a_tensor_and_dtypes_may_mix():
    lr = torch.tensor(0.01)
    params = [parameter(4, dtype=torch.float32), parameter(4, dtype=torch.float64)]
    twins = [parameter(4, dtype=torch.float32), parameter(4, dtype=torch.float64)]
    ours, theirs = MaskedAdamW(params, lr=lr), torch.optim.AdamW(twins, lr=0.01)
    for step in range(20):
        lr.fill_(0.01 / (1 + step))
        theirs.param_groups[0]["lr"] = float(lr)
        for p in (*params, *twins):
            p.grad = torch.linspace(-1, 1, 4).to(p.dtype) * (step % 3)
        ours.step()
        theirs.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)


def test_grad_scaler_unscales_and_skips_overflowed_steps():
    p, q = parameter(4), parameter(4)
    mask = torch.tensor([True, False, False, False])
    ours, theirs = MaskedAdamW([p], frozen={p: mask}), torch.optim.AdamW([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.tensor([1.0, 2.0, -3.0, 0.5])
    for bad in (False, True, False):
        ours.zero_grad()
        scaler.scale((p * x).sum() * (math.inf if bad else 1.0)).backward()
        scaler.step(ours)
        scaler.update()
        if not bad:
            q.grad = x.clone()
            theirs.step()
    torch.testing.assert_close(p.detach()[1:], q.detach()[1:])
    assert torch.equal(p.detach()[0], parameter(4).detach()[0])


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clip_grad_norm_is_torchs_on_the_live_elements(norm_type):
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    params, twins = [parameter(5, 4), parameter(6)], [parameter(5, 4), parameter(6)]
    for p, twin in zip(params, twins, strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        twin.grad = p.grad.clone()
    twins[0].grad[mask] = 0
    params[0].grad[mask] = math.nan
    params[0].grad[0, 0] = twins[0].grad[0, 0]
    mask[0, 0] = False
    params.append(parameter(2))  # no gradient
    for max_norm in (0.5, 1e6):
        norm = gk.optim.clip_grad_norm_(
            params, max_norm, frozen={params[0]: mask}, norm_type=norm_type
        )
        expected = nn.utils.clip_grad_norm_(twins, max_norm, norm_type)
        torch.testing.assert_close(norm, expected)
        assert bool(params[0].grad[mask].isnan().all())
        torch.testing.assert_close(params[0].grad[~mask], twins[0].grad[~mask])
        torch.testing.assert_close(params[1].grad, twins[1].grad)


def test_clip_grad_norm_takes_one_tensor_and_names_a_norm_that_is_not_finite():
    p = parameter(3)
    p.grad = torch.tensor([3.0, math.nan, 4.0])
    with pytest.raises(RuntimeError, match=r"norm of order 2.0 of the live gradients is nan"):
        gk.optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad[0] == 3.0
    frozen = {p: torch.tensor([False, True, False])}
    norm = gk.optim.clip_grad_norm_(p, 1.0, frozen=frozen, error_if_nonfinite=True)
    assert float(norm) == 5.0
    torch.testing.assert_close(p.grad[::2], torch.tensor([0.6, 0.8]))
    p.grad = torch.tensor([3.0, 100.0, 4.0])
    gk.optim.clip_grad_norm_(p, 1.0, frozen=frozen)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 100.0, 0.8]))
    with pytest.raises(ValueError, match=r"a mask in frozen must be bool, got torch.float32"):
        gk.optim.clip_grad_norm_(p, 1.0, frozen={p: torch.ones(3)})


class BetweenDevices(TorchDispatchMode):
    """What is copied from one device to another: a GPU is waited for."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and len({t.device for t in (*args, out) if isinstance(t, Tensor)}) > 1:
            self.copied.append(func)
        return out


def test_the_norm_of_clipping_waits_for_no_gpu():
    """On fake tensors, which would also raise where a value is asked for."""
    with FakeTensorMode(), BetweenDevices() as between:
        params = [nn.Parameter(torch.ones(n, 4, device="cuda")) for n in (5, 6)]
        params.append(nn.Parameter(torch.ones(3, device="cuda", dtype=torch.bfloat16)))
        for p in params:
            p.grad = torch.ones_like(p)
        rows = torch.ones(5, 1, device="cuda", dtype=torch.bool)
        frozen = {params[0]: masks.frozen("", rows, params[0].shape)}
        scale = clip_scale(live_norm(params, frozen, 2.0), 1.0)
        assert (scale.device.type, scale.dtype) == ("cuda", torch.float32)
        assert not between.copied
        torch.zeros(()).to(scale.device)
        assert len(between.copied) == 1


@pytest.mark.parametrize("kind", MASKED)
def test_max_grad_norm_equals_clipping_the_live_norm_before_the_step(kind):
    mask = torch.tensor([[True], [False], [False]])
    paths = []
    for built_in in (True, False):
        p, other = parameter(3, 4), parameter(5, seed=4)
        frozen = {p: mask}
        groups = [{"params": [p]}, {"params": [other]}]
        optimizer = kind(groups, lr=0.1, frozen=frozen, max_grad_norm=0.5 if built_in else None)
        for step in range(5):
            random = torch.Generator().manual_seed(step)
            p.grad = torch.randn(3, 4, generator=random)
            other.grad = torch.randn(5, generator=random)
            p.grad[0] = math.inf
            if not built_in:
                gk.optim.clip_grad_norm_([p, other], 0.5, frozen=frozen)
            optimizer.step()
        paths.append((p.detach(), other.detach()))
        assert p.grad[0].tolist() == [math.inf] * 4
    for one, two in zip(*paths, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def through_torch_save(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("released", [False, True])
def test_resume_from_a_state_dict_is_bit_exact(kind, released):
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    options = {"momentum": 0.9} if kind is MaskedSGD else {}
    p = parameter(5, 4)
    optimizer = kind([p], lr=0.01, frozen={p: mask}, **options)
    train(optimizer, p, 5)
    now = mask & (torch.arange(4) > 1) if released else mask
    optimizer.set_frozen(p, now)
    train(optimizer, p, 3, first=5)
    saved = through_torch_save({"p": p.detach(), "optimizer": optimizer.state_dict()})
    expected = train(optimizer, p, 5, first=8)
    q = nn.Parameter(saved["p"].clone())
    resumed = kind([q], lr=0.5, frozen={q: now}, **options)
    resumed.load_state_dict(saved["optimizer"])
    got = train(resumed, q, 5, first=8)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)
    assert resumed.frozen[q].dtype == torch.bool


def test_a_copied_optimizer_keeps_its_masks():
    p = parameter(4)
    model = nn.ParameterList([p])
    optimizer = MaskedAdamW(
        model.parameters(), frozen={p: torch.tensor([True, False, True, False])}
    )
    train(optimizer, p, 2)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    q = model2[0]
    start = q.detach().clone()
    path, path2 = train(optimizer, p, 3, first=2), train(optimizer2, q, 3, first=2)
    assert torch.equal(path[-1], path2[-1])
    assert (q != start).tolist() == [False, True, False, True]


def test_a_different_mask_on_load_is_an_error_that_changes_nothing():
    mask = torch.tensor([[True], [False], [False]])
    p = parameter(3, 4)
    optimizer = MaskedAdamW([p], frozen={p: mask})
    train(optimizer, p, 3)
    saved = through_torch_save(optimizer.state_dict())
    for other, count in [(None, 4), (~mask, 12), (torch.tensor(True), 8)]:
        q = parameter(3, 4)
        fresh = MaskedAdamW([q], frozen={} if other is None else {q: other})
        with pytest.raises(ValueError, match=rf"parameter 0: {count} of 12 elements are frozen in"):
            fresh.load_state_dict(saved)
        assert not fresh.state
    q = parameter(3, 4)
    same_elements = MaskedAdamW([q], frozen={q: mask.expand(3, 4)})
    same_elements.load_state_dict(saved)
    train(same_elements, q, 1)
    unmasked = torch.optim.AdamW([parameter(3, 4)])
    with pytest.raises(ValueError, match=r"4 of 12 elements are frozen"):
        MaskedAdamW([q], frozen={q: mask}).load_state_dict(unmasked.state_dict())


def test_a_state_dict_shares_no_mask_with_its_optimizer():
    p = parameter(3)
    optimizer = MaskedSGD([p], lr=0.1, frozen={p: torch.tensor([True, False, False])})
    optimizer.state_dict()["state"][0]["frozen"].fill_(True)
    start = p.detach().clone()
    train(optimizer, p, 1)
    assert (p != start).tolist() == [False, True, True]


def test_step_counts_of_single_elements_load_under_a_mask_of_rows():
    rows = torch.tensor([[True], [False], [False]])
    p, q = parameter(3, 4), parameter(3, 4)
    optimizer = MaskedAdamW([p], frozen={p: torch.eye(3, 4, dtype=torch.bool)})
    train(optimizer, p, 3)
    optimizer.set_frozen(p, rows)
    train(optimizer, p, 2, first=3)
    resumed = MaskedAdamW([q], frozen={q: rows})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        q.copy_(p)
    path, expected = train(resumed, q, 3, first=5), train(optimizer, p, 3, first=5)
    assert resumed.state[q]["step"][1].tolist() == [8.0, 5.0, 8.0, 8.0]
    assert torch.equal(path[-1], expected[-1])


def test_state_dicts_of_torchs_optimizers_load_where_nothing_is_frozen():
    p, q = parameter(3, 4), parameter(3, 4)
    theirs, ours = torch.optim.AdamW([p], lr=0.01), MaskedAdamW([q])
    train(theirs, p, 5)
    with torch.no_grad():
        q.copy_(p)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    path, expected = train(ours, q, 5, first=5), train(theirs, p, 5, first=5)
    torch.testing.assert_close(path[-1], expected[-1], rtol=2e-6, atol=2e-6)


def test_distributed_checkpoint_state_round_trips_with_its_masks():
    mask = torch.tensor([[True], [False], [False]])
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Linear(4, 3)
        optimizer = MaskedAdamW(model.parameters(), frozen={model.weight: mask})
        if seed == 0:
            for _ in range(3):
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
            saved = get_optimizer_state_dict(model, optimizer)
            assert saved["state"]["weight"]["frozen"].tolist() == mask.tolist()
        else:
            set_optimizer_state_dict(model, optimizer, saved)
        states.append(optimizer.state[model.weight])
    assert set(states[1]) == {"step", "exp_avg", "exp_avg_sq"}
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])


def test_steps_work_with_compiled_models():
    model = nn.Linear(4, 3)
    mask = torch.tensor([[True], [False], [False]])
    optimizer = MaskedAdamW(model.parameters(), frozen={model.weight: mask})
    start = model.weight.detach().clone()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert (model.weight != start).all(dim=1).tolist() == [False, True, True]


def test_refusals():
    p, q = parameter(3, 4), parameter(3, 4)
    mask = torch.zeros(3, 1, dtype=torch.bool)
    for options, message in [
        ({"lr": -1.0}, r"lr must be at least 0, got -1.0"),
        ({"eps": -1.0}, r"eps must be at least 0"),
        ({"weight_decay": -1.0}, r"weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"freeze_state": "kept"}, r"freeze_state must be paused or dropped, got 'kept'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be positive, got 0.0"),
        ({"frozen": {q: mask}}, r"set_frozen: the parameter is not in this optimizer"),
        ({"frozen": {p: mask.float()}}, r"set_frozen: mask must be bool, got torch.float32"),
        ({"frozen": {p: mask.t()}}, r"set_frozen: mask must have sizes .* \(3, 4\), got \(1, 3\)"),
    ]:
        with pytest.raises(ValueError, match="MaskedAdamW.*" + message):
            MaskedAdamW([p], **options)
    with pytest.raises(ValueError, match=r"MaskedSGD: nesterov needs momentum > 0 and no damp"):
        MaskedSGD([p], nesterov=True)
    with pytest.raises(ValueError, match=r"MaskedSGD: momentum must be at least 0"):
        MaskedSGD([p], momentum=-0.1)
    optimizer = MaskedSGD([p])
    p.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(ValueError, match=r"MaskedSGD: a gradient is sparse; pass grad.to_dense"):
        optimizer.step()
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"param\[0\] must be float32, bfloat16 or .*float16"):
        MaskedSGD([half]).step()
    with pytest.raises(ValueError, match=r"loaded state dict"):
        optimizer.load_state_dict(MaskedSGD([p, q]).state_dict())
