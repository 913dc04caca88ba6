"""Kernels with one planted mistake each, compiled: some case of the ladder must notice. A mutant
that does not compile proves nothing and fails."""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gpu import cuda_host, triton_host
from tests.gpu.ops import OPS
from tests.gpu.params import ROOT
from tests.ptx.faults import KernelError


class Mutant(NamedTuple):
    """`old` stands in csrc/cuda/<source>.cu, or in a header beside it, `count` times and becomes
    `new`, all of them."""

    what: str
    ops: tuple[str, ...]
    old: str
    new: str
    rung: str = "ptx"  # or "emulated", which knows orders of warps
    count: int = 1
    header: str = ""  # of csrc/cuda

    def __str__(self) -> str:
        return f"{self.ops[0]}-{self.what}"


_COMBINE, _BACK = ("combine",), ("combine_backward",)
_TOKEN, _MASKS = "route_token.cuh", "masks.cuh"
_ROUTE_BACK = ("route_backward",)
_ROUTE, _DISTILL = ("route",), ("distill_loss_train", "distill_loss")
_QUANTIZE, _DECODE = ("quantize",), ("dequantize", "dequantize_add_")
_MASKED = ("masked_adam_", "masked_lion_", "masked_sgd_")
_SQUARES = ("masked_square_sum",)
_ENTROPY, _DISPATCH = ("entropy", "entropy_backward"), ("dispatch",)
MUTANTS = [
    Mutant("bound", _COMBINE, "d >= p.D) return", "d > p.D) return"),
    Mutant("stride swapped", _COMBINE, "y + n * p.stride_yn);", "y + n * p.D);"),
    Mutant("mask dropped", _COMBINE, "if (n < 0) continue;", ""),
    Mutant("dtype truncated", _COMBINE, "const int64_t n = row[k];", "const int8_t n = row[k];"),
    Mutant("bound", _BACK, "if (slot >= p.T * p.K) return;", "if (slot > p.T * p.K) return;"),
    Mutant("stride swapped", _BACK, "slot / p.K * p.stride_gt", "slot / p.K * p.K"),
    Mutant("mask dropped", _BACK, "if (n < 0) {", "if (n < -1) {"),
    Mutant("dtype truncated", _BACK, "sum += g * to_float", "sum += int(g) * to_float"),
    Mutant("bound", _ENTROPY, "min(row, p.rows - 1)", "row", count=2),
    Mutant("stride swapped", _ENTROPY, "inside * p.C;", "inside * blockDim.x;", count=2),
    Mutant("mask dropped", _ENTROPY, "if (x == -INFINITY) return;", ""),
    Mutant("dtype truncated", _ENTROPY, "const float z = x - m.top;", "const int z = x - m.top;"),
    Mutant("shuffle short", _ENTROPY, "apart = width / 2", "apart = width / 4"),
    Mutant("bound", _QUANTIZE, "kWide && l + kQuad <= L)", "kWide && l <= L)"),
    Mutant("half swapped", _QUANTIZE, "odd ? kHalf / 8 : 0", "odd ? 0 : kHalf / 8"),
    Mutant("shuffle short", _QUANTIZE, "apart = kGroup / 2", "apart = kGroup / 4"),
    Mutant("tie upwards", _QUANTIZE, "rintf(ratio)", "floorf(ratio + 0.5f)"),
    Mutant(
        "fused",
        _QUANTIZE,
        "__fsub_rn(y[half][i], __fmul_rn(code, scale[half]))",
        "fmaf(-code, scale[half], y[half][i])",
    ),
    Mutant("scale low", _QUANTIZE, "__float_as_uint(scale) + low", "__float_as_uint(scale)"),
    Mutant("mask dropped", _QUANTIZE, "if (l + i >= e.p.L) break;", ""),
    Mutant("dtype truncated", _QUANTIZE, "uint64_t(known = at >> 3)", "uint8_t(known = at >> 3)"),
    Mutant("bound", _DECODE, "whole = kWide && l + kQuad <= p.L", "whole = kWide"),
    Mutant("mask dropped", _DECODE, "if (at < 0) continue;", ""),
    Mutant("stride swapped", _DECODE, "block = l / kBlock", "block = l / kThreads"),
    Mutant("dtype truncated", _DECODE, "kBits == 8 ? int8_t(byte)", "kBits == 8 ? uint8_t(byte)"),
    Mutant(
        "fused",
        _DECODE,
        "__fadd_rn(old.lane[i], value.lane[i])",
        "fmaf(value.lane[i] / p.weight, p.weight, old.lane[i])",
    ),
    Mutant("bound", _MASKED, "if (e.wide && left == kQuad) {", "if (e.wide) {"),
    Mutant("mask dropped", _MASKED, "if (!(live >> j & 1)) continue;", ""),
    Mutant("unit taken as live", _MASKED, "if (is_frozen(t, unit)) continue;", "", count=2),
    Mutant(
        "stride swapped", _MASKED, "s += (t.row[unit] - unit) * t.inner", "s += t.row[unit] - unit"
    ),
    Mutant("bit off by one", _MASKED, ">> (i & 7)) & k", ">> (i & 3)) & k", header=_MASKS),
    Mutant("threshold", _MASKED, "own >= t.threshold", "own > t.threshold", header=_MASKS),
    Mutant("count of frozen", _MASKED, "if (!t.step_by_mask || !is_frozen(t, j)) t.step", "t.step"),
    Mutant("dtype truncated", _MASKED, "uint64_t(draw_at >> 3)", "uint8_t(draw_at >> 3)"),
    Mutant("draws swapped", _MASKED, "draw_at & 4 ? block.word[2]", "draw_at & 4 ? block.word[1]"),
    Mutant("sign lost", _MASKED, "s.maximize ? -scale : scale", "scale"),
    Mutant("bound", _SQUARES, "i < end; i += kThreads", "i <= end; i += kThreads"),
    Mutant("bound of vectors", _SQUARES, "i + kLanes <= end ?", "i < end ?"),
    Mutant("stride swapped", _SQUARES, "at + v * kStep;", "at + v * kLanes;"),
    Mutant("unit swapped", _SQUARES, "quotient(i, e.inner);", "i % e.inner;"),
    Mutant("mask dropped", _SQUARES, "if (live[v] >> j & 1) add", "add"),
    Mutant(
        "unit taken as live", _SQUARES, "if (mask_freezes(e, quotient(i, e.inner))) continue;", ""
    ),
    Mutant("dtype truncated", _SQUARES, "const double wide = double(", "const float wide = float("),
    Mutant("bit off by one", _SQUARES, ">> (i & 7)) & k", ">> (i & 3)) & k", header=_MASKS),
    Mutant("threshold", _SQUARES, "own >= t.threshold", "own > t.threshold", header=_MASKS),
    Mutant(
        "shuffle short", _SQUARES, "apart = kWarp / 2", "apart = kWarp / 4", header="common.cuh"
    ),
    Mutant("warp left out", _SQUARES, "int w = 1; w < kThreads", "int w = 2; w < kThreads"),
    Mutant("chunk of another", _SQUARES, "end_chunk > chunk", "end_chunk >= chunk"),
    Mutant("later launch", _SQUARES, "b.first_chunk = end;", ""),
    Mutant("chunks left out", _SQUARES, "c < b.entry[n].end_chunk; c +=", "false; c +="),
    Mutant("barrier removed", _SQUARES, "__syncthreads();", ""),
    Mutant("barrier removed", _SQUARES, "__syncthreads();", "", rung="emulated"),
    Mutant("bound", _DISPATCH, "const int e = n < N ?", "const int e = n <= N ?", count=2),
    Mutant("rank off by one", _DISPATCH, "(1u << threadIdx.x) - 1", "(2u << threadIdx.x) - 1"),
    Mutant("mask dropped", _DISPATCH, "if (n < N && n >= used)", "if (n < N)"),
    Mutant("dtype truncated", _DISPATCH, "const int32_t used", "const int8_t used"),
    Mutant("barrier removed", _DISPATCH, "__syncthreads();", "", rung="emulated"),
    Mutant(
        "warp barrier removed",
        _DISPATCH,
        "token[n] = -1;\n    __syncwarp();",
        "token[n] = -1;",
        rung="emulated",
    ),
    Mutant("bound", _DISTILL, "c < p.C && grad != nullptr", "c <= p.C && grad != nullptr"),
    Mutant("stride swapped", _DISTILL, "n * p.stride_tb + c", "n * p.J + c + 1"),
    Mutant("mask dropped", _DISTILL, "if (y[i] != 0.0f) sum_yz", "sum_yz"),
    Mutant(
        "dtype truncated", _DISTILL, "const double sum_q = tempered", "const int sum_q = tempered"
    ),
    Mutant("listed among the rest", _DISTILL, "if (seen[c + i] == 0) total_rest", "total_rest"),
    Mutant(
        "barrier removed",
        _DISTILL,
        "part[threadIdx.x / kWarp] = x;\n    __syncthreads();",
        "part[threadIdx.x / kWarp] = x;",
        rung="emulated",
    ),
    Mutant("bound", _ROUTE, "int k = 0; k < p.K;", "int k = 0; k <= p.K;", header=_TOKEN),
    Mutant(
        "stride swapped", _ROUTE, "p.level[e * in.T + token.t] = ", "p.level[e + token.t * in.E] = "
    ),
    Mutant("mask dropped", _ROUTE, "if (!is_taken(score[e / size]))", "if (false)", header=_TOKEN),
    Mutant("dtype truncated", _ROUTE, "importance[at] += double(", "importance[at] += int("),
    Mutant(
        "tie to the larger", _ROUTE, "rank == nth && place < room", "rank == nth && place <= room"
    ),
    Mutant(
        "barrier removed",
        _ROUTE,
        "continue;  // the same for the whole block\n    __syncthreads();",
        "continue;",
        rung="emulated",
    ),
    Mutant("bound", _ROUTE_BACK, "k < p.in.K;", "k <= p.in.K;"),
    Mutant("rows past the part", _ROUTE_BACK, "if (t + i < stop) live |=", "live |="),
    Mutant("stride swapped", _ROUTE_BACK, "t * in.E + e, grad);", "t * in.K + e, grad);"),
    Mutant(
        "mask dropped",
        _ROUTE_BACK,
        "p.expert[n] < p.in.E ? p.grad_weight[n] : 0.0f",
        "p.grad_weight[n]",
    ),
    Mutant("all live", _ROUTE_BACK, "e < E && p.importance[e] != 0.0f", "e < E"),
    Mutant("tokens halved", _ROUTE_BACK, "warp_sum(tokens) + 0.5", "warp_sum(tokens) * 0.5"),
    Mutant("dtype truncated", _ROUTE_BACK, "double(p.part_grad[", "int(p.part_grad["),
    Mutant("threshold held", _ROUTE_BACK, "rows.key[last.at] -= through;", ""),
    Mutant(
        "warp barrier removed",
        _ROUTE_BACK,
        "__syncwarp();\n  if (threadIdx.x == 0 && last.at < E)",
        "if (threadIdx.x == 0 && last.at < E)",
    ),
    Mutant(
        "barrier removed",
        _ROUTE_BACK,
        "continue;  // the same for the whole block\n    __syncthreads();",
        "continue;",
        rung="emulated",
    ),
]


class TritonMutant(NamedTuple):
    """The same of gose_kernels/triton/<source>.py."""

    what: str
    ops: tuple[str, ...]
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.ops[0]}-{self.what}"


TRITON_MUTANTS = [
    TritonMutant("bound", _COMBINE, "valid_d = offs_d < D", "valid_d = offs_d <= D"),
    TritonMutant(
        "mask dropped", _BACK, "(row_k >= 0)[:, None] & (offs_d", "(offs_d[None, :] >= 0) & (offs_d"
    ),
    TritonMutant(
        "bound",
        _ENTROPY,
        "(offs_c < C)[None, :]\n        x = tl",
        "(offs_c <= C)[None, :]\n        x = tl",
    ),
    TritonMutant("rank off by one", _DISPATCH, "axis=0) - 1)", "axis=0))"),
    TritonMutant("scale low", _QUANTIZE, "bitcast=True) + low_G.to(tl.int32)", "bitcast=True)"),
    TritonMutant("bound", _QUANTIZE, "byte < num_bytes)", "byte <= num_bytes)"),
    TritonMutant("mask dropped", _DECODE, "inside = inside & (i >= 0)", "pass"),
    TritonMutant("stride swapped", _MASKED, "place = slot * INNER", "place = slot * COLUMNS"),
    TritonMutant("mask dropped", _MASKED, "tl.where(live, new, old)", "new"),
    TritonMutant(
        "count of frozen", _MASKED, "count + 1.0, mask=frozen == 0", "count + 1.0, mask=unit < U"
    ),
    TritonMutant("bound", _SQUARES, "inside = at < INNER", "inside = at <= INNER"),
    TritonMutant(
        "bound of columns", _SQUARES, "live & (column < INNER)", "live & (column <= INNER)"
    ),
    TritonMutant("bound of sums", _SQUARES, "mask=at < end", "mask=at <= end"),
    TritonMutant("stride swapped", _SQUARES, "unit * INNER + column", "unit * COLUMNS + column"),
    TritonMutant("mask dropped", _SQUARES, "tl.where(live, x * x, 0.0)", "x * x"),
    TritonMutant(
        "dtype truncated", _SQUARES, "mask=live, other=0.0).to(tl.float64)", "mask=live, other=0.0)"
    ),
    TritonMutant("vector left out", _SQUARES, "program * PASSES + step", "program * PASSES"),
    TritonMutant(
        "sums of another", _SQUARES, "tl.load(end_ptr + n - 1,", "tl.load(end_ptr + n - n,"
    ),
    TritonMutant("sums left out", _SQUARES, "while first < end:", "if first < end:"),
    TritonMutant("bound", _ROUTE_BACK, "(offs_k < K)[None, :]", "(offs_k <= K)[None, :]"),
    TritonMutant(
        "stride swapped",
        _ROUTE_BACK,
        "t_R.to(tl.int64)[:, None] * K",
        "t_R.to(tl.int64)[:, None] * E",
    ),
    TritonMutant("mask dropped", _ROUTE_BACK, "tl.where(expert < E, upstream, 0.0)", "upstream"),
    TritonMutant(
        "rows past the part",
        _ROUTE_BACK,
        "mask=(t_R < stop)[:, None]",
        "mask=(t_R < stop + BLOCK_R)[:, None]",
    ),
    TritonMutant("all live", _ROUTE_BACK, "(is_e & (importance != 0.0))", "is_e"),
    TritonMutant(
        "no row is read",
        _ROUTE_BACK,
        "(start < stop) & (tl.min(live, axis=0) == 0)",
        "(start < stop) & (tl.min(live, axis=0) < 0)",
    ),
    TritonMutant(
        "dtype truncated",
        _ROUTE_BACK,
        "total += tl.sum(part.to(tl.float64)",
        "total += tl.sum(part.to(tl.int32)",
    ),
    TritonMutant("bound", _ROUTE, "(offs_k < K)[None, :]", "(offs_k <= K)[None, :]"),
    TritonMutant(
        "stride swapped", _ROUTE, "t_R.to(tl.int64)[:, None] * K", "t_R.to(tl.int64)[:, None] * E"
    ),
    TritonMutant(
        "mask dropped", _ROUTE, "hit &= (id_R < E)[:, None]", "hit &= (id_R <= E)[:, None]"
    ),
    TritonMutant("tie to the larger", _ROUTE, "(place <= capacity)", "(place < capacity)"),
    TritonMutant("level of the last pass", _ROUTE, "count = (count & 0xFFFF) |", "count = count |"),
    TritonMutant(
        "available twice",
        _ROUTE,
        "tl.sum(count >> 1, axis=0)\n        tl",
        "tl.sum(count, axis=0)\n        tl",
    ),
    TritonMutant(
        "dtype truncated",
        _ROUTE,
        "importance += tl.sum(part.to(tl.float64)",
        "importance += tl.sum(part.to(tl.int32)",
    ),
    TritonMutant(
        "bound",
        _DISTILL,
        "listed = valid_R[:, None] & (offs_j < J)[None, :]",
        "listed = valid_R[:, None] & (offs_j <= J)[None, :]",
    ),
    TritonMutant(
        "stride swapped", _DISTILL, "n_R[:, None] * J + offs_j", "n_R[:, None] * C + offs_j"
    ),
    TritonMutant(
        "mask dropped", _DISTILL, "tl.where(target == 0.0, 0.0, target * z)", "target * z"
    ),
    TritonMutant(
        "listed among the rest",
        _DISTILL,
        "tl.where(seen == 0, power, 0.0)",
        "tl.where(inside, power, 0.0)",
    ),
    TritonMutant(
        "dtype truncated",
        _DISTILL,
        "shift_R = _log_ratio(total_p_R, total_q_R)\n    for",
        "shift_R = _log_ratio(total_p_R.to(tl.int32), total_q_R.to(tl.int32))\n    for",
    ),
]


Run = Callable[[str, tuple[Any, ...]], Any]  # of an op's name and arguments
_FOUND = 3  # exit code; 1 is a traceback's


def _survives(names: tuple[str, ...], runs: Iterable[Run]) -> bool:
    """Whether every case of the ops comes out right in every run."""
    for run, name in product(runs, names):
        op = OPS[name]
        for dtype in op.dtypes[:2]:
            for _, args in op.cases(dtype):
                try:
                    op.check(run(name, args), args)
                except (KernelError, AssertionError, RuntimeError):
                    return False
    return True


def _launcher(call: Any, name: str, args: tuple[Any, ...]) -> Any:
    return OPS[name].cuda(call, *args)


def _emulate(names: tuple[str, ...], library: Path) -> None:
    orders = [cuda_host.OnEmulator(library, order) for order in cuda_host.ORDERS]
    sys.exit(0 if _survives(names, [partial(_launcher, call) for call in orders]) else _FOUND)


def _killed(mutant: Mutant, source: Path, folder: Path) -> bool:
    if mutant.rung == "ptx":
        machine = cuda_host.OnPtx(cuda_host.compile_ptx(source, folder), count=False)
        return not _survives(mutant.ops, [partial(_launcher, machine)])
    # It may write where nothing is: a process of its own may die of it.
    library = cuda_host.compile_emulated(source, folder)
    spawn = multiprocessing.get_context("spawn")
    child = spawn.Process(target=_emulate, args=(mutant.ops, library))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode == _FOUND or child.exitcode < 0


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    kernels = ROOT / "csrc" / "cuda"
    source = tmp_path / f"{OPS[mutant.ops[0]].source}.cu"
    source.write_text((kernels / source.name).read_text())
    text = (kernels / (mutant.header or source.name)).read_text()
    assert text.count(mutant.old) == mutant.count
    if mutant.header:  # found before the real ones: they lie beside the source and each other
        (tmp_path / "cuda").mkdir()
        for header in (*kernels.glob("*.cuh"), *kernels.glob("*.h")):
            shutil.copy(header, tmp_path / "cuda")
        (tmp_path / "cuda" / "cuda").symlink_to(tmp_path / "cuda")
    planted = tmp_path / "cuda" / mutant.header if mutant.header else source
    planted.write_text(text.replace(mutant.old, mutant.new))
    assert _killed(mutant, source, tmp_path)


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize("mutant", TRITON_MUTANTS, ids=str)
def test_triton_mutant_is_killed(mutant: TritonMutant, tmp_path: Path) -> None:
    name = OPS[mutant.ops[0]].source
    text = (ROOT / "gose_kernels" / "triton" / f"{name}.py").read_text()
    assert text.count(mutant.old) == 1
    source = tmp_path / f"{name}_mutant.py"
    source.write_text(text.replace(mutant.old, mutant.new))
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(name: str, args: tuple[Any, ...]) -> Any:
        launcher = partial(OPS[name].run, getattr(module, name))
        return triton_host.run_on_ptx(launcher, *args, count=False)[0]

    assert not _survives(mutant.ops, [run])


def test_every_gpu_source_has_mutants() -> None:
    sources = {s.stem for s in cuda_host.SOURCES}
    assert {OPS[op].source for m in TRITON_MUTANTS for op in m.ops} == sources
    assert {OPS[op].source for m in MUTANTS for op in m.ops} == sources
