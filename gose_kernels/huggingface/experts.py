"""The experts implementation "gose" of transformers: `register()` adds it.

    from_pretrained(..., experts_implementation="gose")    model.set_experts_implementation("gose")

The contract of an experts module (`transformers.integrations.moe`), and how each part is honoured:

    has_gate                gate_up_proj, or without it up_proj
    has_bias                gate_up_proj_bias (up_proj_bias) and down_proj_bias
    is_transposed           the weights stand as [E, in, out]
    is_concatenated         not read: `_apply_gate` says how gate and up lie, for all of them
    has_post_expert_norm    post_expert_norm of every expert output, before the gate weights
    _apply_gate, act_fn     found by their values (`forms`)
    _is_expert_parallel     every id >= num_experts is an unused slot; else only num_experts is one,
                            and a larger id is an error
Known activations run as `expert_mlp`. With a norm after the experts or an activation of its own, a
module runs as `dispatch`, two `grouped_gemm`, its own code between them, and `combine`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gose_kernels.huggingface.forms import form_of
from gose_kernels.huggingface.waves import in_waves
from gose_kernels.ops.combine import combine
from gose_kernels.ops.dispatch import dispatch
from gose_kernels.ops.expert_mlp import expert_mlp
from gose_kernels.ops.grouped_gemm import grouped_gemm

NAME = "gose"
FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def register() -> None:
    """Adds "gose" to transformers' experts implementations; more calls change nothing.

    RuntimeError without transformers >= 5.23 (`pip install 'gose[hf]'`).
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise RuntimeError(
            f"huggingface.register: needs transformers >= 5.23 ({error}); pip install 'gose[hf]'"
        ) from error
    ExpertsInterface.register(NAME, experts_forward)


def _want(module: nn.Module, holds: bool, argument: str, wanted: str, got: object) -> None:
    if not holds:
        name = type(module).__name__
        raise ValueError(f"gose experts of {name}: {argument} must be {wanted}, got {got}")


def check(
    module: nn.Module,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """ValueError for a call that does not fit the module; dtype: of weights it no longer holds."""
    for flag in FLAGS:
        _want(module, hasattr(module, flag), f"attribute {flag}", "set by transformers", "none")
    shape, chosen = tuple(x_TD.shape), tuple(expert_TK.shape)
    _want(module, len(shape) == 2, "hidden_states", "of shape [tokens, width]", shape)
    fits = len(chosen) == 2 and chosen[0] == shape[0]
    _want(module, fits, "top_k_index", f"of shape [tokens = {shape[0]}, k]", chosen)
    got = tuple(weight_TK.shape)
    _want(module, got == chosen, "top_k_weights", f"of shape {chosen} as top_k_index", got)
    whole = expert_TK.dtype in (torch.int32, torch.int64)
    _want(module, whole, "top_k_index", "int32 or int64", expert_TK.dtype)
    for name, p in module.named_parameters(recurse=False):
        same = p.device == x_TD.device
        _want(module, same, "hidden_states", f"on {p.device} as {name}", x_TD.device)
        same = (dtype or p.dtype) == x_TD.dtype or torch.is_autocast_enabled(x_TD.device.type)
        wanted = f"{dtype or p.dtype} as {name} (cast the model, or run it under torch.autocast)"
        _want(module, same, "hidden_states", wanted, x_TD.dtype)


def slots(module: nn.Module, top_k_index: Tensor) -> Tensor:
    """Experts in [0, E], E = unused."""
    experts: int = module.num_experts  # type: ignore[assignment]
    if module._is_expert_parallel:
        return top_k_index.clamp(max=experts)
    return top_k_index


def _explained(module: nn.Module, error: ValueError, top_k_index: Tensor) -> ValueError:
    """The op's refusal, in the words of the module's caller."""
    experts: int = module.num_experts  # type: ignore[assignment]
    if top_k_index.numel() and not 0 <= int(top_k_index.min()) <= int(top_k_index.max()) <= experts:
        low, high = int(top_k_index.min()), int(top_k_index.max())
        return ValueError(
            f"gose experts of {type(module).__name__}: top_k_index must hold experts in [0, "
            f"num_experts = {experts}], where {experts} marks an unused slot, got {low} to {high}; "
            f"ids beyond are sentinels of expert parallelism and need _is_expert_parallel = True"
        )
    return ValueError(f"gose experts of {type(module).__name__}: {error}")


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum over a token's slots of weight times expert output, [T, D] in the dtype of the tokens.

    hidden_states [T, D]; top_k_index [T, K] int; top_k_weights [T, K] floating, read in float32.
    ValueError for what does not fit, before anything is computed.
    """
    check(self, hidden_states, top_k_index, top_k_weights)
    try:
        out_TD = _forward(self, hidden_states, slots(self, top_k_index), top_k_weights)
    except ValueError as error:
        raise _explained(self, error, top_k_index) from error
    return out_TD.to(hidden_states.dtype)  # under autocast the op has cast


def _forward(module: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    weight_TK = weight_TK.to(torch.promote_types(x_TD.dtype, torch.float32))
    form = None if module.has_post_expert_norm else form_of(module)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    bias_up = bias_down = None
    if module.has_bias:
        bias_up = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        bias_down = module.down_proj_bias
    transposed = bool(module.is_transposed)
    frozen_E = module._buffers.get("frozen_E")  # of LivingExperts
    if form is not None:
        found = form

        def run(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
            out_TD: Tensor = expert_mlp(
                *(x_TD, weight_TK, expert_TK, up, module.down_proj, bias_up, bias_down, frozen_E),
                activation=found.activation,
                interleaved=found.interleaved,
                limit=found.limit,
                alpha=found.alpha,
                transposed=transposed,
            )
            return out_TD

        early_exit = vars(module).get("_gose_early_exit")
        if early_exit is None or torch.is_grad_enabled():
            return run(x_TD, weight_TK, expert_TK)
        E = module.num_experts
        out_TD, ran_TK = in_waves(run, x_TD, weight_TK, expert_TK, E, early_exit)
        if (watch := vars(module).get("_gose_watch")) is not None:
            watch.left_out(expert_TK[~ran_TK])
        return out_TD
    down = module.down_proj
    if frozen_E is not None and torch.is_grad_enabled():
        up, down, bias_up, bias_down = (_still(w, frozen_E) for w in (up, down, bias_up, bias_down))
    row_TK, token_N, offset_E1 = dispatch(expert_TK, module.num_experts)
    x_ND = x_TD[token_N.clamp_min(0)]
    pre_NH = grouped_gemm(x_ND, up, offset_E1, bias_up, transposed=transposed)
    a_NF = module._apply_gate(pre_NH) if module.has_gate else module.act_fn(pre_NH)
    y_ND = grouped_gemm(a_NF, down, offset_E1, bias_down, transposed=transposed)
    if module.has_post_expert_norm:
        y_ND = module.post_expert_norm(y_ND)
    summed_TD: Tensor = combine(y_ND, weight_TK, row_TK)
    return summed_TD


def _still(weights: Tensor | None, frozen_E: Tensor) -> Tensor | None:
    """Weights whose gradient is 0 for frozen experts."""
    if weights is None:
        return None
    return torch.where(frozen_E.view(-1, *[1] * (weights.dim() - 1)), weights.detach(), weights)
