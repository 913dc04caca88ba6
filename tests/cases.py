"""Hostile inputs of every op: no token, one token, ties, -inf, odd sizes, odd strides.

One section per op: a frozen dataclass whose `build(dtype, device)` gives the op's arguments, and a
list of cases named after the op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# ---- entropy, route, dispatch ----------------------------------------------------------------


def _logits(kind: str, shape: tuple[int, ...]) -> Tensor:
    """float64 logits of a named hostile kind, the same on every call."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if kind == "ties":
        return (2 * x).round() / 2
    if kind == "equal":
        return torch.full_like(x, 0.25)
    if kind == "huge":
        return x * 1e4
    if kind == "tiny":
        return x * 1e-4
    if kind == "one-hot":
        return x.scatter(-1, x.argmax(-1, keepdim=True), 1e3)
    if kind == "masked":  # single classes, a whole column, whole rows
        x = x.masked_fill(x < -0.7, -torch.inf)
        x[..., -1] = -torch.inf
        x.view(-1, shape[-1])[::5] = -torch.inf
        return x
    assert kind == "normal"
    return x


def _strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between rows and between columns."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan).to(x)
    view = wide[..., 1 : 1 + 2 * x.shape[-1] : 2]
    return view.copy_(x)


@dataclass(frozen=True)
class LogitsCase:
    shape: tuple[int, ...]
    kind: str = "normal"
    strided: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape}-{self.kind}{'-strided' if self.strided else ''}"

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        x = _logits(self.kind, self.shape).to(device, dtype)
        return _strided(x) if self.strided else x


entropy = [
    *(LogitsCase((5, 3, 37), kind) for kind in ("normal", "ties", "equal", "huge", "tiny")),
    LogitsCase((5, 3, 37), "one-hot"),
    LogitsCase((5, 3, 37), "masked"),
    *(LogitsCase((4, 2, C)) for C in (1, 2, 15, 16, 17, 252)),
    LogitsCase((3, 1000), "masked"),
    LogitsCase((10,)),
    LogitsCase((0, 4, 5)),
    LogitsCase((4, 0, 5)),
    LogitsCase((6, 33), "masked", strided=True),
    LogitsCase((1, 1, 1)),
]


@dataclass(frozen=True)
class RouteCase:
    T: int
    E: int
    top_k: int
    kind: str = "normal"
    options: Mapping[str, Any] = field(default_factory=dict)
    entropy: str = ""  # "TE" or "E": entropies of policy egs
    bias: bool = False
    noise: bool = False
    strided: bool = False

    def __str__(self) -> str:
        options = [f"{v}" if k == "policy" else f"{k}={v}" for k, v in self.options.items()]
        flags = [n for n in ("bias", "noise", "strided") if getattr(self, n)]
        given = [f"entropy_{self.entropy}"] if self.entropy else []
        parts = [f"{self.T}x{self.E}top{self.top_k}", self.kind, *options, *given, *flags]
        return "-".join(parts).replace(" ", "")

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and options of `route`."""
        random = torch.Generator().manual_seed(11)
        score_TE = _logits(self.kind, (self.T, self.E)).to(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        shape = {"": (), "E": (self.E,), "TE": (self.T, self.E)}[self.entropy]
        H = torch.rand(shape, generator=random, dtype=torch.float64)
        H = torch.where(H < 0.3, 0, (8 * H).round() / 8) if self.kind == "ties" else H
        H = H.to(device, exact)
        bias_E = torch.randn(self.E, generator=random, dtype=torch.float64).to(device, exact)
        noise_TE = torch.randn(self.T, self.E, generator=random, dtype=torch.float64)
        return (
            _strided(score_TE) if self.strided else score_TE,
            self.top_k,
            H if self.entropy == "TE" else None,
            H if self.entropy == "E" else None,
            bias_E if self.bias else None,
            0.5 * noise_TE.to(device, exact) if self.noise else None,
        ), dict(self.options)


_KINDS = ("normal", "ties", "equal", "huge", "tiny", "one-hot", "masked")
_GROUPS = {"policy": "group_limited", "num_groups": 3, "top_groups": 2}
_SIGMOID_GROUPS = {**_GROUPS, "gate": "sigmoid"}
_TAKE = {"policy": "expert_choice", "capacity": 7}
_PRIORITY = {"capacity": 3, "capacity_order": "priority"}
_BANDS = {"adaptive": "bands", "bands": [0.3, 0.8]}
_MASS = {"adaptive": "mass", "mass": 0.6}

route = [
    *(RouteCase(37, 12, 3, kind) for kind in _KINDS),
    *(RouteCase(37, 12, 3, kind, {"renormalize": True}) for kind in _KINDS),
    *(RouteCase(37, 12, 3, kind, {"policy": "egs"}, entropy="TE") for kind in _KINDS),
    RouteCase(37, 12, 3, "masked", {"policy": "egs", "tau": 0.3}, entropy="TE"),
    RouteCase(37, 12, 3, "ties", {"policy": "egs"}, entropy="E"),
    RouteCase(37, 12, 3, "normal", {"policy": "egs", "tau": 0.3}, entropy="E"),
    RouteCase(37, 12, 3, "masked", {"softmax_before": False}),
    RouteCase(37, 12, 3, "masked", {"noise_std": 0.5}, noise=True),
    RouteCase(37, 12, 3, "ties", {"noise_std": 0.5}),
    RouteCase(37, 12, 3, "normal", {"renormalize": True}, noise=True),
    *(RouteCase(37, 12, 3, kind, {"policy": "sigmoid"}) for kind in _KINDS),
    RouteCase(37, 12, 3, "masked", {"policy": "sigmoid", "renormalize": True}, bias=True),
    *(RouteCase(37, 12, 3, kind, _GROUPS) for kind in ("normal", "ties", "masked")),
    *(RouteCase(37, 12, 3, kind, _SIGMOID_GROUPS) for kind in ("normal", "ties", "masked")),
    RouteCase(37, 12, 3, "normal", {**_SIGMOID_GROUPS, "renormalize": True}, bias=True),
    *(RouteCase(37, 12, 3, kind, _TAKE) for kind in _KINDS),
    RouteCase(37, 12, 2, "normal", {**_TAKE, "capacity": 99, "renormalize": True}),
    *(RouteCase(37, 12, 3, kind, {"capacity": 3}) for kind in _KINDS),
    *(RouteCase(37, 12, 3, kind, _PRIORITY) for kind in ("normal", "ties", "masked")),
    RouteCase(37, 12, 3, "normal", {**_PRIORITY, "renormalize": True}, noise=True),
    RouteCase(37, 12, 3, "normal", {"policy": "egs", "capacity": 5}, entropy="TE"),
    *(RouteCase(37, 12, 3, kind, _MASS) for kind in ("normal", "ties", "masked", "one-hot")),
    *(RouteCase(37, 12, 3, kind, _BANDS) for kind in ("normal", "ties", "masked", "one-hot")),
    RouteCase(37, 12, 3, "normal", {**_MASS, "policy": "sigmoid", "renormalize": True}),
    RouteCase(37, 12, 3, "normal", {**_BANDS, "policy": "egs"}, entropy="TE"),
    RouteCase(37, 12, 3, "normal", {**_MASS, "capacity": 4, "renormalize": True}),
    RouteCase(0, 5, 2),
    RouteCase(0, 5, 2, options={"policy": "egs"}, entropy="TE"),
    RouteCase(0, 5, 2, options=_TAKE),
    RouteCase(1, 1, 1),
    RouteCase(1, 8, 2),
    RouteCase(1, 252, 8),
    RouteCase(300, 17, 17),
    RouteCase(1100, 64, 8),
    RouteCase(700, 5, 1, options={"policy": "egs"}, entropy="TE"),
    RouteCase(33, 16, 4, strided=True),
]


@dataclass(frozen=True)
class DispatchCase:
    T: int
    K: int
    E: int
    kind: str = "uniform"

    def __str__(self) -> str:
        return f"{self.T}x{self.K}-E{self.E}-{self.kind}"

    def build(self, dtype: torch.dtype = torch.int32, device: str = "cpu") -> tuple[Tensor, int]:
        random = torch.Generator().manual_seed(3)
        expert_TK = torch.randint(0, max(self.E, 1), (self.T, self.K), generator=random)
        if self.kind == "unused":
            drop_TK = torch.rand(self.T, self.K, generator=random) < 0.4
            expert_TK = expert_TK.masked_fill(drop_TK, self.E)
        elif self.kind == "all-unused":
            expert_TK.fill_(self.E)
        elif self.kind == "one-expert":
            expert_TK.fill_(self.E // 2)
        elif self.kind == "empty-experts":
            expert_TK = expert_TK // 3 * 3
        elif self.kind == "transposed":
            expert_TK = expert_TK.t().contiguous().t()
        return expert_TK.to(device, dtype), self.E


dispatch = [
    *(DispatchCase(37, 3, 7, kind) for kind in ("uniform", "unused", "all-unused", "one-expert")),
    DispatchCase(37, 3, 7, "empty-experts"),
    DispatchCase(37, 3, 7, "transposed"),
    DispatchCase(0, 2, 4),
    DispatchCase(4, 0, 4),
    DispatchCase(1, 1, 1),
    DispatchCase(5, 2, 0, "all-unused"),
    DispatchCase(1, 8, 252),
    DispatchCase(5000, 4, 61, "unused"),
    DispatchCase(20000, 2, 3),
]


@dataclass(frozen=True)
class CombineCase:
    """T tokens of K slots over T*K rows; `unused` of the slots are empty, rows may be strided."""

    name: str
    T: int
    K: int
    D: int
    unused: float = 0.0
    scale: float = 1.0
    row_stride: int = 1
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def draw(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*shape, generator=generator) * self.scale

    def build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        N = self.T * self.K
        y_ND = self.draw(N * self.row_stride, self.D).to(dtype)[:: self.row_stride]
        weight_TK = torch.rand(self.T, self.K, generator=generator)
        row_TK = torch.randperm(N, generator=generator).view(self.T, self.K).int()
        row_TK[torch.rand(self.T, self.K, generator=generator) < self.unused] = -1
        return y_ND, weight_TK.to(torch.promote_types(dtype, torch.float32)), row_TK


combine = [
    CombineCase("no_token", T=0, K=2, D=16),
    CombineCase("one_token", T=1, K=1, D=1),
    CombineCase("no_column", T=3, K=2, D=0),
    CombineCase("odd_sizes", T=37, K=3, D=37),
    CombineCase("block_and_tail", T=5, K=2, D=252),
    CombineCase("wide", T=3, K=8, D=1031),
    CombineCase("strided_rows", T=19, K=2, D=64, row_stride=3),
    CombineCase("half_unused", T=23, K=4, D=80, unused=0.5),
    CombineCase("all_unused", T=4, K=2, D=33, unused=1.1),
    CombineCase("huge_values", T=6, K=2, D=48, scale=3e3),
    CombineCase("tiny_values", T=6, K=2, D=48, scale=1e-6),
]
