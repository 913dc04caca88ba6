"""distill_loss: task loss and distillation loss of every sample, from logits, weighed and averaged.

    q = softmax_c(student[n])             q_tau = softmax_c(student[n] / tau)
    p = softmax_c(teacher[n] / tau)
    y = the one-hot label or the soft label;  y' = (1 - label_smoothing) * y + label_smoothing / C
    CE[n] = -sum_c y'[c] * log q[c]       KL[n] = sum_c p[c] * (log p[c] - log q_tau[c])
    term[n] = weight[n] * (a[n] * CE[n] + (1 - a[n]) * tau**2 * KL[n] / r),   a = task_weight
    reduction "mean": sum_n term[n] / B (not divided by the sum of the weights; 0 for B = 0)
    reduction "none": term_B
    r = 1 for kl_reduction "batchmean";  C for "numel", the form of DeiT and m2mKD code

Top-k teacher cache: with teacher_id_BJ given, teacher holds logits of those J classes only, and
teacher_tail_B the teacher's probability (at this tau) of all other classes together. Then p is
(1 - tail) * softmax(teacher / tau) on the J classes and KL that of J + 1 outcomes, the last one
being "another class": a lower bound of the whole KL, equal to it for J = C.

student        float32 | bfloat16 | float16 | float64  [B, C], C >= 1, any strides
teacher        the same dtypes                         [B, C], or [B, J] with teacher_id_BJ
label          int64 [B] in [0, C), or floating point [B, C] not negative (need not sum to 1)
weight_B       floating point [B] or None = 1
task_weight_B  floating point [B] in [0, 1] or None = the option task_weight
teacher_id_BJ  int64 [B, J], distinct classes of a row, in [0, C); with it teacher_tail_B
teacher_tail_B floating point [B] in [0, 1]; 0 where J = C
returns        float32 (float64 if student is), computed in that dtype

Values out of their range raise on torch and cpu and are trusted on cuda and triton. Logits may be
-inf: such a class of the teacher has p = 0, and a class with y' = 0 or p = 0 adds nothing whatever
q is there; where y' or p is positive and q is 0 the loss is +inf. A row of only -inf, NaN or +inf
gives NaN. A part whose factor is 0 (weight, a, 1 - a) is left out, never multiplied.
KL is summed as p * (exp(-e) - 1 + e) with e = log p - log q_tau, which differs by sum q - sum p = 0
and has no cancellation: a KL of 1e-6 at tau = 100 keeps its relative precision in float32.
Differentiable in student only; a teacher, label or weight that requires a gradient raises.
    d term / d student = weight * (a * (Y q - y') + (1 - a) * tau / r * (q_tau - p)),  Y = sum_c y'
in the tail with q_tau * (1 - tail / sum of q_tau in the tail) in place of q_tau - p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, float32

from gose_kernels.registry import Cost, reference, register


def _check(
    name: str,
    student_BC: Tensor,
    teacher: Tensor,
    label: Tensor,
    weight_B: Tensor | None = None,
    task_weight_B: Tensor | None = None,
    teacher_id_BJ: Tensor | None = None,
    teacher_tail_B: Tensor | None = None,
    task_weight: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    kl_reduction: str = "batchmean",
    reduction: str = "mean",
) -> None:
    for argument, tensor in (("student_BC", student_BC), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {argument} must be floating point, got {tensor.dtype}")
    if student_BC.dim() != 2 or student_BC.shape[1] < 1:
        raise ValueError(
            f"{name}: student_BC must have shape (B, C) with C >= 1, got {tuple(student_BC.shape)}"
        )
    B, C = student_BC.shape
    _check_teacher(name, teacher, teacher_id_BJ, teacher_tail_B, B, C)
    wanted = ((B,), "int64") if label.dim() == 1 else ((B, C), "floating point")
    fits_dtype = label.dtype == torch.int64 if label.dim() == 1 else label.is_floating_point()
    if tuple(label.shape) != wanted[0] or not fits_dtype:
        raise ValueError(
            f"{name}: label must be int64 of shape ({B},) or floating point of shape ({B}, {C}), "
            f"got {label.dtype} of shape {tuple(label.shape)}"
        )
    for argument, per_sample in (("weight_B", weight_B), ("task_weight_B", task_weight_B)):
        _check_per_sample(name, argument, per_sample, B)
    if not 0 <= task_weight <= 1:
        raise ValueError(f"{name}: task_weight must be in [0, 1], got {task_weight}")
    if not tau > 0:
        raise ValueError(f"{name}: tau must be positive, got {tau}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if kl_reduction not in ("batchmean", "numel"):
        raise ValueError(f"{name}: kl_reduction must be batchmean or numel, got {kl_reduction!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{name}: reduction must be mean or none, got {reduction!r}")


def _check_per_sample(name: str, argument: str, value_B: Tensor | None, B: int) -> None:
    if value_B is not None and (tuple(value_B.shape) != (B,) or not value_B.is_floating_point()):
        raise ValueError(
            f"{name}: {argument} must be floating point of shape ({B},), "
            f"got {value_B.dtype} of shape {tuple(value_B.shape)}"
        )


def _check_teacher(
    name: str,
    teacher: Tensor,
    teacher_id_BJ: Tensor | None,
    teacher_tail_B: Tensor | None,
    B: int,
    C: int,
) -> None:
    if (teacher_id_BJ is None) != (teacher_tail_B is None):
        given = "teacher_tail_B" if teacher_id_BJ is None else "teacher_id_BJ"
        raise ValueError(f"{name}: teacher_id_BJ and teacher_tail_B go together, got only {given}")
    if teacher_id_BJ is None:
        if tuple(teacher.shape) != (B, C):
            raise ValueError(
                f"{name}: teacher must have the shape of student_BC {(B, C)}, "
                f"got {tuple(teacher.shape)}"
            )
        return
    if teacher.dim() != 2 or teacher.shape[0] != B or not 1 <= teacher.shape[1] <= C:
        raise ValueError(
            f"{name}: teacher must have shape ({B}, J) with J in [1, C={C}], "
            f"got {tuple(teacher.shape)}"
        )
    if teacher_id_BJ.shape != teacher.shape or teacher_id_BJ.dtype != torch.int64:
        raise ValueError(
            f"{name}: teacher_id_BJ must be int64 of the shape of teacher {tuple(teacher.shape)}, "
            f"got {teacher_id_BJ.dtype} of shape {tuple(teacher_id_BJ.shape)}"
        )
    _check_per_sample(name, "teacher_tail_B", teacher_tail_B, B)


def _within(values: Tensor | None, low: float, high: float) -> bool:
    return values is None or bool(((values >= low) & (values <= high)).all())


def _check_values(
    name: str,
    C: int,
    label: Tensor,
    task_weight_B: Tensor | None,
    teacher_id_BJ: Tensor | None,
    teacher_tail_B: Tensor | None,
) -> None:
    if label.dim() == 1 and not _within(label, 0, C - 1):
        raise ValueError(f"{name}: label must hold classes in [0, C={C})")
    if label.dim() == 2 and not _within(label, 0, torch.inf):
        raise ValueError(f"{name}: label must hold no negative weight and no NaN")
    if not _within(task_weight_B, 0, 1):
        raise ValueError(f"{name}: task_weight_B must hold values in [0, 1]")
    if not _within(teacher_id_BJ, 0, C - 1):
        raise ValueError(f"{name}: teacher_id_BJ must hold classes in [0, C={C})")
    if teacher_id_BJ is not None:
        id_BJ = teacher_id_BJ.sort(dim=1).values
        if bool((id_BJ[:, 1:] == id_BJ[:, :-1]).any()):
            raise ValueError(f"{name}: teacher_id_BJ must hold distinct classes in every row")
    if not _within(teacher_tail_B, 0, 1):
        raise ValueError(f"{name}: teacher_tail_B must hold values in [0, 1]")


def _target(label: Tensor, C: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """y'."""
    y_BC = label.to(dtype)
    if label.dim() == 1:
        y_BC = torch.nn.functional.one_hot(label, C).to(dtype)
    return (1 - label_smoothing) * y_BC + label_smoothing / C


def _outcomes(
    student_BC: Tensor,
    teacher: Tensor,
    teacher_id_BJ: Tensor | None,
    teacher_tail_B: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities at tau of teacher and student over C classes, or J classes and the rest."""
    log_q = (student_BC / tau).log_softmax(dim=1)
    log_p = (teacher.to(student_BC.dtype) / tau).log_softmax(dim=1)
    if teacher_id_BJ is None or teacher_tail_B is None:
        return log_p, log_q
    tail_B1 = teacher_tail_B.to(student_BC.dtype).unsqueeze(1)
    rest_B1 = log_q.scatter(1, teacher_id_BJ, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p = torch.cat((log_p + (-tail_B1).log1p(), tail_B1.log()), dim=1)
    return log_p, torch.cat((log_q.gather(1, teacher_id_BJ), rest_B1), dim=1)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p * (exp(-e) - 1 + e), e = log p - log q: never negative, q where p = 0."""
    p, q = log_p.exp(), log_q.exp()
    e = torch.where(p == 0, 0, log_p - log_q)
    # Taylor's series where the difference cancels; 5e-13 from exact at the edge.
    series = 1 - e / 7 * (1 - e / 8)
    for divisor in (6, 5, 4, 3):
        series = 1 - e / divisor * series
    near = p * (e * e / 2 * series)
    far = torch.where(p == 0, 0, p * e) + (q - p)
    return torch.where(p == 0, q, torch.where(e.abs() < 0.1, near, far))


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q - p, to full relative precision where they are close."""
    p, q = log_p.exp(), log_q.exp()
    e = log_p - log_q
    return torch.where(e.abs() < 0.5, p * torch.expm1(-e), q - p)


def _factors(
    student_BC: Tensor,
    weight_B: Tensor | None,
    task_weight_B: Tensor | None,
    task_weight: float,
    tau: float,
    kl_reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What CE[n] and KL[n] are multiplied with."""
    B, C = student_BC.shape
    device = student_BC.device
    w_B = torch.ones(B, dtype=dtype, device=device) if weight_B is None else weight_B.to(dtype)
    a_B = torch.full((B,), task_weight, dtype=dtype, device=device)
    if task_weight_B is not None:
        a_B = task_weight_B.to(dtype)
    return w_B * a_B, w_B * (1 - a_B) * (tau * tau / (C if kl_reduction == "numel" else 1))


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, 0 where the factor is 0, infinite and NaN values too."""
    return torch.where(factor != 0, factor * value, 0)


def distill_loss_reference(
    student_BC: Tensor,
    teacher: Tensor,
    label: Tensor,
    weight_B: Tensor | None = None,
    task_weight_B: Tensor | None = None,
    teacher_id_BJ: Tensor | None = None,
    teacher_tail_B: Tensor | None = None,
    *,
    task_weight: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    kl_reduction: str = "batchmean",
    reduction: str = "mean",
) -> Tensor:
    tensors = (student_BC, teacher, label, weight_B, task_weight_B, teacher_id_BJ, teacher_tail_B)
    options = (task_weight, tau, label_smoothing, kl_reduction, reduction)
    _check("distill_loss", *tensors, *options)
    B, C = student_BC.shape
    _check_values("distill_loss", C, label, task_weight_B, teacher_id_BJ, teacher_tail_B)
    dtype = torch.promote_types(student_BC.dtype, float32)
    logit_BC = student_BC.to(dtype)
    target_BC = _target(label, C, label_smoothing, dtype)
    ce_B = -_product(target_BC, logit_BC.log_softmax(dim=1)).sum(dim=1)
    kl_B = _kl_terms(*_outcomes(logit_BC, teacher, teacher_id_BJ, teacher_tail_B, tau)).sum(dim=1)
    ce_factor_B, kl_factor_B = _factors(
        student_BC, weight_B, task_weight_B, task_weight, tau, kl_reduction, dtype
    )
    term_B = _product(ce_factor_B, ce_B) + _product(kl_factor_B, kl_B)
    return term_B if reduction == "none" else term_B.sum() / max(B, 1)


def distill_loss_backward_reference(
    grad: Tensor,
    student_BC: Tensor,
    teacher: Tensor,
    label: Tensor,
    weight_B: Tensor | None = None,
    task_weight_B: Tensor | None = None,
    teacher_id_BJ: Tensor | None = None,
    teacher_tail_B: Tensor | None = None,
    *,
    task_weight: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    kl_reduction: str = "batchmean",
    reduction: str = "mean",
) -> Tensor:
    """Gradient of student_BC, in its dtype; grad has the shape and dtype of the loss."""
    tensors = (student_BC, teacher, label, weight_B, task_weight_B, teacher_id_BJ, teacher_tail_B)
    options = (task_weight, tau, label_smoothing, kl_reduction, reduction)
    _check("distill_loss_backward", *tensors, *options)
    _check_grad(grad, student_BC, reduction)
    B, C = student_BC.shape
    _check_values("distill_loss_backward", C, label, task_weight_B, teacher_id_BJ, teacher_tail_B)
    logit_BC = student_BC.to(grad.dtype)
    target_BC = _target(label, C, label_smoothing, grad.dtype)
    ce_BC = target_BC.sum(dim=1, keepdim=True) * logit_BC.softmax(dim=1) - target_BC
    log_p, log_q = _outcomes(logit_BC, teacher, teacher_id_BJ, teacher_tail_B, tau)
    kl_BC = _difference(log_p, log_q)
    if teacher_id_BJ is not None:
        # A class of the tail gets the tail's q - p in proportion to its own q.
        share_BC = (logit_BC / tau).scatter(1, teacher_id_BJ, -torch.inf).softmax(dim=1)
        share_BC = torch.where(log_q[:, -1:] == -torch.inf, 0, share_BC)
        kl_BC = (share_BC * kl_BC[:, -1:]).scatter(1, teacher_id_BJ, kl_BC[:, :-1])
    ce_factor_B, kl_factor_B = _factors(
        student_BC, weight_B, task_weight_B, task_weight, tau, kl_reduction, grad.dtype
    )
    slope_BC = _product(ce_factor_B[:, None], ce_BC) + _product(kl_factor_B[:, None] / tau, kl_BC)
    grad_B1 = grad.unsqueeze(1) if reduction == "none" else grad / max(B, 1)
    return (grad_B1 * slope_BC).to(student_BC.dtype)


def _loss_like(student_BC: Tensor, reduction: str = "mean", **_options: Any) -> Tensor:
    """An empty tensor of the loss's shape and dtype."""
    shape = student_BC.shape[:1] if reduction == "none" else ()
    return student_BC.new_empty(shape, dtype=torch.promote_types(student_BC.dtype, float32))


def _check_grad(grad: Tensor, student_BC: Tensor, reduction: str = "mean", **_options: Any) -> None:
    wanted = _loss_like(student_BC, reduction)
    if grad.shape != wanted.shape or grad.dtype != wanted.dtype:
        raise ValueError(
            f"distill_loss_backward: grad must be {wanted.dtype} of shape {tuple(wanted.shape)}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)}"
        )


def _fake(student_BC: Tensor, *tensors: Any, backend: str | None = None, **options: Any) -> Tensor:
    _check("distill_loss", student_BC, *tensors, **options)
    return _loss_like(student_BC, **options)


def _backward_fake(
    grad: Tensor, student_BC: Tensor, *tensors: Any, backend: str | None = None, **options: Any
) -> Tensor:
    _check("distill_loss_backward", student_BC, *tensors, **options)
    _check_grad(grad, student_BC, **options)
    return student_BC.new_empty(student_BC.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    names = ("teacher", "label", "weight_B", "task_weight_B", "teacher_id_BJ", "teacher_tail_B")
    for name, needs_grad in zip(names, ctx.needs_input_grad[1:], strict=False):
        if needs_grad:
            raise ValueError(
                f"distill_loss: {name} requires a gradient and gets none; pass {name}.detach()"
            )
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_BC = torch.ops.gose.distill_loss_backward(grad, *ctx.saved_tensors, **ctx.options)
    return grad_BC, None, None, None, None, None, None


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _cost(student_BC: Tensor, *tensors: Tensor | None, **_options: Any) -> Cost:
    # per logit: two softmaxes of the student 6, one of the teacher 3, terms of KL 3 and of CE 2
    B = student_BC.shape[0]
    return Cost(B, _bytes(student_BC, *tensors) + 4 * B, 14 * student_BC.numel())


def _backward_cost(
    grad: Tensor, student_BC: Tensor, *tensors: Tensor | None, **_options: Any
) -> Cost:
    # per logit: the softmaxes 9, the two differences and their weighed sum 5
    moved = _bytes(grad, student_BC, student_BC, *tensors)
    return Cost(student_BC.shape[0], moved, 14 * student_BC.numel())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student_BC = torch.ones(4, 10, device=device, dtype=dtype)
    return student_BC, student_BC + 1, torch.zeros(4, device=device, dtype=torch.int64)


def _backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    grad = torch.ones((), device=device, dtype=torch.promote_types(dtype, float32))
    return grad, *_example(device, dtype)


_TENSORS = (
    "Tensor student_BC, Tensor teacher, Tensor label, Tensor? weight_B=None, "
    "Tensor? task_weight_B=None, Tensor? teacher_id_BJ=None, Tensor? teacher_tail_B=None"
)
_OPTIONS = (
    "float task_weight=0.5, float tau=1.0, float label_smoothing=0.0, "
    "str kl_reduction='batchmean', str reduction='mean', str? backend=None"
)

distill_loss = register(
    f"distill_loss({_TENSORS}, *, {_OPTIONS}) -> Tensor",
    reference(distill_loss_reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
    example=_example,
)

distill_loss_backward = register(
    f"distill_loss_backward(Tensor grad, {_TENSORS}, *, {_OPTIONS}) -> Tensor",
    reference(distill_loss_backward_reference),
    fake=_backward_fake,
    cost=_backward_cost,
    example=_backward_example,
)
