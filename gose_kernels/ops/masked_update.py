"""masked_sgd_, masked_adam_, masked_lion_: optimizer steps that leave frozen elements alone.

For tensor n of the lists and element i, with g = grad[i] * grad_scale, negated for maximize:

    frozen[i]: param, moments and step keep their bits, whatever grad holds (NaN and infinity too)
    else, in the order of torch.optim:
    sgd    g += weight_decay * p;  momentum > 0: m = momentum * m + g,  g = m or, with nesterov,
           g + momentum * m;  p -= lr * g
    adam   step += 1;  decoupled: p *= 1 - lr * weight_decay, else g += weight_decay * p
           m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
           w = max(w, v) with amsgrad, else v
           p -= lr / (1 - beta1**step) * m / (sqrt(w) / sqrt(1 - beta2**step) + eps)
    lion   p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
           m = beta2 * m + (1 - beta2) * g                        [Chen et al. 2023, Program 1]

param, grad   lists of float32 | float64 tensors, one dtype per pair, any strides
momentum, exp_avg (m), exp_avg_sq (v), max_exp_avg_sq (w)
              lists of the shapes and dtypes of param; empty where the option does not use them
step          float32 list; each of the shape of its frozen mask (goes up where not frozen, so that
              elements released later restart their bias correction) or of shape [] (one count for
              the tensor: goes up at every call, the mask being an unchanging one)
frozen        list of bool tensors, True = must not change, each broadcastable to its param (one per
              expert, row or element); an empty list freezes nothing
lr            float32 | float64 tensor of shape []: a new value is neither a sync nor a recompile
grad_scale    the same, or None = 1: the product of loss unscaling and clipping

Frozen elements are selected out, never multiplied by 0. Everything is computed in the dtype of
param, except 1 - beta**step in float64. Empty lists and empty tensors are allowed; a live NaN
spreads as in torch.optim. A momentum starts at zero, which is torch's first step without dampening.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gose_kernels.masks import check_frozen
from gose_kernels.registry import Cost, native, reference, register


def _check_scalar(name: str, argument: str, value: Tensor | None) -> None:
    if value is None:
        return
    if value.dim() != 0 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: {argument} must be a float32 or float64 tensor of shape (), "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def _check(
    name: str,
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    states: dict[str, tuple[Sequence[Tensor], bool]],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """states: argument name -> (its list, whether the options use it)."""
    _check_scalar(name, "lr", lr)
    _check_scalar(name, "grad_scale", grad_scale)
    wanted = {"grad": (grad, True), **states, "frozen": (frozen, len(frozen) > 0)}
    for argument, (tensors, used) in wanted.items():
        if len(tensors) != (len(param) if used else 0):
            raise ValueError(
                f"{name}: {argument} must have {len(param) if used else 0} tensors, "
                f"got {len(tensors)}"
            )
    for n, p in enumerate(param):
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: param[{n}] must be float32 or float64, got {p.dtype}")
        for argument, (tensors, used) in {"grad": (grad, True), **states}.items():
            if used and (tensors[n].shape != p.shape or tensors[n].dtype != p.dtype):
                raise ValueError(
                    f"{name}: {argument}[{n}] must be {p.dtype} of shape {tuple(p.shape)}, "
                    f"got {tensors[n].dtype} of shape {tuple(tensors[n].shape)}"
                )
        if frozen:
            check_frozen(f"{name}: frozen[{n}]", frozen[n], f"param[{n}]", p.shape)


def _check_step(step: Sequence[Tensor], param: Sequence[Tensor], frozen: Sequence[Tensor]) -> None:
    if len(step) != len(param):
        raise ValueError(f"masked_adam_: step must have {len(param)} tensors, got {len(step)}")
    for n, count in enumerate(step):
        mask_shape = frozen[n].shape if frozen else torch.Size()
        if count.dtype != torch.float32 or count.shape not in (torch.Size(), mask_shape):
            raise ValueError(
                f"masked_adam_: step[{n}] must be float32 of shape () or of its mask "
                f"{tuple(mask_shape)}, got {count.dtype} of shape {tuple(count.shape)}"
            )


def _keep(frozen: Sequence[Tensor], n: int, tensor: Tensor, new: Tensor) -> None:
    """tensor becomes `new` where not frozen.

    On bits, because torch.where takes one element at a time, ten times longer on a random mask.
    """
    if frozen:
        integer = torch.int32 if tensor.dtype == torch.float32 else torch.int64
        bits = tensor.view(integer)
        all_ones_if_live = frozen[n].to(integer) - 1
        new = (bits ^ ((bits ^ new.view(integer)) & all_ones_if_live)).view(tensor.dtype)
    tensor.copy_(new)


def _gradient(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    grad = grad if grad_scale is None else grad * grad_scale.to(grad.dtype)
    return -grad if maximize else grad


def masked_sgd_reference_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    _check_sgd(param, grad, momentum_buffer, frozen, lr, grad_scale, momentum, nesterov)
    for n, p in enumerate(param):
        g = _gradient(grad[n], grad_scale, maximize)
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            m = momentum * momentum_buffer[n] + g
            g = g + momentum * m if nesterov else m
            _keep(frozen, n, momentum_buffer[n], m)
        _keep(frozen, n, p, p - lr.to(p.dtype) * g)


def _check_sgd(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    momentum: float,
    nesterov: bool,
) -> None:
    if nesterov and momentum <= 0:
        raise ValueError(f"masked_sgd_: nesterov needs momentum > 0, got {momentum}")
    states = {"momentum_buffer": (momentum_buffer, momentum != 0)}
    _check("masked_sgd_", param, grad, states, frozen, lr, grad_scale)


def masked_adam_reference_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    _check_adam(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, frozen, lr, grad_scale, amsgrad
    )
    for n, p in enumerate(param):
        counts_by_mask = bool(frozen) and step[n].shape == frozen[n].shape
        _keep(frozen if counts_by_mask else [], n, step[n], step[n] + 1)
        g = _gradient(grad[n], grad_scale, maximize)
        new = p
        if weight_decay != 0 and decoupled:
            new = p * (1 - lr * weight_decay).to(p.dtype)
        elif weight_decay != 0:
            g = g + weight_decay * p
        m = exp_avg[n].lerp(g, 1 - beta1)
        v = exp_avg_sq[n] * beta2 + (1 - beta2) * g * g
        w = torch.maximum(max_exp_avg_sq[n], v) if amsgrad else v
        correction1 = 1 - beta1 ** step[n].double()
        correction2 = 1 - beta2 ** step[n].double()
        denominator = w.sqrt() / correction2.sqrt().to(p.dtype) + eps
        new = new - (lr / correction1).to(p.dtype) * (m / denominator)
        _keep(frozen, n, exp_avg[n], m)
        _keep(frozen, n, exp_avg_sq[n], v)
        if amsgrad:
            _keep(frozen, n, max_exp_avg_sq[n], w)
        _keep(frozen, n, p, new)


def _check_adam(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    amsgrad: bool,
) -> None:
    states = {
        "exp_avg": (exp_avg, True),
        "exp_avg_sq": (exp_avg_sq, True),
        "max_exp_avg_sq": (max_exp_avg_sq, amsgrad),
    }
    _check("masked_adam_", param, grad, states, frozen, lr, grad_scale)
    _check_step(step, param, frozen)


def masked_lion_reference_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    _check("masked_lion_", param, grad, {"exp_avg": (exp_avg, True)}, frozen, lr, grad_scale)
    for n, p in enumerate(param):
        g = _gradient(grad[n], grad_scale, maximize)
        new = p if weight_decay == 0 else p * (1 - lr * weight_decay).to(p.dtype)
        direction = (beta1 * exp_avg[n] + (1 - beta1) * g).sign()
        _keep(frozen, n, p, new - lr.to(p.dtype) * direction)
        _keep(frozen, n, exp_avg[n], beta2 * exp_avg[n] + (1 - beta2) * g)


def _sgd_fake(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    _check_sgd(param, grad, momentum_buffer, frozen, lr, grad_scale, momentum, nesterov)


def _adam_fake(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    amsgrad: bool = False,
    backend: str | None = None,
    **_options: float,
) -> None:
    _check_adam(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, frozen, lr, grad_scale, amsgrad
    )


def _lion_fake(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    backend: str | None = None,
    **_options: float,
) -> None:
    _check("masked_lion_", param, grad, {"exp_avg": (exp_avg, True)}, frozen, lr, grad_scale)


def _cost(
    param: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    frozen: Sequence[Tensor],
    flops_per_element: int,
) -> Cost:
    """Cost with every element live: counting the frozen ones would cost a pass or a sync."""
    elements = sum(p.numel() for p in param)
    moved = sum(3 * p.numel() * p.element_size() for p in param)
    moved += sum(2 * t.numel() * t.element_size() for state in states for t in state)
    moved += sum(mask.numel() for mask in frozen)
    return Cost(elements, moved, flops_per_element * elements)


def _sgd_cost(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> Cost:
    flops = 2 + 2 * (momentum != 0) + 2 * nesterov + 2 * (weight_decay != 0)
    return _cost(param, [momentum_buffer], frozen, flops)


def _adam_cost(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    **_options: object,
) -> Cost:
    # m 3, v 4, denominator 3, step 3, decay 1; a square root and a division count as one each
    return _cost(param, [exp_avg, exp_avg_sq, max_exp_avg_sq, step], frozen, 14)


def _lion_cost(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    frozen: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    **_options: object,
) -> Cost:
    return _cost(param, [exp_avg], frozen, 9)  # direction 4, moment 3, step 2


def _example_lists(
    device: torch.device, dtype: torch.dtype, num_states: int
) -> tuple[list[list[Tensor]], list[Tensor], Tensor]:
    """param, grad and states; frozen; lr."""
    shapes = ((4, 8), (5,))
    lists = [
        [torch.full(s, 0.5, device=device, dtype=dtype) for s in shapes]
        for _ in range(2 + num_states)
    ]
    frozen = [torch.zeros(4, 1, device=device, dtype=torch.bool)]
    frozen.append(torch.ones(5, device=device, dtype=torch.bool))
    return lists, frozen, torch.full((), 0.1, device=device)


def _sgd_example(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    (param, grad), frozen, lr = _example_lists(device, dtype, 0)
    return param, grad, [], frozen, lr


def _adam_example(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    lists, frozen, lr = _example_lists(device, dtype, 2)
    step = [torch.zeros((), device=device) for _ in frozen]
    return *lists, [], step, frozen, lr


def _lion_example(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    lists, frozen, lr = _example_lists(device, dtype, 1)
    return *lists, frozen, lr


def _unless_float64(param: Sequence[Tensor], *_args: object, **_options: object) -> str | None:
    for n, p in enumerate(param):
        if p.dtype == torch.float64:
            return f"takes float32, got float64 in param[{n}]"
    return None


def _adam_unless(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    frozen: Sequence[Tensor],
    *_args: object,
    **_options: object,
) -> str | None:
    """Counts by columns: several elements far apart would share one count."""
    for n, (p, count, mask) in enumerate(zip(param, step, frozen, strict=False)):
        if count.dim() > 0 and count.shape == mask.shape != p.shape:
            wide = (1,) * (p.dim() - mask.dim()) + tuple(mask.shape)
            repeated = [own != size for own, size in zip(wide, p.shape, strict=False)]
            if any(repeated) and max(wide[repeated.index(True) :]) > 1:
                return f"takes counts per expert, row or element, got {tuple(wide)} in step[{n}]"
    return _unless_float64(param)


masked_sgd_ = register(
    "masked_sgd_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] momentum_buffer, "
    "Tensor[] frozen, Tensor lr, Tensor? grad_scale=None, *, float momentum=0.0, "
    "float weight_decay=0.0, bool nesterov=False, bool maximize=False, str? backend=None) -> ()",
    native("cpu", "masked_sgd_", unless=_unless_float64, writes=(0, 2)),
    reference(masked_sgd_reference_),
    fake=_sgd_fake,
    cost=_sgd_cost,
    example=_sgd_example,
)

masked_adam_ = register(
    "masked_adam_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] max_exp_avg_sq, Tensor(e!)[] step, Tensor[] frozen, "
    "Tensor lr, Tensor? grad_scale=None, *, float beta1=0.9, float beta2=0.999, float eps=1e-8, "
    "float weight_decay=0.0, bool decoupled=True, bool amsgrad=False, bool maximize=False, "
    "str? backend=None) -> ()",
    native("cpu", "masked_adam_", unless=_adam_unless, writes=(0, 2, 3, 4, 5)),
    reference(masked_adam_reference_),
    fake=_adam_fake,
    cost=_adam_cost,
    example=_adam_example,
)

masked_lion_ = register(
    "masked_lion_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor[] frozen, "
    "Tensor lr, Tensor? grad_scale=None, *, float beta1=0.9, float beta2=0.99, "
    "float weight_decay=0.0, bool maximize=False, str? backend=None) -> ()",
    native("cpu", "masked_lion_", unless=_unless_float64, writes=(0, 2)),
    reference(masked_lion_reference_),
    fake=_lion_fake,
    cost=_lion_cost,
    example=_lion_example,
)
