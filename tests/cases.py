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
    if kind == "far":  # a column that is there, too unlikely for a float
        x[..., -1] = -1e3
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
    RouteCase(0, 5, 2, options=_PRIORITY),
    RouteCase(1, 1, 1),
    RouteCase(1, 8, 2),
    RouteCase(1, 252, 8),
    RouteCase(37, 12, 3, "far"),
    RouteCase(33, 130, 3, options={"capacity": 1}),
    RouteCase(300, 17, 17),
    RouteCase(1100, 64, 8),
    RouteCase(700, 5, 1, options={"policy": "egs"}, entropy="TE"),
    RouteCase(33, 16, 4, strided=True),
    RouteCase(21, 70, 20, "ties"),
    RouteCase(21, 70, 70, "equal"),
    RouteCase(21, 70, 20, "ties", {"policy": "egs"}, entropy="TE"),
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
    CombineCase("many_rows", T=70, K=3, D=5),  # ids beyond 8 bits
    CombineCase("wide", T=3, K=8, D=1031),
    CombineCase("strided_rows", T=19, K=2, D=64, row_stride=3),
    CombineCase("half_unused", T=23, K=4, D=80, unused=0.5),
    CombineCase("all_unused", T=4, K=2, D=33, unused=1.1),
    CombineCase("huge_values", T=6, K=2, D=48, scale=3e3),
    CombineCase("tiny_values", T=6, K=2, D=48, scale=1e-6),
]


# ---- grouped_gemm, expert_mlp, moe, squared_grad ---------------------------------------------


def _offsets(kind: str, rows: int, experts: int) -> Tensor:
    """int32 offsets of `rows` rows in `experts` groups."""
    if kind == "one-expert":
        load_E = torch.zeros(experts, dtype=torch.long)
        load_E[experts // 2] = rows
    elif kind == "empty-experts":
        busy = (experts + 2) // 3
        load_E = torch.zeros(experts, dtype=torch.long)
        load_E[::3] = rows // busy
        load_E[0] += rows - load_E.sum()
    else:
        assert kind == "uniform"
        random = torch.Generator().manual_seed(5)
        expert_N = torch.randint(0, max(experts, 1), (rows,), generator=random)
        load_E = torch.bincount(expert_N, minlength=experts)
    return torch.cat([load_E.new_zeros(1), load_E.cumsum(0)]).int()


def _rows_apart(x: Tensor) -> Tensor:
    """The same numbers in every second row of a larger tensor; the rows between hold NaN."""
    wide = torch.full((2 * x.shape[0] + 1, x.shape[1] + 3), torch.nan).to(x)
    return wide[1::2, 2:-1].copy_(x)


@dataclass(frozen=True)
class GroupedGemmCase:
    """`unused` rows of NaN after the last group."""

    N: int
    E: int
    F: int
    D: int
    kind: str = "uniform"
    unused: int = 0
    bias: bool = False
    transposed: bool = False
    strided: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        flags = [n for n in ("bias", "transposed", "strided") if getattr(self, n)]
        flags += [f"unused{self.unused}"] * (self.unused > 0)
        flags += [f"scale{self.scale:g}"] * (self.scale != 1)
        return "-".join([f"{self.N}x{self.E}x{self.F}x{self.D}", self.kind, *flags])

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Any]]:
        """Positional arguments and options of `grouped_gemm`."""
        random = torch.Generator().manual_seed(13)
        x_ND = torch.randn(self.N, self.D, generator=random) * self.scale
        x_ND[self.N - self.unused :] = torch.nan
        shape = (self.D, self.F) if self.transposed else (self.F, self.D)
        w_EFD = torch.randn(self.E, *shape, generator=random)
        bias_EF = torch.randn(self.E, self.F, generator=random)
        x_ND, w_EFD = x_ND.to(device, dtype), w_EFD.to(device, dtype)
        if self.strided:
            x_ND, w_EFD = _rows_apart(x_ND), w_EFD.mT.contiguous().mT
        offset_E1 = _offsets(self.kind, self.N - self.unused, self.E).to(device)
        bias = bias_EF.to(device, dtype) if self.bias else None
        return (x_ND, w_EFD, offset_E1, bias), {"transposed": self.transposed}


grouped_gemm = [
    GroupedGemmCase(37, 5, 19, 23),
    GroupedGemmCase(37, 5, 19, 23, bias=True),
    GroupedGemmCase(37, 5, 19, 23, bias=True, transposed=True),
    GroupedGemmCase(37, 5, 19, 23, "one-expert", bias=True),
    GroupedGemmCase(41, 7, 16, 32, "empty-experts", transposed=True),
    GroupedGemmCase(41, 7, 16, 32, unused=9, bias=True),
    GroupedGemmCase(8, 3, 16, 32, unused=8),
    GroupedGemmCase(50, 3, 64, 252, strided=True),
    GroupedGemmCase(50, 3, 252, 37, strided=True, transposed=True, bias=True),
    GroupedGemmCase(30, 4, 33, 48, scale=1e3),
    GroupedGemmCase(30, 4, 33, 48, scale=1e-4),
    GroupedGemmCase(1, 1, 1, 1, bias=True),
    GroupedGemmCase(1, 64, 8, 8),
    GroupedGemmCase(0, 3, 5, 7, bias=True),
    GroupedGemmCase(0, 0, 5, 7),
    GroupedGemmCase(6, 2, 0, 7),
    GroupedGemmCase(6, 2, 5, 0, bias=True),
]


def _experts(kind: str, T: int, K: int, E: int) -> Tensor:
    """int32 ids, different within a token where E allows; E is an unused slot."""
    random = torch.Generator().manual_seed(17)
    if kind == "one-expert":
        return torch.full((T, K), E // 2, dtype=torch.int32)
    if kind == "all-unused":
        return torch.full((T, K), E, dtype=torch.int32)
    ids = torch.rand(T, max(E, K), generator=random).argsort(dim=1)[:, :K] % max(E, 1)
    if kind == "empty-experts":
        ids = ids // 3 * 3
    elif kind == "unused":
        ids = ids.masked_fill(torch.rand(T, K, generator=random) < 0.4, E)
        ids[::4] = E  # tokens without any expert
    else:
        assert kind == "uniform"
    return ids.int()


@dataclass(frozen=True)
class ExpertMlpCase:
    activation: str = "swiglu"
    T: int = 13
    K: int = 2
    E: int = 5
    D: int = 12
    F: int = 9
    kind: str = "uniform"
    bias: bool = False
    frozen: bool = False
    strided: bool = False
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = [n for n in ("bias", "frozen", "strided") if getattr(self, n)]
        flags += [n if v is True else f"{n}{v:g}" for n, v in self.options.items()]
        flags += [f"scale{self.scale:g}"] * (self.scale != 1)
        sizes = f"{self.T}x{self.K}-E{self.E}-{self.F}x{self.D}"
        return "-".join([self.activation, sizes, self.kind, *flags])

    @property
    def hidden(self) -> int:
        return 2 * self.F if self.activation in _GATED else self.F

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and options of `expert_mlp`."""
        random = torch.Generator().manual_seed(19)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=random) * scale).to(device, dtype)

        transposed = self.options.get("transposed", False)
        x_TD = draw(self.T, self.D, scale=self.scale)
        weight_TK = torch.rand(self.T, self.K, generator=random)
        up_EHD = draw(self.E, self.hidden, self.D, scale=max(self.D, 1) ** -0.5)
        down_EDF = draw(self.E, self.D, self.F, scale=max(self.F, 1) ** -0.5)
        bias_up_EH, bias_down_ED = draw(self.E, self.hidden), draw(self.E, self.D)
        frozen_E = torch.arange(self.E) % 3 == 1
        frozen_EF = torch.rand(self.E, self.F, generator=random) < 0.4
        if transposed:
            up_EHD, down_EDF = up_EHD.mT.contiguous(), down_EDF.mT.contiguous()
        expert_TK = _experts(self.kind, self.T, self.K, self.E).to(device)
        weight_TK = weight_TK.to(device, torch.promote_types(dtype, torch.float32))
        weight_TK[expert_TK == self.E] = torch.nan
        x_TD[(expert_TK == self.E).all(dim=1)] = torch.nan
        if self.strided:
            x_TD, up_EHD = _rows_apart(x_TD), up_EHD.mT.contiguous().mT
            weight_TK, expert_TK = weight_TK.t().contiguous().t(), expert_TK.t().contiguous().t()
        return (
            *(x_TD, weight_TK, expert_TK, up_EHD, down_EDF),
            *((bias_up_EH, bias_down_ED) if self.bias else (None, None)),
            *((frozen_E.to(device), frozen_EF.to(device)) if self.frozen else (None, None)),
        ), {"activation": self.activation, **self.options}


_GATED = ("swiglu", "swiglu_oai", "geglu", "geglu_tanh", "reglu")
_UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_TURNED = {"transposed": True}
_PAIRS = {"interleaved": True}

expert_mlp = [
    *(ExpertMlpCase(name) for name in (*_GATED, *_UNGATED)),
    *(ExpertMlpCase(name, bias=True, options=_TURNED) for name in (*_GATED, *_UNGATED)),
    *(ExpertMlpCase(name, bias=True, options=_PAIRS) for name in _GATED),
    *(ExpertMlpCase(name, options={**_TURNED, **_PAIRS}) for name in _GATED),
    *(ExpertMlpCase(name, scale=20, options={"limit": 1.5}) for name in _GATED),
    ExpertMlpCase("swiglu_oai", scale=20, bias=True, options={**_PAIRS, "alpha": 0.9}),
    ExpertMlpCase(kind="one-expert", K=3),
    ExpertMlpCase(kind="empty-experts", E=8),
    ExpertMlpCase(kind="unused", bias=True),
    ExpertMlpCase("gelu", kind="unused", bias=True, frozen=True),
    ExpertMlpCase(kind="all-unused", bias=True),
    ExpertMlpCase(bias=True, frozen=True),
    ExpertMlpCase(frozen=True, options={**_TURNED, **_PAIRS}),
    ExpertMlpCase("relu2", frozen=True, bias=True, options=_TURNED),
    ExpertMlpCase(strided=True, bias=True),
    ExpertMlpCase(strided=True, options=_TURNED),
    ExpertMlpCase(T=37, K=4, E=7, D=252, F=37),
    ExpertMlpCase("silu", T=70, K=3, E=3, D=64, F=96, bias=True),
    ExpertMlpCase(scale=1e-4),
    ExpertMlpCase(T=0, bias=True),
    ExpertMlpCase(K=0),
    ExpertMlpCase(T=1, K=1, E=1, D=1, F=1, bias=True),
    ExpertMlpCase(T=1, K=8, E=64),
    ExpertMlpCase(E=0, kind="all-unused"),
    ExpertMlpCase(F=0, bias=True),
    ExpertMlpCase("relu", D=0, bias=True),
]


@dataclass(frozen=True)
class MoeCase:
    """`score` says what ranks the experts: router, logits, or neither (entropies alone)."""

    score: str = "router"
    top_k: int = 2
    T: int = 13
    E: int = 5
    D: int = 12
    F: int = 9
    entropy: str = ""
    bias: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{v}" if k == "policy" else f"{k}={v}" for k, v in self.options.items()]
        sizes = f"{self.T}x{self.E}top{self.top_k}-{self.F}x{self.D}"
        parts = [sizes, self.score, *options, *(["bias"] if self.bias else [])]
        return "-".join([*parts, *([f"entropy_{self.entropy}"] if self.entropy else [])])

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and options of `moe`."""
        activation = self.options.get("activation", "swiglu")
        mlp = ExpertMlpCase(activation, self.T, self.top_k, self.E, self.D, self.F, bias=self.bias)
        (x_TD, _, _, up_EHD, down_EDF, *biases, _, _), _ = mlp.build(dtype, device)
        random = torch.Generator().manual_seed(23)
        router_ED = torch.randn(self.E, self.D, generator=random).to(device, dtype)
        logits_TE = torch.randn(self.T, self.E, generator=random).to(device, dtype)
        shape = {"": (), "E": (self.E,), "TE": (self.T, self.E)}[self.entropy]
        H = torch.rand(shape, generator=random, dtype=torch.float64).to(device, dtype)
        return (
            *(x_TD, up_EHD, down_EDF, self.top_k),
            router_ED if self.score == "router" else None,
            logits_TE if self.score == "logits" else None,
            *biases,
            *(None, None),
            H if self.entropy == "TE" else None,
            H if self.entropy == "E" else None,
        ), dict(self.options)


moe = [
    MoeCase(),
    MoeCase("logits"),
    MoeCase(options={"renormalize": True}, bias=True),
    MoeCase(options={"policy": "sigmoid", "activation": "geglu"}),
    MoeCase(options={"policy": "expert_choice", "capacity": 4}),
    MoeCase(options={"capacity": 3}),
    MoeCase("logits", top_k=3, options={"adaptive": "mass", "mass": 0.6}),
    MoeCase("neither", options={"policy": "egs"}, entropy="TE"),
    MoeCase("neither", options={"policy": "egs", "activation": "relu"}, entropy="E"),
    MoeCase("logits", options={"policy": "egs", "tau": 0.3}, entropy="TE"),
    MoeCase(top_k=5),
    MoeCase(T=0),
    MoeCase(T=1, E=64, top_k=8),
    MoeCase(T=37, E=7, D=252, F=37),
]


@dataclass(frozen=True)
class SquaredGradCase:
    """`samples`: "rows" (each row its own), "runs" of 1 to 5 rows, "shuffled" runs, "one"."""

    N: int
    D: int
    F: int
    samples: str = "rows"
    E: int | None = None
    kind: str = "uniform"
    unused: int = 0
    strided: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.F}x{self.D}", self.samples]
        parts += [f"E{self.E}-{self.kind}"] * (self.E is not None)
        parts += [f"unused{self.unused}"] * (self.unused > 0) + ["strided"] * self.strided
        return "-".join(parts + [f"scale{self.scale:g}"] * (self.scale != 1))

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Arguments of `squared_grad`."""
        random = torch.Generator().manual_seed(29)
        x_ND = torch.randn(self.N, self.D, generator=random).to(device, dtype)
        grad_NF = (torch.randn(self.N, self.F, generator=random) * self.scale).to(device, dtype)
        if self.unused:
            x_ND[-self.unused :] = torch.nan
            grad_NF[-self.unused :] = torch.nan
        start = torch.rand(self.N, generator=random) < 0.4
        sample_N = {
            "rows": torch.arange(self.N),
            "runs": start.cumsum(0),
            "shuffled": (start.cumsum(0) - 7)[torch.randperm(self.N, generator=random)],
            "one": torch.full((self.N,), 3),
        }[self.samples]
        if self.strided:
            x_ND, grad_NF = _rows_apart(x_ND), _strided(grad_NF)
        return (
            x_ND,
            grad_NF,
            None if self.samples == "rows" else sample_N.int().to(device),
            None
            if self.E is None
            else _offsets(self.kind, self.N - self.unused, self.E).to(device),
        )


squared_grad = [
    *(SquaredGradCase(40, 11, 7, samples) for samples in ("rows", "runs", "shuffled", "one")),
    *(SquaredGradCase(40, 11, 7, s, E=4) for s in ("rows", "runs", "shuffled", "one")),
    SquaredGradCase(40, 11, 7, "shuffled", E=4, kind="one-expert"),
    SquaredGradCase(40, 11, 7, "runs", E=7, kind="empty-experts", unused=5),
    SquaredGradCase(40, 11, 7, "rows", E=3, unused=40),
    SquaredGradCase(33, 252, 37, "runs", strided=True),
    SquaredGradCase(33, 37, 252, "rows", strided=True),
    SquaredGradCase(40, 11, 7, "runs", scale=1e-6),
    SquaredGradCase(40, 11, 7, "rows", scale=1e4),
    SquaredGradCase(1, 1, 1),
    SquaredGradCase(1, 1, 1, "one"),
    SquaredGradCase(0, 3, 4),
    SquaredGradCase(0, 3, 4, "runs", E=2),
    SquaredGradCase(5, 0, 4, "runs"),
    SquaredGradCase(5, 3, 0, "runs"),
]


# ---- quantize, low_rank ----------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizeCase:
    """Values of one kind; with_residual and frozen give the optional arguments."""

    kind: str
    shape: tuple[int, ...]
    with_residual: bool = False
    frozen: str = ""  # "element", "row", "all"
    strided: bool = False

    def __str__(self) -> str:
        flags = [n for n in ("with_residual", "frozen", "strided") if getattr(self, n)]
        return "-".join([self.kind, "x".join(map(str, self.shape)), *flags, self.frozen]).strip("-")

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        random = torch.Generator().manual_seed(5)
        x = torch.randn(self.shape, generator=random)
        residual = 0.01 * torch.randn(self.shape, generator=random)
        frozen = torch.rand(self.shape, generator=random) < 0.6
        flat = x.view(-1)
        if self.kind == "zeros":
            x.zero_()
        elif self.kind == "constant":
            x.fill_(-0.3)
        elif self.kind == "ties":  # codes n + 1/2 at a scale of exactly 1
            flat.copy_(torch.arange(x.numel()) % 12 - 6 + 0.5)
            flat[::64] = 127.0
        elif self.kind == "subnormal":
            x *= 1e-41
        elif self.kind == "smallest":  # one float32 step above zero, and zeros
            x.copy_(torch.where(x > 1, 1.4e-45, 0.0))
        elif self.kind == "tiny":  # below the smallest float16 scale
            x *= 1e-9
        elif self.kind == "large":  # float16 scales saturate, float32 ones do not
            x *= 1e9
        elif self.kind == "largest":
            x.copy_(torch.where(x > 0, 1.0, -1.0) * torch.finfo(torch.float32).max)
        elif self.kind == "spike":  # one element sets the scale of its block
            flat[x.numel() // 2] = 1e4
        elif self.kind == "scales":  # every block at another magnitude
            flat *= 2.0 ** (torch.arange(x.numel()) // 64 % 120 - 60)
        else:
            assert self.kind == "normal"
        if self.frozen == "row":
            frozen = frozen[:, :1]
        elif self.frozen == "all":
            frozen = torch.ones((), dtype=torch.bool)
        if self.frozen:
            x[frozen.expand(x.shape)] = torch.nan  # frozen elements may hold anything
        x = _strided(x.to(device, dtype)) if self.strided else x.to(device, dtype)
        return (
            x,
            residual.to(device) if self.with_residual else None,
            frozen.to(device) if self.frozen else None,
        )


quantize = [
    *(QuantizeCase(kind, (700,)) for kind in ("normal", "zeros", "constant", "ties", "spike")),
    *(QuantizeCase(kind, (300,)) for kind in ("subnormal", "smallest", "tiny", "large", "largest")),
    QuantizeCase("scales", (4001,)),
    *(QuantizeCase("normal", (P,)) for P in (0, 1, 2, 63, 64, 65, 255, 256, 257)),
    QuantizeCase("normal", ()),
    QuantizeCase("normal", (37, 11), with_residual=True),
    QuantizeCase("normal", (37, 11), frozen="element"),
    QuantizeCase("normal", (37, 11), with_residual=True, frozen="element"),
    QuantizeCase("spike", (40, 16), with_residual=True, frozen="row"),
    QuantizeCase("normal", (37, 11), with_residual=True, frozen="all"),
    QuantizeCase("zeros", (5, 64), with_residual=True),
    QuantizeCase("tiny", (5, 64), with_residual=True),
    QuantizeCase("large", (5, 64), with_residual=True),
    QuantizeCase("normal", (23, 29), with_residual=True, frozen="element", strided=True),
]


@dataclass(frozen=True)
class LowRankCase:
    M: int
    N: int
    R: int
    kind: str = "normal"
    with_residual: bool = True

    def __str__(self) -> str:
        return f"{self.M}x{self.N}r{self.R}-{self.kind}{'' if self.with_residual else '-plain'}"

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(13)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        x, q, residual = draw(self.M, self.N), draw(self.N, self.R), 0.1 * draw(self.M, self.N)
        if self.kind == "zeros":
            x, residual = torch.zeros_like(x), torch.zeros_like(residual)
        elif self.kind == "rank-one":
            x, residual = draw(self.M, 1) @ draw(1, self.N), torch.zeros_like(residual)
        elif self.kind == "zero-factor":
            q = torch.zeros_like(q)
        elif self.kind == "equal-columns":
            q = q[:, :1].expand(-1, self.R).contiguous()
        elif self.kind == "huge":
            x, residual = x * 1e15, residual * 1e15
        elif self.kind == "tiny":
            x, residual = x * 1e-15, residual * 1e-15
        elif self.kind == "transposed":
            x = x.t().contiguous().t()
        exact = torch.promote_types(dtype, torch.float32)
        return (
            x.to(device, dtype),
            q.to(device, exact),
            residual.to(device, exact) if self.with_residual else None,
        )


low_rank = [
    LowRankCase(37, 29, 4),
    LowRankCase(37, 29, 1),
    LowRankCase(37, 29, 4, with_residual=False),
    *(LowRankCase(40, 24, 3, kind) for kind in ("zeros", "rank-one", "zero-factor", "huge")),
    *(LowRankCase(40, 24, 3, kind) for kind in ("equal-columns", "tiny", "transposed")),
    LowRankCase(3, 2, 1),
    LowRankCase(3, 252, 2),
    LowRankCase(252, 3, 2),
    LowRankCase(65, 64, 32),
]

# ---- distill_loss ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillCase:
    """Arguments and options of distill_loss; J > 0 gives a top-J teacher cache."""

    B: int
    C: int
    kind: str = "normal"
    soft: bool = False
    weighed: bool = False  # weight_B and task_weight_B, zeros among them
    J: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = [n for n in ("soft", "weighed") if getattr(self, n)]
        given = [f"{k}={v}" for k, v in self.options.items()]
        top = [f"top{self.J}"] if self.J else []
        return "-".join([f"{self.B}x{self.C}", self.kind, *top, *flags, *given])

    def build(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Logits, ids, tail and weights are numbers of `dtype`, so float64 truth sees the same."""
        random = torch.Generator().manual_seed(17)
        shape = (self.B, self.C)
        student = torch.randn(shape, generator=random, dtype=torch.float64)
        teacher = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
        if self.kind == "equal":
            teacher = student.clone()
        elif self.kind == "one-hot":
            teacher = torch.zeros_like(teacher).scatter_(1, teacher.argmax(1, keepdim=True), 1e3)
        elif self.kind == "masked":  # classes the teacher cannot give, one that neither can
            teacher = teacher.masked_fill(teacher < -0.5, -torch.inf)
            teacher[:, 0] = 0.25
            teacher[:, -1] = student[:, -1] = -torch.inf
        elif self.kind == "missing":  # the student has no probability where the teacher has some
            student[:, 1] = -torch.inf
        elif self.kind == "huge":
            student, teacher = student * 1e4, teacher * 1e4
        elif self.kind == "tiny":
            student, teacher = student * 1e-4, teacher * 1e-4
        elif self.kind == "shifted":
            student, teacher = student + 300, teacher - 300
        student, teacher = student.to(dtype), teacher.to(dtype)
        label = torch.randint(0, max(self.C - 1, 1), (self.B,), generator=random)
        if self.soft:
            label = torch.rand(shape, generator=random, dtype=torch.float64).to(dtype)
            label[:, -1] = 0
        weight = torch.rand(self.B, generator=random, dtype=torch.float64).to(dtype)
        task_weight = torch.rand(self.B, generator=random, dtype=torch.float64).to(dtype)
        weight[::5], task_weight[1::5], task_weight[2::5] = 0, 0, 1
        ids = tail = None
        if self.J:
            teacher, ids = teacher.topk(self.J, dim=1)
            tail = torch.rand(self.B, generator=random, dtype=torch.float64).to(dtype)
            tail[::3] = 0
            tail = torch.zeros_like(tail) if self.J == self.C else tail
        tensors = (
            student,
            teacher,
            label,
            weight if self.weighed else None,
            task_weight if self.weighed else None,
            ids,
            tail,
        )
        on_device = tuple(None if t is None else t.to(device) for t in tensors)
        return on_device, dict(self.options)


distill_loss = [
    *(DistillCase(7, 37, kind) for kind in ("normal", "equal", "one-hot", "masked", "missing")),
    *(DistillCase(7, 37, kind) for kind in ("huge", "tiny", "shifted")),
    *(DistillCase(7, 37, options={"tau": tau}) for tau in (0.1, 4.0, 100.0)),
    *(DistillCase(7, 37, "masked", options={"tau": tau}) for tau in (0.1, 100.0)),
    DistillCase(7, 37, "one-hot", options={"tau": 0.1}),
    DistillCase(7, 37, "tiny", options={"tau": 100.0}),
    DistillCase(7, 37, options={"label_smoothing": 0.1}),
    DistillCase(7, 37, options={"kl_reduction": "numel"}),
    DistillCase(7, 37, options={"reduction": "none"}),
    DistillCase(7, 37, "missing", options={"task_weight": 1.0}),
    DistillCase(7, 37, options={"task_weight": 0.0}),
    DistillCase(7, 37, soft=True, options={"label_smoothing": 0.2, "tau": 2.0}),
    DistillCase(7, 37, "masked", soft=True),
    DistillCase(11, 37, weighed=True, options={"reduction": "none", "tau": 2.0}),
    DistillCase(11, 37, "missing", soft=True, weighed=True),
    DistillCase(7, 37, J=5, options={"tau": 2.0}),
    DistillCase(7, 37, J=37, options={"tau": 2.0}),
    DistillCase(7, 37, "masked", J=5),
    DistillCase(7, 37, "equal", J=1, options={"reduction": "none"}),
    DistillCase(7, 37, "one-hot", J=3, weighed=True, options={"kl_reduction": "numel"}),
    DistillCase(0, 5),
    DistillCase(0, 5, options={"reduction": "none"}),
    DistillCase(1, 1),
    DistillCase(1, 1, J=1),
    DistillCase(1, 2, soft=True),
    DistillCase(2, 1000, options={"tau": 3.0}),
]

# ---- masked_sgd_, masked_adam_, masked_lion_ -------------------------------------------------


@dataclass(frozen=True)
class UpdateCase:
    """Tensors of several shapes, each with its mask kind; the options fit the op of that name."""

    op: str
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ("element", "row", "none", "all")
    grad: str = "normal"  # "frozen-nan": NaN and infinity where frozen, "huge", "zero"
    scaled: bool = False
    strided: bool = False

    def __str__(self) -> str:
        given = [f"{k}={v}" for k, v in self.options.items()]
        flags = [n for n in ("scaled", "strided") if getattr(self, n)]
        masks = "+".join(self.masks) or "no_mask"
        return "-".join([self.op, *given, masks, self.grad, *flags])

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
        """param, grad, states (random, as in mid-training), frozen, lr, grad_scale."""
        random = torch.Generator().manual_seed(19)
        shapes = ((6, 5), (4, 3, 2), (7,), (1, 1))
        num_states = {"masked_sgd_": 1, "masked_adam_": 3, "masked_lion_": 1}[self.op]

        def draw(shape: tuple[int, ...]) -> Tensor:
            drawn = torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)
            return _strided(drawn) if self.strided else drawn

        param, grad = [draw(s) for s in shapes], [draw(s) for s in shapes]
        states = [[draw(s) for s in shapes] for _ in range(num_states)]
        for state in states[1:]:  # second moments
            state[:] = [t.square_() for t in state]
        frozen = []
        for kind, p in zip(self.masks, param, strict=bool(self.masks)):
            drawn = torch.rand(p.shape, generator=random) < 0.5
            first = (slice(None),) + (slice(0, 1),) * (p.dim() - 1)
            frozen.append(
                {
                    "element": drawn,
                    "row": drawn[first],
                    "none": torch.tensor(False),
                    "all": torch.tensor(True),
                }[kind].to(device)
            )
        for mask, g in zip(frozen, grad, strict=False):
            if self.grad == "frozen-nan":
                bad = torch.where(torch.rand(g.shape, generator=random) < 0.5, torch.nan, torch.inf)
                g.copy_(torch.where(mask, bad.to(g), g))
        if self.grad in ("huge", "zero"):
            for g in grad:
                g.mul_(1e15 if self.grad == "huge" else 0.0)
        lr = torch.tensor(0.01, dtype=torch.float64, device=device)
        scale = torch.tensor(0.25, device=device) if self.scaled else None
        return param, grad, states, frozen, lr, scale


_ADAM = ({}, {"decoupled": False, "weight_decay": 0.1}, {"weight_decay": 0.1, "eps": 1e-3})
_SGD = ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})
_LION = ({}, {"weight_decay": 0.1}, {"maximize": True})

masked_update = [
    *(UpdateCase("masked_adam_", options) for options in _ADAM),
    *(UpdateCase("masked_sgd_", options) for options in _SGD),
    *(UpdateCase("masked_lion_", options) for options in _LION),
    UpdateCase("masked_adam_", {"amsgrad": True, "maximize": True, "weight_decay": 0.01}),
    UpdateCase("masked_sgd_", {"maximize": True, "weight_decay": 0.01}),
    *(
        UpdateCase(op, {"weight_decay": 0.1}, grad="frozen-nan", scaled=True)
        for op in ("masked_adam_", "masked_sgd_", "masked_lion_")
    ),
    *(UpdateCase(op, masks=()) for op in ("masked_adam_", "masked_sgd_", "masked_lion_")),
    UpdateCase("masked_adam_", {"weight_decay": 0.1}, strided=True),
    UpdateCase("masked_sgd_", {"momentum": 0.5}, grad="huge", strided=True),
    UpdateCase("masked_adam_", grad="huge"),
    UpdateCase("masked_adam_", grad="zero"),
    UpdateCase("masked_lion_", grad="zero"),
]
