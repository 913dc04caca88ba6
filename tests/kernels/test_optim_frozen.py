"""Bits of frozen elements through long trainings, every kind of mask, every dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gose_kernels as gk
from gose_kernels.optim import Importance, MaskedAdamW, MaskedLion, MaskedSGD
from tests.kernels.test_optim import PAIRS, parameter, through_torch_save, train

MASKED = (MaskedAdamW, MaskedSGD, MaskedLion)
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
SHAPE = (4, 6, 32)
# Sizes of the masks of a parameter of SHAPE.
KINDS = {
    "whole": (),
    "expert": (4, 1, 1),
    "row": (4, 6, 1),
    "shared-row": (6, 1),
    "column": (1, 1, 32),
    "block": (4, 6, 2),
    "tile": (2, 3, 4),
    "element": (4, 6, 32),
    "score-row": (4, 6, 1),
    "score-element": (4, 6, 32),
}
# Options of each optimizer beside lr, one line each.
OPTIONS: dict[Any, list[dict[str, Any]]] = {
    MaskedAdamW: [
        {},
        {"weight_decay": 0.3, "amsgrad": True},
        {"decoupled_weight_decay": False, "weight_decay": 0.1, "maximize": True},
    ],
    MaskedSGD: [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
    ],
    MaskedLion: [{}, {"weight_decay": 0.3, "maximize": True}],
}


def whole_mask(mask: Tensor | Importance) -> Tensor:
    """What is frozen, repeated to SHAPE one dimension after the other."""
    own = mask.score >= mask.threshold if isinstance(mask, Importance) else mask
    own = own.reshape((1,) * (3 - own.dim()) + tuple(own.shape))
    for dim, size in enumerate(SHAPE):
        own = own.repeat_interleave(size // own.shape[dim], dim)
    return own


def draw_mask(kind: str, random: torch.Generator) -> Tensor | Importance:
    drawn = torch.rand(KINDS[kind], generator=random)
    return Importance(drawn, 0.5) if kind.startswith("score") else drawn < 0.5


def check_steps(
    optimizer: Any, p: nn.Parameter, kinds: list[str], steps: int, random: torch.Generator
) -> float:
    """Trains with masks that are set, moved and lifted at random steps; share of live elements
    that moved. Frozen elements get NaN and infinite gradients and must keep their bits."""
    mask: Tensor | Importance | None = draw_mask(kinds[0], random)
    optimizer.set_frozen(p, mask)
    live = moved = 0
    for step in range(steps):
        if step and torch.rand((), generator=random) < 12 / steps:
            kind = kinds[int(torch.randint(len(kinds), (), generator=random))]
            mask = None if torch.rand((), generator=random) < 0.2 else draw_mask(kind, random)
            optimizer.set_frozen(p, mask)
        elif isinstance(mask, Importance) and torch.rand((), generator=random) < 0.3:
            mask.score.copy_(torch.rand(mask.score.shape, generator=random))
        frozen = torch.zeros(SHAPE, dtype=torch.bool) if mask is None else whole_mask(mask)
        grad = torch.randn(SHAPE, generator=random).to(p.dtype)
        p.grad = torch.where(frozen, (math.nan, math.inf, -math.inf)[step % 3], grad)
        before, old_grad = p.detach().clone(), p.grad.clone()
        optimizer.step()
        same = p.detach().view(BITS[p.dtype]) == before.view(BITS[p.dtype])
        assert bool(same[frozen].all())
        assert torch.equal(p.grad.nan_to_num(), old_grad.nan_to_num())
        live += int((~frozen).sum())
        moved += int((~same & ~frozen).sum())
    assert bool(p.isfinite().all())
    return moved / max(1, live)


@settings(max_examples=80)
@given(
    optimizer=st.sampled_from(MASKED),
    line=st.integers(0, 3),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    dtype=st.sampled_from(sorted(BITS, key=str)),
    freeze_state=st.sampled_from(["paused", "dropped"]),
    bfloat16=st.sampled_from(["master", "stochastic"]),
    max_grad_norm=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_frozen_bits_hold(
    optimizer, line, kinds, dtype, freeze_state, bfloat16, max_grad_norm, seed
):
    random = torch.Generator().manual_seed(seed)
    if freeze_state == "dropped":
        kinds = [kind.removeprefix("score-") for kind in kinds]
    lines = OPTIONS[optimizer]
    p = parameter(*SHAPE, seed=seed % 97, dtype=dtype)
    made = optimizer(
        [p],
        lr=0.05,
        freeze_state=freeze_state,
        bfloat16=bfloat16,
        max_grad_norm=max_grad_norm,
        **lines[line % len(lines)],
    )
    refused = False
    try:
        share = check_steps(made, p, kinds, 12, random)
    except ValueError as error:
        refused = "scores as fine as" in str(error)
        assert refused
    if not refused and dtype != torch.bfloat16 and max_grad_norm is None:
        assert share > 0.95 or share == 0.0  # 0: everything was frozen all the time


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("form", ["element", "tile", "row", "score-element"])
def test_frozen_bits_hold_through_thousands_of_steps(kind, form):
    random = torch.Generator().manual_seed(5)
    p = parameter(*SHAPE)
    options = OPTIONS[kind][1] | {"maximize": False, "weight_decay": 0.01}
    made = kind([p], lr=1e-3, **options)
    steps = 10_000 if form == "element" else 1000
    assert check_steps(made, p, [form], steps, random) > 0.9


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("kind", MASKED)
def test_bits_of_a_training_are_the_same_for_any_number_of_threads(kind, mode):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            random = torch.Generator().manual_seed(6)
            params = [
                nn.Parameter(torch.randn(700, 64, generator=random)),
                nn.Parameter(torch.randn(300, 129, generator=random).bfloat16()),
            ]
            frozen = {
                params[0]: torch.rand(700, 1, generator=random) < 0.5,
                params[1]: torch.rand(300, 129, generator=random) < 0.5,
            }
            made = kind(params, lr=0.01, frozen=frozen, max_grad_norm=1.0, bfloat16=mode)
            for _ in range(5):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
                made.step()
            results.append(params)
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("pair", [name for name in PAIRS if "lion" not in name])
def test_trajectories_are_those_of_torchs_other_implementations(pair, implementation):
    ours, theirs, options, extra = PAIRS[pair]
    a, b = parameter(37, 5), parameter(37, 5)
    path = train(ours([a], **options, **extra), a, 50)
    expected = train(theirs([b], **options, **{implementation: True}), b, 50)
    for got, wanted in zip(path, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dampening_is_torchs(weight_decay):
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": weight_decay}
    a, b, late = parameter(7, 5), parameter(7, 5), parameter(3)
    ours, theirs = MaskedSGD([a, late], **options), torch.optim.SGD([b], **options)
    path, expected = train(ours, a, 20), train(theirs, b, 20)
    torch.testing.assert_close(path[-1], expected[-1], rtol=2e-6, atol=2e-6)
    late.grad, start = torch.ones(3), late.detach().clone()
    ours.step()  # its own first step
    torch.testing.assert_close(late, start - 0.05 * (1 + weight_decay * start))


def state_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer keeps beside the parameters: state, row maps, masks."""
    tensors = [t for s in optimizer.state.values() for t in s.values() if t is not None]
    tensors += [f.mask for f in optimizer._frozen.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("sizes", [(400, 1), (400, 4)], ids=["rows", "blocks"])
def test_frozen_rows_and_blocks_have_no_state(kind, dtype, sizes):
    mask = torch.arange(math.prod(sizes)).view(sizes) % 4 != 1
    made = {}
    for masked in (False, True):
        p = parameter(400, 512, dtype=dtype)
        p.grad = torch.ones_like(p)
        options = {"momentum": 0.9} if kind is MaskedSGD else {}
        made[masked] = kind([p], lr=0.1, frozen={p: mask} if masked else {}, **options)
        made[masked].step()
    share = state_bytes(made[True]) / state_bytes(made[False])
    assert 0.25 < share <= 0.27
    assert all(f.mask.numel() <= mask.numel() for f in made[True]._frozen.values())


def test_element_masks_take_one_bit_an_element():
    p = parameter(128, 64)
    made = MaskedLion([p], frozen={p: torch.rand(128, 64) < 0.5})
    assert made._frozen[p].mask.numel() == 128 * 64 / 8


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("freeze_state", ["paused", "dropped"])
def test_compact_state_follows_masks_and_gives_the_dense_trajectory(kind, freeze_state):
    """Masks of 16 columns have compact state; the same masks of single elements do not."""
    options = {"momentum": 0.9} if kind is MaskedSGD else {}
    rows, other = torch.arange(12)[:, None] < 6, torch.arange(12)[:, None] % 2 == 0
    masks = [rows, other, torch.tensor(False), rows | other, ~rows]
    paths, sizes = [], []
    for dense in (False, True):
        p = parameter(12, 32)
        made = kind([p], lr=0.05, freeze_state=freeze_state, **options)
        path = []
        for step in range(25):
            if step % 5 == 0:
                mask = masks[step // 5]
                made.set_frozen(p, mask.expand(12, 32) if dense else mask)
            path += train(made, p, 1, first=step)
            if not dense:
                moment = "momentum_buffer" if kind is MaskedSGD else "exp_avg"
                sizes.append(made.state[p][moment].numel() // 32)
        paths.append(path)
    for one, two in zip(*paths, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    paused = [6, 9, 12, 12, 12]
    assert sizes[::5] == (paused if freeze_state == "paused" else [6, 6, 12, 3, 6])


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("kind", MASKED)
def test_bfloat16_parameters_follow_float32_ones(kind, mode):
    """A master copy is the float32 training; draws keep small steps that rounding would lose."""
    options = {"momentum": 0.9} if kind is MaskedSGD else {}
    wide = parameter(40, 50)
    p = nn.Parameter(wide.detach().bfloat16())
    wide = nn.Parameter(p.detach().float())
    start = wide.detach().clone()
    lr = 1e-4 if kind is not MaskedSGD else 1e-3
    ours, theirs = (
        kind([p], lr=lr, bfloat16=mode, seed=3, **options),
        kind([wide], lr=lr, **options),
    )
    for step in range(30):
        random = torch.Generator().manual_seed(step)
        p.grad = (torch.randn(40, 50, generator=random) + 1).bfloat16()
        wide.grad = p.grad.float()
        ours.step()
        theirs.step()
    if mode == "master":
        torch.testing.assert_close(ours.state[p]["master"], wide.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(p, ours.state[p]["master"].bfloat16())
        return
    moved, expected = p.detach().float() - start, wide.detach() - start
    assert float(moved.mean() / expected.mean()) == pytest.approx(1.0, abs=0.15)
    assert "master" not in ours.state[p]


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("kind", MASKED)
def test_resume_of_bfloat16_with_compact_state_is_bit_exact(kind, mode):
    mask = torch.arange(20)[:, None] % 3 == 0
    options: dict[str, Any] = {"bfloat16": mode, "seed": 9}
    options |= {"momentum": 0.9} if kind is MaskedSGD else {}
    p = parameter(20, 32, dtype=torch.bfloat16)
    made = kind([p], lr=0.01, frozen={p: mask}, **options)
    train(made, p, 4)
    saved = through_torch_save({"p": p.detach(), "optimizer": made.state_dict()})
    expected = train(made, p, 4, first=4)
    q = nn.Parameter(saved["p"].clone())
    resumed = kind([q], lr=0.5, frozen={q: mask}, **options)
    resumed.load_state_dict(saved["optimizer"])
    got = train(resumed, q, 4, first=4)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)
    for name, value in made.state[p].items():
        assert resumed.state[q][name].dtype == value.dtype


def test_draws_differ_by_parameter_step_and_seed():
    def run(seed: int) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(512).bfloat16()) for _ in range(2)]
        made = MaskedSGD(params, lr=1e-3, bfloat16="stochastic", seed=seed)
        out = []
        for _ in range(2):
            for p in params:
                p.grad = torch.ones(512).bfloat16()
            made.step()
            out += [p.detach().clone() for p in params]
        return out

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[2] - first[0], first[0] - 1)


def test_an_importance_is_read_at_every_step_and_counts_by_its_scores():
    score = torch.tensor([[0.9], [0.1], [math.nan]])
    p = parameter(3, 4)
    made = MaskedAdamW([p], lr=0.1, frozen={p: Importance(score, 0.5)})
    for moves in ([False, True, True], [True, False, True]):
        start = p.detach().clone()
        train(made, p, 1)
        assert (p != start).all(dim=1).tolist() == moves
        score.copy_(score.flip(0) if moves[0] else torch.tensor([[0.4], [0.5], [0.0]]))
    assert made.state[p]["step"].flatten().tolist() == [1.0, 1.0, 2.0]
    assert made.frozen[p].shape == (3, 1)


def test_refusals_of_importances():
    p = parameter(6, 4)
    for score, message in [
        (
            torch.zeros(1, 4),
            r"must have .* one per expert, row or element .* \(6, 4\), got .* \(1, 4\)",
        ),
        (torch.zeros(6, 1).double(), r"must have float32 scores"),
        (torch.zeros(5, 1), r"must have sizes that divide"),
    ]:
        with pytest.raises(ValueError, match="MaskedSGD.set_frozen: mask " + message):
            MaskedSGD([p], frozen={p: Importance(score, 0.5)})
    with pytest.raises(ValueError, match=r"Importance with freeze_state='paused' only"):
        MaskedSGD([p], freeze_state="dropped", frozen={p: Importance(torch.zeros(6, 1), 0.5)})
    made = MaskedAdamW([p], frozen={p: torch.eye(6, 4, dtype=torch.bool)})
    train(made, p, 1)
    made.set_frozen(p, None)
    train(made, p, 1)
    with pytest.raises(ValueError, match=r"scores as fine as .* \(6, 4\), got \(6, 1\)"):
        made.set_frozen(p, Importance(torch.zeros(6, 1), 0.5))
    with pytest.raises(TypeError, match=r"MaskedSGD: no option named 'fused'"):
        MaskedSGD([p], fused=True)
    with pytest.raises(ValueError, match=r"bfloat16 must be master or stochastic, got 'nearest'"):
        MaskedSGD([p], bfloat16="nearest")


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_grad_scaler_unscales_inside_the_step(max_grad_norm):
    """Scaled gradients stay as they are, and frozen ones count in no norm."""
    mask = torch.tensor([True, False, False, False])
    p, q = parameter(4), parameter(4)
    ours = MaskedAdamW([p], lr=0.1, frozen={p: mask}, max_grad_norm=max_grad_norm)
    theirs = MaskedAdamW([q], lr=0.1, frozen={q: mask}, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.tensor([100.0, 2.0, -3.0, 0.5])
    for _ in range(3):
        ours.zero_grad()
        scaler.scale((p * x).sum()).backward()
        scaled = p.grad.clone()
        scaler.step(ours)
        scaler.update()
        assert torch.equal(p.grad, scaled) and torch.equal(scaled, x * 1024)
        q.grad = x.clone()
        theirs.step()
    torch.testing.assert_close(p, q)


def test_accumulated_gradients_stay_as_they_are():
    p = parameter(40, 32)
    made = MaskedAdamW([p], frozen={p: torch.rand(40, 1) < 0.5}, max_grad_norm=1e-3)
    for _ in range(3):
        (p.sum() * 3).backward()
        made.step()
    assert bool((p.grad == 9.0).all())


@pytest.mark.parametrize("form", ["tile", "element", "score-row"])
def test_clip_grad_norm_takes_every_kind_of_mask(form):
    random = torch.Generator().manual_seed(2)
    mask = draw_mask(form, random)
    frozen = whole_mask(mask)
    p = parameter(*SHAPE, dtype=torch.bfloat16)
    p.grad = torch.randn(SHAPE, generator=random).bfloat16()
    expected = p.grad[~frozen].double().norm()
    p.grad[frozen] = math.nan
    before = p.grad.clone()
    norm = gk.optim.clip_grad_norm_([p], 1.0, frozen={p: mask})
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(p.grad[~frozen].double().norm().item(), 1.0, rtol=0.01, atol=0)
    assert bool(p.grad[frozen].isnan().all())
    wanted = before[~frozen] * (1 / (norm + 1e-6)).bfloat16()
    assert torch.equal(p.grad[~frozen], wanted)
