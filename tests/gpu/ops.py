"""Every op with GPU kernels as the ladder's tests see it: how its CUDA launcher is called on CPU
tensors, its Triton launcher, its cases and its reference."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels import masks
from gose_kernels.ops import combine as combine_op
from gose_kernels.ops import dispatch as dispatch_op
from gose_kernels.ops import distill_loss as distill_op
from gose_kernels.ops import entropy as entropy_op
from gose_kernels.ops import masked_square_sum as square_sum_op
from gose_kernels.ops import masked_update as masked_op
from gose_kernels.ops import quantize as quantize_op
from gose_kernels.ops import route as route_op
from tests import cases
from tests.checks import assert_close_within_ulps
from tests.gpu import masked, routing
from tests.gpu.params import Call, Options, fill, poisoned, split, structs

Outputs = tuple[Tensor, ...]


class OnGpu(NamedTuple):
    """An op: `cuda(call, *args)` allocates as csrc/bind_*.h does, with poison in what the kernel
    must write."""

    source: str  # csrc/cuda/<source>.cu and gose_kernels/triton/<source>.py
    cuda: Callable[..., Outputs]
    reference: Callable[..., Any]
    cases: Callable[[torch.dtype], Iterator[tuple[str, tuple[Any, ...]]]]
    # Meta tensors that reach every tile configuration of the Triton kernel, the widest first.
    tiles: Callable[[torch.dtype], Iterator[tuple[str, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    exact: bool = False  # equal bits, not close
    ulps: int = 0  # allowed beside the error rule, of float32 elements
    writes: tuple[int, ...] = ()  # arguments that change in place: they are the outputs
    doubled: tuple[int, ...] | None = None  # arguments of the truth in float64; None: all
    also: Callable[[Outputs, tuple[Any, ...]], None] | None = None  # what else must hold

    def triton(self, name: str) -> Callable[..., Any]:
        module = importlib.import_module(f"gose_kernels.triton.{self.source}")
        launcher: Callable[..., Any] = getattr(module, name)

        return lambda *args: self.run(launcher, *args)

    def run(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """The outputs of a call; what changes in place is copied first."""
        given, options = split(args)
        given = tuple(_copied(a) if i in self.writes else a for i, a in enumerate(given))
        out = function(*given, **options, **more)
        return _flat(given[i] for i in self.writes) if self.writes else out

    def check(self, got: Any, args: tuple[Any, ...]) -> None:
        """The error rule of tests/checks.py against the reference in float64."""
        same = _tuple(self.reference(*args))
        if self.exact:
            for g, s in zip(_tuple(got), same, strict=True):
                assert (g.dtype, g.shape) == (s.dtype, s.shape)
                assert same_bits(g, s)
            return
        if self.also is not None:
            self.also(_tuple(got), args)
        doubled = range(len(args)) if self.doubled is None else self.doubled
        wide = (_double(a) if i in doubled else a for i, a in enumerate(args))
        truth = _tuple(self.reference(*wide))
        for g, s, t in zip(_tuple(got), same, truth, strict=True):
            if g.is_floating_point():
                assert_close_within_ulps(g, s, t, self.ulps)
            else:
                assert g.dtype == s.dtype
                assert torch.equal(g, s)


def _tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _flat(values: Iterable[Any]) -> Outputs:
    """Tensors and lists of tensors as one tuple."""
    return tuple(t for v in values for t in (v if isinstance(v, list) else [v]))


def _copied(value: Any) -> Any:
    """A tensor or a list of tensors, strides and all, in memory of its own."""
    if isinstance(value, list):
        return [_copied(t) for t in value]
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(t) for t in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _combine(call: Call, y: Tensor, weight: Tensor, row: Tensor) -> Outputs:
    (T, K), D = weight.shape, y.shape[1]
    out = poisoned(T, D, dtype=y.dtype)
    tensors = {"y": y, "weight": weight, "row": row, "out": out}
    call("combine", "CombineParams", tensors, T=T, D=D, K=K, stride_yn=y.stride(0), dtype=y.dtype)
    return (out,)


def _combine_backward(call: Call, grad: Tensor, y: Tensor, weight: Tensor, row: Tensor) -> Outputs:
    (T, K), D = weight.shape, y.shape[1]
    grad_y = torch.zeros_like(y, memory_format=torch.contiguous_format)
    grad_weight = poisoned(T, K, dtype=torch.float32)
    tensors = {"grad": grad, "y": y, "weight": weight, "row": row}
    sizes = {"T": T, "D": D, "K": K, "stride_gt": grad.stride(0), "stride_yn": y.stride(0)}
    call(
        "combine_backward",
        "CombineBackwardParams",
        {**tensors, "grad_y": grad_y, "grad_weight": grad_weight},
        **sizes,
        dtype=y.dtype,
    )
    return grad_y, grad_weight


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _combine_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Widths of every block size, the widest first; K unrolls."""
    for D, K in ((4096, 2), (4096, 8), *((2**i, 2) for i in range(11)), (37, 3)):
        T = 64
        y, weight = _meta(T * K, D, dtype=dtype), _meta(T, K, dtype=torch.float32)
        yield f"D{D}-K{K}", (y, weight, _meta(T, K, dtype=torch.int32))


def _combine_backward_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, args in _combine_tiles(dtype):
        yield label, (_meta(args[1].shape[0], args[0].shape[1], dtype=dtype), *args)


def _combine_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.combine:
        yield str(case), case.build(dtype)


def _combine_backward_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.combine:
        y, weight, row = case.build(dtype)
        yield str(case), (case.draw(row.shape[0], y.shape[1]).to(dtype), y, weight, row)


def _entropy(call: Call, logits: Tensor) -> Outputs:
    logits = logits.contiguous()
    out = poisoned(*logits.shape[:-1], dtype=torch.float32)
    tensors = {"logits": logits, "out": out}
    call(
        "entropy",
        "EntropyParams",
        tensors,
        rows=out.numel(),
        C=logits.shape[-1],
        dtype=logits.dtype,
    )
    return (out,)


def _entropy_backward(call: Call, grad: Tensor, logits: Tensor) -> Outputs:
    logits = logits.contiguous()
    grad_logits = poisoned(*logits.shape, dtype=logits.dtype)
    tensors = {"grad": grad, "logits": logits, "grad_logits": grad_logits}
    sizes = {"rows": grad.numel(), "C": logits.shape[-1]}
    call("entropy_backward", "EntropyBackwardParams", tensors, **sizes, dtype=logits.dtype)
    return (grad_logits,)


def _entropy_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.entropy:
        yield str(case), (case.build(dtype),)
    broken = torch.zeros(3, 20, dtype=dtype)
    broken[0, 3], broken[1, 7] = torch.nan, torch.inf
    yield "nan-and-infinity", (broken,)


def _entropy_backward_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    random = torch.Generator().manual_seed(5)
    for label, (logits,) in _entropy_cases(dtype):
        yield label, (torch.randn(logits.shape[:-1], generator=random), logits)


def _entropy_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every number of columns of a tile, long rows first."""
    for C in (4096, *(2**i for i in range(11)), 37):
        yield f"C{C}", (_meta(64, C, dtype=dtype),)


def _entropy_backward_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (logits,) in _entropy_tiles(dtype):
        yield label, (_meta(64, dtype=torch.float32), logits)


def _dispatch(call: Call, expert: Tensor, E: int) -> Outputs:
    (T, K), chunk = expert.shape, 512
    expert = expert.to(torch.int32).contiguous()
    outputs = [poisoned(*s, dtype=torch.int32) for s in ((T, K), (T * K,), (E + 1,))]
    tensors = dict(zip(("row", "token", "offset"), outputs, strict=True))
    scratch = poisoned(-(-T * K // chunk), E + 1, dtype=torch.int32)
    tensors |= {"expert": expert, "scratch": scratch}
    call("dispatch", "DispatchParams", tensors, T=T, K=K, E=E, chunk=chunk)
    return tuple(outputs)


def _dispatch_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.dispatch:
        if case.T * case.K < 1000:
            yield str(case), case.build(dtype)
    case = cases.DispatchCase(400, 3, 61, "unused")  # several chunks, experts past one tile
    yield str(case), case.build(dtype)


def _dispatch_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "E128", (_meta(4096, 8, dtype=dtype), 128)


_FORMATS = (
    ("int8_b256_f32", "nearest"),
    ("int4_b64_f16", "stochastic"),
    ("int8_b64_f16", "stochastic"),
    ("int8_b256_f32", "stochastic"),
    ("int4_b64_f16", "nearest"),
)


def _format(name: str) -> Any:
    form = quantize_op.FORMATS[name]
    half = form.scale_dtype == torch.float16
    return fill(
        "CodeFormat", bits=form.bits, block=form.block, half_scale=half, max_scale=form.max_scale
    )


def _quantize(
    call: Call, x: Tensor, residual: Tensor | None, frozen: Tensor | None, options: Options
) -> Outputs:
    form = quantize_op.FORMATS[options["format"]]
    place = None if frozen is None else masks.places(frozen, x.shape)
    L, x = x.numel() if place is None else place.numel(), x.contiguous()
    code = poisoned(form.code_bytes(L), dtype=torch.uint8)
    scale = poisoned(form.num_scales(L), dtype=form.scale_dtype)
    left = poisoned(*(x.shape if residual is not None else (0,)), dtype=torch.float32)
    if place is not None:
        left.zero_()
    tensors = {"x": x, "code": code, "scale": scale}
    if residual is not None:
        tensors |= {"residual": residual, "left": left}
    if place is not None:
        tensors["place"] = place
    call(
        "quantize",
        "QuantizeParams",
        tensors,
        P=x.numel(),
        L=L,
        seed=options["seed"],
        step=options["step"],
        stochastic=options["rounding"] == "stochastic",
        format=_format(options["format"]),
        dtype=x.dtype,
    )
    return code, scale, left


def _quantize_reference(*args: Any) -> Outputs:
    given, options = split(args)
    return quantize_op.quantize_reference(*given, **options)


def _quantize_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every case in one format, all formats in turn; values that the dtype holds. Shapes with
    whole vectors, several tiles and a rest, with and without residual, come in every format."""
    turn = 0
    for case in cases.quantize:
        given = case.build(dtype)
        if case.frozen == "" and not bool(given[0].isfinite().all()):
            continue
        if dtype == torch.float16 and case.kind in ("large", "largest", "scales"):
            continue
        name, rounding = _FORMATS[0 if case.kind == "ties" else turn % len(_FORMATS)]
        turn += 1
        options = Options(format=name, rounding=rounding, seed=9, step=4)
        yield f"{case}-{name}-{rounding}", (*given, options)
    for name, rounding in _FORMATS:
        case = cases.QuantizeCase("normal", (2183,), name != "int8_b64_f16")
        options = Options(format=name, rounding=rounding, seed=-9, step=2**40)
        yield f"{case}-{name}-{rounding}", (*case.build(dtype), options)
        x, residual, frozen = cases.QuantizeCase("normal", (2183,), True).build(dtype)
        shifted = (x[1:], None if residual is None else residual[1:], frozen)
        yield f"{case}-off-by-one-{name}-{rounding}", (*shifted, options)


def _quantize_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, rounding in _FORMATS:
        for residual in (None, _meta(4096, dtype=torch.float32)):
            options = Options(format=name, rounding=rounding, seed=1, step=1)
            label = f"{name}-{rounding}-{residual is not None}"
            yield label, (_meta(4096, dtype=dtype), residual, None, options)


def _decode(
    call: Call, op: str, out: Tensor, code: Tensor, scale: Tensor, frozen: Tensor | None,
    options: Options,
) -> Outputs:  # fmt: skip
    form = quantize_op.FORMATS[options["format"]]
    tensors, L = {"code": code, "scale": scale, "out": out}, out.numel()
    if frozen is not None:
        most = min(code.numel() * 8 // form.bits, scale.numel() * form.block)
        tensors["place"] = masks.places(frozen, out.shape, most)
        L = most
    call(
        "dequantize",
        "DequantizeParams",
        tensors,
        P=out.numel(),
        L=L,
        weight=options.get("weight", 1.0),
        add=op == "dequantize_add_",
        format=_format(options["format"]),
    )
    return (out,)


def _dequantize(
    call: Call, code: Tensor, scale: Tensor, numel: int, frozen: Tensor | None, options: Options
) -> Outputs:
    out = poisoned(numel, dtype=torch.float32)
    if frozen is not None:
        out.zero_()
        frozen = frozen.reshape(-1)
    return _decode(call, "dequantize", out, code, scale, frozen, options)


def _dequantize_reference(*args: Any) -> Outputs:
    given, options = split(args)
    return (quantize_op.dequantize_reference(*given, **options),)


def _dequantize_add(
    call: Call, acc: Tensor, code: Tensor, scale: Tensor, frozen: Tensor | None, options: Options
) -> Outputs:
    return _decode(call, "dequantize_add_", acc.clone(), code, scale, frozen, options)


def _dequantize_add_reference(*args: Any) -> Outputs:
    given, options = split(args)
    acc = given[0].clone()
    quantize_op.dequantize_add_reference_(acc, *given[1:], **options)
    return (acc,)


def _coded_cases() -> Iterator[tuple[str, tuple[Any, ...], tuple[int, ...], Options]]:
    """(label, code, scale and frozen, shape, options) of every format; several programs, a rest."""
    wanted = [
        cases.QuantizeCase("normal", shape, frozen=frozen)
        for shape in ((1,), (700,), (2051,))
        for frozen in ("", "element")
    ]
    wanted.append(cases.QuantizeCase("normal", (37, 11), frozen="row"))
    wanted.append(cases.QuantizeCase("normal", (5, 3), frozen="all"))
    for name in quantize_op.FORMATS:
        for case in wanted:
            x, _, frozen = case.build()
            code, scale, _ = quantize_op.quantize_reference(x, None, frozen, format=name)
            yield f"{case}-{name}", (code, scale, frozen), tuple(x.shape), Options(format=name)


def _dequantize_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (code, scale, frozen), shape, options in _coded_cases():
        whole = None if frozen is None else frozen.expand(shape).contiguous()
        yield label, (code, scale, int(torch.Size(shape).numel()), whole, options)


def _dequantize_add_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (code, scale, frozen), shape, options in _coded_cases():
        acc = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
        if frozen is not None:
            acc[frozen.expand(shape)] = -0.0  # adding 0 would change these bits
        yield label, (acc, code, scale, frozen, Options(weight=0.3, **options))


def _dequantize_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, form in quantize_op.FORMATS.items():
        code = _meta(form.code_bytes(4096), dtype=torch.uint8)
        scale = _meta(form.num_scales(4096), dtype=form.scale_dtype)
        yield name, (code, scale, 4096, None, Options(format=name))


def _dequantize_add_tiles(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, (code, scale, _, _, options) in _dequantize_tiles(dtype):
        yield name, (_meta(4096, dtype=torch.float32), code, scale, None, options)


_REFERENCES = {
    "masked_sgd_": masked_op.masked_sgd_reference_,
    "masked_adam_": masked_op.masked_adam_reference_,
    "masked_lion_": masked_op.masked_lion_reference_,
}
_LISTS = (0, 2, 3, 4)  # param, state, step, master: what a step changes


def _num_states(op: str, options: Mapping[str, Any]) -> int:
    if op == "masked_adam_":
        return 3 if options.get("amsgrad") else 2
    return 1 if op == "masked_lion_" or options.get("momentum") else 0


def _update_tensor(op: str, args: tuple[Any, ...], options: Options, n: int) -> dict[str, Any]:
    """The fields of one entry, tensors still as tensors; contiguous ones are expected."""
    param, grad, state, step, master, frozen, row = args[:7]
    p = param[n]
    fields: dict[str, Any] = {"param": p, "grad": grad[n].contiguous(), "numel": p.numel()}
    fields["inner"] = max(1, p.numel())
    fields["state"] = [state[s * len(param) + n] for s in range(_num_states(op, options))]
    if master:
        fields["master"] = master[n]
    if frozen:
        fields |= masked.mask_fields(frozen[n], p)
    if step:
        by_mask = bool(frozen) and step[n].shape == (
            p.shape if frozen[n].dtype == torch.uint8 else frozen[n].shape
        )
        fields |= {"step": step[n], "num_steps": step[n].numel(), "step_by_mask": by_mask}
    if row and row[n].numel() > 0:
        fields["row"] = row[n]
    for name in ("seed", "start", "threshold"):
        if options.get(name):
            fields[name] = options[name][n]
    return fields


def _masked(op: str, call: Call, *args: Any) -> Outputs:
    given, options = split(args)
    lists = [_copied(a) if i in _LISTS else a for i, a in enumerate(given)]
    dense = [[t.contiguous() for t in a] if isinstance(a, list) else a for a in lists]
    tensors: dict[str, Tensor] = {"lr[]": dense[7]}
    entries = (structs()["UpdateTensor"] * max(1, len(dense[0])))()
    for n in range(len(dense[0])):
        fields = _update_tensor(op, tuple(dense), options, n)
        states = fields.pop("state")
        tensors |= {f"{k}[{n}]": t for k, t in fields.items() if isinstance(t, Tensor)}
        tensors |= {f"state{s}[{n}]": t for s, t in enumerate(states)}
        addresses = [t.data_ptr() for t in states] + [0] * (3 - len(states))
        entries[n] = fill("UpdateTensor", state=(ctypes.c_void_p * 3)(*addresses), **fields)
    scale = dense[8] if len(dense) > 8 else None
    if scale is not None:
        tensors["grad_scale[]"] = scale
    decay, decoupled = options.get("weight_decay", 0.0), options.get("decoupled", True)
    decoupled = decoupled and op != "masked_sgd_"
    scalar = fill(
        "UpdateScalars",
        lr=dense[7],
        lr_is_double=dense[7].dtype == torch.float64,
        grad_scale=0 if scale is None else scale,
        grad_scale_is_double=scale is not None and scale.dtype == torch.float64,
        decay=decay if decoupled else 0.0,
        maximize=options.get("maximize", False),
    )
    half = bool(dense[0]) and dense[0][0].dtype == torch.bfloat16
    update_list = fill(
        "UpdateList",
        tensor=ctypes.addressof(entries),
        count=len(dense[0]),
        draw=options.get("draw", 0),
        dtype=torch.bfloat16 if half else torch.float32,
        stochastic=half and bool(options.get("seed")),
        scalar=scalar,
    )
    values: dict[str, Any] = {"list": update_list}
    if op == "masked_sgd_":
        values |= {"momentum": options.get("momentum", 0.0), "weight_decay": decay}
        values |= {"undamped": 1 - options.get("dampening", 0.0)}
        values |= {"nesterov": options.get("nesterov", False)}
    elif op == "masked_adam_":
        values |= {"beta1": options.get("beta1", 0.9), "beta2": options.get("beta2", 0.999)}
        values |= {"eps": options.get("eps", 1e-8), "amsgrad": options.get("amsgrad", False)}
        values["weight_decay"] = 0.0 if decoupled else decay
    else:
        beta1, beta2 = options.get("beta1", 0.9), options.get("beta2", 0.99)
        values |= {"beta1": beta1, "beta2": beta2, "rest1": 1 - beta1, "rest2": 1 - beta2}
    name = op.removesuffix("_")
    struct = "".join(part.title() for part in name.split("_")) + "Params"
    call(name, struct, tensors, **values)
    for to, copy in zip(
        _flat(lists[i] for i in _LISTS), _flat(dense[i] for i in _LISTS), strict=True
    ):
        to.copy_(copy)
    return _flat(lists[i] for i in _LISTS)


def _masked_reference(op: str, *args: Any) -> Outputs:
    given, options = split(args)
    lists = tuple(_copied(a) if i in _LISTS else a for i, a in enumerate(given))
    _REFERENCES[op](*lists, **options)
    return _flat(lists[i] for i in _LISTS)


def _frozen_bits_stay(got: Outputs, args: tuple[Any, ...]) -> None:
    """Elements that their mask freezes, of parameters and states without rows."""
    given, options = split(args)
    param, state, frozen, rows = given[0], given[2], given[5], given[6]
    for n, mask in enumerate(frozen):
        if rows and rows[n].numel() > 0:
            continue
        threshold = (options.get("threshold") or [0.0] * (n + 1))[n]
        whole = masks.as_bool(mask, threshold, param[n].shape)
        for at in (n, *range(len(param) + n, len(param) + len(state), len(param))):
            before = (*param, *state)[at]
            assert same_bits(got[at][whole], before[whole])


def _masked_case(case: cases.UpdateCase, dtype: torch.dtype) -> tuple[Any, ...]:
    param, grad, states, frozen, lr, scale = case.build(dtype)
    state = [t for moment in states[: _num_states(case.op, case.options)] for t in moment]
    state = [t if t.dtype == torch.float32 else t.float() for t in state]
    counts = [torch.tensor(3.0) for _ in param] if case.op == "masked_adam_" else []
    return param, grad, state, counts, [], frozen, [], lr, scale, Options(case.options)


_MASKED_OPTIONS = {
    "masked_sgd_": {"momentum": 0.9, "dampening": 0.25, "nesterov": True, "weight_decay": 0.1},
    "masked_adam_": {"amsgrad": True, "weight_decay": 0.1, "beta1": 0.4},
    "masked_lion_": {"weight_decay": 0.1, "maximize": True},
}


def masked_units(op: str, dtype: torch.dtype, form: str) -> tuple[Any, ...]:
    """All kinds of masks in one call. form: "counts" by mask where they can be, "rows" of state,
    "master" copies, "draws"."""
    random = torch.Generator().manual_seed(23)
    columns = {(6, 8), (3, 5), (1, 5)}  # what counts by mask and rows do not come with
    units = [u for u in masked.UNITS if form not in ("counts", "rows") or u[1] not in columns]
    num_states = _num_states(op, _MASKED_OPTIONS[op])
    param, grad, frozen, step, row = [], [], [], [], []
    states: list[list[Tensor]] = [[] for _ in range(num_states)]
    master: list[Tensor] = []
    for shape, mask_shape, kind in units:
        mask = torch.rand(mask_shape, generator=random) < 0.5
        own = masks.unit_shape(shape if kind == "bits" else mask_shape, shape)
        count = int(torch.Size(own).numel())
        p = torch.randn(shape, generator=random)
        whole = masks.spread(mask, shape)
        grad.append(torch.where(whole, torch.nan, torch.randn(shape, generator=random)).to(dtype))
        frozen.append(masked.as_kind(mask, shape, kind))
        like: tuple[int, ...] = shape
        if form == "rows":
            has = torch.rand(count, generator=random) < 0.7
            slots = torch.full((count,), -1, dtype=torch.int32)
            slots[has] = torch.randperm(int(has.sum()), generator=random).int()
            row.append(slots)
            like = (int(has.sum()), p.numel() // max(1, count))
        for moments in states:
            moments.append(torch.rand(like, generator=random))
        if form == "master":
            master.append(p.clone())
        param.append(p.to(dtype))
        if op == "masked_adam_":
            own_count = shape if kind == "bits" else mask_shape
            drawn = torch.randint(0, 9, own_count, generator=random).float()
            step.append(drawn if form == "counts" else torch.tensor(2.0))
    options = Options(_MASKED_OPTIONS[op], threshold=[0.5] * len(units))
    if form == "draws":
        options |= {"seed": list(range(len(units))), "draw": 7}
        options["start"] = [0, 100, 64, 36, 0, 7, 0, 12, 2**16, 0]
    state = [t for moments in states for t in moments]
    lr, scale = torch.tensor(0.1), torch.tensor(0.5, dtype=torch.float64)
    return param, grad, state, step, master, frozen, row, lr, scale, options


def _masked_cases(op: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for case in cases.masked_update:
        if case.op == op and (case.grad != "huge" or dtype == torch.float32):
            yield str(case), _masked_case(case, dtype)
    half = dtype == torch.bfloat16
    for form in ("counts", "rows", *(("master", "draws") if half else ())):
        yield form, masked_units(op, dtype, form)
    many = [torch.linspace(-1, 1, 1 + n % 7).to(dtype) for n in range(45)]  # several launches
    state = [t.float().abs() for t in many * _num_states(op, {})]
    step = [torch.tensor(1.0) for _ in many] if op == "masked_adam_" else []
    lr = torch.tensor(0.01)
    yield "many", (many, many, state, step, [], [], [], lr, None, Options())


def _masked_tiles(op: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The widest tile of rows, elements and no mask; every number of columns."""
    for shape, mask in (
        ((64, 4096), (64, 1)),
        ((64, 4096), (64, 4096)),
        ((64, 4096), None),
        *(((64, 1 << i), (64, 1)) for i in range(1, 10)),
    ):
        param, grad = [_meta(*shape, dtype=dtype)], [_meta(*shape, dtype=dtype)]
        state = [_meta(*shape, dtype=torch.float32)] * _num_states(op, _MASKED_OPTIONS[op])
        step = [_meta(dtype=torch.float32)] if op == "masked_adam_" else []
        frozen = [] if mask is None else [_meta(*mask, dtype=torch.bool)]
        lr, options = _meta(dtype=torch.float32), Options(_MASKED_OPTIONS[op])
        yield f"{shape}-{mask}", (param, grad, state, step, [], frozen, [], lr, None, options)
    if op == "masked_sgd_":  # without a float32 tensor
        given = (param, grad, [], step, [], frozen, [], lr, None, Options())
        yield f"{shape}-{mask}-plain", given


def _masked_op(op: str) -> OnGpu:
    return OnGpu(
        "masked_update",
        partial(_masked, op),
        partial(_masked_reference, op),
        partial(_masked_cases, op),
        partial(_masked_tiles, op),
        dtypes=(torch.float32, torch.bfloat16),
        ulps=4,
        writes=_LISTS,
        doubled=(0, 1, 2, 4),
        also=_frozen_bits_stay,
    )


def _with_options(reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        given, options = split(args)
        return reference(*given, **options)

    return run


OPS: dict[str, OnGpu] = {
    "combine": OnGpu(
        "combine", _combine, combine_op.combine_reference, _combine_cases, _combine_tiles
    ),
    "combine_backward": OnGpu(
        "combine",
        _combine_backward,
        combine_op.combine_backward_reference,
        _combine_backward_cases,
        _combine_backward_tiles,
    ),
    "dequantize": OnGpu(
        "quantize",
        _dequantize,
        _dequantize_reference,
        _dequantize_cases,
        _dequantize_tiles,
        dtypes=(torch.float32,),
        exact=True,
    ),
    "dequantize_add_": OnGpu(
        "quantize",
        _dequantize_add,
        _dequantize_add_reference,
        _dequantize_add_cases,
        _dequantize_add_tiles,
        dtypes=(torch.float32,),
        exact=True,
        writes=(0,),
    ),
    "dispatch": OnGpu(
        "dispatch",
        _dispatch,
        dispatch_op.dispatch_reference,
        _dispatch_cases,
        _dispatch_tiles,
        dtypes=(torch.int32, torch.int64),
        exact=True,
    ),
    "entropy": OnGpu(
        "entropy",
        _entropy,
        entropy_op.entropy_reference,
        _entropy_cases,
        _entropy_tiles,
        ulps=4,
    ),
    "entropy_backward": OnGpu(
        "entropy",
        _entropy_backward,
        entropy_op.entropy_backward_reference,
        _entropy_backward_cases,
        _entropy_backward_tiles,
        ulps=4,
    ),
    **{op: _masked_op(op) for op in _REFERENCES},
    "masked_square_sum": OnGpu(
        "masked_square_sum",
        masked.square_sum,
        _with_options(square_sum_op.masked_square_sum_reference),
        masked.square_sum_cases,
        masked.square_sum_tiles,
        dtypes=(torch.float32, torch.bfloat16),
        doubled=(0,),
        also=masked.every_sum_is_right,
    ),
    "quantize": OnGpu(
        "quantize",
        _quantize,
        _quantize_reference,
        _quantize_cases,
        _quantize_tiles,
        exact=True,
    ),
    "distill_loss": OnGpu(
        "distill_loss",
        lambda call, *args: routing.distill(call, False, *args),
        _with_options(distill_op.distill_loss_reference),
        routing.distill_cases,
        routing.distill_tiles,
        ulps=4,
    ),
    "distill_loss_train": OnGpu(
        "distill_loss",
        lambda call, *args: routing.distill(call, True, *args),
        _with_options(distill_op.distill_loss_train_reference),
        routing.distill_cases,
        routing.distill_tiles,
        ulps=4,
    ),
    "route": OnGpu(
        "route",
        routing.route,
        _with_options(route_op.route_reference),
        routing.route_cases,
        routing.route_tiles,
        ulps=4,
    ),
    "route_backward": OnGpu(
        "route_backward",
        routing.route_backward,
        _with_options(route_op.route_backward_reference),
        routing.route_backward_cases,
        routing.route_backward_tiles,
        ulps=4,
    ),
}


def every_case() -> list[Any]:
    """(op, dtype, case name) of all ops, as pytest parameters."""
    found = []
    for name, op in OPS.items():
        for dtype in op.dtypes:
            for case, _ in op.cases(dtype):
                short = str(dtype).removeprefix("torch.")
                found.append(pytest.param(name, dtype, case, id=f"{name}-{short}-{case}"))
    return found


def arguments(name: str, dtype: torch.dtype, case: str) -> tuple[Any, ...]:
    return dict(OPS[name].cases(dtype))[case]


def _bytes(t: Tensor) -> Tensor:
    flat = t.reshape(-1).clone(memory_format=torch.contiguous_format)  # a stride of 2 may stay else
    return flat.view(torch.uint8)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(_tuple(a), _tuple(b), strict=True)
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


assert set(OPS) <= set(gk.OPS)
