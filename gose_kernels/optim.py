"""MaskedAdamW, MaskedSGD, MaskedLion: torch optimizers whose frozen elements keep their bits.

    optimizer = MaskedAdamW(model.parameters(), lr=1e-3, frozen={model.weight: frozen_mask})

Setting gradients to zero does not freeze a parameter: momentum and weight decay still move it. Here
a frozen element keeps its bits for every option, whatever its gradient holds, and it is left out of
gradient norms. With nothing frozen the trajectories are those of torch.optim up to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from gose_kernels.masks import check_frozen
from gose_kernels.ops.masked_update import masked_adam_, masked_lion_, masked_sgd_

FreezeState = Literal["paused", "dropped"]


def _live_grad(param: Tensor, frozen: Mapping[Tensor, Tensor]) -> Tensor:
    """The gradient with 0 in place of frozen elements: what norms are made of."""
    grad = cast(Tensor, param.grad)
    return torch.where(frozen[param], 0, grad) if param in frozen else grad


def _total_norm(
    params: Iterable[Tensor], frozen: Mapping[Tensor, Tensor], norm_type: float
) -> Tensor:
    return torch.nn.utils.get_total_norm(
        [_live_grad(p, frozen) for p in params if p.grad is not None], norm_type
    )


@torch.no_grad()
def clip_grad_norm_(
    params: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    frozen: Mapping[Tensor, Tensor] | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Norm of all live gradient elements before they are scaled to at most max_norm, in place.

    As torch.nn.utils.clip_grad_norm_, except that elements with True in `frozen` (parameter -> bool
    tensor, broadcastable to it) count in no norm and keep their gradient's bits. With
    error_if_nonfinite a norm that is NaN or infinite raises RuntimeError and nothing is scaled.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    frozen = {} if frozen is None else frozen
    for p in params:
        if p in frozen:
            check_frozen("clip_grad_norm_: a mask in frozen", frozen[p], "its parameter", p.shape)
    norm = _total_norm(params, frozen, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {norm_type} of the live gradients is {float(norm)}"
        )
    scale = _clip_scale(norm, max_norm)
    for p in params:
        if p.grad is not None:
            scaled = p.grad * scale.to(p.grad)
            p.grad.copy_(torch.where(frozen[p], p.grad, scaled) if p in frozen else scaled)
    return norm


def _clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: torch.nn.utils.clip_grad_norm_


class _MaskedOptimizer(torch.optim.Optimizer):
    """What the three optimizers share: masks, the loop over tensors, checkpoints."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        frozen: Mapping[Parameter, Tensor] | None,
        freeze_state: FreezeState,
        max_grad_norm: float | None,
        backend: str | None,
    ) -> None:
        name = type(self).__name__
        if freeze_state not in ("paused", "dropped"):
            raise ValueError(
                f"{name}: freeze_state must be paused or dropped, got {freeze_state!r}"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm must be positive, got {max_grad_norm}")
        for option in ("lr", "weight_decay", "eps", "momentum"):
            if option in defaults and not defaults[option] >= 0:
                raise ValueError(f"{name}: {option} must be at least 0, got {defaults[option]}")
        for index, beta in enumerate(defaults.get("betas", ())):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: betas[{index}] must be in [0, 1), got {beta}")
        super().__init__(params, defaults)
        self.freeze_state = freeze_state
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self._frozen: dict[Tensor, Tensor] = {}
        for param, mask in (frozen or {}).items():
            self.set_frozen(param, mask)

    def __getstate__(self) -> dict[str, Any]:
        own = ("freeze_state", "max_grad_norm", "backend", "_frozen")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @property
    def frozen(self) -> Mapping[Tensor, Tensor]:
        """The masks in force: parameter -> bool tensor that broadcasts to it."""
        return MappingProxyType(self._frozen)

    @torch.no_grad()
    def set_frozen(self, param: Tensor, mask: Tensor | None) -> None:
        """From the next step on, exactly the elements of `param` with True in `mask` are frozen.

        mask: bool, broadcastable to param, copied; None releases all. An element frozen later keeps
        its moments and step count for its release ("paused"), or loses them at once ("dropped").
        Released elements count their own steps, so bias correction is right for each of them.
        """
        name = type(self).__name__
        if not any(param is p for p in self._params()):
            raise ValueError(f"{name}.set_frozen: the parameter is not in this optimizer")
        if mask is None:
            mask = torch.zeros((), dtype=torch.bool)
        check_frozen(f"{name}.set_frozen: mask", mask, "the parameter", param.shape)
        mask = mask.detach().to(param.device, copy=True)
        before = self._frozen.get(param, mask.new_zeros(()))
        if param in self.state:
            mask = self._carry(self.state[param], before, mask)
        self._frozen[param] = mask

    def _carry(self, state: dict[str, Any], before: Tensor, mask: Tensor) -> Tensor:
        """State moved from one mask to the next; returns the mask in the shape its counts need."""
        frozen_now = mask & ~before
        if self.freeze_state == "dropped":
            for name, moment in state.items():
                if name != "step" and moment is not None:
                    moment.copy_(torch.where(frozen_now, 0, moment))
        if "step" not in state:
            return mask
        count = state["step"]
        if count.dim() == 0 and not bool((before & ~mask).any()):
            # One count serves the live elements still, if no frozen one has another count than 0.
            unchanged = before.shape == mask.shape and not bool(frozen_now.any())
            if unchanged or (self.freeze_state == "dropped" and mask.dim() > 0):
                return mask
        if count.shape != before.shape:  # one count and a mask from the first step on
            count = torch.where(before, 0, count)
        if self.freeze_state == "dropped":
            count = torch.where(frozen_now, 0, count)
        shape = (count != mask).shape
        state["step"] = count.expand(shape).clone()
        return mask.expand(shape).clone()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors shaped like a parameter."""

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        frozen: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        """One step of these parameters by the optimizer's op."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the live elements of parameters with a gradient; the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = None
        if self.max_grad_norm is not None:
            norm = _total_norm(self._params(), self._frozen, 2.0)
            grad_scale = _clip_scale(norm, self.max_grad_norm)
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for (device, _), params in alike.items():
                self._step_alike(group, params, device, grad_scale)
        return loss

    def _step_alike(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        device: torch.device,
        grad_scale: Tensor | None,
    ) -> None:
        """The step of one group's parameters of one device and dtype."""
        for p in params:
            grad = cast(Tensor, p.grad)
            if grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__}: a gradient is sparse; pass grad.to_dense()"
                )
            state = self.state[p]
            for name in self._moments(group):
                if state.get(name) is None:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        free = torch.zeros((), dtype=torch.bool, device=device)
        any_frozen = any(p in self._frozen for p in params)
        frozen = [self._frozen.get(p, free) for p in params] if any_frozen else []
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(())
        else:
            lr = torch.full((), lr, dtype=torch.float64, device=device)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device)
        self._update(group, params, [cast(Tensor, p.grad) for p in params], frozen, lr, grad_scale)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with every mask as "frozen" in its parameter's state."""
        packed = super().state_dict()
        for index, param in enumerate(self._params()):
            if param in self._frozen:
                entry = packed["state"].get(index, {})
                packed["state"][index] = {**entry, "frozen": self._frozen[param].clone()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of an optimizer with the same masks (torch.optim's own: with nothing frozen).

        A mask that differs from the one in force raises ValueError and changes nothing.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = self._params()
        entries = dict(state_dict["state"])
        masks: dict[Tensor, Tensor] = {}
        if len(saved) == len(params):  # otherwise torch refuses below
            for index, (key, param) in enumerate(zip(saved, params, strict=True)):
                entry = dict(entries.pop(key, {}))
                mask = entry.pop("frozen", None)
                self._check_same_mask(index, param, mask)
                if mask is not None:
                    masks[param] = mask.to(param.device, torch.bool, copy=True)
                if entry:
                    entries[key] = entry
        super().load_state_dict({**state_dict, "state": entries})
        self._frozen.update(masks)  # the same elements, in the shape of the loaded step counts

    def _check_same_mask(self, index: int, param: Tensor, saved: Tensor | None) -> None:
        where = f"{type(self).__name__}.load_state_dict: parameter {index}"
        free = torch.zeros((), dtype=torch.bool, device=param.device)
        mask = free if saved is None else saved.to(param.device, torch.bool)
        check_frozen(f"{where}: its frozen mask", mask, "the parameter", param.shape)
        differing = int((mask ^ self._frozen.get(param, free)).expand(param.shape).sum())
        if differing:
            raise ValueError(
                f"{where}: {differing} of {param.numel()} elements are frozen in the checkpoint or "
                "here, but not in both; call set_frozen with the checkpoint's mask before loading"
            )


class MaskedAdamW(_MaskedOptimizer):
    """AdamW [Loshchilov and Hutter 2019] or, with decoupled_weight_decay=False, Adam, with masks.

    Options as torch.optim.AdamW, and
    frozen         parameter -> bool tensor broadcastable to it (per expert, row or element), True =
                   must not change; also `set_frozen` at any time between steps
    freeze_state   what an element frozen later does with its state: "paused" keeps it for its
                   release, "dropped" zeroes it
    max_grad_norm  scales the gradients of a step so that the norm of all live ones is at most this
    backend        passed on to the op masked_adam_
    """

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
        frozen: Mapping[Parameter, Tensor] | None = None,
        freeze_state: FreezeState = "paused",
        max_grad_norm: float | None = None,
        backend: str | None = None,
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
        super().__init__(params, defaults, frozen, freeze_state, max_grad_norm, backend)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        frozen: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        masked_adam_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            frozen,
            lr,
            grad_scale,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            backend=self.backend,
        )


class MaskedSGD(_MaskedOptimizer):
    """SGD with momentum, Nesterov momentum and coupled weight decay, with masks.

    Options as torch.optim.SGD without dampening; frozen, freeze_state, max_grad_norm and backend as
    in MaskedAdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        frozen: Mapping[Parameter, Tensor] | None = None,
        freeze_state: FreezeState = "paused",
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        if nesterov and momentum <= 0:
            raise ValueError(f"MaskedSGD: nesterov needs momentum > 0, got {momentum}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, frozen, freeze_state, max_grad_norm, backend)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        frozen: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        with_momentum = group["momentum"] != 0
        masked_sgd_(
            params,
            grads,
            [self.state[p]["momentum_buffer"] for p in params] if with_momentum else [],
            frozen,
            lr,
            grad_scale,
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            backend=self.backend,
        )


class MaskedLion(_MaskedOptimizer):
    """Lion [Chen et al. 2023] with decoupled weight decay and masks.

    lr, betas, weight_decay, maximize as in the paper's Program 1; frozen, freeze_state,
    max_grad_norm and backend as in MaskedAdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        frozen: Mapping[Parameter, Tensor] | None = None,
        freeze_state: FreezeState = "paused",
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, frozen, freeze_state, max_grad_norm, backend)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        frozen: list[Tensor],
        lr: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        masked_lion_(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            frozen,
            lr,
            grad_scale,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            backend=self.backend,
        )
