"""masked_sgd_, masked_adam_, masked_lion_: optimizer steps that leave frozen elements alone.

For tensor n of the lists and element i, with g = grad[i] * grad_scale, negated for maximize:

    frozen[i]: param, moments, master and step keep their bits, whatever grad holds (NaN too)
    else, in the order of torch.optim:
    sgd    g += weight_decay * p;  momentum != 0: m = momentum * m + (1 - dampening) * g, then
           g = m or, with nesterov, g + momentum * m;  p -= lr * g
    adam   step += 1;  decoupled: p *= 1 - lr * weight_decay, else g += weight_decay * p
           m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
           w = max(w, v) with amsgrad, else v
           p -= lr / (1 - beta1**step) * m / (sqrt(w) / sqrt(1 - beta2**step) + eps)
    lion   p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
           m = beta2 * m + (1 - beta2) * g                        [Chen et al. 2023, Program 1]

param, grad   lists of float32 | bfloat16 | float64 tensors, one dtype per call, any strides
state         one list of moments, float32 (float64 for float64): all m, then adam's v, then w
              with amsgrad; sgd without momentum has none
step          adam: float32 list; each of the shape of its frozen mask (of param for packed bits:
              goes up where not frozen, so that elements released later restart their bias
              correction) or of shape [] (one count for the tensor: goes up at every call, the mask
              being an unchanging one); sgd, lion: empty
master        bfloat16: float32 list, what param is the rounding of (to nearest); else empty
frozen        a mask per param, or an empty list: nothing is frozen. True = must not change:
              bool        every size divides that of param (one value per expert, row, block,
                          element; shape [] for all)
              uint8       [ceil(numel / 8)], one bit per element, bit i % 8 of byte i // 8
              float32     scores in the shapes of bool: frozen where score >= threshold[n]
row           int32 list, or empty; a tensor in it is empty or has one value per unit, the elements
              in a row that share a value of their mask: the state of unit u is row[u] of the state
              tensors, then [slots, elements of a unit]; -1 = it has none, and is frozen
lr            float32 | float64 tensor of shape []: a new value is neither a sync nor a recompile
grad_scale    the same, or None = 1: the product of loss unscaling and clipping
threshold     a number per param where a mask is scores
seed, draw    bfloat16 without master: with a seed per param, rounded up with the probability of
              what is cut off: lane(start[n] + i) of gose_kernels.philox at (seed[n], step draw) is
              added to the lower half; without seeds to nearest, which loses small steps
start         index of a param's first element in the whole tensor that it is a piece of; empty: 0

Frozen elements are selected out, never multiplied by 0. Everything is computed in the dtype of
the moments, except 1 - beta**step in float64 (cuda: -expm1(step * log beta), within 2 units in the
last place of float32). cuda and triton trust the slots of `row`: a check would sync. Empty lists
and empty tensors are allowed; a live NaN spreads as in torch.optim. A momentum starts at zero,
which is torch's first step without dampening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels import masks, philox
from gose_kernels.backends import native, reference, triton
from gose_kernels.registry import Cost, Op, register

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


class _Call(NamedTuple):
    """The positional arguments of all three ops, in order."""

    param: Sequence[Tensor]
    grad: Sequence[Tensor]
    state: Sequence[Tensor]
    step: Sequence[Tensor]
    master: Sequence[Tensor]
    frozen: Sequence[Tensor]
    row: Sequence[Tensor]
    lr: Tensor
    grad_scale: Tensor | None = None


def _num_states(name: str, options: dict[str, Any]) -> int:
    """Moments per parameter."""
    if name == "masked_sgd_":
        return int(options.get("momentum", 0.0) != 0)
    if name == "masked_lion_":
        return 1
    return 3 if options.get("amsgrad", False) else 2


def _check_scalar(name: str, argument: str, value: Tensor | None) -> None:
    if value is None:
        return
    if value.dim() != 0 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: {argument} must be a float32 or float64 tensor of shape (), "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def _check_like(name: str, argument: str, t: Tensor, dtype: torch.dtype, shape: Any) -> None:
    if t.dtype != dtype or t.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: {argument} must be {dtype} of shape {tuple(shape)}, "
            f"got {t.dtype} of shape {tuple(t.shape)}"
        )


def _count_shape(mask: Tensor, param: Tensor) -> torch.Size:
    """The shape that step counts by mask have."""
    return param.shape if mask.dtype == torch.uint8 else mask.shape


def _unit(call: _Call, n: int) -> tuple[int, int]:
    """(units, elements of a unit) of a parameter and its mask."""
    param = call.param[n]
    if call.frozen and call.frozen[n].dtype == torch.uint8:
        return param.numel(), 1
    shape = masks.unit_shape(call.frozen[n].shape if call.frozen else (), param.shape)
    units = torch.Size(shape).numel()
    return units, param.numel() // max(1, units)


def _checked(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> _Call:
    """The arguments of a call; ValueError unless they fit together."""
    call = _Call(*args)
    momentum = options.get("momentum", 0.0)
    if options.get("nesterov", False) and momentum <= 0:
        raise ValueError(f"{name}: nesterov needs momentum > 0, got {momentum}")
    _check_scalar(name, "lr", call.lr)
    _check_scalar(name, "grad_scale", call.grad_scale)
    count, num_states = len(call.param), _num_states(name, options)
    seeds, starts = options.get("seed", ()), options.get("start", ())
    for argument, got, wanted, what in (
        ("grad", len(call.grad), count, "tensors"),
        ("state", len(call.state), num_states * count, "tensors"),
        ("step", len(call.step), count * (name == "masked_adam_"), "tensors"),
        ("master", len(call.master), count * (len(call.master) > 0), "tensors"),
        ("frozen", len(call.frozen), count * (len(call.frozen) > 0), "tensors"),
        ("row", len(call.row), count * (len(call.row) > 0), "tensors"),
        ("seed", len(seeds), count * (len(seeds) > 0), "numbers"),
        ("start", len(starts), count * (len(starts) > 0), "numbers"),
    ):
        if got != wanted:
            raise ValueError(f"{name}: {argument} must have {wanted} {what}, got {got}")
    masks.check_thresholds(name, call.frozen, options.get("threshold", ()), count)
    if call.master and seeds:
        raise ValueError(f"{name}: seed must be empty where there are master copies")
    masks.check_dtype(name, "param", call.param)
    for n in range(count):
        _check_entry(name, call, n, num_states)
    return call


def _check_entry(name: str, call: _Call, n: int, num_states: int) -> None:
    p = call.param[n]
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    _check_like(name, f"grad[{n}]", call.grad[n], p.dtype, p.shape)
    if call.frozen:
        masks.check_mask(f"{name}: frozen[{n}]", call.frozen[n], f"param[{n}]", p.shape)
    shape: Sequence[int] = p.shape
    if call.row and call.row[n].numel() > 0:
        units, inner = _unit(call, n)
        like = (*call.state[n : n + 1], *call.master[n : n + 1], p)[0]
        shape = (like.shape[0] if like.dim() == 2 else 0, inner)
        _check_like(name, f"row[{n}]", call.row[n], torch.int32, (units,))
    for at in range(n, num_states * len(call.param), len(call.param)):
        _check_like(name, f"state[{at}]", call.state[at], wide, shape)
    if call.master:
        _check_like(name, f"master[{n}]", call.master[n], wide, shape)
    if call.step:
        count, mask = call.step[n], call.frozen[n] if call.frozen else None
        mask_shape = torch.Size() if mask is None else _count_shape(mask, p)
        if count.dtype != torch.float32 or count.shape not in (torch.Size(), mask_shape):
            raise ValueError(
                f"{name}: step[{n}] must be float32 of shape () or of its mask "
                f"{tuple(mask_shape)}, got {count.dtype} of shape {tuple(count.shape)}"
            )


def _merge(frozen: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`old` where frozen, `new` elsewhere.

    On bits, because torch.where takes one element at a time, ten times longer on a random mask.
    """
    if frozen is None:
        return new
    integer = _BITS[old.dtype]
    bits = old.view(integer)
    all_ones_if_live = frozen.to(integer) - 1
    return (bits ^ ((bits ^ new.view(integer)) & all_ones_if_live)).view(old.dtype)


class _Entry:
    """One parameter of a call as plain tensors of its shape, in the dtype of its moments."""

    def __init__(
        self, name: str, call: _Call, n: int, num_states: int, options: dict[str, Any]
    ) -> None:
        self._param, self._options, self._n = call.param[n], options, n
        shape = self._param.shape
        self.frozen: Tensor | None = None
        if call.frozen:
            threshold = (options.get("threshold") or [0.0] * (n + 1))[n]
            self.frozen = masks.as_bool(call.frozen[n], threshold, shape)
        self._row = call.row[n] if call.row and call.row[n].numel() > 0 else None
        self._inner = _unit(call, n)[1]
        if self._row is not None:
            self._check_slots(name, call)
            stateless = (self._row < 0).unsqueeze(1).expand(-1, self._inner).reshape(shape)
            self.frozen = stateless if self.frozen is None else self.frozen | stateless
        self._states = [call.state[n + s * len(call.param)] for s in range(num_states)]
        self.states = [self._dense(t) for t in self._states]
        self._master = call.master[n] if call.master else None
        wide = torch.float64 if self._param.dtype == torch.float64 else torch.float32
        self.p = self._param.to(wide) if self._master is None else self._dense(self._master)
        g = call.grad[n].to(wide)
        g = g if call.grad_scale is None else g * call.grad_scale.to(wide)
        self.g = -g if options.get("maximize", False) else g

    def _check_slots(self, name: str, call: _Call) -> None:
        assert self._row is not None
        n = self._n
        slots = len((*call.state[n : n + 1], *call.master[n : n + 1], self._row)[0])
        bad = self._row[(self._row < -1) | (self._row >= slots)]
        if len(bad):
            raise ValueError(
                f"{name}: row[{n}] must hold slots in [0, {slots}) or -1, got {int(bad[0])}"
            )

    def _dense(self, state: Tensor) -> Tensor:
        if self._row is None:
            return state
        has = self._row >= 0
        out = state.new_zeros(len(self._row), self._inner)
        out[has] = state[self._row[has].long()]
        return out.view(self._param.shape)

    def _store(self, state: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """The state with `new` where live; as a tensor of the parameter's shape."""
        merged = _merge(self.frozen, old, new)
        if self._row is None:
            state.copy_(merged)
        else:
            has = self._row >= 0
            state[self._row[has].long()] = merged.reshape(-1, self._inner)[has]
        return merged

    def store(self, p: Tensor, states: Sequence[Tensor]) -> None:
        """The step's outcome, where it is live."""
        for state, old, new in zip(self._states, self.states, states, strict=True):
            self._store(state, old, new)
        if self._master is not None:
            self._store(self._master, self.p, p)
        self._param.copy_(_merge(self.frozen, self._param, self._rounded(p)))

    def _rounded(self, p: Tensor) -> Tensor:
        seeds = self._options.get("seed", ())
        if self._param.dtype != torch.bfloat16 or not seeds:
            return p.to(self._param.dtype)
        start = (self._options.get("start") or [0] * (self._n + 1))[self._n]
        lanes = philox.lanes(
            start + p.numel(), seeds[self._n], self._options.get("draw", 0), device=p.device
        )[start:]
        bits = p.contiguous().view(torch.int32)
        drawn = ((bits + lanes.view(p.shape).int()) >> 16).to(torch.int16).view(torch.bfloat16)
        return torch.where(p.isnan(), p.to(torch.bfloat16), drawn)


def _entries(
    name: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[int, _Call, _Entry]]:
    call = _checked(name, args, options)
    for n in range(len(call.param)):
        yield n, call, _Entry(name, call, n, _num_states(name, options), options)


def masked_sgd_reference_(
    *args: Any,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    **options: Any,
) -> None:
    given = {**options, "momentum": momentum, "nesterov": nesterov}
    for _, call, entry in _entries("masked_sgd_", args, given):
        p, g, states = entry.p, entry.g, entry.states
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            states = [momentum * states[0] + (1 - dampening) * g]
            g = g + momentum * states[0] if nesterov else states[0]
        entry.store(p - call.lr.to(p.dtype) * g, states)


def masked_adam_reference_(
    *args: Any,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    amsgrad: bool = False,
    **options: Any,
) -> None:
    for n, call, entry in _entries("masked_adam_", args, {**options, "amsgrad": amsgrad}):
        step, lr = call.step[n], call.lr
        _count(call, n, options)
        p, g, states = entry.p, entry.g, entry.states
        if weight_decay != 0 and not decoupled:
            g = g + weight_decay * p
        m = states[0].lerp(g, 1 - beta1)
        v = states[1] * beta2 + (1 - beta2) * g * g
        w = torch.maximum(states[2], v) if amsgrad else v
        count = masks.spread(step, p.shape).double() if step.dim() else step.double()
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        denominator = w.sqrt() / correction2.sqrt().to(p.dtype) + eps
        if weight_decay != 0 and decoupled:
            p = p * (1 - lr * weight_decay).to(p.dtype)
        entry.store(
            p - (lr / correction1).to(p.dtype) * (m / denominator), [m, v, w][: len(states)]
        )


def _count(call: _Call, n: int, options: dict[str, Any]) -> None:
    """Step counts go up: one for the tensor, or where its mask is not frozen."""
    step, param = call.step[n], call.param[n]
    if not call.frozen or step.shape != _count_shape(call.frozen[n], param):
        step.add_(1)
        return
    threshold = (options.get("threshold") or [0.0] * (n + 1))[n]
    frozen = masks.as_bool(call.frozen[n], threshold, step.shape)
    if call.row and call.row[n].numel() > 0:
        frozen = frozen | (call.row[n] < 0).view(step.shape)
    step.copy_(_merge(frozen, step, step + 1))


def masked_lion_reference_(
    *args: Any,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    **options: Any,
) -> None:
    for _, call, entry in _entries("masked_lion_", args, options):
        p, g, (m,) = entry.p, entry.g, entry.states
        direction = (beta1 * m + (1 - beta1) * g).sign()
        kept = p if weight_decay == 0 else p * (1 - call.lr * weight_decay).to(p.dtype)
        entry.store(kept - call.lr.to(p.dtype) * direction, [beta2 * m + (1 - beta2) * g])


def _unless(name: str) -> Callable[..., str | None]:
    """What the kernels leave to the reference: float64, and counts by columns, where several
    elements far apart share one count."""

    def reason(*args: Any, **_options: Any) -> str | None:
        call = _Call(*args)
        for n, p in enumerate(call.param):
            if p.dtype == torch.float64:
                return f"takes float32 | bfloat16, got float64 in param[{n}]"
        for n, (count, mask) in enumerate(zip(call.step, call.frozen, strict=False)):
            p = call.param[n]
            if count.dim() == 0 or mask.dtype == torch.uint8 or count.shape != mask.shape:
                continue
            if count.numel() != torch.Size(masks.unit_shape(mask.shape, p.shape)).numel():
                return (
                    f"takes counts per expert, row or element, got {tuple(mask.shape)} in step[{n}]"
                )
        return None

    return reason


_WRITES = (0, 2, 3, 4)  # param, state, step, master
_LISTS = (
    "(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] state, Tensor(c!)[] step, "
    "Tensor(d!)[] master, Tensor[] frozen, Tensor[] row, Tensor lr, Tensor? grad_scale=None, *, "
    "float[] threshold=[], int[] seed=[], int[] start=[], int draw=0, "
)


def _register(
    name: str, run: Callable[..., None], options: str, flops: Callable[[dict[str, Any]], int]
) -> Op:
    """An op of the lists that all three share and options of its own."""

    def fake(*args: Any, backend: str | None = None, **given: Any) -> None:
        _checked(name, args, given)

    def check(*args: Any, **given: Any) -> None:
        _checked(name, args, given)

    def cost(*args: Any, **given: Any) -> Cost:
        """Every element counts as live: counting the frozen ones would cost a pass or a sync."""
        call = _Call(*args)
        elements = sum(p.numel() for p in call.param)
        moved = sum(3 * p.numel() * p.element_size() for p in call.param)
        for tensors in (call.state, call.step, call.master):
            moved += sum(2 * t.numel() * t.element_size() for t in tensors)
        for tensors in (call.frozen, call.row):
            moved += sum(t.numel() * t.element_size() for t in tensors)
        return Cost(elements, moved, flops(given) * elements)

    def example(device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
        shapes = ((4, 8), (5,))
        param, grad = [[torch.full(s, 0.5, device=device, dtype=dtype) for s in shapes]] * 2
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        num_states = _num_states(name, {})
        state = [torch.full(s, 0.5, device=device, dtype=wide) for s in shapes * num_states]
        step = [torch.zeros((), device=device) for _ in shapes] if name == "masked_adam_" else []
        frozen = [
            torch.zeros(4, 1, device=device, dtype=torch.bool),
            torch.ones(5, device=device, dtype=torch.bool),
        ]
        grad = [t.clone() for t in grad]
        return param, grad, state, step, [], frozen, [], torch.full((), 0.1, device=device)

    return register(
        f"{name}{_LISTS}{options}, str? backend=None) -> ()",
        native("cuda", name, unless=_unless(name), writes=_WRITES),
        triton("masked_update", name, check=check, unless=_unless(name), writes=_WRITES),
        native("cpu", name, unless=_unless(name), writes=_WRITES),
        reference(run),
        fake=fake,
        cost=cost,
        example=example,
    )


masked_sgd_ = _register(
    "masked_sgd_",
    masked_sgd_reference_,
    "float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
    "bool maximize=False",
    lambda o: 2 + 2 * (o["momentum"] != 0) + 2 * o["nesterov"] + 2 * (o["weight_decay"] != 0),
)

# m 3, v 4, denominator 3, step 3, decay 1; a square root and a division count as one each
masked_adam_ = _register(
    "masked_adam_",
    masked_adam_reference_,
    "float beta1=0.9, float beta2=0.999, float eps=1e-8, float weight_decay=0.0, "
    "bool decoupled=True, bool amsgrad=False, bool maximize=False",
    lambda _: 14,
)

# direction 4, moment 3, step 2
masked_lion_ = _register(
    "masked_lion_",
    masked_lion_reference_,
    "float beta1=0.9, float beta2=0.99, float weight_decay=0.0, bool maximize=False",
    lambda _: 9,
)
