"""watch_routers: what the routers of a model do while it runs, summed over its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gose_kernels.huggingface.replace import routers_of
from gose_kernels.huggingface.routers import routed
from gose_kernels.moe import MoE, RouteStats
from gose_kernels.ops.entropy import entropy


@dataclasses.dataclass
class RouterWatch:
    """Sums over the tokens that one router has seen.

    load_E          int64: slots that routing gave to each expert, before a capacity drops some
    kept_E          int64: slots that ran
    entropy_sum     of the router's distribution, in [0, 1] a token
    width, hidden, gated   of the experts: a slot costs 2 * width * hidden * (3 or 2) FLOPs
    """

    top_k: int
    width: int
    hidden: int
    gated: bool
    load_E: Tensor
    kept_E: Tensor
    tokens: int = 0
    entropy_sum: float = 0.0

    @property
    def flops_per_slot(self) -> int:
        """FLOPs of one token through one expert."""
        return 2 * self.width * self.hidden * (3 if self.gated else 2)

    @property
    def flops(self) -> int:
        """FLOPs that ran in the experts."""
        return int(self.kept_E.sum()) * self.flops_per_slot

    def left_out(self, experts_N: Tensor) -> None:
        """Slots that were counted and did not run, by expert; the id of unused slots counts not."""
        E = len(self.load_E)
        self.kept_E -= torch.bincount(experts_N.cpu().long(), minlength=E + 1)[:E]

    def _add(self, expert_TK: Tensor, load_E: Tensor, entropy_T: Tensor) -> None:
        E = len(self.load_E)
        self.kept_E += torch.bincount(expert_TK.reshape(-1).cpu().long(), minlength=E + 1)[:E]
        self.load_E += load_E.cpu().long()
        self.tokens += len(expert_TK)
        self.entropy_sum += float(entropy_T.double().sum())


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[dict[str, RouterWatch]]:
    """Name of every router (of a gk.MoE: of the layer) -> what it has done inside the block.

    For transformers' own routers and those of `replace_moe_layers`, and for gk.MoE. ValueError for
    a model that has none.
    """
    watches: dict[str, RouterWatch] = {}
    handles, seen = [], []
    with torch.no_grad():
        for name, router, experts in routers_of(model):
            watches[name] = _watch(router, experts, router)
            see = partial(_see_router, watches[name])
            handles.append(router.register_forward_hook(see, with_kwargs=True))
            vars(experts)["_gose_watch"] = watches[name]
            seen.append(experts)
        for name, module in model.named_modules():
            if isinstance(module, MoE):
                watches[name] = _watch(module.gate, module.experts, module)
                handles.append(module.register_forward_hook(partial(_see_moe, watches[name])))
    if not watches:
        raise ValueError(
            f"watch_routers: {type(model).__name__} has no router that gives (logits, weights, "
            "experts), and no gk.MoE"
        )
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()
        for experts in seen:
            del vars(experts)["_gose_watch"]


def _watch(router: Any, experts: Any, has_top_k: Any) -> RouterWatch:
    E, width = router.weight.shape
    if hasattr(experts, "packed_EB"):
        gated, hidden = experts.has_gate, experts.hidden
    else:
        gated, hidden = hasattr(experts, "gate_up_proj"), experts.down_proj[0].numel() // width
    zeros_E = torch.zeros(E, dtype=torch.int64)
    return RouterWatch(has_top_k.top_k, width, hidden, gated, zeros_E, zeros_E.clone())


@torch.no_grad()
def _see_router(
    watch: RouterWatch,
    router: Any,
    given: tuple[Any, ...],
    named: dict[str, Any],
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    logits_TE, _, expert_TK = outputs
    if "_gose_routing" in vars(router):
        _, (_, _, entropy_T, load_E, *_) = routed(router, *given, **named)
    else:
        entropy_T = entropy(logits_TE.float().unsqueeze(1)).squeeze(1)
        load_E = torch.bincount(expert_TK.reshape(-1), minlength=len(watch.load_E))
    watch._add(expert_TK, load_E[: len(watch.load_E)], entropy_T)


def _see_moe(
    watch: RouterWatch, _moe: nn.Module, _given: Any, outputs: tuple[Tensor, RouteStats]
) -> None:
    stats = outputs[1]
    watch._add(stats.expert_TK, stats.load_E, stats.entropy_T.detach())
