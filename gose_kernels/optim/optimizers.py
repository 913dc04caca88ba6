"""The three masked optimizers."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gose_kernels.ops.masked_update import masked_adam_, masked_lion_, masked_sgd_
from gose_kernels.optim.masked import MaskedOptimizer, Masking


class MaskedAdamW(MaskedOptimizer):
    """AdamW [Loshchilov and Hutter 2019] or, with decoupled_weight_decay=False, Adam, with masks.

    Options as torch.optim.AdamW, and
    frozen         parameter -> mask, also `set_frozen` at any time between steps: a bool tensor,
                   True = must not change, every size of which divides the parameter's (one value
                   per expert, row, block or element), or an Importance
    freeze_state   what an element frozen later does with its state: "paused" keeps it for its
                   release, "dropped" forgets it. Rows and blocks of 16 elements and more that are
                   frozen from the start, or dropped, have no state in memory
    max_grad_norm  scales the gradients of a step so that the norm of all live ones is at most this
    bfloat16       how bfloat16 parameters keep small steps: "master" rounds a float32 copy,
                   "stochastic" rounds up with the probability of what is cut off, from draws that
                   depend on seed, parameter, step and element alone
    seed           of these draws
    backend        passed on to the op masked_adam_
    Moments are float32. Parameters may be DTensors (FSDP2): masks are those of the whole tensor.
    """

    _op = masked_adam_

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        **masking: Unpack[Masking],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, masking)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    def _options(self, group: dict[str, Any], fresh: bool) -> dict[str, Any]:
        same = ("eps", "weight_decay", "amsgrad", "maximize")
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "decoupled": group["decoupled_weight_decay"],
            **{name: group[name] for name in same},
        }


class MaskedSGD(MaskedOptimizer):
    """SGD with momentum, Nesterov momentum and coupled weight decay, with masks.

    Options as torch.optim.SGD, and those of MaskedAdamW from `frozen` on. As in torch a parameter's
    first step is not dampened; that of an element released later is.
    """

    _op = masked_sgd_

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **masking: Unpack[Masking],
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"MaskedSGD: nesterov needs momentum > 0 and no dampening, got {momentum} and "
                f"{dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masking)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _options(self, group: dict[str, Any], fresh: bool) -> dict[str, Any]:
        same = ("momentum", "weight_decay", "nesterov", "maximize")
        dampening = 0.0 if fresh else group["dampening"]
        return {"dampening": dampening, **{name: group[name] for name in same}}


class MaskedLion(MaskedOptimizer):
    """Lion [Chen et al. 2023] with decoupled weight decay and masks.

    lr, betas, weight_decay, maximize as in the paper's Program 1, and the options of MaskedAdamW
    from `frozen` on.
    """

    _op = masked_lion_

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **masking: Unpack[Masking],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, masking)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _options(self, group: dict[str, Any], fresh: bool) -> dict[str, Any]:
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
        }
