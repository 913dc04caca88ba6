"""What the compiled expert layers promise beyond their formula: a token's bits depend on no other
token, no thread count, no stride and no road through torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gose_kernels as gk
from tests import cases
from tests.checks import backends_of
from tests.expert_mlp_oracle import double, forward_error_bound

pytestmark = pytest.mark.skipif(
    gk.native.why_not() is not None, reason=f"expert_mlp on cpu: {gk.native.why_not()}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Sizes beside those that a kernel likes; E = 2 experts have 12, 48 and more rows each.
SHAPES = [
    cases.ExpertMlpCase(T=13, K=2, E=5, bias=True, kind="unused"),
    cases.ExpertMlpCase("gelu", T=130, K=3, E=4, D=33, F=65),
    cases.ExpertMlpCase(T=300, K=2, E=2, D=96, F=40, options={"interleaved": True}),
]
slow = pytest.mark.matrix(keep=4)


def _outputs(case: cases.ExpertMlpCase, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer on the tokens of an index tensor."""
    (x, weight, expert, *weights), options = case.build(dtype)

    def outputs(token: Tensor) -> Tensor:
        out: Tensor = gk.expert_mlp(
            x[token], weight[token], expert[token], *weights, **options, backend="cpu"
        )
        return out

    return outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_cpu_permuting_tokens_permutes_bits(case: cases.ExpertMlpCase, dtype: torch.dtype) -> None:
    layer = _outputs(case, dtype)
    want_TD = layer(torch.arange(case.T))
    for seed in range(3):
        order_T = torch.randperm(case.T, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(layer(order_T), want_TD[order_T])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_cpu_splitting_a_batch_changes_no_bit(
    case: cases.ExpertMlpCase, dtype: torch.dtype
) -> None:
    layer = _outputs(case, dtype)
    want_TD = layer(torch.arange(case.T))

    @given(st.lists(st.integers(0, case.T), max_size=4))
    def splits(cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), case.T]
        pieces = [layer(torch.arange(a, b)) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat(pieces), want_TD)

    splits()
    one_by_one = [layer(torch.tensor([t])) for t in range(min(case.T, 20))]
    assert torch.equal(torch.cat(one_by_one), want_TD[: len(one_by_one)])
    tripled = layer(torch.arange(case.T).repeat(3))
    assert torch.equal(tripled, want_TD.repeat(3, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_columns_made_in_passes_have_the_bits_of_one_pass(dtype: torch.dtype) -> None:
    """8000 slots of 1100 columns are more than the 32 MB that are kept; those of a part are not."""
    case = cases.ExpertMlpCase(T=2000, K=4, E=4, D=1100, F=9, kind="unused", bias=True)
    (x_TD, weight_TK, expert_TK, *weights), options = case.build(dtype)
    grad_TD = torch.randn(case.T, case.D, generator=torch.Generator().manual_seed(2)).to(dtype)

    def step(tokens: slice) -> tuple[Tensor, ...]:
        leaf_TD = x_TD[tokens].clone().requires_grad_()
        parts = (leaf_TD, weight_TK[tokens], expert_TK[tokens])
        out_TD = gk.expert_mlp(*parts, *weights, **options, backend="cpu")
        (of_x_TD,) = torch.autograd.grad(out_TD, leaf_TD, grad_TD[tokens])
        with torch.no_grad():
            assert torch.equal(gk.expert_mlp(*parts, *weights, **options, backend="cpu"), out_TD)
        return out_TD.detach(), of_x_TD

    pieces = [step(slice(t, t + 500)) for t in range(0, 2000, 500)]
    for whole, parts in zip(step(slice(0, 2000)), zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_cpu_splitting_a_grouped_gemm_changes_no_bit() -> None:
    for dtype in DTYPES:
        (x_ND, w_EFD, _, bias_EF), _ = cases.GroupedGemmCase(130, 1, 37, 70, bias=True).build(dtype)

        def product(
            first: int, end: int, x: Tensor = x_ND, w: Tensor = w_EFD, bias: Any = bias_EF
        ) -> Tensor:
            offset_E1 = torch.tensor([0, end - first], dtype=torch.int32)
            y: Tensor = gk.grouped_gemm(x[first:end], w, offset_E1, bias, backend="cpu")
            return y

        want_NF = product(0, 130)
        for step in (1, 7, 12, 48, 129):
            pieces = [product(a, min(a + step, 130)) for a in range(0, 130, step)]
            assert torch.equal(torch.cat(pieces), want_NF), (dtype, step)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_thread_counts_give_equal_bits(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """One expert with nearly all tokens and one with few: pieces of uneven work."""
    case = cases.ExpertMlpCase(T=500, K=2, E=7, D=100, F=70, kind="empty-experts", bias=True)
    layer = _outputs(case, dtype)
    (x_ND, w_EFD, offset_E1, bias_EF), _ = cases.GroupedGemmCase(
        200, 5, 70, 33, "empty-experts", bias=True
    ).build(dtype)
    args, _ = cases.MoeCase(T=200, E=7, D=100, F=70, bias=True).build(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        gk.forget_packed()
        product = gk.grouped_gemm(x_ND, w_EFD, offset_E1, bias_EF, backend="cpu")
        results.append([layer(torch.arange(500)), product, *gk.moe(*args)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _spread(values: Tensor, strides: tuple[int, ...], path: Path) -> Tensor:
    """The values, strides elements apart, in a sparse file: memory is used where they lie."""
    size = sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 1
    storage = torch.UntypedStorage.from_file(str(path), True, size * values.element_size())
    wide = torch.empty(0, dtype=values.dtype).set_(storage, 0, values.shape, strides)
    return wide.copy_(values)


FAR = 2**31 + 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["x rows", "experts", "columns", "steps", "packed"])
def test_cpu_strides_beyond_32_bits(which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = cases.ExpertMlpCase(T=3, K=2, E=3, D=5, F=2)
    (x, weight, expert, up, down, *_), _ = case.build(dtype)
    want = gk.expert_mlp(x, weight, expert, up, down, backend="cpu")
    path = tmp_path / "sparse"
    if which == "packed":
        packed_EB = gk.pack_experts(up, down)
        far_EB = _spread(packed_EB, (FAR, 1), path)
        got = gk.expert_mlp_packed(x, weight, expert, far_EB, case.F, backend="cpu")
    else:
        if which == "x rows":
            x = _spread(x, (FAR, 1), path)
        elif which == "experts":
            up = _spread(up, (FAR, 5, 1), path)
        elif which == "columns":
            up = _spread(up, (8, FAR, 1), path)
        else:
            down = _spread(down, (2, 8, FAR), path)
        got = gk.expert_mlp(x, weight, expert, up, down, backend="cpu")
    assert torch.equal(got, want)


def test_cpu_grouped_gemm_strides_beyond_32_bits(tmp_path: Path) -> None:
    (x_ND, w_EFD, offset_E1, bias_EF), _ = cases.GroupedGemmCase(5, 2, 3, 4, bias=True).build()
    assert bias_EF is not None
    want = gk.grouped_gemm(x_ND, w_EFD, offset_E1, bias_EF, backend="cpu")
    far_ND = _spread(x_ND, (FAR, 1), tmp_path / "x")
    far_EFD = _spread(w_EFD, (FAR, 4, 1), tmp_path / "w")
    far_EF = _spread(bias_EF, (FAR, 1), tmp_path / "bias")
    assert torch.equal(gk.grouped_gemm(far_ND, far_EFD, offset_E1, far_EF, backend="cpu"), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_strides_change_no_bit(dtype: torch.dtype) -> None:
    """Every argument with gaps, turned, or expanded, against contiguous copies of the numbers."""
    (x, weight, expert, up, down, bias_up, bias_down, *_), _ = cases.ExpertMlpCase(
        T=20, K=2, D=37, F=21, bias=True
    ).build(dtype)

    def gaps(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 3).to(t.dtype)
        return wide[..., 1 : 1 + 2 * t.shape[-1] : 2].copy_(t)

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    args = (x, weight, expert, up, down, bias_up, bias_down)
    want = gk.expert_mlp(*args, backend="cpu")
    for form in (gaps, turned):
        assert torch.equal(gk.expert_mlp(*map(form, args), backend="cpu"), want)
    one = (x[:1], weight[:1], expert[:1], up[:1], down[:1], bias_up[:1], bias_down[:1])
    one = (*one[:2], torch.zeros_like(one[2]), *one[3:])
    expanded = [t.expand(6, *t.shape[1:]) for t in one]
    assert torch.equal(
        gk.expert_mlp(*expanded, backend="cpu"),
        gk.expert_mlp(*[t.contiguous() for t in expanded], backend="cpu"),
    )


@slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("F", [1, 16, 31, 64, 100])
@pytest.mark.parametrize("D", [1, 32, 63, 130, 256])
@pytest.mark.parametrize("T", [1, 5, 49, 200])
def test_cpu_sizes(T: int, D: int, F: int, gated: bool, dtype: torch.dtype) -> None:
    """All tokens to one of two experts, around the edges of rows, panels and steps."""
    case = cases.ExpertMlpCase("swiglu" if gated else "gelu", T, 1, 2, D, F, bias=True)
    args, options = case.build(dtype)
    got = gk.expert_mlp(*args, **options, backend="cpu")
    truth = gk.expert_mlp(*double(args), **options, backend="torch")
    error = (got.double() - truth).abs()
    assert (error <= forward_error_bound(double(args), options, dtype)).all()


# ---- roads through torch ---------------------------------------------------------------------


def _mlp(*args: Tensor) -> Tensor:
    out: Tensor = gk.expert_mlp(*args, backend="cpu")
    return out


def _product(*args: Tensor) -> Tensor:
    out: Tensor = gk.grouped_gemm(*args, backend="cpu")
    return out


def _moe(*args: Any) -> Tensor:
    out: Tensor = gk.moe(*args)[0]
    return out


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Any, ...]]]] = {
    "expert_mlp": (_mlp, lambda: cases.ExpertMlpCase(bias=True).build()[0][:7]),
    "grouped_gemm": (_product, lambda: cases.GroupedGemmCase(20, 3, 6, 8).build()[0][:3]),
    "moe": (_moe, lambda: cases.MoeCase(bias=True).build()[0]),
}


@pytest.mark.parametrize("name", CALLS)
def test_modes_without_gradients_give_the_same_bits(name: str) -> None:
    call, build = CALLS[name]
    args = build()
    want = call(*args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = call(*args)
        assert torch.equal(got.clone(), want)
        assert not got.requires_grad
    assert got.is_inference()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_gives_the_same_bits(name: str, compiler: str) -> None:
    call, build = CALLS[name]
    args = build()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    with torch.no_grad():
        want = call(*args)
        assert torch.equal(compiled(*args), want)
        assert torch.equal(compiled(*args), want)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_is_a_call_on_cast_tensors(name: str) -> None:
    call, build = CALLS[name]
    args = build()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = call(*args)
    assert got.dtype == torch.bfloat16
    if name == "expert_mlp":
        x, weight, expert, *rest = args
        assert torch.equal(got, call(x.bfloat16(), weight, expert, *[t.bfloat16() for t in rest]))
    elif name == "grouped_gemm":
        assert torch.equal(got, call(args[0].bfloat16(), args[1].bfloat16(), args[2]))


@pytest.mark.parametrize("backend", backends_of("moe"))
def test_one_expert_of_one_is_dense(backend: str) -> None:
    (x, up, down, _, router, *_), _ = cases.MoeCase(T=9, E=1, top_k=1).build(torch.float64)
    gate, value = (x @ up[0].mT).chunk(2, dim=1)
    dense = (torch.nn.functional.silu(gate) * value) @ down[0].mT
    if backend == "torch":
        torch.testing.assert_close(gk.moe(x, up, down, 1, router, backend=backend)[0], dense)
    single = [t.float() for t in (x, up, down, router)]
    got = gk.moe(*single[:3], 1, single[3], backend=backend)[0]
    torch.testing.assert_close(got, dense.float(), rtol=1e-5, atol=1e-5)
