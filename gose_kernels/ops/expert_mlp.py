"""expert_mlp: every token through the two-layer MLPs of its K experts, summed with gate weights.

    for t, k with e = expert[t, k] < E:
        for h:  pre[h] = sum_d w_up[e, h, d] * x[t, d] + bias_up[e, h]
        for f:  a[f] = act(pre)[f]
        for d:  y[t, k, d] = sum_f w_down[e, d, f] * a[f] + bias_down[e, d]
    for t, d:  out[t, d] = sum_k weight[t, k] * y[t, k, d]      (unused slots skipped, never * 0)

Activations with a gate, H = 2F, act = phi(gate[f]) * up[f], without one, H = F, act = phi(pre[f]):

    swiglu      phi = silu                         silu       g * sigmoid(g)
    geglu       phi = gelu                         gelu       g * Phi(g), exact
    geglu_tanh  phi = gelu_tanh                    gelu_tanh  its tanh approximation
    reglu       phi = relu                         relu       max(g, 0)
    swiglu_oai  phi = g * sigmoid(alpha * g),      relu2      max(g, 0)^2
                times up + 1, limit 7 by default

activation   one of these names
interleaved  False: gate[f] = pre[f], up[f] = pre[F + f]; True: gate[f] = pre[2f], up[f] = pre[2f+1]
limit        with a gate: gate is clamped to at most limit, up to [-limit, limit]; None: the
             activation's own, or not at all
alpha        swiglu_oai only
transposed   True: the weights come as w_up_EDH and w_down_EFD

x_TD       float32 | bfloat16 | float16 | float64, any strides
weight_TK  float32 (float64 with a float64 x)   gate weights
expert_TK  int32 | int64   experts in [0, E], E = unused slot; any other value raises on torch and
           cpu, is trusted on cuda and triton (a check would sync)
w_up_EHD, w_down_EDF, bias_up_EH, bias_down_ED  dtype of x, any strides
frozen_E   bool, True: the weights and biases of this expert get a gradient of exactly 0 and no
           product is made for it
frozen_EF  bool, True: the same for one hidden unit: its rows of w_up and bias_up, its column of
           w_down. bias_down belongs to no unit
returns    out_TD, dtype of x. Sums in float32 (float64 for float64), k ascending. The torch backend
           rounds pre, a and y to the dtype of x; others may keep more. On cpu a token's bits do not
           depend on the other tokens of the call.
T, K, E, D and F may be 0: sums over nothing are 0. A token without used slots gives 0 and is not
read; experts without tokens are not read and get weight gradients of 0.
Differentiable in x, weight, weights and biases, once. At the limit the gradient passes.

expert_mlp_train, which autograd runs instead, returns (out_TD, pre_NH): pre, biased, its rows in
the order of `dispatch` and 0 from row offset[E] on. With the inputs it is all that backward keeps:
`a` is made again, and the gate gradient comes from sum_f (w_down^T grad_out)[f] * a[f], not from y.

expert_mlp_backward returns the gradients of x, weight, w_up, w_down, bias_up and bias_down. One
without its `need_` has shape [0] and costs nothing. expert_mlp_backward_add_ (ops/accumulate.py)
adds those of the weights to what is there.
Source: memory scheme of SonicMoE [arXiv 2512.14080]; swiglu_oai as in gpt-oss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose_kernels import memory, repeats
from gose_kernels.backends import native, reference, triton
from gose_kernels.ops.mlp_call import (
    BackwardCall,
    MlpCall,
    bind_backward,
    check,
    check_backward,
    empty_gradients,
    mlp_numbers,
)
from gose_kernels.packing import (
    DTYPES,
    Packed,
    numbers_then,
    packed_experts,
    path_of,
)
from gose_kernels.registry import Cost, register


def _split(pre_NH: Tensor, call: MlpCall) -> tuple[Tensor, Tensor]:
    """Views of the gate and the up half."""
    if call.interleaved:
        return pre_NH[:, 0::2], pre_NH[:, 1::2]
    hidden = pre_NH.shape[1] // 2
    return pre_NH[:, :hidden], pre_NH[:, hidden:]


def _activate(pre_NH: Tensor, call: MlpCall) -> Tensor:
    if not call.act.gated:
        return call.act.phi(pre_NH, call.scale)
    gate_NF, up_NF = _split(pre_NH, call)
    factor_NF = up_NF.clamp(-call.clamp, call.clamp) + call.act.shift
    return call.act.phi(gate_NF.clamp(max=call.clamp), call.scale) * factor_NF


def _activate_backward(grad_NF: Tensor, pre_NH: Tensor, call: MlpCall) -> Tensor:
    """Gradient of pre."""
    if not call.act.gated:
        return grad_NF * call.act.slope(pre_NH, call.scale)
    grad_pre_NH = torch.empty_like(pre_NH)
    (gate_NF, up_NF), (into_gate_NF, into_up_NF) = _split(pre_NH, call), _split(grad_pre_NH, call)
    clamped_NF = gate_NF.clamp(max=call.clamp)
    factor_NF = up_NF.clamp(-call.clamp, call.clamp) + call.act.shift
    slope_NF = call.act.slope(clamped_NF, call.scale)
    phi_NF = call.act.phi(clamped_NF, call.scale)
    into_gate_NF.copy_(torch.where(gate_NF > call.clamp, 0, grad_NF * factor_NF * slope_NF))
    into_up_NF.copy_(torch.where(up_NF.abs() > call.clamp, 0, grad_NF * phi_NF))
    return grad_pre_NH


def _product(x_ND: Tensor, w_DF: Tensor, bias_EF: Tensor | None, e: int) -> Tensor:
    return x_ND @ w_DF if bias_EF is None else torch.addmm(bias_EF[e], x_ND, w_DF)


class _Plan(NamedTuple):
    """The plan of `dispatch`, on one backend: the reference calls no other kernel."""

    row_TK: Tensor
    token_N: Tensor
    offset_E1: Tensor

    def groups(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Experts that have rows, these rows, and their tokens."""
        for e, (start, stop) in enumerate(pairwise(self.offset_E1.tolist())):
            if stop > start:
                yield e, slice(start, stop), self.token_N[start:stop]


def _plan(call: MlpCall, num_experts: int) -> _Plan:
    return _Plan(*torch.ops.gose.dispatch(call.expert_TK, num_experts, backend="torch"))


def _forward(call: MlpCall, keep: bool) -> tuple[Tensor, Tensor]:
    """out_TD and, if kept, pre_NH."""
    E, H, _, D = check(call)
    plan = _plan(call, E)
    N = call.expert_TK.numel()
    y_ND = call.x_TD.new_zeros(N, D)
    kept_NH = call.x_TD.new_zeros(N if keep else 0, H)
    for e, rows, token_n in plan.groups():
        pre_nH = _product(call.x_TD[token_n], call.up_EDH[e], call.bias_up_EH, e)
        if keep:
            kept_NH[rows] = pre_nH
        a_nF = _activate(pre_nH.to(call.sum_dtype), call).to(pre_nH.dtype)
        y_ND[rows] = _product(a_nF, call.down_EFD[e], call.bias_down_ED, e)
    out_TD: Tensor = torch.ops.gose.combine(y_ND, call.weight_TK, plan.row_TK, backend="torch")
    return out_TD, kept_NH


def expert_mlp_reference(*args: Any, **options: Any) -> Tensor:
    return _forward(MlpCall(*args, **options), keep=False)[0]


def expert_mlp_train_reference(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _forward(MlpCall(*args, **options), keep=True)


def _unfrozen(call: MlpCall, e: int) -> tuple[Tensor | slice, Tensor | slice] | None:
    """Rows of w_up and columns of w_down that get a gradient; None if the expert is frozen."""
    if call.frozen_E is not None and bool(call.frozen_E[e]):
        return None
    if call.frozen_EF is None:
        return slice(None), slice(None)
    unit_f = (~call.frozen_EF[e]).nonzero()[:, 0]
    if not call.act.gated:
        return unit_f, unit_f
    num_units = call.down_EFD.shape[1]
    pair = (2 * unit_f, 2 * unit_f + 1) if call.interleaved else (unit_f, num_units + unit_f)
    return torch.cat(pair), unit_f


def expert_mlp_backward_reference(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call, back = bind_backward(args, options)
    check_backward(call, back)
    gradients = tuple(t.zero_() for t in empty_gradients(call, back))
    _, grad_weight_TK, grad_up, grad_down, grad_bias_up_EH, grad_bias_down_ED = gradients
    plan, dtype = _plan(call, call.w_up_EHD.shape[0]), call.x_TD.dtype
    used_TK = plan.row_TK >= 0
    weight_N = call.weight_TK.new_zeros(call.expert_TK.numel())
    weight_N[plan.row_TK[used_TK]] = call.weight_TK[used_TK]
    grad_weight_N = torch.zeros_like(weight_N)
    grad_x_ND = call.x_TD.new_zeros(weight_N.numel() if back.need_x else 0, call.x_TD.shape[1])
    for e, rows, token_n in plan.groups():
        grad_nD, weight_n1 = back.grad_TD[token_n], weight_N[rows, None]
        pre_nH = back.pre_NH[rows].to(call.sum_dtype)
        if back.need_weight or back.need_down:
            a_nF = _activate(pre_nH, call)
        if back.need_weight or back.need_pre:
            grad_a_nF = (grad_nD @ call.down_EFD[e].mT).to(call.sum_dtype)
        if back.need_pre:
            grad_pre_nH = (weight_n1 * _activate_backward(grad_a_nF, pre_nH, call)).to(dtype)
        if back.need_weight:
            grad_weight_N[rows] = (grad_a_nF * a_nF).sum(dim=1)
            if call.bias_down_ED is not None:
                product_nD = grad_nD.to(call.sum_dtype) * call.bias_down_ED[e]
                grad_weight_N[rows] += product_nD.sum(dim=1)
        if back.need_x:
            grad_x_ND[rows] = grad_pre_nH @ call.up_EDH[e].mT
        if (unfrozen := _unfrozen(call, e)) is None:
            continue
        row_h, unit_f = unfrozen
        if back.need_up:
            into_DH = grad_up[e] if call.transposed else grad_up[e].mT
            into_DH[:, row_h] = call.x_TD[token_n].mT @ grad_pre_nH[:, row_h]
        if back.need_down:
            into_FD = grad_down[e] if call.transposed else grad_down[e].mT
            into_FD[unit_f] = (weight_n1 * a_nF).to(dtype)[:, unit_f].mT @ grad_nD
        if back.need_bias_up:
            grad_bias_up_EH[e][row_h] = grad_pre_nH[:, row_h].sum(dim=0)
        if back.need_bias_down:
            grad_bias_down_ED[e] = (weight_n1 * grad_nD).sum(dim=0).to(dtype)
    if back.need_weight:
        grad_weight_TK[used_TK] = grad_weight_N[plan.row_TK[used_TK]]
    if not back.need_x:
        return gradients
    one_TK = torch.ones_like(call.weight_TK)
    grad_x_TD = torch.ops.gose.combine(grad_x_ND, one_TK, plan.row_TK, backend="torch")
    return grad_x_TD, *gradients[1:]


def _fake(*args: Any, backend: str | None = None, **options: Any) -> Tensor:
    call = MlpCall(*args, **options)
    check(call)
    return call.x_TD.new_empty(call.x_TD.shape)


def _train_fake(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    call = MlpCall(*args, **options)
    _, H, _, _ = check(call)
    return call.x_TD.new_empty(call.x_TD.shape), call.x_TD.new_empty(call.expert_TK.numel(), H)


def _backward_fake(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    call, back = bind_backward(args, options)
    check_backward(call, back)
    return empty_gradients(call, back)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.options = dict(keyword_only_inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


_NEED_WEIGHTS = ("need_up", "need_down")


def _backward(ctx: Any, grad_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    # torch leaves out trailing arguments that have their default.
    needs = (*ctx.needs_input_grad, *[False] * 9)[:9]
    if grad_TD is None:
        return (None,) * 9
    saved, wanted = (
        ctx.saved_tensors,
        dict(zip(BackwardCall._fields[2:], [needs[i] for i in (0, 1, 3, 4, 5, 6)], strict=True)),
    )
    up_and_down = wanted["need_up"], wanted["need_down"]
    into = memory.gradients_to_add_to(saved[3:5], up_and_down)
    if into is None:
        gradients = torch.ops.gose.expert_mlp_backward(*saved, grad_TD, **ctx.options, **wanted)
    else:
        others = {name: need for name, need in wanted.items() if name not in _NEED_WEIGHTS}
        x, weight, *biases = torch.ops.gose.expert_mlp_backward_add_(
            *saved, grad_TD, *into, **ctx.options, **others
        )
        wanted |= dict.fromkeys(_NEED_WEIGHTS, False)
        gradients = (x, weight, None, None, *biases)
    x, weight, up, down, bias_up, bias_down = (
        g if need else None for g, need in zip(gradients, wanted.values(), strict=True)
    )
    return x, weight, None, up, down, bias_up, bias_down, None, None


def _moved(call: MlpCall) -> int:
    """Bytes of tokens, slots and the weights of no more experts than there are slots."""
    E, H, F, D = check(call)
    experts, slots = min(E, call.expert_TK.numel()), call.expert_TK.numel()
    elements = 2 * call.x_TD.numel() + experts * D * (H + F)
    elements += experts * (H * (call.bias_up_EH is not None) + D * (call.bias_down_ED is not None))
    per_slot = call.weight_TK.element_size() + call.expert_TK.element_size()
    return elements * call.x_TD.element_size() + slots * per_slot


def _cost(*args: Any, **options: Any) -> Cost:
    """Every slot used."""
    call = MlpCall(*args, **options)
    _, H, F, D = check(call)
    return Cost(call.x_TD.shape[0], _moved(call), 2 * call.expert_TK.numel() * D * (H + F))


def _train_cost(*args: Any, **options: Any) -> Cost:
    call = MlpCall(*args, **options)
    _, H, _, _ = check(call)
    inference = _cost(*args, **options)
    kept = call.expert_TK.numel() * H * call.x_TD.element_size()
    return inference._replace(bytes=inference.bytes + kept)


def backward_cost(*args: Any, **options: Any) -> Cost:
    """Every slot used, nothing frozen."""
    call, back = bind_backward(args, options)
    _, H, F, D = check(call)
    written = sum(g.numel() * g.element_size() for g in empty_gradients(call, back))
    read = (back.pre_NH.numel() + back.grad_TD.numel()) * call.x_TD.element_size()
    need_a = back.need_weight or back.need_pre
    products = (need_a + back.need_down) * F + (back.need_x + back.need_up) * H
    flops = 2 * call.expert_TK.numel() * D * products
    return Cost(call.x_TD.shape[0], _moved(call) + read + written, flops)


def example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    T, K, E, D, F = 4, 2, 3, 8, 6
    return (
        torch.ones(T, D, device=device, dtype=dtype),
        torch.full((T, K), 0.5, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        torch.arange(T * K, device=device, dtype=torch.int32).view(T, K) % E,
        torch.full((E, 2 * F, D), 0.1, device=device, dtype=dtype),
        torch.full((E, D, F), 0.1, device=device, dtype=dtype),
    )


def backward_example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    args = example(device, dtype)
    pre_NH = torch.ones(args[2].numel(), args[3].shape[1], device=device, dtype=dtype)
    return (*args, None, None, None, None, pre_NH, torch.ones_like(args[0]))


TENSORS = (
    "Tensor x_TD, Tensor weight_TK, Tensor expert_TK, Tensor w_up_EHD, Tensor w_down_EDF, "
    "Tensor? bias_up_EH{none}, Tensor? bias_down_ED{none}, "
    "Tensor? frozen_E{none}, Tensor? frozen_EF{none}"
)
OPTIONS = (
    'str activation="swiglu", bool interleaved=False, bool transposed=False, '
    "float? limit=None, float alpha=1.702"
)
_ARGUMENTS = f"{TENSORS.format(none='=None')}, *, {OPTIONS}, str? backend=None"


def numbers_of(call: MlpCall) -> Tensor:
    hidden = call.w_down_EDF.shape[1 if call.transposed else 2]
    return mlp_numbers(call.activation, call.interleaved, call.limit, call.alpha, hidden)


def packed_of(call: MlpCall, *, changing: bool = False) -> Packed | None:
    return packed_experts(
        *(call.w_up_EHD, call.w_down_EDF),
        gated=call.act.gated,
        interleaved=call.interleaved,
        transposed=call.transposed,
        changing=changing,
    )


def _native(call: MlpCall, keep: bool) -> Any:
    """out_TD, or if kept out_TD and pre_NH. The kernel checks what it reads; what it cannot see,
    and a call that it refuses, is checked here in the op's own words."""
    masked = call.frozen_E is not None or call.frozen_EF is not None
    # Packed weights of close widths have equal sizes: the kernel cannot tell them apart.
    width = call.w_up_EHD.shape[1 if call.transposed else -1]
    if masked or call.w_up_EHD.dtype != call.x_TD.dtype or width != call.x_TD.shape[-1]:
        check(call)
    kernels = torch.ops.gose_native
    trained = keep and (call.w_up_EHD.requires_grad or call.w_down_EDF.requires_grad)
    routed = (call.x_TD, call.weight_TK, call.expert_TK)
    biases = (call.bias_up_EH, call.bias_down_ED)
    try:
        numbers, packed = numbers_of(call), packed_of(call, changing=trained)
        if packed is None:
            raw = (call.w_up_EHD, call.w_down_EDF, call.transposed)
            return kernels.expert_mlp_train_raw.default(numbers, *raw, *routed, *biases)
        if keep:
            return kernels.expert_mlp_train.default(numbers, packed.packed_EB, *routed, *biases)
        given = (*routed, None, None, *biases)
        return kernels.expert_mlp.default(numbers, packed.packed_EB, *given)
    except (KeyError, ValueError, RuntimeError, IndexError):
        check(call)
        raise


def _bind(*args: Any, **options: Any) -> tuple[MlpCall]:
    """A checked call, as the Triton launchers take it."""
    call = MlpCall(*args, **options)
    check(call)
    return (call,)


def _bind_both(*args: Any, **options: Any) -> tuple[MlpCall, BackwardCall]:
    call, back = bind_backward(args, options)
    check_backward(call, back)
    return call, back


def _cpu(*args: Any, **options: Any) -> Tensor:
    out_TD: Tensor = _native(MlpCall(*args, **options), keep=False)
    return out_TD


def _learn(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    call = MlpCall(*args, **options)
    packed = packed_of(call)
    assert packed is not None
    then = numbers_then(call.x_TD, (call.w_up_EHD, call.w_down_EDF))
    numbers = torch.cat([numbers_of(call), then])
    run = partial(torch.ops.gose_native.expert_mlp.default._op, numbers, packed.packed_EB)
    repeats.learn("expert_mlp", (3, 4), packed.versions, args, options, run)


def _cpu_train(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out_TD, pre_NH = _native(MlpCall(*args, **options), keep=True)
    return out_TD, pre_NH


def native_backward(
    call: MlpCall,
    back: BackwardCall,
    grad_up: Tensor | None,
    grad_down: Tensor | None,
    *,
    add: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias_up and bias_down; those of the weights go to the given tensors,
    with `add` to what is there."""
    others: tuple[Tensor, ...] = torch.ops.gose_native.expert_mlp_backward(
        *(numbers_of(call), call.x_TD, call.weight_TK, call.expert_TK),
        *(call.w_up_EHD, call.w_down_EDF, call.transposed),
        *(call.bias_down_ED, call.frozen_E, call.frozen_EF),
        *(back.pre_NH, back.grad_TD, grad_up, grad_down),
        *(back.need_x, back.need_weight, back.need_bias_up, back.need_bias_down, add),
    )
    return others


def _cpu_backward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call, back = bind_backward(args, options)
    check_backward(call, back)
    up, down = call.w_up_EHD, call.w_down_EDF
    grad_up = memory.take(up.shape, up.dtype) if back.need_up else None
    grad_down = memory.take(down.shape, down.dtype) if back.need_down else None
    x, weight, bias_up, bias_down = native_backward(call, back, grad_up, grad_down, add=False)
    none = up.new_empty(0)
    return (
        x,
        weight,
        grad_up if grad_up is not None else none,
        grad_down if grad_down is not None else down.new_empty(0),
        bias_up,
        bias_down,
    )


def _train(*args: Any, **options: Any) -> Tensor:
    out_TD: Tensor = torch.ops.gose.expert_mlp_train(*args, **options)[0]
    return out_TD


expert_mlp = register(
    f"expert_mlp({_ARGUMENTS}) -> Tensor",
    triton("expert_mlp", "expert_mlp", *DTYPES, bind=_bind),
    native(
        "cpu", _cpu, *DTYPES, path=path_of, again=repeats.repeating("expert_mlp", 3), learn=_learn
    ),
    reference(expert_mlp_reference),
    fake=_fake,
    training=_train,
    cost=_cost,
    example=example,
    autocast=("x_TD", "w_up_EHD", "w_down_EDF", "bias_up_EH", "bias_down_ED"),
)

expert_mlp_train = register(
    f"expert_mlp_train({_ARGUMENTS}) -> (Tensor, Tensor)",
    triton("expert_mlp", "expert_mlp_train", *DTYPES, bind=_bind),
    native("cpu", _cpu_train, *DTYPES),
    reference(expert_mlp_train_reference),
    fake=_train_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_train_cost,
    example=example,
)

expert_mlp_backward = register(
    f"expert_mlp_backward({TENSORS.format(none='')}, Tensor pre_NH, Tensor grad_TD, *, "
    f"{OPTIONS}, bool need_x=True, bool need_weight=True, bool need_up=True, "
    "bool need_down=True, bool need_bias_up=False, bool need_bias_down=False, "
    "str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton("expert_mlp_backward", "expert_mlp_backward", *DTYPES, bind=_bind_both),
    native("cpu", _cpu_backward, *DTYPES),
    reference(expert_mlp_backward_reference),
    fake=_backward_fake,
    cost=backward_cost,
    example=backward_example,
)
