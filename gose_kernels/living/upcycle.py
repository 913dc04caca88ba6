"""upcycle: a dense MLP as a mixture of experts that starts from it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gose_kernels.huggingface.layouts import dense_parts
from gose_kernels.moe import MoE
from gose_kernels.ops.activations import ACTIVATIONS

_TOKENS = 64


@torch.no_grad()
def upcycle(
    mlp: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    **options: Any,
) -> MoE:
    """gk.MoE of `num_experts` copies of an MLP, with a new router [Komatsuzaki et al. 2023].

    mlp        two linear layers with an activation between them, or three with a gate: any module
               whose names `huggingface.layouts` knows or an nn.Sequential; it is not changed
    noise      standard deviation of what is added to every weight, in units of that weight
               matrix's rms, apart for each expert; 0: exact copies
    generator  of router and noise
    options    of MoE. renormalize=True is the default: weights then sum to 1, and without noise
               the layer gives what the MLP gives, up to rounding
    What lies between the linear layers is found by running the MLP on random tokens. ValueError
    if it has no such layers or an activation that `expert_mlp` does not have.
    """
    found = dense_parts(mlp)
    kind = type(mlp).__name__
    if found is None:
        raise ValueError(
            f"upcycle: mlp must have two linear layers, or three with a gate, got {kind}"
        )
    *ups, down = found
    biases = [layer.bias is not None for layer in found]
    if any(biases) != all(biases):
        raise ValueError(f"upcycle: all linear layers of {kind} must have a bias, or none")
    if noise < 0:
        raise ValueError(f"upcycle: noise must be at least 0, got {noise}")
    width, hidden = ups[0].in_features, ups[0].out_features
    weights = {"up": torch.cat([u.weight for u in ups]), "down": down.weight}
    probe = torch.randn(_TOKENS, width, generator=torch.Generator().manual_seed(0))
    probe = probe.to(down.weight.device)
    wanted = copy.deepcopy(mlp).float().eval()(probe)
    for activation, act in ACTIVATIONS.items():
        if act.gated != (len(ups) == 2):
            continue
        sure = MoE(width, hidden, 1, 1, activation=activation, bias=all(biases), renormalize=True)
        _fill(sure.to(probe.device), {k: w.float() for k, w in weights.items()}, ups, down)
        got, _ = sure(probe)
        if got.shape == wanted.shape and (got - wanted).norm() <= 1e-4 * wanted.norm():
            break
    else:
        raise ValueError(f"upcycle: no activation of expert_mlp gives the output of {kind}")
    moe = MoE(
        *(width, hidden, num_experts, top_k),
        activation=activation,
        bias=all(biases),
        device=down.weight.device,
        dtype=down.weight.dtype,
        generator=generator,
        **{"renormalize": True, **options},
    )
    _fill(moe, weights, ups, down)
    for p in (getattr(moe.experts, moe.experts.up_name), moe.experts.down_proj):
        if noise:
            drawn = torch.randn(p.shape, generator=generator, device="cpu").to(p.device)
            p.add_((noise * p[0].float().square().mean().sqrt() * drawn).to(p.dtype))
    return moe


def _fill(moe: MoE, weights: dict[str, torch.Tensor], ups: list[nn.Linear], down: Any) -> None:
    """Every expert the MLP."""
    experts: Any = moe.experts
    transposed = bool(moe.options["transposed"])
    up = weights["up"]
    if moe.options["interleaved"]:
        up = up.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    getattr(experts, experts.up_name).copy_((up.mT if transposed else up)[None])
    experts.down_proj.copy_((weights["down"].mT if transposed else weights["down"])[None])
    if down.bias is not None:
        bias = torch.cat([layer.bias for layer in ups])
        if moe.options["interleaved"]:
            bias = bias.unflatten(0, (2, -1)).mT.flatten()
        getattr(experts, f"{experts.up_name}_bias").copy_(bias[None])
        experts.down_proj_bias.copy_(down.bias[None])
