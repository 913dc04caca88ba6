"""masked_sgd_, masked_adam_, masked_lion_ on a GPU: one launch per tensor, and one before it that
raises the step counts.

Letters: P elements in U units of INNER (elements that share a mask value; one unit without a mask).
The contract is in ops/masked_update.py. Programs without a live element load their mask and nothing
else; frozen rows of a mixed program are not loaded, frozen elements are stored as they were.
Compiled without contraction: a layout of the state changes no bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gose_kernels.triton import BYTES_PER_LOAD, declares, size_of, threads_per_warp, warps_of
from gose_kernels.triton.masks import NONE, SCORES, is_frozen, units_of
from gose_kernels.triton.philox import draw, key_words

_COUNTS = 128  # step counts of a program
_STATE_BYTES = 4  # of an element of a state, a master copy or a score
# Rules, as constants of a kernel.
_SGD, _ADAM, _LION = (tl.constexpr(n) for n in range(3))
_RULES = {"masked_sgd_": _SGD.value, "masked_adam_": _ADAM.value, "masked_lion_": _LION.value}


def _mask_work(args: Mapping[str, Any]) -> int:
    """Bytes of the mask and of the rows."""
    names = [
        n
        for n, on in (("frozen_ptr", args["KIND"] != NONE.value), ("row_ptr", args["HAS_ROW"]))
        if on
    ]
    return size_of(*(args[name] for name in names))


def _update_work(args: Mapping[str, Any]) -> tuple[int, int]:
    """As if all were live: what is frozen is known on the device alone."""
    P, num_states = args["U"] * args["INNER"], args["NUM_STATES"]
    state = 4 * P if not args["HAS_ROW"] else size_of(args["state0_ptr"]) if num_states else 0
    moved = 3 * P * args["param_ptr"].element_size() + 2 * num_states * state
    moved += 2 * size_of(args["master_ptr"]) * args["HAS_MASTER"] + _mask_work(args)
    moved += size_of(args["step_ptr"]) * {0: 0, 1: 1, 2: 1, 3: 2}[args["COUNTS"]]
    rule = {_SGD.value: 2 + 3 * num_states, _ADAM.value: 11, _LION.value: 8}[args["RULE"]]
    rule += 2 * args["COUPLED"] + args["DECOUPLED"] + args["HAS_SCALE"] + 2 * args["NESTEROV"]
    return moved, rule * P


def _count_work(args: Mapping[str, Any]) -> tuple[int, int]:
    return 2 * size_of(args["step_ptr"]) + _mask_work(args), 0


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step in float64: at the first step three digits are cancelled."""
    return 1.0 - tl.exp(step.to(tl.float64) * log_beta)


@triton.jit
def _biases(lr_ptr, log_beta1, log_beta2, step):
    """lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), float32."""
    rate = tl.load(lr_ptr).to(tl.float64) / _one_minus_power(log_beta1, step)
    grow = 1.0 / tl.sqrt(_one_minus_power(log_beta2, step))
    return rate.to(tl.float32), grow.to(tl.float32)


@triton.jit(launch_metadata=declares(_update_work))
def _update_kernel(
    param_ptr,  # [U, INNER]
    grad_ptr,  # [U, INNER]
    master_ptr,  # as a state, or anything
    state0_ptr,  # float32 [U, INNER], or [slots, INNER] with rows, or anything
    state1_ptr,
    state2_ptr,
    step_ptr,  # float32: one count, or one a unit; or anything
    frozen_ptr,  # by KIND: a byte, a bit or a score of each unit; or anything
    row_ptr,  # [U] int32 slot of a unit's state, -1 = none; or anything
    lr_ptr,  # a number
    scale_ptr,  # a number, or anything
    U,
    INNER,
    threshold,
    momentum,  # or beta1
    undamped,  # 1 - dampening, or 1 - beta1
    beta2,
    rest2,
    eps,
    coupled,  # weight decay that goes into the gradient
    decay: tl.float64,  # the other one
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    start,  # of the draws
    key0,
    key1,
    RULE: tl.constexpr,
    KIND: tl.constexpr,
    NUM_STATES: tl.constexpr,
    ELEMENTS: tl.constexpr,  # every element is a unit: they lie along the columns
    COUNTS: tl.constexpr,  # 0 none, 1 of the tensor, 2 of units, 3 of elements, raised here
    HAS_ROW: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    SHORT_LERP: tl.constexpr,  # beta1 > 0.5
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(INNER, COLUMNS)
    unit = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (unit < U) & (column < INNER)
    if ELEMENTS:
        live = is_frozen(frozen_ptr, column, inside, threshold, KIND) == 0
    else:
        live = is_frozen(frozen_ptr, unit, unit < U, threshold, KIND) == 0
    slot = unit
    if HAS_ROW:
        slot = tl.load(row_ptr + unit, mask=unit < U, other=-1).to(tl.int64)
        live = live & (slot >= 0)
    live = live & inside
    if tl.max(live.to(tl.int32)) > 0:
        at = unit * INNER + column
        place = slot * INNER + column
        # Frozen elements between live ones are loaded and stored with them, frozen units are not.
        moved = live
        if ELEMENTS:
            moved = inside
        old = tl.load(param_ptr + at, mask=moved, other=0.0)
        p = old.to(tl.float32)
        if HAS_MASTER:
            p = tl.load(master_ptr + place, mask=moved, other=0.0)
        before = p
        g = tl.load(grad_ptr + at, mask=moved, other=0.0).to(tl.float32)
        if HAS_SCALE:
            g *= tl.load(scale_ptr).to(tl.float32)
        if MAXIMIZE:
            g = -g
        if COUPLED:
            g += coupled * p
        if NUM_STATES > 0:
            old0 = tl.load(state0_ptr + place, mask=moved, other=0.0)
            m = old0
        if DECOUPLED:
            lr = tl.load(lr_ptr)
            p *= (1.0 - lr * tl.full([], decay, lr.dtype)).to(tl.float32)
        if RULE == _SGD:
            if NUM_STATES > 0:
                m = momentum * m + undamped * g
                if NESTEROV:
                    g += momentum * m
                else:
                    g = m
            p -= tl.load(lr_ptr).to(tl.float32) * g
        elif RULE == _LION:
            mixed = momentum * m + undamped * g
            sign = tl.where(mixed > 0.0, 1.0, tl.where(mixed < 0.0, -1.0, 0.0))
            p -= tl.load(lr_ptr).to(tl.float32) * sign
            m = beta2 * m + rest2 * g
        else:
            if COUNTS == 3:
                count = tl.load(step_ptr + column, mask=inside, other=0.0)
                count = tl.where(live, count + 1.0, count)
                tl.store(step_ptr + column, count, mask=inside)
                rate, grow = _biases(lr_ptr, log_beta1, log_beta2, count)
            elif COUNTS == 2:
                count = tl.load(step_ptr + unit, mask=unit < U, other=1.0)
                rate, grow = _biases(lr_ptr, log_beta1, log_beta2, count)
            else:
                rate, grow = _biases(lr_ptr, log_beta1, log_beta2, tl.load(step_ptr))
            # As torch's lerp: exact at both ends.
            if SHORT_LERP:
                m += undamped * (g - m)
            else:
                m = g + (undamped - 1.0) * (g - m)
            old1 = tl.load(state1_ptr + place, mask=moved, other=0.0)
            v = old1 * beta2 + rest2 * g * g
            highest = v
            if NUM_STATES == 3:
                old2 = tl.load(state2_ptr + place, mask=moved, other=0.0)
                highest = tl.where((old2 > v) | (old2 != old2), old2, v)
                tl.store(state2_ptr + place, tl.where(live, highest, old2), mask=moved)
            tl.store(state1_ptr + place, tl.where(live, v, old1), mask=moved)
            denominator = tl.sqrt_rn(highest) * grow + eps
            p -= rate * tl.div_rn(m, denominator)
        if NUM_STATES > 0:
            tl.store(state0_ptr + place, tl.where(live, m, old0), mask=moved)
        if HAS_MASTER:
            tl.store(master_ptr + place, tl.where(live, p, before), mask=moved)
        if STOCHASTIC:
            raised = p.to(tl.uint32, bitcast=True) + draw(start + at, key0, key1)
            raised = (raised >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            new = tl.where(p != p, p.to(tl.bfloat16), raised)
        else:
            new = p.to(old.dtype)
        tl.store(param_ptr + at, tl.where(live, new, old), mask=moved)


@triton.jit(launch_metadata=declares(_count_work))
def _count_kernel(
    step_ptr,  # float32: one count a unit, up where its unit is not frozen
    frozen_ptr,
    row_ptr,
    U,
    threshold,
    KIND: tl.constexpr,
    HAS_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    frozen = is_frozen(frozen_ptr, unit, unit < U, threshold, KIND)
    if HAS_ROW:
        frozen = frozen | (tl.load(row_ptr + unit, mask=unit < U, other=-1) < 0)
    count = tl.load(step_ptr + unit, mask=frozen == 0, other=0.0)
    tl.store(step_ptr + unit, count + 1.0, mask=frozen == 0)


class _Writes:
    """Tensors with gaps, updated as contiguous copies that are copied back at the end."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor) -> Tensor:
        if t.is_contiguous():
            return t
        self._copies.append((t, t.contiguous()))
        return self._copies[-1][1]

    def finish(self) -> None:
        for to, copy in self._copies:
            to.copy_(copy)


def _tile(units: int, inner: int, widest: int) -> tuple[int, int]:
    """Units and columns of a program: 16 bytes a thread of the tensor with the widest elements."""
    size = warps_of("masked_update") * threads_per_warp() * BYTES_PER_LOAD // widest
    columns = min(size, triton.next_power_of_2(max(1, inner)))
    return min(size // columns, triton.next_power_of_2(max(1, units))), columns


class _Entry:
    """A tensor of the lists as its kernels see it."""

    def __init__(self, n: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        params, grads, self.states, steps, masters, frozens, rows, lr, *_ = args
        self.n, self.count, self.lr, self.writes = n, len(params), lr, _Writes()
        self.param, self.grad = params[n], grads[n]
        self.master = masters[n] if masters else None
        self.row = rows[n].contiguous() if rows and rows[n].numel() > 0 else None
        frozen = frozens[n] if frozens else None
        self.mask, units, self.kind = units_of(frozen, self.param)
        self.threshold = float((options.get("threshold") or [0.0] * (n + 1))[n])
        numel = self.param.numel()
        inner = numel // max(1, units)
        self.elements = inner == 1 and self.row is None and numel > 0
        self.sizes = (1, numel) if self.elements else (units, inner)
        self.step = self.writes(steps[n]) if steps else None
        self.by_mask = bool(steps) and frozen is not None
        if frozen is not None and self.by_mask:
            packed = frozen.dtype == torch.uint8
            self.by_mask = steps[n].shape == (self.param.shape if packed else frozen.shape)

    def raise_counts(self) -> None:
        """But for those of elements, which the update raises."""
        if self.step is None or self.step.numel() == 0 or (self.by_mask and self.elements):
            return
        counts, masked = self.step.numel(), self.by_mask
        _count_kernel[(triton.cdiv(counts, _COUNTS),)](
            self.step,
            self.mask if masked else self.step,
            self.step if self.row is None else self.row,
            counts,
            self.threshold,
            KIND=self.kind if masked else NONE.value,
            HAS_ROW=self.row is not None and masked,
            BLOCK=_COUNTS,
            num_warps=warps_of("masked_update"),
            enable_fp_fusion=False,
        )

    def update(
        self,
        rule: dict[str, Any],
        num_states: int,
        grad_scale: Tensor | None,
        draws: dict[str, Any],
    ) -> None:
        """The step itself; what is missing among the pointers is lr, which nothing reads there."""
        states = [self.writes(self.states[s * self.count + self.n]) for s in range(num_states)]
        param, lr = self.writes(self.param), self.lr
        scored = self.elements and self.kind == SCORES.value
        wide = num_states > 0 or self.master is not None or scored
        rows, columns = _tile(*self.sizes, _STATE_BYTES if wide else param.element_size())
        counts = 0 if self.step is None else 1 + self.by_mask * (1 + self.elements)
        _update_kernel[(triton.cdiv(self.sizes[0], rows) * triton.cdiv(self.sizes[1], columns),)](
            param,
            self.grad.contiguous(),
            lr if self.master is None else self.writes(self.master),
            *states,
            *[lr] * (3 - num_states),
            lr if self.step is None else self.step,
            param if self.mask is None else self.mask,
            lr if self.row is None else self.row,
            lr,
            lr if grad_scale is None else grad_scale,
            *self.sizes,
            self.threshold,
            **rule,
            **draws,
            KIND=self.kind,
            NUM_STATES=num_states,
            ELEMENTS=self.elements,
            COUNTS=counts,
            HAS_ROW=self.row is not None,
            HAS_MASTER=self.master is not None,
            HAS_SCALE=grad_scale is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps_of("masked_update"),
            enable_fp_fusion=False,
        )


def _rule(
    op: str,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    nesterov: bool = False,
    **_options: Any,
) -> dict[str, Any]:
    """What the kernel knows of the rule. Differences are rounded once."""
    first = momentum if op == "masked_sgd_" else beta1
    return {
        "momentum": first,
        "undamped": 1 - (dampening if op == "masked_sgd_" else beta1),
        "beta2": beta2,
        "rest2": 1 - beta2,
        "eps": eps,
        "coupled": 0.0 if decoupled else weight_decay,
        "decay": weight_decay if decoupled else 0.0,
        "log_beta1": _log(beta1),
        "log_beta2": _log(beta2),
        "RULE": _RULES[op],
        "MAXIMIZE": maximize,
        "NESTEROV": nesterov,
        "COUPLED": not decoupled and weight_decay != 0,
        "DECOUPLED": decoupled and weight_decay != 0,
        "SHORT_LERP": beta1 > 0.5,
    }


def _draws(n: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    seeds, starts = options.get("seed"), options.get("start")
    key0, key1 = key_words(seeds[n] if seeds else 0, options.get("draw", 0))
    stochastic = bool(seeds) and dtype == torch.bfloat16
    start = starts[n] if starts else 0
    return {"start": start, "key0": key0, "key1": key1, "STOCHASTIC": stochastic}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _run(op: str, args: tuple[Any, ...], options: dict[str, Any], num_states: int) -> None:
    rule, grad_scale = _rule(op, **options), args[8] if len(args) > 8 else None
    for n, param in enumerate(args[0]):
        with torch.cuda.device_of(param):
            entry = _Entry(n, args, options)
            entry.raise_counts()
            if param.numel() > 0:
                entry.update(rule, num_states, grad_scale, _draws(n, param.dtype, options))
            entry.writes.finish()


def masked_sgd_(*args: Any, **options: Any) -> None:
    """One step of every tensor; rows are trusted."""
    _run("masked_sgd_", args, options, int(options.get("momentum", 0.0) != 0))


def masked_adam_(*args: Any, **options: Any) -> None:
    """One step of every tensor; rows are trusted."""
    given = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled": True, **options}
    _run("masked_adam_", args, given, 3 if options.get("amsgrad", False) else 2)


def masked_lion_(*args: Any, **options: Any) -> None:
    """One step of every tensor; rows are trusted."""
    given = {"beta1": 0.9, "beta2": 0.99, **options, "decoupled": True}
    _run("masked_lion_", args, given, 1)
