"""route, its backward and distill_loss as the ladder's tests see them: see tests/gpu/ops.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gose_kernels.ops import route as route_op
from gose_kernels.ops.distill_loss import DistillCall
from gose_kernels.ops.route_call import ADAPTIVE, POLICIES, RouteCall
from tests import cases
from tests.gpu.params import Call, Options, fill, poisoned, split
from tests.route_oracle import gradients

Outputs = tuple[Tensor, ...]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def distill(call: Call, with_grad: bool, *args: Any) -> Outputs:
    arguments, options = split(args)
    given = DistillCall(*arguments, **options)
    (B, C), student = given.student_BC.shape, given.student_BC
    hard = given.label.dim() == 1
    per_sample = {
        "weight": given.weight_B,
        "task_weight_B": given.task_weight_B,
        "tail": given.teacher_tail_B,
    }
    tensors = {k: t.float().contiguous() for k, t in per_sample.items() if t is not None}
    tensors |= {"student": student, "teacher": given.teacher}
    tensors["label" if hard else "soft"] = given.label
    tensors["term"] = poisoned(B, dtype=torch.float32)
    more: dict[str, Tensor] = {}
    if given.teacher_id_BJ is not None:
        tensors["id"] = given.teacher_id_BJ.contiguous()
        more["seen"] = torch.zeros(B, C, dtype=torch.uint8)
    if with_grad:
        tensors["grad"] = poisoned(B, C, dtype=student.dtype)
    if given.reduction == "mean":
        more["loss"] = poisoned(dtype=torch.float32)
    filled = fill(
        "DistillParams",
        **tensors,
        B=B,
        C=C,
        J=given.teacher.shape[1],
        stride_sb=student.stride(0),
        stride_tb=given.teacher.stride(0),
        stride_lb=given.label.stride(0),
        task_weight=given.task_weight,
        inverse_tau=1 / given.tau,
        smoothing=given.label_smoothing,
        kl_scale=given.tau**2 / (C if given.kl_reduction == "numel" else 1),
        grad_scale=1 / max(B, 1) if given.reduction == "mean" else 1.0,
        dtype=student.dtype,
        teacher_dtype=given.teacher.dtype,
        soft_dtype=torch.float32 if hard else given.label.dtype,
    )
    pointed = {f"in.{k}": t for k, t in tensors.items()}
    call("distill_loss", "DistillDeviceParams", {**pointed, **more}, **{"in": filled})
    loss = more.get("loss", tensors["term"])
    return (loss, tensors["grad"]) if with_grad else (loss,)


def distill_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.distill_loss:
        if case.B * case.C <= 4096:
            args, options = case.build(dtype)
            yield str(case), (*args, Options(options))
    args, options = cases.DistillCase(3, 1400, soft=True).build(dtype)  # several tiles of a row
    yield "mixed-dtypes", (args[0], args[1].float(), args[2].half(), *args[3:], Options(options))
    args, options = cases.DistillCase(3, 1400, J=20).build(dtype)
    yield "3x1400-top20", (*args, Options(options))


def distill_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every number of columns of a tile, long rows first; soft labels, a teacher cache."""
    label = _meta(64, dtype=torch.int64)
    for C in (4096, *(2**i for i in range(11)), 37):
        logits = _meta(64, C, dtype=dtype)
        yield f"C{C}", (logits, logits, label)
    per_sample = _meta(64, dtype=dtype)
    logits = _meta(64, 4096, dtype=dtype)
    yield "soft", (logits, logits, logits, per_sample, per_sample)
    ids, tail = _meta(64, 64, dtype=torch.int64), per_sample
    yield "listed", (logits, _meta(64, 64, dtype=dtype), label, None, None, ids, tail)


_SUMS = {"nothing": 0, "experts": 1, "chosen": 2}  # RouteSum


def _route_input(
    score: Tensor,
    K: int,
    entropy_TE: Tensor | None,
    entropy_E: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[RouteCall, ctypes.Structure, dict[str, Tensor]]:
    """The call, its RouteInput as csrc/bind_made.h makes it, and the tensors that it points to."""
    made = RouteCall(score, K, entropy_TE, entropy_E, bias, noise, **options)
    score = score if score.stride(1) == 1 else score.contiguous()
    entropy = entropy_E if entropy_TE is None else entropy_TE
    given = {"entropy": entropy, "bias": bias, "noise": noise}
    tensors = {k: t.float().contiguous() for k, t in given.items() if t is not None}
    tensors["score"] = score
    T, E = score.shape
    filled = fill(
        "RouteInput",
        **tensors,
        T=T,
        E=E,
        K=K,
        stride_st=score.stride(0),
        stride_et=0 if entropy_TE is None else E,
        stride_nt=E,
        num_groups=made.num_groups,
        top_groups=made.top_groups,
        num_bands=len(made.bands) if made.adaptive == "bands" else 0,
        capacity=made.capacity or 0,
        floor=made.entropy_floor,
        tau=made.tau or 0.0,
        mass=made.mass,
        noise_std=made.noise_std,
        policy=POLICIES.index(made.policy),
        sum=_SUMS[made.sums_over],
        adaptive=ADAPTIVE.index(made.adaptive),
        sigmoid=made.is_sigmoid,
        priority=made.capacity_order == "priority",
        dtype=score.dtype,
    )
    return made, filled, tensors


def route(call: Call, *args: Any) -> Outputs:
    (score, K, *others), options = split(args)
    call_, given, tensors = _route_input(score, K, *(others or [None] * 4), options)
    T, E = score.shape
    tokens = 16 if E > 128 or T < 2048 else 32 if T < 4096 else 64
    blocks, takes = -(-T // tokens), call_.policy == "expert_choice"
    f32, i32 = torch.float32, torch.int32
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((T, K), f32),
        "expert": ((T, K), i32),
        "entropy": ((T,), f32),
        "load": ((E,), i32),
        "importance": ((E,), f32),
        "loss": ((5,), f32),
        "part_importance": ((blocks, E), f32),
        "part_count": ((blocks, E), torch.int16),
        "part_sums": ((blocks, 3), f32),
    }
    if takes:
        shapes["log_p"] = ((E, T), f32)
    elif call_.capacity is not None:
        shapes["level"] = ((E, T), torch.int16)
        if call_.capacity_order == "priority":
            shapes["first"] = ((T,), f32)
    if call_.noise_std > 0:
        shapes["win"] = ((blocks, E), f32)
    made = {k: poisoned(*shape, dtype=dtype) for k, (shape, dtype) in shapes.items()}
    bits = 32 if takes else K.bit_length() + (32 if "first" in made else 0)
    band = list(call_.bands) if call_.adaptive == "bands" else []
    call(
        "route",
        "RouteDeviceParams",
        {**{f"in.{k}": t for k, t in tensors.items()}, **made},
        **{"in": given, "tokens": tokens, "rank_bits": bits, "band": band},
    )
    return tuple(made[k] for k in ("weight", "expert", "entropy", "load", "importance", "loss"))


def route_backward(call: Call, *args: Any) -> Outputs:
    (score, K, *others), options = split(args)
    call_, given, tensors = _route_input(score, K, *others[:4], options)
    names = ("expert", "load", "importance")
    grads = ("grad_weight", "grad_entropy", "grad_importance", "grad_loss")
    read = dict(zip((*names, *grads), others[4:], strict=True))
    (T, E), tokens, live_tokens = score.shape, 16, 64
    blocks, parts, f32 = -(-T // tokens), -(-T // live_tokens), torch.float32
    per_module, losses = others[1] is not None, read["grad_loss"] is not None
    egs = call_.policy == "egs"
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "grad": ((E,) if per_module else (T, E), f32 if egs else score.dtype)
    }
    if losses:
        shapes |= {"column": ((E,), f32), "scalar": ((2,), f32)}
        shapes["part_live"] = (parts, E), torch.uint8
    if losses and call_.noise_std > 0:
        shapes |= {"part_win": ((blocks, E), f32), "win_slope": ((E,), f32)}
    if per_module:
        shapes["part_grad"] = ((blocks, E), f32)
    made = {k: poisoned(*shape, dtype=dtype) for k, (shape, dtype) in shapes.items()}
    drops = call_.capacity is not None and call_.policy != "expert_choice"
    call(
        "route_backward",
        "RouteBackwardDeviceParams",
        {
            **{f"in.{k}": t for k, t in tensors.items()},
            **{k: t.contiguous() for k, t in read.items() if t is not None},
            **made,
        },
        **{"in": given, "tokens": tokens, "live_tokens": live_tokens},
        again=drops and read["grad_weight"] is not None and call_.sums_over == "chosen",
        band=list(call_.bands) if call_.adaptive == "bands" else [],
    )
    ranked = next(x for x in (others[0], others[1], score) if x is not None)
    return (made["grad"].to(ranked.dtype),)


def _with_gradients(args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, ...]:
    out = route_op.route_reference(*args, **options)
    return (*args, out[1], out[3], out[4], *gradients(args, out, torch.float32))


def route_backward_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (*args, options) in route_cases(dtype):
        yield label, (*_with_gradients(tuple(args), options), options)
    args, options = cases.RouteCase(70, 12, 3, "far").build(dtype)
    yield "70x12top3-far", (*_with_gradients(args, options), Options(options))
    # One gradient alone, where all experts are there and where some are gone, in several parts.
    for kind, start in product(("normal", "masked"), range(4)):
        args, options = cases.RouteCase(70, 12, 3, kind).build(dtype)
        full = _with_gradients(args, options)
        alone = [g if i == start else None for i, g in enumerate(full[-4:])]
        name = ("weight", "entropy", "importance", "loss")[start]
        yield f"70x12top3-{kind}-{name}-alone", (*full[:-4], *alone, Options(options))


def route_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    several_blocks = cases.RouteCase(70, 64, 8)
    for case in (several_blocks, *(c for c in cases.route if c.T <= 37)):
        args, options = case.build(dtype)
        yield str(case), (*args, Options(options))


def _tiles(T: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every number of experts of a tile; every policy and pass at 64 experts."""
    nothing = (None,) * 4
    for E, K in ((64, 8), (8, 2), (1, 1), (128, 8), (252, 8), (1024, 8), (4096, 16)):
        yield f"E{E}", (_meta(T, E, dtype=dtype), K, *nothing)
    score, f32 = _meta(T, 64, dtype=dtype), torch.float32
    shapes = {"TE": (T, 64), "E": (64,)}
    for case in cases.route:
        if case.T == 37 and case.kind == "normal" and (case.options or case.entropy):
            H = [_meta(*s, dtype=f32) if case.entropy == k else None for k, s in shapes.items()]
            bias = _meta(64, dtype=f32) if case.bias else None
            noise = _meta(T, 64, dtype=f32) if case.noise else None
            options = Options(case.options)
            if "num_groups" in options:
                options["num_groups"] = 4
            yield f"E64-{case}", (score, 8, *H, bias, noise, options)


def route_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Of many tokens, whose tiles have the most warps, and of few."""
    for T in (4096, 64):
        for label, args in _tiles(T, dtype):
            yield f"T{T}-{label}", args
    yield "T2048-E64", (_meta(2048, 64, dtype=dtype), 8, *(None,) * 4)


def route_backward_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    f32, i32 = torch.float32, torch.int32
    for label, (score, K, *rest) in _tiles(64, dtype):
        T, E = score.shape
        slots, each = (T, K), (E,)
        more = (_meta(*slots, dtype=i32), _meta(*each, dtype=i32), _meta(*each, dtype=f32))
        grads = [_meta(*s, dtype=f32) for s in (slots, (T,), each, (5,))]
        yield label, (score, K, *rest[:4], *more, *grads, *rest[4:])
