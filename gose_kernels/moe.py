"""MoE: a mixture-of-experts layer as one module, with the parameter names of transformers' blocks.

    gate.weight                                    [E, D]
    gate.e_score_correction_bias                   [E], a buffer; with correction_bias=True
    experts.gate_up_proj, experts.up_proj          [E, 2F, D] with a gate, [E, F, D] without one
    experts.down_proj                              [E, D, F]
    experts.gate_up_proj_bias (up_proj_bias), experts.down_proj_bias     [E, 2F] | [E, F], [E, D]
    shared_expert.gate_proj, up_proj, down_proj    linear layers of the shared expert
    shared_expert_gate                             linear layer [1, D]; with shared_gate=True

Transposed weights stand as [E, D, 2F] and [E, F, D]. All are plain parameters: DDP, FSDP2 (shard
the layer as one unit: it reads the parameters of its parts), activation checkpointing, autocast and
torch.compile(fullgraph=True) work as with any module. Experts spread over devices are not covered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.ops.moe import moe
from gose_kernels.ops.route import route
from gose_kernels.ops.route_call import LOSSES


class RouteStats(NamedTuple):
    """What routing one batch of T tokens found; shapes and meanings as `route` has them."""

    weight_TK: Tensor
    expert_TK: Tensor
    entropy_T: Tensor
    load_E: Tensor
    importance_E: Tensor
    loss_L: Tensor

    def loss(self, name: str) -> Tensor:
        """One loss by its name in `gk.LOSSES`; ValueError for another name."""
        if name not in LOSSES:
            raise ValueError(
                f"RouteStats.loss: no loss named {name!r}; losses: {', '.join(LOSSES)}"
            )
        return self.loss_L[LOSSES.index(name)]


class _Gate(nn.Module):
    def __init__(self, num_experts: int, width: int, correction_bias: bool, **like: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, **like))
        if correction_bias:
            bias_E = torch.zeros(num_experts, dtype=torch.float32, device=like["device"])
            self.register_buffer("e_score_correction_bias", bias_E)


class _Experts(nn.Module):
    def __init__(
        self, E: int, D: int, F: int, gated: bool, bias: bool, transposed: bool, **like: Any
    ) -> None:
        super().__init__()
        self.up_name = "gate_up_proj" if gated else "up_proj"
        H = 2 * F if gated else F
        up, down = ((E, D, H), (E, F, D)) if transposed else ((E, H, D), (E, D, F))
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(up, **like)))
        self.down_proj = nn.Parameter(torch.empty(down, **like))
        for name, size in ((f"{self.up_name}_bias", H), ("down_proj_bias", D)):
            parameter = nn.Parameter(torch.zeros(E, size, **like)) if bias else None
            self.register_parameter(name, parameter)


class _SharedExpert(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str, **like: Any) -> None:
        super().__init__()
        self.activation = activation
        if ACTIVATIONS[activation].gated:
            self.gate_proj = nn.Linear(width, hidden, bias=False, **like)
        self.up_proj = nn.Linear(width, hidden, bias=False, **like)
        self.down_proj = nn.Linear(hidden, width, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if not act.gated:
            hidden = act.phi(self.up_proj(x), 1.0)
        else:
            hidden = act.phi(self.gate_proj(x), 1.0) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


class MoE(nn.Module):
    """`moe` with its parameters: router, experts, and a shared expert if asked for.

    width D, hidden F, num_experts E, top_k K
    activation, interleaved, transposed, limit, alpha    as in `expert_mlp`; bias: both biases
    scale            factor of the routed experts' sum
    correction_bias  a buffer gate.e_score_correction_bias that shifts the choice, not the weights
                     (sigmoid gates); training it is the caller's
    shared_hidden    hidden units of an expert that sees every token; 0: none. It is plain swiglu
                     for swiglu_oai
    shared_gate      its output is multiplied by sigmoid(shared_expert_gate(x))
    shared_name      "shared_expert" (Qwen2-MoE) or "shared_experts" (DeepSeek)
    generator        of the initial weights: normal, standard deviation 1 / sqrt(inputs)
    routing          policy and the options after it, as in `route`
    ValueError for what `expert_mlp` or `route` refuse.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        interleaved: bool = False,
        transposed: bool = False,
        limit: float | None = None,
        alpha: float = 1.702,
        bias: bool = False,
        scale: float = 1.0,
        correction_bias: bool = False,
        shared_hidden: int = 0,
        shared_gate: bool = False,
        shared_name: str = "shared_expert",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **routing: Any,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"MoE: activation must be one of {names}, got {activation!r}")
        _check_routing(num_experts, top_k, correction_bias, routing)
        like = {"device": device, "dtype": dtype}
        gated = ACTIVATIONS[activation].gated
        self.top_k, self.scale, self.shared_name = top_k, scale, shared_name
        self.options = {
            "activation": activation,
            "interleaved": interleaved,
            "transposed": transposed,
            "limit": limit,
            "alpha": alpha,
            **routing,
        }
        self.gate = _Gate(num_experts, width, correction_bias, **like)
        self.experts = _Experts(num_experts, width, hidden, gated, bias, transposed, **like)
        if shared_hidden:
            shared = "swiglu" if activation == "swiglu_oai" else activation
            self.add_module(shared_name, _SharedExpert(width, shared_hidden, shared, **like))
        self.shared_expert_gate = (
            nn.Linear(width, 1, bias=False, **like) if shared_hidden and shared_gate else None
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights; biases and the correction bias become 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
                continue
            inputs = p.shape[1 if p.dim() == 3 and self.options["transposed"] else -1]
            p.normal_(0, inputs**-0.5, generator=generator)
        if (bias_E := self._correction()) is not None:
            bias_E.zero_()

    def _correction(self) -> Tensor | None:
        return getattr(self.gate, "e_score_correction_bias", None)

    def _live_logits(self, x_TD: Tensor) -> Tensor:
        """The router's scores, -inf for experts that `LivingExperts` keeps out."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.to(dtype) @ self.gate.weight.to(dtype).mT
        live_E = self.gate._buffers["live_E"]
        assert live_E is not None
        return logits_TE.masked_fill(~live_E, -torch.inf)

    def forward(
        self,
        x: Tensor,
        *,
        entropy_TE: Tensor | None = None,
        entropy_E: Tensor | None = None,
        noise_TE: Tensor | None = None,
        frozen_E: Tensor | None = None,
        frozen_EF: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, RouteStats]:
        """(out [..., D] in the dtype of the experts, RouteStats) of x [..., D].

        Losses stand in the statistics; nothing is added to the output's gradient.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        experts = self.experts
        logits_TE = None
        if "live_E" in self.gate._buffers:
            logits_TE = self._live_logits(x_TD)
            own_E = experts._buffers["frozen_E"]
            frozen_E = own_E if frozen_E is None or own_E is None else frozen_E | own_E
        out_TD, *stats = moe(
            *(x_TD, getattr(experts, experts.up_name), experts.down_proj, self.top_k),
            *(self.gate.weight if logits_TE is None else None, logits_TE),
            *(getattr(experts, f"{experts.up_name}_bias"), experts.down_proj_bias),
            *(frozen_E, frozen_EF, entropy_TE, entropy_E, self._correction(), noise_TE),
            **self.options,
            backend=backend,
        )
        out = out_TD if x.dim() == 2 else out_TD.view(x.shape)
        if self.scale != 1.0:
            out = out * self.scale
        shared = getattr(self, self.shared_name, None)
        if shared is not None:
            from_shared = shared(x)
            if self.shared_expert_gate is not None:
                from_shared = functional.sigmoid(self.shared_expert_gate(x)) * from_shared
            out = out + from_shared
        return out, RouteStats(*stats)

    def extra_repr(self) -> str:
        E, D = self.gate.weight.shape
        options = {k: v for k, v in self.options.items() if v not in (False, None)}
        return f"width={D}, num_experts={E}, top_k={self.top_k}, {options}"


def _check_routing(E: int, top_k: int, biased: bool, routing: dict[str, Any]) -> None:
    """One token through `route`: what it refuses, it refuses before there are weights."""
    entropy_E = torch.zeros(E) if routing.get("policy") == "egs" else None
    bias_E = torch.zeros(E) if biased else None
    route(torch.zeros(1, E), top_k, entropy_E=entropy_E, bias_E=bias_E, **routing)
