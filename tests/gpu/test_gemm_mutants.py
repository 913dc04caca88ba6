"""Triton's expert GEMMs with one planted mistake each, compiled for sm_80: the PTX machine has to
notice. A mutant that does not compile proves nothing and fails."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gose_kernels.triton
from tests import cases
from tests.gpu import triton_host
from tests.gpu.gemm_ops import (
    GEMM_KERNELS,
    GEMMS,
    LAYERS,
    SQUARES,
    WHOLE_LAYERS,
    check_backward,
    check_forward,
    check_gemm,
    check_gemm_backward,
    check_moe,
    check_packed,
    check_squares,
)
from tests.gpu.params import ROOT
from tests.ptx.faults import KernelError

# In the order of their imports.
MODULES = (
    *("activations", "tiles", "weight_grad", "grouped_gemm", "expert_mlp", "expert_mlp_backward"),
    *("squared_grad", "expert_mlp_packed", "moe"),
)
_ODD, _WIDE, _LONG = GEMMS[0], GEMMS[2], GEMMS[3]
_STEPS = cases.ExpertMlpCase("silu", T=9, D=136, F=40)
CHECKS = {
    "gemm": partial(check_gemm, case=_ODD),
    "gemm of two steps": partial(check_gemm, case=_WIDE),
    "gemm of many rows": partial(check_gemm, case=_LONG),
    "gemm backward": partial(check_gemm_backward, case=_ODD),
    "gemm backward of many rows": partial(check_gemm_backward, case=_LONG),
    "gemm backward added": partial(check_gemm_backward, case=_ODD, add=True),
    "forward": partial(check_forward, case=LAYERS[0]),
    "forward of pairs": partial(check_forward, case=LAYERS[1]),
    "backward": partial(check_backward, case=LAYERS[0]),
    "backward added": partial(check_backward, case=LAYERS[0], add=True),
    "backward of steps": partial(check_backward, case=LAYERS[5]),
    "clamped backward": partial(check_backward, case=LAYERS[3]),
    "int8": partial(check_packed, case=LAYERS[0], weights="int8"),
    "int4": partial(check_packed, case=LAYERS[0], weights="int4"),
    "packed": partial(check_packed, case=LAYERS[0], weights=None),
    "int8 of pairs": partial(check_packed, case=LAYERS[1], weights="int8"),
    "int8 of steps": partial(check_packed, case=_STEPS, weights="int8"),
    "int4 of steps": partial(check_packed, case=_STEPS, weights="int4"),
    "moe": partial(check_moe, case=WHOLE_LAYERS[1]),
    "squares of rows": partial(check_squares, case=SQUARES[0]),
    "squares of samples": partial(check_squares, case=SQUARES[1]),
    "squares of runs": partial(check_squares, case=SQUARES[2]),
}


class Mutant(NamedTuple):
    """`old` stands once in gose_kernels/triton/<module>.py and becomes `new`; all checks notice."""

    kernel: str
    what: str
    module: str
    old: str
    new: str
    checks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kernel.strip('_')}-{self.what}"


_MAP = partial(Mutant, "_tile_map_kernel", module="tiles")
_GEMM = partial(Mutant, "_grouped_gemm_kernel", module="grouped_gemm", checks=("gemm", "forward"))
_PRODUCT = partial(Mutant, "_grouped_gemm_kernel", module="tiles")
_UP = partial(Mutant, "_up_kernel", module="expert_mlp", checks=("forward",))
_HIDDEN = partial(Mutant, "_hidden_grad_kernel", module="expert_mlp_backward", checks=("backward",))
_ROW = partial(Mutant, "_row_weight_kernel", module="expert_mlp_backward", checks=("backward",))
_GATE = partial(Mutant, "_gate_grad_kernel", module="expert_mlp_backward", checks=("backward",))
_WEIGHT = partial(
    Mutant, "_weight_grad_kernel", module="weight_grad", checks=("gemm backward", "backward")
)
_BIAS = partial(
    Mutant, "_bias_grad_kernel", module="weight_grad", checks=("gemm backward", "backward")
)
_ROWS = partial(Mutant, "_squared_rows_kernel", module="squared_grad", checks=("squares of rows",))
_SAMPLES = partial(
    Mutant,
    "_squared_samples_kernel",
    module="squared_grad",
    checks=("squares of samples", "squares of runs"),
)
_SQUARED_BIAS = partial(Mutant, "_squared_bias_kernel", module="squared_grad")
_PACKED = partial(
    Mutant, "_packed_kernel", module="expert_mlp_packed", checks=("int8", "int4", "packed")
)
_SCORE = partial(Mutant, "_score_kernel", module="moe", checks=("moe",))
MUTANTS = [
    _MAP(
        "bound",
        old="(last - first + ROWS - 1) //",
        new="(last - first) //",
        checks=("gemm of two steps",),
    ),
    _MAP("mask dropped", old=" & (e < E)[None, :]\n", new="\n", checks=("gemm",)),
    _MAP(
        "dtype truncated",
        old="tile - begin) * ROWS",
        new="(tile - begin) * ROWS).to(tl.int8)",
        checks=("gemm of many rows",),
    ),
    # The same kernel multiplies by w_down in the layer.
    _GEMM("bound", old="valid = f < F", new="valid = f <= F"),
    _GEMM("stride swapped", old="f * stride_wf", new="f * stride_wd"),
    _GEMM("stride of experts", old="e * stride_we", new="e * stride_wf"),
    _GEMM("mask dropped", old="inside[:, None] & valid[None, :])", new="inside[:, None])"),
    _GEMM("bias of none", old="valid & (e < E), other", new="valid, other", checks=("gemm",)),
    _GEMM("rows of none", old="tl.where(e < E, D, 0)", new="D", checks=("gemm",)),
    _GEMM("dtype truncated", old="acc.to(y_ptr", new="acc.to(tl.int32).to(y_ptr"),
    _PRODUCT(
        "mask of the sum dropped",
        old="w = tl.load(w_piece, mask=inside[:, None] & valid[None, :], other=0.0)",
        new="w = tl.load(w_piece, mask=valid[None, :], other=0.0)",
        checks=("gemm of two steps",),
    ),
    _PRODUCT(
        "step short",
        old="x_here = ahead(x_at, start, stride_xd)",
        new="x_here = ahead(x_at, start // 2, stride_xd)",
        checks=("gemm of two steps",),
    ),
    _PRODUCT(
        "piece again",
        old="x_piece = x_here + piece * stride_xd",
        new="x_piece = x_here",
        checks=("gemm of two steps",),
    ),
    _PRODUCT(
        "row truncated",
        old="first.to(tl.int64)",
        new="first.to(tl.int8).to(tl.int64)",
        checks=("gemm of many rows",),
    ),
    _PRODUCT(
        "rows of the next",
        old="r, count - 1), r < count",
        new="r, count), r <= count",
        checks=("gemm", "forward"),
    ),
    _UP("bound", old="valid_h = h < (2 * F", new="valid_h = h <= (2 * F"),
    _UP("stride swapped", old="token * stride_xt", new="token * stride_xd"),
    _UP("mask dropped", old="inside[:, None] & (f < F)[None, :])", new="inside[:, None])"),
    _UP("dtype truncated", old="a.to(a_ptr", new="a.to(tl.int32).to(a_ptr"),
    _UP("rows of none", old="tl.where(e < E, D, 0)", new="D"),
    _UP("halves swapped", old="e * H + F + h", new="e * H + h"),
    _UP("up beside gate", old="w_at, w_at + F * stride_wh", new="w_at, w_at + F * stride_wd"),
    _UP(
        "pairs apart",
        old="gate, up = tl.split(tl.reshape(acc, [ROWS, COLUMNS, 2]))",
        new="up, gate = tl.split(tl.reshape(acc, [ROWS, COLUMNS, 2]))",
        checks=("forward of pairs",),
    ),
    _HIDDEN("bound", old="valid = f < F", new="valid = f <= F"),
    _HIDDEN("stride swapped", old="token * stride_gt", new="token * stride_gd"),
    _HIDDEN("mask dropped", old="share, mask=inside)", new="share)"),
    _HIDDEN("dtype truncated", old="into_gate.to(grad", new="into_gate.to(tl.int32).to(grad"),
    _HIDDEN("rows of none", old="if (e < 0) | (e == E):", new="if e < 0:"),
    _HIDDEN("weight lost", old="(weight * a).to", new="(1.0 * a).to"),
    _HIDDEN(
        "gradient beyond the limit",
        old="tl.where(gate > limit, 0.0, into_gate)",
        new="into_gate",
        checks=("clamped backward",),
    ),
    _HIDDEN(
        "slope of the unclamped",
        old="slope(low, alpha, PHI)",
        new="phi(low, alpha, PHI)",
    ),
    _ROW("mask dropped", old="weight, mask=row >= 0)", new="weight, mask=slot < N)"),
    _GATE("mask dropped", old="share_at, mask=used", new="share_at, mask=slot < N"),
    _GATE("stride swapped", old="t * stride_gt", new="t * stride_gd"),
    _GATE("bound", old="used[:, None] & (d < D)", new="used[:, None] & (d <= D)"),
    _WEIGHT(
        "bound",
        old="inside = n < last\n    keep",
        new="inside = n <= last\n    keep",
        checks=("gemm backward of many rows", "backward"),
    ),
    _WEIGHT("stride swapped", old="first + r, stride_ln", new="first + r, stride_la"),
    _WEIGHT(
        "step lost",
        old="ahead(right_here, DEPTH,",
        new="ahead(right_here, 0,",
        checks=("gemm backward of many rows", "backward of steps"),
    ),
    _WEIGHT(
        "piece again",
        old="at = ahead(at, piece, stride)",
        new="pass",
        checks=("gemm backward of many rows", "backward of steps"),
    ),
    _WEIGHT(
        "token of the next",
        old="tl.load(token_ptr + n, mask=n",
        new="tl.load(token_ptr + n + 1, mask=n",
        checks=("backward",),
    ),
    _WEIGHT(
        "mask dropped",
        old="keep = valid_a[:, None] & valid_b[None, :]",
        new="keep = valid_a[:, None]",
    ),
    _WEIGHT(
        "dtype truncated",
        old="acc.to(out_ptr.dtype.element_ty), mask=keep",
        new="acc.to(tl.int32).to(out_ptr.dtype.element_ty), mask=keep",
    ),
    _WEIGHT(
        "frozen units trained",
        old="acc = tl.where(live[:, None], acc, 0.0)",
        new="pass",
        checks=("backward",),
    ),
    _WEIGHT(
        "sum lost",
        old="acc += tl.load(out_at, mask=keep, other=0.0).to(tl.float32)",
        new="pass",
        checks=("gemm backward added", "backward added"),
    ),
    _WEIGHT(
        "frozen units added to",
        old="keep &= live[:, None]",
        new="pass",
        checks=("backward added",),
    ),
    _BIAS("bound", old="valid = a < A", new="valid = a <= A"),
    _BIAS("stride swapped", old="(row * stride_gn)", new="(row * stride_ga)"),
    _BIAS("mask dropped", old="total = tl.where(_live", new="tl.where(_live", checks=("backward",)),
    _BIAS("dtype truncated", old="total.to(out", new="total.to(tl.int32).to(out"),
    _ROWS("bound", old="(n < last)[:, None], n.to", new="(n <= last)[:, None], n.to"),
    _ROWS(
        "stride swapped",
        old="(d * stride_xd)[None, :]\n    for",
        new="(d * stride_xn)[None, :]\n    for",
    ),
    _ROWS(
        "mask dropped",
        old="acc, mask=valid_f[:, None] & valid_d",
        new="acc, mask=valid_f[:, None] | valid_d",
    ),
    _ROWS("dtype truncated", old="tl.store(out_at, acc,", new="tl.store(out_at, acc.to(tl.int32),"),
    _ROWS("product of rows", old="tl.trans(grad * grad), x * x", new="tl.trans(grad), x"),
    _ROWS(
        "experts together",
        old="(e * F + f)[:, None] * D + d[None, :]\n    tl.store(out_at, acc",
        new="f[:, None] * D + d[None, :]\n    tl.store(out_at, acc",
    ),
    _SAMPLES("bound", old="n < stop\n            row", new="n <= stop\n            row"),
    _SAMPLES(
        "stride swapped",
        old="(d * stride_xd)[None, :]\n    while",
        new="(d * stride_xn)[None, :]\n    while",
    ),
    _SAMPLES(
        "mask dropped",
        old="total, mask=valid_f[:, None] & valid_d",
        new="total, mask=valid_f[:, None] | valid_d",
    ),
    _SAMPLES(
        "dtype truncated", old="tl.store(out_at, total,", new="tl.store(out_at, total.to(tl.int32),"
    ),
    _SAMPLES(
        "order lost",
        old="tl.load(row_ptr + n, mask=inside, other=0).to",
        new="n.to",
        checks=("squares of samples",),
    ),
    _SAMPLES(
        "samples together",
        old="stop = tl.load(stop_ptr + first)\n        acc",
        new="stop = last\n        acc",
    ),
    _SAMPLES("square of the sum", old="total += acc * acc", new="total += acc"),
    _SQUARED_BIAS(
        "bound",
        old="valid = f < F",
        new="valid = f <= F",
        checks=("squares of rows", "squares of samples"),
    ),
    _SQUARED_BIAS(
        "stride swapped",
        old="(f * stride_gf)[None, :]\n    if",
        new="(f * stride_gn)[None, :]\n    if",
        checks=("squares of rows", "squares of samples"),
    ),
    _SQUARED_BIAS(
        "rows of the next",
        old="(n < stop)[:, None] & valid",
        new="(n <= stop)[:, None] & valid",
        checks=("squares of samples", "squares of runs"),
    ),
    _SQUARED_BIAS(
        "dtype truncated",
        old="tl.store(out_ptr + e * F + f, total,",
        new="tl.store(out_ptr + e * F + f, total.to(tl.int32),",
        checks=("squares of rows", "squares of samples"),
    ),
    _SQUARED_BIAS(
        "samples together",
        old="stop = tl.load(stop_ptr + first)\n            acc",
        new="stop = last\n            acc",
        checks=("squares of samples", "squares of runs"),
    ),
    _PACKED("bound", old="valid = f < F", new="valid = f <= F"),
    _PACKED("stride swapped", old="row * stride_xn, w_ptr", new="row * stride_xd, w_ptr"),
    _PACKED("mask dropped", old="inside[:, None] & valid[None, :])", new="inside[:, None])"),
    _PACKED("dtype truncated", old="out.to(out_ptr", new="out.to(tl.int32).to(out_ptr"),
    _PACKED("rows of none", old="if (e < 0) | (e == E):", new="if e < 0:"),
    _PACKED("weights of one expert", old="w_ptr + e * stride_we", new="w_ptr + e * stride_wp"),
    _PACKED(
        "mask of the sum dropped",
        old="if WHOLE_D else tl.load(x_at, mask=(d < D - start)[None, :], other=0.0)",
        new="if WHOLE_D else tl.load(x_at)",
    ),
    _PACKED("gates for ups", old="gate, up = tl.split", new="up, gate = tl.split"),
    _PACKED(
        "bias of halves", old='2 * f if FORM == "pairs" else f', new="f", checks=("int8 of pairs",)
    ),
    _PACKED("scales lost", old="acc *= tl.load(r_at", new="tl.load(r_at", checks=("int8", "int4")),
    _PACKED(
        "scales of the next panel",
        old="(c // 32 + 1).to",
        new="(c // 32).to",
        checks=("int8", "int4"),
    ),
    _PACKED(
        "levels swapped",
        old="tl.where(q < 8, _LOW, _HIGH)",
        new="tl.where(q < 8, _HIGH, _LOW)",
        checks=("int4",),
    ),
    _PACKED(
        "steps in order", old="half // 2 * 4 + half % 2 * 16", new="half * 4", checks=("int4",)
    ),
    _PACKED("signs lost", old=" | ((code & 128) << 24)", new="", checks=("int4",)),
    _PACKED(
        "pairs apart",
        old="tl.permute(tl.reshape(w, [DEPTH // 2, COLUMNS, 2]), (0, 2, 1))",
        new="tl.reshape(w, [DEPTH // 2, 2, COLUMNS])",
        checks=("packed",),
    ),
    _PACKED("step short", old="w_at += DEPTH * 32", new="w_at += 32", checks=("int8 of steps",)),
    _PACKED(
        "blocks of the first step",
        old="s_at += DEPTH // 32 * 576",
        new="s_at += 0",
        checks=("int4 of steps",),
    ),
    _SCORE("bound", old="mask=(t < T)[:, None]", new="mask=(t <= T)[:, None]"),
    _SCORE(
        "stride swapped",
        old="tl.minimum(t, T - 1) * stride_xt",
        new="tl.minimum(t, T - 1) * stride_xd",
    ),
    _SCORE(
        "mask dropped",
        old="acc, mask=(t < T)[:, None] & (e < E)[None, :])",
        new="acc, mask=(t < T)[:, None])",
    ),
    _SCORE(
        "dtype truncated", old="tl.store(score_at, acc,", new="tl.store(score_at, acc.to(tl.int32),"
    ),
    _SCORE("rows beyond", old="tl.minimum(t, T - 1)", new="t"),
    _SCORE(
        "mask of the sum dropped",
        old="x = tl.load(x_at, mask=inside[None, :], other=0.0)",
        new="x = tl.load(x_at)",
    ),
    _SCORE("step short", old="w_at += DEPTH * stride_wd", new="w_at += stride_wd"),
]


def _notices(check: str) -> bool:
    def run(launcher: Any, *args: Any) -> Any:
        return triton_host.run_on_ptx(launcher, *args, count=False)[0]

    try:
        CHECKS[check](run, dtype=torch.bfloat16)
    except (KernelError, AssertionError, RuntimeError):
        return True
    return False


def _source(module: str) -> str:
    return (ROOT / "gose_kernels" / "triton" / f"{module}.py").read_text()


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the modules, one of them changed, in the place of those that are imported."""
    for module in MODULES:
        importlib.import_module(f"gose_kernels.triton.{module}")

    def put(changed: str, text: str) -> None:
        for module in MODULES:
            path, name = tmp_path / f"{module}.py", f"gose_kernels.triton.{module}"
            path.write_text(text if module == changed else _source(module))
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            planted = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, planted)
            monkeypatch.setattr(gose_kernels.triton, module, planted)
            spec.loader.exec_module(planted)

    return put


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, plant: Any) -> None:
    text = _source(mutant.module)
    assert text.count(mutant.old) == 1
    plant(mutant.module, text.replace(mutant.old, mutant.new))
    assert {check: _notices(check) for check in mutant.checks} == dict.fromkeys(mutant.checks, True)


def test_planted_modules_are_right(plant: Any) -> None:
    """Without a mistake nothing is noticed."""
    plant("tiles", _source("tiles"))
    assert not _notices("gemm")


def test_every_kernel_has_mutants() -> None:
    written = {k for m in MODULES for k in re.findall(r"^def (_\w+_kernel)\(", _source(m), re.M)}
    assert {m.kernel for m in MUTANTS} == written
    for kernel in GEMM_KERNELS:
        planted = {m.what for m in MUTANTS if m.kernel == kernel}
        assert planted >= {"bound", "stride swapped", "mask dropped", "dtype truncated"}, kernel
