"""The closed forms of benchmarks/gpu_model.py against what the PTX machine counts, and the targets
of memory-bound kernels: no byte moved twice, full sectors, no bank conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

import gose_kernels as gk
from benchmarks import gpu_model
from gose_kernels.ops.quantize import quantize_reference
from gose_kernels.ops.route import route_reference
from gose_kernels.triton import WARPS, choose_warps
from tests import cases
from tests.gpu import cuda_host, triton_host
from tests.gpu.ops import OPS, same_bits
from tests.gpu.params import Options, split
from tests.ptx.faults import Counts
from tests.route_oracle import gradients


def _combine(T: int, K: int, D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return cases.CombineCase("model", T=T, K=K, D=D).build(dtype)


def _with_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return torch.ones(args[1].shape[0], args[0].shape[1], dtype=args[0].dtype), *args


def _of_weights_and_losses(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of route_backward, all experts live."""
    args = (*args, *[None] * 4)
    out = route_reference(*args)
    weight, _, _, loss = gradients(args, out, torch.float32)
    return (*args, out[1], out[3], out[4], weight, None, None, loss)


# Shapes scaled down from gpu_model.SHAPES: whole tiles, every slot used.
SCALED: dict[str, dict[str, Any]] = {
    "combine": {
        f"{T}x{K}x{D}-{dtype}": lambda T=T, K=K, D=D, dtype=dtype: _combine(T, K, D, dtype)
        for T, K, D in ((8, 8, 2048), (16, 2, 1024), (16, 2, 64))
        for dtype in (torch.float32, torch.bfloat16)
    },
}
SCALED["combine_backward"] = {
    label: lambda build=build: _with_grad(build()) for label, build in SCALED["combine"].items()
}
SCALED["entropy"] = {
    f"{rows}x{C}-{dtype}": lambda rows=rows, C=C, dtype=dtype: (
        torch.randn(rows, C, generator=torch.Generator().manual_seed(0)).to(dtype),
    )
    for rows, C in ((64, 1024), (256, 64))
    for dtype in (torch.float32, torch.bfloat16)
}
SCALED["entropy_backward"] = {
    label: lambda build=build: (torch.ones(build()[0].shape[0]), *build())
    for label, build in SCALED["entropy"].items()
}


def _quantized(op: str, name: str, rounding: str, residual: bool, dtype: torch.dtype) -> Any:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    if op == "quantize":
        options = Options(format=name, rounding=rounding, seed=1, step=1)
        return x.to(dtype), 0.01 * x if residual else None, None, options
    code, scale, _ = quantize_reference(x, format=name)
    if op == "dequantize":
        return code, scale, 4096, None, Options(format=name)
    return x, code, scale, None, Options(format=name, weight=0.5)


SCALED["quantize"] = {
    f"{name}-{rounding}-{residual}-{dtype}": partial(
        _quantized, "quantize", name, rounding, residual, dtype
    )
    for name in gk.FORMATS
    for rounding in ("nearest", "stochastic")
    for residual in (True, False)
    for dtype in (torch.float32, torch.bfloat16)
}
for _op in ("dequantize", "dequantize_add_"):
    SCALED[_op] = {
        name: partial(_quantized, _op, name, "nearest", False, torch.float32) for name in gk.FORMATS
    }

MASKED_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "masked_sgd_": (
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9},
        {},
    ),
    "masked_adam_": ({"weight_decay": 0.1}, {"amsgrad": True}),
    "masked_lion_": ({"weight_decay": 0.1}, {}),
}


def _masked(
    op: str, options: dict[str, Any], dtype: torch.dtype, mask: tuple[int, ...] | None
) -> tuple[Any, ...]:
    """Two tensors, nothing frozen."""
    count = 3 if options.get("amsgrad") else 2 if op == "masked_adam_" else 1
    count *= op != "masked_sgd_" or "momentum" in options
    param, grad = ([torch.ones(32, 256, dtype=dtype) for _ in range(2)] for _ in range(2))
    state = [torch.ones(32, 256) for _ in range(2 * count)]
    step = [torch.ones(()) for _ in param] if op == "masked_adam_" else []
    frozen = [] if mask is None else [torch.zeros(mask, dtype=torch.bool) for _ in param]
    return param, grad, state, step, [], frozen, [], torch.tensor(0.1), None, Options(options)


for _op, _choices in MASKED_OPTIONS.items():
    SCALED[_op] = {
        f"{mask}-{i}-{dtype}": partial(_masked, _op, options, dtype, mask)
        for mask in ((32, 1), (32, 256), None)
        for i, options in enumerate(_choices)
        for dtype in (torch.float32, torch.bfloat16)
    }


def _squares(dtype: torch.dtype, mask: tuple[int, ...] | None) -> tuple[Any, ...]:
    """Two tensors, nothing frozen."""
    grad = [torch.ones(32, 256, dtype=dtype) for _ in range(2)]
    frozen = [] if mask is None else [torch.zeros(mask, dtype=torch.bool) for _ in grad]
    return grad, frozen, Options()


SCALED["masked_square_sum"] = {
    f"{mask}-{dtype}": partial(_squares, dtype, mask)
    for mask in ((32, 1), (32, 256), None)
    for dtype in (torch.float32, torch.bfloat16)
}
SCALED["dispatch"] = {"256x8-E16": lambda: cases.DispatchCase(256, 8, 16).build()}
SCALED["distill_loss"] = {
    f"{B}x{C}-{dtype}": lambda B=B, C=C, dtype=dtype: (
        *cases.DistillCase(B, C).build(dtype)[0][:2],
        torch.arange(B),
    )
    for B, C in ((8, 2048), (64, 64))
    for dtype in (torch.float32, torch.bfloat16)
}
SCALED["distill_loss_train"] = SCALED["distill_loss"]
SCALED["route"] = {
    f"{T}x{E}top{K}-{dtype}": lambda T=T, E=E, K=K, dtype=dtype: cases.RouteCase(T, E, K).build(
        dtype
    )[0][:2]
    for T, E, K in ((128, 64, 8), (64, 256, 4))
    for dtype in (torch.float32, torch.bfloat16)
}
SCALED["route_backward"] = {
    label: lambda build=build: _of_weights_and_losses(build())
    for label, build in SCALED["route"].items()
}
CASES = [(op, label) for op, table in SCALED.items() for label in table]
# Beside rows of 64 columns the sectors that hold a row's weights, indices, label and term count.
NARROW = {
    (op, label)
    for op, label in CASES
    if op.startswith(("combine", "distill_loss")) and "x64-" in label
}


def _count(
    op: str, backend: str, args: tuple[Any, ...], ptx: Mapping[str, cuda_host.Compiled]
) -> Counts:
    if backend == "triton":
        return triton_host.run_on_ptx(OPS[op].triton(op), *args)[1]
    on_ptx = cuda_host.OnPtx(ptx[OPS[op].source])
    OPS[op].cuda(on_ptx, *args)
    return on_ptx.counts


@pytest.mark.matrix(keep=50)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("op", "label"), CASES)
def test_closed_forms_are_what_is_counted(
    op: str, label: str, backend: str, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    args = SCALED[op][label]()
    given, options = split(args)
    counts, work = _count(op, backend, args, ptx), gpu_model.work(op, backend, *given, **options)
    scratch = gpu_model.scratch_bytes(op, backend, *given)
    if op in MASKED_OPTIONS and backend == "triton":
        scratch *= len(args[0])  # a launch a tensor
    assert work.bytes <= counts.bytes <= work.bytes + scratch
    assert counts.launches == work.launches
    if op in gpu_model.AT_LEAST:
        assert counts.flops >= work.flops
    else:
        assert counts.flops == work.flops
    assert counts.mma == 0


@pytest.mark.parametrize("op", SCALED)
def test_profilers_are_told_the_closed_forms(op: str) -> None:
    """Every Triton kernel declares its launches: bytes as the model's, scratch and numbers aside;
    operations no fewer than the op declares without divisions and roots."""
    args = next(iter(SCALED[op].values()))()
    given, options = split(args)
    launched: list[triton_host.Launched] = []
    with triton_host.launches_go_to("sm_80", launched.append):
        OPS[op].triton(op)(*args)
    work = gpu_model.work(op, "triton", *given, **options)
    scratch = gpu_model.scratch_bytes(op, "triton", *given)
    scratch *= len(launched)
    moved = sum(one.declared["bytes"] for one in launched)
    assert work.bytes <= moved <= work.bytes + scratch
    declared = sum(one.declared.get(f"flops{bits}", 0) for one in launched for bits in (32, 64))
    assert declared <= work.flops
    assert 2 * declared >= gk.OPS[op].cost_of(*given, **options).flops
    for one in launched:
        assert one.declared["name"] == one.compiled.metadata.name


@pytest.mark.matrix(keep=30)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("op", "label"), [c for c in CASES if c not in NARROW])
def test_targets(op: str, label: str, backend: str, ptx: Mapping[str, cuda_host.Compiled]) -> None:
    """What blocks fetch is at most 1.1 times the minimum, nine tenths of every fetched sector is
    used."""
    args = SCALED[op][label]()
    counts = _count(op, backend, args, ptx)
    given, options = split(args)
    work = gpu_model.work(op, backend, *given, **options)
    if 100 * gpu_model.scratch_bytes(op, backend, *given) <= work.bytes:
        assert 32 * counts.block_sectors <= 1.10 * work.bytes
        assert counts.sector_efficiency >= 0.9
    # A gather by expert id meets banks by chance: one phase more for each.
    gathers = 2 * args[0].shape[0] if (op, backend) == ("route_backward", "cuda") else 0
    assert counts.bank_conflicts <= gathers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_scratch_is_small_where_it_counts(backend: str, dtype: torch.dtype) -> None:
    """Sums of programs are under a tenth of all bytes, a twentieth at very many tokens; what all
    tokens share in a backward pass is next to nothing."""
    for T, share in ((4096, 0.10), (65536, 0.05)):
        for E in (64, 128):
            score = torch.empty(T, E, dtype=dtype, device="meta")
            scratch = gpu_model.scratch_bytes("route", backend, score, 2)
            assert scratch <= share * gpu_model.work("route", backend, score, 2).bytes
            assert gpu_model.scratch_bytes("route_backward", backend, score) <= 16 * (E + 1)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", MASKED_OPTIONS)
def test_frozen_units_are_not_loaded(
    op: str, backend: str, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    """Of rows, half of them frozen: half the bytes, and the mask. Of elements in whole frozen
    programs: the mask alone."""
    args = _masked(op, {}, torch.float32, (32, 1))
    mask_bytes, scratch = 2 * 32, 2 * gpu_model.scratch_bytes(op, backend, *args[:-1])
    whole = gpu_model.work(op, backend, *args[:-1]).bytes - mask_bytes
    for mask in args[5]:
        mask[::2] = True
    counts = _count(op, backend, args, ptx)
    assert whole / 2 <= counts.bytes - mask_bytes <= whole / 2 + 8 + scratch
    args = _masked(op, {}, torch.float32, (32, 256))
    for mask in args[5]:
        mask.fill_(True)
    counts = _count(op, backend, args, ptx)
    assert 2 * 32 * 256 <= counts.bytes <= 2 * 32 * 256 + 16 + scratch


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_units_are_not_summed(
    dtype: torch.dtype, backend: str, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    """Half of the rows, or of vectors of elements: half the bytes, and the mask."""
    op = "masked_square_sum"
    for mask in ((32, 1), (32, 256)):
        args = _squares(dtype, mask)
        scratch = gpu_model.scratch_bytes(op, backend, *args[:-1])
        for frozen in args[1]:
            frozen.view(-1, 8)[::2] = True
        half = 2 * 32 * 256 * dtype.itemsize // 2
        least = half + sum(m.numel() for m in args[1]) + 8 * len(args[0])
        assert least <= _count(op, backend, args, ptx).bytes <= least + scratch


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize(
    ("kernels", "op"),
    [
        ("combine", "combine"),
        ("dispatch", "dispatch"),
        ("masked_update", "masked_adam_"),
        ("quantize", "quantize"),
        ("quantize", "dequantize_add_"),
    ],
)
def test_tuned_choices_change_no_bits(kernels: str, op: str, warps: int) -> None:
    args = next(iter(SCALED[op].values()))()
    launched: list[int] = []

    class Noting(triton_host.OnPtx):
        def __call__(self, one: triton_host.Launched) -> None:
            launched.append(one.compiled.metadata.num_warps)
            super().__call__(one)

    plain, _ = triton_host.run_on_ptx(OPS[op].triton(op), *args, count=False)
    choose_warps({kernels: warps})
    try:
        with triton_host.launches_go_to("sm_80", Noting(count=False), assembled=False):
            tuned = OPS[op].triton(op)(*args)
    finally:
        choose_warps({kernels: 4})
    assert warps in launched
    assert same_bits(plain, tuned)


def test_every_gpu_kernel_has_a_model() -> None:
    assert set(OPS) == set(gpu_model.ARGUMENTS) == set(SCALED)


def test_prediction_by_hand() -> None:
    """combine of Qwen3 at 4096 tokens, bfloat16: 36864 rows of 4096 bytes, 32768 slots of 8."""
    done = gpu_model.work(
        "combine", "cuda", *gpu_model.ARGUMENTS["combine"](gpu_model.SHAPES["qwen3 T=4096"])
    )
    assert (done.bytes, done.flops) == (36864 * 4096 + 32768 * 8, 2 * 32768 * 2048)
    seconds, bound = gpu_model.predicted_seconds(done, gpu_model.DEVICES["H100"])
    assert bound == "memory"
    assert seconds == pytest.approx(2.5e-6 + 151257088 / (0.85 * 3.35e12))
    tiny = gpu_model.Work(bytes=100, flops=0, launches=3)
    assert gpu_model.predicted_seconds(tiny, gpu_model.DEVICES["A100"])[1] == "launch"
    heavy = gpu_model.Work(bytes=100, flops=10**12, launches=1)
    assert gpu_model.predicted_seconds(heavy, gpu_model.DEVICES["A100"])[1] == "compute"


def test_table_says_that_it_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_model.main([]) == 0
    assert "predicted, not measured" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("T", "E"), [(2051, 64), (4099, 64), (4099, 61), (4099, 128)])
def test_route_of_many_tokens(
    T: int, E: int, backend: str, dtype: torch.dtype, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    """Larger groups of tokens, the same answer; from 4096 tokens on their sums add less than a
    tenth of the bytes."""
    args = cases.RouteCase(T, E, 2).build(dtype)[0][:2]
    if backend == "triton":
        out, counts = triton_host.run_on_ptx(OPS["route"].triton("route"), *args)
    else:
        on_ptx = cuda_host.OnPtx(ptx["route"])
        out = OPS["route"].cuda(on_ptx, *args)
        counts = on_ptx.counts
    OPS["route"].check(out, args)
    least = gpu_model.work("route", backend, *args).bytes
    assert counts.bytes <= least + gpu_model.scratch_bytes("route", backend, *args)
    if T >= 4096:
        assert counts.bytes <= 1.10 * least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradient_of_losses_reads_scores_once(
    backend: str, dtype: torch.dtype, ptx: Mapping[str, cuda_host.Compiled]
) -> None:
    """All experts have importance: what blocks fetch is at most 1.1 times the minimum. An expert
    without any costs at most a sector a token more."""
    score, K = cases.RouteCase(320, 64, 8).build(dtype)[0][:2]
    args = _of_weights_and_losses((score, K))
    least = gpu_model.work("route_backward", backend, *args).bytes
    plain = _count("route_backward", backend, args, ptx)
    assert 32 * plain.block_sectors <= 1.10 * least
    score[:, 5] = -torch.inf
    masked = _count("route_backward", backend, _of_weights_and_losses((score, K)), ptx)
    assert 0 < 32 * (masked.block_sectors - plain.block_sectors) <= 1.1 * 32 * score.shape[0]
