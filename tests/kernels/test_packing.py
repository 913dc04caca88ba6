"""Packed weights: what stands in them, and that one copy is made, found again, remade and freed."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels import packing
from gose_kernels.ops.activations import ACTIVATIONS
from tests import cases
from tests.checks import assert_chain_close_to_truth, backends_of
from tests.expert_mlp_oracle import double, oracle

pytestmark = pytest.mark.skipif(
    gk.native.why_not() is not None, reason=f"packing: {gk.native.why_not()}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E, D, F, T, K = 3, 37, 21, 5, 2
# Sizes around a panel's 32 columns, its 16 units, and the 64 and 128 steps that are packed at once.
SIZES = [(1, 1), (16, 32), (17, 33), (37, 130), (130, 37), (70, 300)]


class Packs:
    """How often weights were packed, and the most copies there were at once."""

    def __init__(self) -> None:
        self.count = 0
        self.most = 0
        self._made: list[weakref.ref[Tensor]] = []

    def watch(self, pack: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **options: Any) -> Tensor:
            packed_EB = pack(*args, **options)
            self.count += 1
            self._made.append(weakref.ref(packed_EB))
            self.most = max(self.most, sum(made() is not None for made in self._made))
            return packed_EB

        return watched


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Packs]:
    gk.forget_packed()
    gc.collect()
    assert gk.packed_bytes() == 0
    packs = Packs()
    monkeypatch.setattr(packing, "pack_experts", packs.watch(packing.pack_experts))
    yield packs
    gk.forget_packed()


def _call(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x_TD, weight_TK, expert_TK, w_up_EHD, w_down_EDF"""
    args, _ = cases.ExpertMlpCase(T=T, K=K, E=E, D=D, F=F).build(dtype)
    return list(args[:5])


def _bytes(dtype: torch.dtype = torch.bfloat16) -> int:
    return E * packing.expert_bytes(width=D, hidden=F, dtype=dtype)


def test_one_copy_is_made_and_found_again(packs: Packs) -> None:
    x, weight, expert, up, down = _call()
    parameter_up, parameter_down = torch.nn.Parameter(up), torch.nn.Parameter(down)
    calls: list[tuple[Tensor, Tensor]] = [
        *((up, down), (up.detach(), down), (up.view(E, 2 * F, D), down[:]), (up.mT.mT, down)),
        *((parameter_up, parameter_down), (parameter_up.detach(), down)),
        (up.as_strided(up.shape, up.stride()), down),
    ]
    for one_up, one_down in calls:
        gk.expert_mlp(x, weight, expert, one_up, one_down)
        gk.expert_mlp(x[:2], weight[:2], expert[:2], one_up, one_down)
    with torch.inference_mode():
        gk.expert_mlp(x, weight, expert, up, down)
    assert packs.count == 1
    assert gk.packed_bytes() == _bytes()


def test_layouts_have_copies_of_their_own(packs: Packs) -> None:
    x, weight, expert, up, down = _call()
    plain = gk.expert_mlp(x, weight, expert, up, down)
    pairs = gk.expert_mlp(x, weight, expert, up, down, interleaved=True)
    again = gk.expert_mlp(x, weight, expert, up, down)
    assert packs.count == 2
    assert torch.equal(plain, again)
    assert not torch.equal(plain, pairs)
    some = gk.expert_mlp(x, weight, expert.clamp_max(1), up[:2], down[:2])
    want = gk.expert_mlp(x, weight, expert.clamp_max(1), up, down)
    assert packs.count == 3
    assert torch.equal(some, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w[1].zero_(),
        lambda w: w.view(-1)[5:9].fill_(3.0),
        lambda w: w.detach().neg_(),
        lambda w: w.copy_(torch.ones_like(w)),
    ],
    ids=["mul_", "row", "view", "detach", "copy_"],
)
@pytest.mark.parametrize("which", [3, 4], ids=["up", "down"])
def test_a_change_in_place_is_seen(
    packs: Packs, change: Callable[[Tensor], Tensor], which: int
) -> None:
    args = _call(torch.float32)
    before = gk.expert_mlp(*args)
    change(args[which])
    after = gk.expert_mlp(*args)
    assert packs.count == 2
    assert packs.most == 1
    assert not torch.equal(after, before)
    gk.forget_packed()
    assert torch.equal(after, gk.expert_mlp(*args))
    assert gk.packed_bytes() == _bytes(torch.float32)


def test_weights_in_training_are_not_kept(packs: Packs) -> None:
    """They are packed as they are read, with the same bits; a copy from before a step goes."""
    x, weight, expert, up, down = _call(torch.float32)
    weights = [torch.nn.Parameter(up), torch.nn.Parameter(down)]
    for step in range(1, 4):
        with torch.no_grad():
            kept = gk.expert_mlp(x, weight, expert, *weights)
        assert packs.count == step
        out = gk.expert_mlp(x, weight, expert, *weights)
        assert torch.equal(out, kept)
        gradients = torch.autograd.grad(out.square().sum(), weights)
        with torch.no_grad():
            for w, gradient in zip(weights, gradients, strict=True):
                w.sub_(0.01 * gradient)
        gk.expert_mlp(x, weight, expert, *weights)
        assert gk.packed_bytes() == 0
    assert packs.most == 1


def test_copies_go_with_their_weights(packs: Packs) -> None:
    x, weight, expert, up, down = _call()
    up, down = torch.nn.Parameter(up.clone()), torch.nn.Parameter(down.clone())
    with torch.no_grad():
        gk.expert_mlp(x, weight, expert, up, down)
    view = up.detach()[1:]
    assert gk.packed_bytes() == _bytes()
    del up
    gc.collect()
    assert gk.packed_bytes() == _bytes()  # a view still uses the memory
    del view
    gc.collect()
    assert gk.packed_bytes() == 0


def test_copies_made_through_a_view_go_with_the_weights(packs: Packs) -> None:
    x, weight, expert, up, down = _call()
    up, down = up.clone(), down.clone()
    gk.expert_mlp(x, weight, expert, up.detach(), down.view(down.shape))
    gc.collect()
    gk.expert_mlp(x, weight, expert, up, down)
    assert packs.count == 1
    assert gk.packed_bytes() == _bytes()
    del down
    gc.collect()
    assert gk.packed_bytes() == 0


def test_new_weights_in_the_memory_of_old_ones_are_not_taken_for_them(packs: Packs) -> None:
    x, weight, expert, up, down = _call(torch.float32)
    for i in range(20):
        fresh_up, fresh_down = up * i, down + i  # the allocator gives the same memory again
        got = gk.expert_mlp(x, weight, expert, fresh_up, fresh_down)
        assert torch.equal(got, gk.expert_mlp(x, weight, expert, up * i, down + i))
        del fresh_up, fresh_down
    assert gk.packed_bytes() <= _bytes(torch.float32)


def test_weights_cast_by_autocast_leave_nothing_behind(packs: Packs) -> None:
    args = _call(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first = gk.expert_mlp(*args)
        second = gk.expert_mlp(*args)
    assert torch.equal(first, second)
    gc.collect()
    assert gk.packed_bytes() == 0


def test_uncounted_changes_need_forget_packed(packs: Packs) -> None:
    x, weight, expert, up, down = _call(torch.float32)
    with torch.inference_mode():
        up = up.clone()  # an inference tensor: it has no version counter
        before = gk.expert_mlp(x, weight, expert, up, down)
        assert torch.equal(gk.expert_mlp(x, weight, expert, up, down), before)
        assert packs.count == 1
        up.mul_(2)
        gk.forget_packed()
        assert gk.packed_bytes() == 0
        after = gk.expert_mlp(x, weight, expert, up, down)
    assert packs.count == 2
    assert torch.equal(after.clone(), gk.expert_mlp(x, weight, expert, up.clone(), down))
    assert not torch.equal(after.clone(), before.clone())


def test_two_threads_share_one_copy(packs: Packs) -> None:
    args = _call()
    want = gk.expert_mlp(*args)
    for _ in range(20):
        gk.forget_packed()
        packs.count = 0
        together, outputs = threading.Barrier(2), []

        def call(together: threading.Barrier = together, outputs: list[Tensor] = outputs) -> None:
            together.wait()
            outputs.extend(gk.expert_mlp(*args) for _ in range(5))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == 10
        assert all(torch.equal(out, want) for out in outputs)
        assert packs.count == 1


def test_grouped_gemm_keeps_its_weights_too(packs: Packs) -> None:
    (x_ND, w_EFD, offset_E1, _), _ = cases.GroupedGemmCase(20, 3, 6, 8).build()
    first = gk.grouped_gemm(x_ND, w_EFD, offset_E1)
    kept = gk.packed_bytes()
    assert kept == 3 * 32 * 32 * 4
    assert torch.equal(gk.grouped_gemm(x_ND, w_EFD.detach(), offset_E1), first)
    w_EFD.mul_(2)
    torch.testing.assert_close(gk.grouped_gemm(x_ND, w_EFD, offset_E1), 2 * first)
    assert gk.packed_bytes() == kept


# ---- what stands in a packed copy ------------------------------------------------------------


def _weights(
    dtype: torch.dtype, width: int, hidden: int, gated: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Numbers whose bits are all different patterns, NaN among them."""
    random = torch.Generator().manual_seed(width * 1000 + hidden)
    rows = 2 * hidden if gated else hidden
    up = torch.randn(2, rows, width, generator=random).to(dtype)
    down = torch.randn(2, width, hidden, generator=random).to(dtype)
    up[0, 0, 0] = torch.nan
    return (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["", "interleaved"])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_unpack_is_the_inverse(
    dtype: torch.dtype, gated: bool, interleaved: bool, transposed: bool
) -> None:
    for width, hidden in SIZES:
        up, down = _weights(dtype, width, hidden, gated, transposed)
        packed_EB = gk.pack_experts(
            up, down, gated=gated, interleaved=interleaved and gated, transposed=transposed
        )
        got_up, got_down = packing.unpack_experts(
            packed_EB, width=width, hidden=hidden, dtype=dtype, gated=gated
        )
        want_up, want_down = (up.mT, down.mT) if transposed else (up, down)
        if interleaved and gated:
            want_up = torch.cat([want_up[:, 0::2], want_up[:, 1::2]], dim=1)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(got_up.contiguous().view(bits), want_up.contiguous().view(bits))
        assert torch.equal(got_down.contiguous().view(bits), want_down.contiguous().view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_padding_is_zero(dtype: torch.dtype) -> None:
    """Memory that held NaN before: what no weight fills is 0, or NaN rows would leak into sums."""
    width, hidden = 37, 21
    up, down = torch.ones(2, 2 * hidden, width, dtype=dtype), torch.ones(2, width, hidden).to(dtype)
    total = packing.expert_bytes(width=width, hidden=hidden, dtype=dtype)
    out_EB = torch.full((2, total), 0xFF, dtype=torch.uint8)
    packed = gk.pack_experts(up, down, out=out_EB).view(dtype)
    assert int((packed == 1).sum()) == up.numel() + down.numel()
    assert int((packed == 0).sum()) == packed.numel() - up.numel() - down.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_packs_into_rows_of_a_larger_tensor(dtype: torch.dtype) -> None:
    """One expert at a time, with other bytes between the rows."""
    *_, up, down = _call(dtype)
    want_EB = gk.pack_experts(up, down)
    wide = torch.full((E, want_EB.shape[1] + 128), 0xA5, dtype=torch.uint8)
    for e in range(E):
        into = wide[e : e + 1, : want_EB.shape[1]]
        given = gk.pack_experts(up[e : e + 1], down[e : e + 1], out=into)
        assert given.data_ptr() == into.data_ptr()
    assert torch.equal(wide[:, : want_EB.shape[1]], want_EB)
    assert bool((wide[:, want_EB.shape[1] :] == 0xA5).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
def test_cpu_packed_weights_give_the_same_bits(
    case: cases.ExpertMlpCase, dtype: torch.dtype
) -> None:
    (x, weight, expert, up, down, bias_up, bias_down, *_), options = case.build(dtype)
    want = gk.expert_mlp(x, weight, expert, up, down, bias_up, bias_down, **options, backend="cpu")
    transposed = options.pop("transposed", False)
    packed_EB = gk.pack_experts(
        *(up, down),
        gated=ACTIVATIONS[case.activation].gated,
        interleaved=options.get("interleaved", False),
        transposed=transposed,
    )
    total, apart = packed_EB.shape[1], -(-packed_EB.shape[1] // 64) * 64 + 64
    wide = torch.zeros(packed_EB.shape[0], apart, dtype=torch.uint8)
    wide[:, :total] = packed_EB
    for rows in (packed_EB, wide[:, :total]):
        got = gk.expert_mlp_packed(
            *(x, weight, expert, rows, case.F, bias_up, bias_down), **options, backend="cpu"
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.expert_mlp, ids=str)
@pytest.mark.parametrize("backend", backends_of("expert_mlp_packed", "triton", interpreted=8))
def test_packed_layer_is_that_of_the_weights(
    case: cases.ExpertMlpCase, dtype: torch.dtype, backend: str
) -> None:
    (x, weight, expert, up, down, bias_up, bias_down, *_), options = case.build(dtype)
    given = (x, weight, expert, up, down, bias_up, bias_down)
    truth = oracle(*double(given), **options)
    same = gk.expert_mlp(*given, **options, backend="torch")
    layout = {name: options.get(name, False) for name in ("interleaved", "transposed")}
    options.pop("transposed", None)
    packed_EB = gk.pack_experts(up, down, gated=ACTIVATIONS[case.activation].gated, **layout)
    rest = (packed_EB, case.F, bias_up, bias_down)
    got = gk.expert_mlp_packed(x, weight, expert, *rest, **options, backend=backend)
    # Equal parts of a token are rounded alike: their errors add up.
    alike = case.kind == "one-expert"
    assert_chain_close_to_truth(got, same, truth, gradient=alike, rounded_parts=True)


@pytest.mark.parametrize("backend", backends_of("expert_mlp_packed", "triton"))
def test_packed_refusals(backend: str) -> None:
    x, weight, expert, up, down = _call()
    packed_EB = gk.pack_experts(up, down)
    shape = rf"packed_EB must be uint8 of shape \({E}, {packed_EB.shape[1]}\) with rows"
    apart = torch.zeros(E, packed_EB.shape[1] + 1, dtype=torch.uint8)[:, 1:]
    for packed, hidden, message in (
        (packed_EB[:, :-64], F, shape),
        (packed_EB.view(torch.bfloat16), F, shape),
        (apart, F, shape),
        (packed_EB, F + 32, "packed_EB must be uint8 of shape"),
        (packed_EB, -1, "hidden must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.expert_mlp_packed(x, weight, expert, packed, hidden, backend=backend)


@pytest.mark.parametrize(
    ("up", "down", "options", "message"),
    [
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 4),
            {},
            r"pack_experts: w_down_EDF must be torch.float32 of shape \(3, 5, 2\) to fit w_up_EHD "
            r"of shape \(3, 4, 5\) with gated=True, transposed=False, got torch.float32 of shape "
            r"\(3, 5, 4\)",
        ),
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 2).half(),
            {},
            r"w_down_EDF must be torch.float32 of .*, got torch.float16",
        ),
        (torch.zeros(3, 3, 5), torch.zeros(3, 5, 1), {}, r"w_down_EDF must be .*gated=True"),
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 2),
            {"transposed": True},
            r"w_down_EDF must be torch.float32 of shape \(3, 2, 4\) .*transposed=True",
        ),
        (
            torch.zeros(3, 4, 5).double(),
            torch.zeros(3, 5, 2).double(),
            {},
            "pack_experts: w_up_EHD must be float32, bfloat16 or float16, got torch.float64",
        ),
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 2),
            {"out": torch.zeros(3, 64, dtype=torch.uint8)},
            r"pack_experts: out must be uint8 of shape \(3, 12288\), .*, got .* of shape \(3, 64\)",
        ),
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 2),
            {"out": torch.zeros(3, 12288)},
            r"pack_experts: out must be uint8 of shape \(3, 12288\), .*, got torch.float32",
        ),
        (
            torch.zeros(3, 4, 5),
            torch.zeros(3, 5, 2),
            {"out": torch.zeros(3, 12289, dtype=torch.uint8)[:, 1:]},
            r"out must be .*, rows a multiple of 64 bytes apart, got .* strides \(12289, 1\)",
        ),
    ],
)
def test_cpu_pack_refusals(up: Tensor, down: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.pack_experts(up, down, **options)


def test_cpu_packed_refusals() -> None:
    x, weight, expert, up, down = _call()
    packed_EB = gk.pack_experts(up, down)

    def refuses(message: str, packed: Tensor, hidden: int = F) -> None:
        with pytest.raises(ValueError, match=message):
            gk.expert_mlp_packed(x, weight, expert, packed, hidden, backend="cpu")

    shape = rf"packed_EB must be uint8 of shape \({E}, {packed_EB.shape[1]}\)"
    refuses(shape, packed_EB[:, :-64])
    refuses(shape, packed_EB.view(torch.bfloat16))
    refuses(shape, torch.zeros(E, packed_EB.shape[1] + 1, dtype=torch.uint8)[:, 1:])
    refuses("packed_EB must be uint8 of shape", packed_EB, F + 32)
    refuses("hidden must be at least 0, got -1", packed_EB, -1)


# ---- memory of a call ------------------------------------------------------------------------


def test_cpu_scratch_is_reused_and_released() -> None:
    ops = torch.ops.gose_native
    args = _call()
    ops.release_scratch()
    assert ops.scratch_bytes() == 0
    gk.expert_mlp(*args)
    kept = ops.scratch_bytes()
    assert kept > 0
    for _ in range(1000):
        gk.expert_mlp(*args)
    assert ops.scratch_bytes() == kept
    ops.release_scratch()
    assert ops.scratch_bytes() == 0


def test_cpu_scratch_of_many_sizes_is_bounded() -> None:
    """Calls of growing size leave buffers that are outgrown; they do not pile up."""
    ops, (_, _, _, up, down) = torch.ops.gose_native, _call()
    ops.release_scratch()
    largest = 0
    for tokens in range(1, 120):
        expert_TK = torch.zeros(tokens, K, dtype=torch.int32)
        gk.expert_mlp(
            torch.zeros(tokens, D, dtype=up.dtype), torch.zeros(tokens, K), expert_TK, up, down
        )
        largest = max(largest, ops.scratch_bytes())
    few, (x, weight, expert, *_) = ops.scratch_bytes(), _call()
    ops.release_scratch()
    gk.expert_mlp(x.repeat(24, 1), weight.repeat(24, 1), expert.repeat(24, 1), up, down)
    assert few <= 16 * ops.scratch_bytes()
    assert largest <= 16 * ops.scratch_bytes()


def test_cpu_a_forked_child_computes_the_same() -> None:
    """One thread: torch's pool does not survive a fork, whichever op uses it."""
    args = _call()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = gk.expert_mlp(*args)
        child = os.fork()
        if child == 0:
            same = torch.equal(gk.expert_mlp(*args), want)
            gk.forget_packed()
            os._exit(0 if same and torch.equal(gk.expert_mlp(*args), want) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
