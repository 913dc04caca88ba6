"""Own MoE layers on `MoE`: known parameter layouts, and the swap of a layer that behaves as one.

A layout says where a layer keeps its router and the weights of its experts. What it computes from
them is found by asking: the layer runs on random tokens, and the `MoE` (or `expert_mlp`, where the
caller routes) with the same numbers takes its place, else the layer stays, with the reason.

    list of experts    a ModuleList of MLPs of two or three linear layers beside a linear router
    FastMoE            experts.htoh4, experts.h4toh: weight and bias with an expert dimension
    ScatterMoE         experts.weight, output_experts.weight; called with weights and experts
    MegaBlocks         experts.mlp.w1, (v1,) w2 of [experts * hidden, width]; router.layer
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gose_kernels.moe import MoE
from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.ops.expert_mlp import expert_mlp

_GATES = ("gate", "router", "wg")
_TOP_K = ("top_k", "num_experts_per_tok", "topk", "k", "moe_top_k", "num_selected")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN = (("up_proj", "down_proj"), ("fc1", "fc2"), ("w1", "w2"), ("wi", "wo"), ("c_fc", "c_proj"))
_TOKENS = 64


class Part(NamedTuple):
    """A view of one parameter that is the region [experts, rows] of a stacked tensor."""

    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]
    into: str
    region: tuple[Any, ...]


class Layout(NamedTuple):
    """Where a layer keeps what `MoE` needs: sizes, and its parameters as parts of MoE's."""

    name: str
    sizes: tuple[int, int, int]  # experts, width, hidden
    gated: bool
    bias: bool
    gate: Tensor | None  # None: the caller routes
    top_k: int
    parts: list[Part]

    @property
    def up(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"


def _same(parameter: Tensor) -> Tensor:
    return parameter


def _rows(rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda w: w[:, rows]


def _top_k(*holders: Any) -> int | None:
    for holder, name in itertools.product(holders, _TOP_K):
        if type(value := getattr(holder, name, None)) is int:
            return value
    return None


def _linear(module: Any, name: str) -> nn.Linear | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Linear) else None


def dense_parts(expert: nn.Module) -> list[nn.Linear] | None:
    """(gate, up, down) or (up, down) of one MLP; None for anything else."""
    for names in (*_GATED, *_PLAIN):
        layers = [_linear(expert, name) for name in names]
        if all(layers) and sum(isinstance(m, nn.Linear) for m in expert.modules()) == len(names):
            return [layer for layer in layers if layer is not None]
    if isinstance(expert, nn.Sequential):
        layers = [m for m in expert if isinstance(m, nn.Linear)]
        if len(layers) == 2:
            return [layer for layer in layers if layer is not None]
    return None


def _list_of_experts(layer: nn.Module) -> Layout | None:
    experts = getattr(layer, "experts", None)
    if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
        return None
    mlps = [dense_parts(e) for e in experts]
    gate = next((g for n in _GATES if (g := _linear(layer, n)) is not None), None)
    top_k = _top_k(layer, getattr(layer, "config", None))
    if gate is None or gate.bias is not None or top_k is None or not all(mlps):
        return None
    first = mlps[0] or []
    gated, bias = len(first) == 3, first[0].bias is not None
    width, hidden = first[0].in_features, first[0].out_features
    up = "gate_up_proj" if gated else "up_proj"
    parts = []
    for e, linears in enumerate(mlps):
        for i, linear in enumerate(linears or []):
            into, rows = (
                (up, slice(i * hidden, (i + 1) * hidden))
                if i < len(first) - 1
                else ("down_proj", slice(None))
            )
            parts.append(Part(linear.weight, _same, into, (e, rows)))
            if bias:
                parts.append(Part(linear.bias, _same, f"{into}_bias", (e, rows)))
    sizes = (len(experts), width, hidden)
    return Layout("list of experts", sizes, gated, bias, gate.weight, top_k, parts)


def _fastmoe(layer: nn.Module) -> Layout | None:
    up, down = (getattr(getattr(layer, "experts", None), n, None) for n in ("htoh4", "h4toh"))
    gate = getattr(layer, "gate", None)
    gate = _linear(gate, "gate") or (gate if isinstance(gate, nn.Linear) else None)
    top_k = _top_k(layer, getattr(layer, "gate", None))
    if up is None or down is None or gate is None or top_k is None:
        return None
    if gate.bias is not None and bool(gate.bias.any()):
        return None
    experts, hidden, width = up.weight.shape
    bias = getattr(up, "bias", None) is not None
    every = (slice(None),)
    parts = [
        Part(up.weight, _same, "up_proj", every),
        Part(down.weight, _same, "down_proj", every),
    ]
    if bias:
        parts += [
            Part(up.bias, _same, "up_proj_bias", every),
            Part(down.bias, _same, "down_proj_bias", every),
        ]
    return Layout("FastMoE", (experts, width, hidden), False, bias, gate.weight, top_k, parts)


def _scattermoe(layer: nn.Module) -> Layout | None:
    up, down = (getattr(layer, n, None) for n in ("experts", "output_experts"))
    top_k = _top_k(layer)
    if not isinstance(getattr(up, "weight", None), Tensor) or down is None or top_k is None:
        return None
    assert up is not None
    (experts, rows, width), hidden = up.weight.shape, down.weight.shape[2]
    gated = rows == 2 * hidden
    every = slice(None)
    parts = [Part(down.weight, _same, "down_proj", (every,))]
    if gated:  # the up half stands first
        for at, into in ((0, hidden), (hidden, 0)):
            half = slice(at, at + hidden)
            region = (every, slice(into, into + hidden))
            parts.append(Part(up.weight, _rows(half), "gate_up_proj", region))
    else:
        parts.append(Part(up.weight, _same, "up_proj", (every,)))
    return Layout("ScatterMoE", (experts, width, hidden), gated, False, None, top_k, parts)


def _megablocks(layer: nn.Module) -> Layout | None:
    mlp = getattr(getattr(layer, "experts", None), "mlp", None)
    gate = _linear(getattr(layer, "router", None), "layer")
    top_k = _top_k(getattr(layer, "args", None), layer, getattr(layer, "router", None))
    w1, w2 = getattr(mlp, "w1", None), getattr(mlp, "w2", None)
    if gate is None or top_k is None or not isinstance(w1, Tensor) or not isinstance(w2, Tensor):
        return None
    assert mlp is not None
    experts, width = gate.weight.shape
    hidden = w1.numel() // (experts * width)
    v1 = getattr(mlp, "v1", None)
    up, every = "gate_up_proj" if v1 is not None else "up_proj", slice(None)

    def stacked(w: Tensor) -> Tensor:
        return w.view(experts, hidden, width)

    parts = [
        Part(mlp.w1, stacked, up, (every, slice(hidden))),
        Part(mlp.w2, lambda w: stacked(w).mT, "down_proj", (every,)),
    ]
    if v1 is not None:
        parts.append(Part(mlp.v1, stacked, up, (every, slice(hidden, None))))
    sizes = (experts, width, hidden)
    return Layout("MegaBlocks", sizes, v1 is not None, False, gate.weight, top_k, parts)


LAYOUTS = (_list_of_experts, _fastmoe, _scattermoe, _megablocks)


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout that a layer has, or None."""
    return next((found for has in LAYOUTS if (found := has(layer)) is not None), None)


def _routings() -> Iterator[dict[str, Any]]:
    for renormalize in (True, False):
        yield {"policy": "softmax", "renormalize": renormalize}
        yield {"policy": "sigmoid", "renormalize": renormalize}


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class OwnLayer(nn.Module):
    """`MoE` in the place of an own layer: the same calls, the same kind of output."""

    def __init__(self, moe: MoE, gives_logits: bool) -> None:
        super().__init__()
        self.moe, self.gives_logits = moe, gives_logits

    def forward(self, x: Tensor) -> Any:
        out, _ = self.moe(x)
        if not self.gives_logits:
            return out
        return out, functional.linear(x.reshape(-1, x.shape[-1]), self.moe.gate.weight)


class OwnExperts(nn.Module):
    """`expert_mlp` in the place of experts that their caller routes."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.experts, self.activation = moe.experts, moe.options["activation"]

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        weight_TK = expert_p.reshape(len(x_TD), -1)
        weight_TK = weight_TK.to(torch.promote_types(x.dtype, torch.float32))
        expert_TK = expert_idxs.reshape(len(x_TD), -1)
        up, down = getattr(self.experts, self.experts.up_name), self.experts.down_proj
        out_TD: Tensor = expert_mlp(
            x_TD, weight_TK, expert_TK, up, down, activation=self.activation
        )
        return out_TD.view(x.shape).to(x.dtype)


@torch.no_grad()
def _build(layout: Layout, activation: str, routing: dict[str, Any]) -> MoE:
    """MoE with the layer's numbers."""
    experts, width, hidden = layout.sizes
    like = layout.parts[0].parameter
    moe = MoE(
        *(width, hidden, experts, layout.top_k),
        activation=activation,
        bias=layout.bias,
        device=like.device,
        dtype=like.dtype,
        **routing,
    )
    for part in layout.parts:
        getattr(moe.experts, part.into)[part.region] = part.view(part.parameter.data)
    if layout.gate is not None:
        moe.gate.weight.data = layout.gate.data.clone()
    return moe


def _gives_logits(output: Any, probe: Tensor, gate: Tensor | None) -> bool | str:
    """Whether a layer returns (out, logits) and not out alone, or why its output is neither."""
    rest = output[1:] if isinstance(output, tuple) else ()
    if not rest or all(r is None for r in rest):
        return False if not rest else "it returns a tuple whose rest is None"
    logits = rest[0]
    if len(rest) == 1 and gate is not None and isinstance(logits, Tensor):
        ours = functional.linear(probe, gate)
        if logits.shape == ours.shape and torch.allclose(logits.to(ours.dtype), ours, atol=1e-5):
            return True
    return "it returns more than its output and the router's logits"


@torch.no_grad()
def own_layer(layer: nn.Module, layout: Layout) -> tuple[nn.Module, str] | str:
    """(replacement, what it is) that gives the layer's numbers, or why there is none."""
    like = layout.parts[0].parameter
    if like.device.type == "meta":
        return "its parameters have no values"
    experts, width, _ = layout.sizes
    seed = torch.Generator().manual_seed(0)
    probe = torch.randn(_TOKENS, width, generator=seed).to(like.device, torch.float32)
    exact: Any = copy.deepcopy(layer).to(torch.float32).eval()
    with_routes: tuple[Tensor, ...] = ()
    if layout.gate is None:
        picks = torch.rand(_TOKENS, experts, generator=seed).topk(layout.top_k, dim=1)
        with_routes = (picks.values.to(like.device), picks.indices.to(like.device))
    try:
        output = exact(probe, *with_routes)
    except Exception as error:  # the layer is the caller's: anything may stop it
        return f"it did not run on {_TOKENS} random tokens: {type(error).__name__}: {error}"
    gate = None if layout.gate is None else layout.gate.float()
    logits = _gives_logits(output, probe, gate)
    if isinstance(logits, str):
        return logits
    wanted = _first(output)
    names = [name for name, act in ACTIVATIONS.items() if act.gated == layout.gated]
    for activation, routing in itertools.product(names, _routings() if gate is not None else [{}]):
        moe = _build(layout, activation, routing)
        whole = _whole(copy.deepcopy(moe).float(), layout, logits)
        difference = (whole_out := _first(whole(probe, *with_routes))) - wanted
        if whole_out.shape == wanted.shape and difference.norm() <= 1e-4 * wanted.norm():
            how = f"{layout.name}, {activation}" + "".join(f", {v}" for v in routing.values())
            return _whole(moe, layout, logits), how
    return "no activation and policy of ours gives its output on random tokens"


def _whole(moe: MoE, layout: Layout, gives_logits: bool) -> nn.Module:
    return OwnExperts(moe) if layout.gate is None else OwnLayer(moe, gives_logits)


@torch.no_grad()
def write_back(replacement: nn.Module, layout: Layout) -> None:
    """The replacement's weights, as they are now, into the parameters of the layer it replaced."""
    inner: Any = replacement
    moe = inner.moe if isinstance(replacement, OwnLayer) else inner
    for part in layout.parts:
        part.view(part.parameter.data).copy_(getattr(moe.experts, part.into)[part.region])
    if layout.gate is not None:
        layout.gate.data.copy_(moe.gate.weight)
