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

distill_loss_train, which autograd runs instead, returns (loss, grad_BC): the gradient of sum term
(/ B for "mean") in the dtype of student, made in the pass that makes the loss. It is all that is
kept for the backward, which multiplies it with the gradient of the loss, in place if it may, and
not at all by 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, float16, float32

from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, register


class DistillCall(NamedTuple):
    """The arguments of distill_loss and distill_loss_train, in schema order."""

    student_BC: Tensor
    teacher: Tensor
    label: Tensor
    weight_B: Tensor | None = None
    task_weight_B: Tensor | None = None
    teacher_id_BJ: Tensor | None = None
    teacher_tail_B: Tensor | None = None
    task_weight: float = 0.5
    tau: float = 1.0
    label_smoothing: float = 0.0
    kl_reduction: str = "batchmean"
    reduction: str = "mean"
    backend: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What everything is computed in."""
        return torch.promote_types(self.student_BC.dtype, float32)


def check(call: DistillCall) -> None:
    """ValueError for arguments that do not fit together; values are `_check_values`'s."""
    for argument, tensor in (("student_BC", call.student_BC), ("teacher", call.teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"distill_loss: {argument} must be floating point, got {tensor.dtype}")
    if call.student_BC.dim() != 2 or call.student_BC.shape[1] < 1:
        raise ValueError(
            "distill_loss: student_BC must have shape (B, C) with C >= 1, "
            f"got {tuple(call.student_BC.shape)}"
        )
    B, C = call.student_BC.shape
    label = call.label
    _check_teacher(call, B, C)
    wanted = ((B,), "int64") if label.dim() == 1 else ((B, C), "floating point")
    fits_dtype = label.dtype == torch.int64 if label.dim() == 1 else label.is_floating_point()
    if tuple(label.shape) != wanted[0] or not fits_dtype:
        raise ValueError(
            f"distill_loss: label must be int64 of shape ({B},) or floating point of shape "
            f"({B}, {C}), got {label.dtype} of shape {tuple(label.shape)}"
        )
    _check_per_sample("weight_B", call.weight_B, B)
    _check_per_sample("task_weight_B", call.task_weight_B, B)
    if not 0 <= call.task_weight <= 1:
        raise ValueError(f"distill_loss: task_weight must be in [0, 1], got {call.task_weight}")
    if not call.tau > 0:
        raise ValueError(f"distill_loss: tau must be positive, got {call.tau}")
    if not 0 <= call.label_smoothing <= 1:
        raise ValueError(
            f"distill_loss: label_smoothing must be in [0, 1], got {call.label_smoothing}"
        )
    if call.kl_reduction not in ("batchmean", "numel"):
        raise ValueError(
            f"distill_loss: kl_reduction must be batchmean or numel, got {call.kl_reduction!r}"
        )
    if call.reduction not in ("mean", "none"):
        raise ValueError(f"distill_loss: reduction must be mean or none, got {call.reduction!r}")


def _check_per_sample(argument: str, value_B: Tensor | None, B: int) -> None:
    if value_B is not None and (tuple(value_B.shape) != (B,) or not value_B.is_floating_point()):
        raise ValueError(
            f"distill_loss: {argument} must be floating point of shape ({B},), "
            f"got {value_B.dtype} of shape {tuple(value_B.shape)}"
        )


def _check_teacher(call: DistillCall, B: int, C: int) -> None:
    teacher, id_BJ = call.teacher, call.teacher_id_BJ
    if (id_BJ is None) != (call.teacher_tail_B is None):
        given = "teacher_tail_B" if id_BJ is None else "teacher_id_BJ"
        raise ValueError(
            f"distill_loss: teacher_id_BJ and teacher_tail_B go together, got only {given}"
        )
    if id_BJ is None:
        if tuple(teacher.shape) != (B, C):
            raise ValueError(
                f"distill_loss: teacher must have the shape of student_BC {(B, C)}, "
                f"got {tuple(teacher.shape)}"
            )
        return
    if teacher.dim() != 2 or teacher.shape[0] != B or not 1 <= teacher.shape[1] <= C:
        raise ValueError(
            f"distill_loss: teacher must have shape ({B}, J) with J in [1, C={C}], "
            f"got {tuple(teacher.shape)}"
        )
    if id_BJ.shape != teacher.shape or id_BJ.dtype != torch.int64:
        raise ValueError(
            "distill_loss: teacher_id_BJ must be int64 of the shape of teacher "
            f"{tuple(teacher.shape)}, got {id_BJ.dtype} of shape {tuple(id_BJ.shape)}"
        )
    _check_per_sample("teacher_tail_B", call.teacher_tail_B, B)


def _within(values: Tensor | None, low: float, high: float) -> bool:
    return values is None or bool(((values >= low) & (values <= high)).all())


def _check_values(call: DistillCall) -> None:
    C, label = call.student_BC.shape[1], call.label
    if label.dim() == 1 and not _within(label, 0, C - 1):
        raise ValueError(f"distill_loss: label must hold classes in [0, C={C})")
    if label.dim() == 2 and not _within(label, 0, torch.inf):
        raise ValueError("distill_loss: label must hold no negative weight and no NaN")
    if not _within(call.task_weight_B, 0, 1):
        raise ValueError("distill_loss: task_weight_B must hold values in [0, 1]")
    if not _within(call.teacher_id_BJ, 0, C - 1):
        raise ValueError(f"distill_loss: teacher_id_BJ must hold classes in [0, C={C})")
    if call.teacher_id_BJ is not None:
        id_BJ = call.teacher_id_BJ.sort(dim=1).values
        if bool((id_BJ[:, 1:] == id_BJ[:, :-1]).any()):
            raise ValueError("distill_loss: teacher_id_BJ must hold distinct classes in every row")
    if not _within(call.teacher_tail_B, 0, 1):
        raise ValueError("distill_loss: teacher_tail_B must hold values in [0, 1]")


def _target(call: DistillCall) -> Tensor:
    """y'."""
    C = call.student_BC.shape[1]
    y_BC = call.label if call.label.dim() == 2 else torch.nn.functional.one_hot(call.label, C)
    return (1 - call.label_smoothing) * y_BC.to(call.dtype) + call.label_smoothing / C


def _outcomes(call: DistillCall) -> tuple[Tensor, Tensor]:
    """Log-probabilities at tau of teacher and student over C classes, or J classes and the rest."""
    log_q = (call.student_BC.to(call.dtype) / call.tau).log_softmax(dim=1)
    log_p = (call.teacher.to(call.dtype) / call.tau).log_softmax(dim=1)
    if call.teacher_id_BJ is None or call.teacher_tail_B is None:
        return log_p, log_q
    tail_B1 = call.teacher_tail_B.to(call.dtype).unsqueeze(1)
    rest_B1 = log_q.scatter(1, call.teacher_id_BJ, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_p = torch.cat((log_p + (-tail_B1).log1p(), tail_B1.log()), dim=1)
    return log_p, torch.cat((log_q.gather(1, call.teacher_id_BJ), rest_B1), dim=1)


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


def _factors(call: DistillCall) -> tuple[Tensor, Tensor]:
    """What CE[n] and KL[n] are multiplied with."""
    B, C = call.student_BC.shape
    one_B = torch.ones(B, dtype=call.dtype, device=call.student_BC.device)
    w_B = one_B if call.weight_B is None else call.weight_B.to(call.dtype)
    a_B = call.task_weight * one_B
    if call.task_weight_B is not None:
        a_B = call.task_weight_B.to(call.dtype)
    scale = call.tau * call.tau / (C if call.kl_reduction == "numel" else 1)
    return w_B * a_B, w_B * (1 - a_B) * scale


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, 0 where the factor is 0, infinite and NaN values too."""
    return torch.where(factor != 0, factor * value, 0)


def distill_loss_reference(*tensors: Any, **options: Any) -> Tensor:
    call = DistillCall(*tensors, **options)
    check(call)
    _check_values(call)
    log_q_BC = call.student_BC.to(call.dtype).log_softmax(dim=1)
    ce_B = -_product(_target(call), log_q_BC).sum(dim=1)
    kl_B = _kl_terms(*_outcomes(call)).sum(dim=1)
    ce_factor_B, kl_factor_B = _factors(call)
    term_B = _product(ce_factor_B, ce_B) + _product(kl_factor_B, kl_B)
    return term_B if call.reduction == "none" else term_B.sum() / max(len(term_B), 1)


def distill_loss_train_reference(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = DistillCall(*tensors, **options)
    loss = distill_loss_reference(*tensors, **options)
    logit_BC, target_BC = call.student_BC.to(call.dtype), _target(call)
    ce_BC = target_BC.sum(dim=1, keepdim=True) * logit_BC.softmax(dim=1) - target_BC
    log_p, log_q = _outcomes(call)
    kl_BC = _difference(log_p, log_q)
    if call.teacher_id_BJ is not None:
        # A class of the tail gets the tail's q - p in proportion to its own q.
        rest_BC = (logit_BC / call.tau).scatter(1, call.teacher_id_BJ, -torch.inf)
        share_BC = torch.where(log_q[:, -1:] == -torch.inf, 0, rest_BC.softmax(dim=1))
        kl_BC = (share_BC * kl_BC[:, -1:]).scatter(1, call.teacher_id_BJ, kl_BC[:, :-1])
    ce_factor_B, kl_factor_B = _factors(call)
    grad_BC = _product(ce_factor_B[:, None], ce_BC)
    grad_BC = grad_BC + _product(kl_factor_B[:, None] / call.tau, kl_BC)
    if call.reduction == "mean":
        grad_BC = grad_BC / max(len(grad_BC), 1)
    return loss, grad_BC.to(call.student_BC.dtype)


def _check_arguments(*tensors: Any, **options: Any) -> None:
    check(DistillCall(*tensors, **options))


def _fake(*tensors: Any, **options: Any) -> Tensor:
    call = DistillCall(*tensors, **options)
    check(call)
    shape = call.student_BC.shape[:1] if call.reduction == "none" else ()
    return call.student_BC.new_empty(shape, dtype=call.dtype)


def _train_fake(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    student_BC = DistillCall(*tensors, **options).student_BC
    return _fake(*tensors, **options), student_BC.new_empty(student_BC.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    for name, needs_grad in zip(DistillCall._fields[1:7], ctx.needs_input_grad[1:], strict=False):
        if needs_grad:
            raise ValueError(
                f"distill_loss: {name} requires a gradient and gets none; pass {name}.detach()"
            )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for the kept gradient
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (grad_BC,) = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    factor = grad.unsqueeze(1) if grad.dim() == 1 else grad
    if type(grad) is not Tensor or grad.device.type != "cpu":  # traced, or a look would sync
        grad_BC = (grad_BC * factor).to(grad_BC.dtype)
    elif not bool((grad == 1).all()):
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grad_BC = (grad_BC * factor).to(grad_BC.dtype)
        else:
            grad_BC = grad_BC.mul_(factor)
    return grad_BC, None, None, None, None, None, None


def _train(*tensors: Any, **options: Any) -> Tensor:
    loss: Tensor = torch.ops.gose.distill_loss_train(*tensors, **options)[0]
    return loss


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _cost(student_BC: Tensor, *tensors: Tensor | None, **_options: Any) -> Cost:
    # per logit: two softmaxes of the student 6, one of the teacher 3, terms of KL 3 and of CE 2
    B = student_BC.shape[0]
    return Cost(B, _bytes(student_BC, *tensors) + 4 * B, 14 * student_BC.numel())


def _train_cost(student_BC: Tensor, *tensors: Tensor | None, **_options: Any) -> Cost:
    # more per logit: the two slopes and their weighed sum 5
    cost = _cost(student_BC, *tensors)
    return Cost(cost.tokens, cost.bytes + _bytes(student_BC), 19 * student_BC.numel())


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student_BC = torch.ones(4, 10, device=device, dtype=dtype)
    return student_BC, student_BC + 1, torch.zeros(4, device=device, dtype=torch.int64)


_ARGUMENTS = (
    "Tensor student_BC, Tensor teacher, Tensor label, Tensor? weight_B=None, "
    "Tensor? task_weight_B=None, Tensor? teacher_id_BJ=None, Tensor? teacher_tail_B=None, *, "
    "float task_weight=0.5, float tau=1.0, float label_smoothing=0.0, "
    "str kl_reduction='batchmean', str reduction='mean', str? backend=None"
)
_DTYPES = (float32, torch.bfloat16, float16)

distill_loss = register(
    f"distill_loss({_ARGUMENTS}) -> Tensor",
    native("cuda", "distill_loss", *_DTYPES),
    triton("distill_loss", "distill_loss", *_DTYPES, check=_check_arguments),
    native("cpu", "distill_loss", *_DTYPES),
    reference(distill_loss_reference),
    fake=_fake,
    training=_train,
    cost=_cost,
    example=_example,
)

distill_loss_train = register(
    f"distill_loss_train({_ARGUMENTS}) -> (Tensor, Tensor)",
    native("cuda", "distill_loss_train", *_DTYPES),
    triton("distill_loss", "distill_loss_train", *_DTYPES, check=_check_arguments),
    native("cpu", "distill_loss_train", *_DTYPES),
    reference(distill_loss_train_reference),
    fake=_train_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_train_cost,
    example=_example,
)
