"""How far rounding can carry results of the CPU kernels, element by element.

A result beyond its bound is wrong. The bounds are those of float32 sums in any order, of hidden
units and outputs rounded to the dtype of the call, and of elementary functions with small relative
errors; all in float64, from the float64 numbers themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import cases
from tests.expert_mlp_oracle import _act

_SINGLE = 2.0**-24  # half an ulp of float32
_FUNCTION = 16 * _SINGLE  # of an activation or its slope


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of a number of this size when it is stored."""
    info = torch.finfo(dtype)
    return value.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def summed(size: Tensor, count: int) -> Tensor:
    """Error of float32 sums of `count` terms whose absolute values add up to `size`.

    At most (count + 4) roundings of partial sums no larger than that; many fall on both sides, and
    eight standard deviations of their random walk are never seen.
    """
    return size * _SINGLE * min(count + 4, 8 * math.sqrt(count + 1))


def product(
    left: Tensor, right: Tensor, left_error: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Error of left @ right, left known with an error."""
    size = left.abs() @ right.abs()
    error = summed(size, left.shape[-1] if count is None else count)
    return error if left_error is None else error + left_error @ right.abs()


class Rows(NamedTuple):
    """The slots of one expert."""

    expert: int
    token_n: Tensor
    slot_n: Tensor


def rows_of(expert_TK: Tensor, num_experts: int) -> Iterator[Rows]:
    for e in range(num_experts):
        token_n, slot_n = (expert_TK == e).nonzero(as_tuple=True)
        if len(token_n):
            yield Rows(e, token_n, slot_n)


class Mlp:
    """One call of expert_mlp in float64: its weights as up_EHD, down_EDF, gates first."""

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
        self.dtype, self.options = dtype, options
        self.x_TD, self.weight_TK, self.expert_TK, up, down, bias_up, bias_down, *_ = (
            a.double() if a is not None and a.is_floating_point() else a for a in args
        )
        if options.get("transposed", False):
            up, down = up.mT, down.mT
        self.up_EHD, self.down_EDF = up, down
        self.bias_up_EH = up.new_zeros(up.shape[:2]) if bias_up is None else bias_up
        self.bias_down_ED = down.new_zeros(down.shape[:2]) if bias_down is None else bias_down
        H = up.shape[1]
        self.gate_H = torch.ones(H, dtype=torch.bool)
        if options["activation"] in cases._GATED:
            at_H = torch.arange(H)
            self.gate_H = at_H % 2 == 0 if options.get("interleaved", False) else at_H < H // 2

    def act(self, pre_nH: Tensor) -> Tensor:
        options = self.options
        return _act(
            pre_nH.mT,
            options["activation"],
            options.get("interleaved", False),
            options.get("limit"),
            options.get("alpha", 1.702),
        ).mT

    def _size(self, pre_nH: Tensor) -> Tensor:
        """Of phi's argument or result, whichever is larger, times the other factor."""
        size_nF = self.act(pre_nH).abs()
        gate_nF = pre_nH[:, self.gate_H].abs()
        if self.gate_H.all():
            return size_nF.maximum(gate_nF)
        return size_nF.maximum(gate_nF * (pre_nH[:, ~self.gate_H].abs() + 1))

    def _activated(self, pre_nH: Tensor, error_nH: Tensor) -> Tensor:
        """Error of the hidden units: at the corners of where the pre-activation may be."""
        exact_nF, worst_nF = self.act(pre_nH), torch.zeros(())
        for gate, up in itertools.product((-1, 1), repeat=2):
            corner_nH = pre_nH + error_nH * torch.where(self.gate_H, gate, up)
            worst_nF = worst_nF.maximum((self.act(corner_nH) - exact_nF).abs())
        return worst_nF + _FUNCTION * self._size(pre_nH)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out_TD and its bound; pre of every slot in (expert, token) order and its bound."""
        out_TD, error_TD = torch.zeros_like(self.x_TD), torch.zeros_like(self.x_TD)
        pres, errors = [], []
        for e, token_n, slot_n in rows_of(self.expert_TK, len(self.up_EHD)):
            x_nD, up_HD, down_DF = self.x_TD[token_n], self.up_EHD[e], self.down_EDF[e]
            weight_n1 = self.weight_TK[token_n, slot_n, None]
            pre_nH = x_nD @ up_HD.mT + self.bias_up_EH[e]
            bias_error = summed(self.bias_up_EH[e].abs(), x_nD.shape[1])
            error_nH = product(x_nD, up_HD.mT) + bias_error + rounded(pre_nH, self.dtype)
            pres.append(pre_nH), errors.append(error_nH)
            a_nF = self.act(pre_nH)
            error_nF = self._activated(pre_nH, error_nH) + rounded(a_nF, self.dtype)
            y_nD = a_nF @ down_DF.mT + self.bias_down_ED[e]
            error_nD = product(a_nF, down_DF.mT, error_nF) + rounded(y_nD, self.dtype)
            error_nD += summed(self.bias_down_ED[e].abs(), a_nF.shape[1])
            size_nD = (weight_n1 * y_nD).abs()
            out_TD.index_add_(0, token_n, weight_n1 * y_nD)
            error_nD = weight_n1.abs() * error_nD + summed(size_nD, self.expert_TK.shape[1])
            error_TD.index_add_(0, token_n, error_nD)
        H = self.up_EHD.shape[1]
        pre_NH = torch.cat(pres) if pres else torch.zeros(0, H).double()
        bound_NH = torch.cat(errors) if errors else torch.zeros(0, H).double()
        return out_TD, error_TD + rounded(out_TD, self.dtype), pre_NH, bound_NH

    def backward(self, pre_NH: Tensor, grad_TD: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Every gradient with its bound, from the pre-activation as it was kept; nothing frozen."""
        truth = {
            "x": torch.zeros_like(self.x_TD),
            "weight": torch.zeros_like(self.weight_TK),
            "up": torch.zeros_like(self.up_EHD),
            "down": torch.zeros_like(self.down_EDF),
            "bias_up": torch.zeros_like(self.bias_up_EH),
            "bias_down": torch.zeros_like(self.bias_down_ED),
        }
        error = {name: torch.zeros_like(t) for name, t in truth.items()}
        grad_TD, pre_NH, done = grad_TD.double(), pre_NH.double(), 0
        for e, token_n, slot_n in rows_of(self.expert_TK, len(self.up_EHD)):
            x_nD, up_HD, down_DF = self.x_TD[token_n], self.up_EHD[e], self.down_EDF[e]
            weight_n1, grad_nD = self.weight_TK[token_n, slot_n, None], grad_TD[token_n]
            pre_nH = pre_NH[done : done + len(token_n)].requires_grad_()
            done += len(token_n)
            a_nF = self.act(pre_nH)

            def through(grad_nF: Tensor, a_nF: Tensor = a_nF, pre_nH: Tensor = pre_nH) -> Tensor:
                (result,) = torch.autograd.grad(a_nF, pre_nH, grad_nF, retain_graph=True)
                return result

            of_a_nF = grad_nD @ down_DF
            error_a_nF = product(grad_nD, down_DF) + rounded(of_a_nF, self.dtype)
            of_pre_nH = weight_n1 * through(of_a_nF)
            pre_nH, a_nF = pre_nH.detach(), a_nF.detach()
            slope_nH = self._slope_error(pre_nH, of_a_nF)
            error_pre_nH = weight_n1.abs() * (through(error_a_nF).abs() + slope_nH)
            error_pre_nH += rounded(of_pre_nH, self.dtype)
            function_nF = _FUNCTION * self._size(pre_nH)
            scaled_nF = weight_n1 * a_nF
            error_scaled_nF = weight_n1.abs() * function_nF + rounded(scaled_nF, self.dtype)

            row_nD = of_pre_nH @ up_HD
            truth["x"].index_add_(0, token_n, row_nD)
            error_row_nD = product(of_pre_nH, up_HD, error_pre_nH) + rounded(row_nD, self.dtype)
            error_row_nD += summed(row_nD.abs(), self.expert_TK.shape[1])
            error["x"].index_add_(0, token_n, error_row_nD)
            bias_D = self.bias_down_ED[e]
            truth["weight"][token_n, slot_n] = (of_a_nF * a_nF).sum(1) + grad_nD @ bias_D
            error["weight"][token_n, slot_n] = (
                (error_a_nF * a_nF.abs() + of_a_nF.abs() * function_nF).sum(1)
                + summed((of_a_nF * a_nF).abs().sum(1), a_nF.shape[1])
                + summed(grad_nD.abs() @ bias_D.abs(), len(bias_D))
            )
            truth["up"][e] = of_pre_nH.mT @ x_nD
            error["up"][e] = product(of_pre_nH.mT, x_nD, error_pre_nH.mT)
            truth["down"][e] = grad_nD.mT @ scaled_nF
            error["down"][e] = product(scaled_nF.mT, grad_nD, error_scaled_nF.mT).mT
            truth["bias_up"][e] = of_pre_nH.sum(0)
            error["bias_up"][e] = error_pre_nH.sum(0) + summed(of_pre_nH.abs().sum(0), len(token_n))
            truth["bias_down"][e] = (weight_n1 * grad_nD).sum(0)
            error["bias_down"][e] = summed((weight_n1 * grad_nD).abs().sum(0), len(token_n))
        if self.options.get("transposed", False):
            for name in ("up", "down"):
                truth[name], error[name] = truth[name].mT, error[name].mT
        for name, t in truth.items():
            dtype = torch.float32 if name == "weight" else self.dtype
            error[name] = error[name] + rounded(t, dtype)
        return {name: (t, error[name]) for name, t in truth.items()}

    def _slope_error(self, pre_nH: Tensor, of_a_nF: Tensor) -> Tensor:
        """What the slopes' own error makes of a gradient of the hidden units."""
        gate_nF = pre_nH[:, self.gate_H].abs()
        gate_error_nF = _FUNCTION * (1 + gate_nF) * of_a_nF.abs()
        if self.gate_H.all():
            return gate_error_nF
        other_nF = pre_nH[:, ~self.gate_H].abs() + 1
        error_nH = torch.empty_like(pre_nH)
        error_nH[:, self.gate_H] = gate_error_nF * other_nF
        error_nH[:, ~self.gate_H] = _FUNCTION * gate_nF * of_a_nF.abs()
        return error_nH


def freeze(
    gradients: dict[str, tuple[Tensor, Tensor]],
    frozen_E: Tensor | None,
    frozen_EF: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Zero the gradients of what is frozen, and their bounds."""
    if frozen_E is None and frozen_EF is None:
        return
    up, down = gradients["up"][0], gradients["down"][0]
    transposed = options.get("transposed", False)
    E, F = down.shape[0], down.shape[1 if transposed else 2]
    unit_EF = torch.zeros(E, F, dtype=torch.bool) if frozen_EF is None else frozen_EF
    expert_E = torch.zeros(E, dtype=torch.bool) if frozen_E is None else frozen_E
    unit_EF = unit_EF | expert_E[:, None]
    unit_EH = unit_EF
    if options["activation"] in cases._GATED:
        pairs = options.get("interleaved", False)
        unit_EH = unit_EF.repeat_interleave(2, dim=1) if pairs else torch.cat([unit_EF] * 2, dim=1)
    assert up.shape[2 if transposed else 1] == unit_EH.shape[1]
    for i in range(2):
        up, down = gradients["up"][i], gradients["down"][i]
        (up.mT if transposed else up)[unit_EH] = 0
        (down if transposed else down.mT)[unit_EF] = 0
        gradients["bias_up"][i][unit_EH] = 0
        gradients["bias_down"][i][expert_E] = 0
