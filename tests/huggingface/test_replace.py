"""replace_moe_layers: experts, routers, own layouts, packed weights, the table and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gose_kernels as gk
from gose_kernels.huggingface.layouts import OwnExperts, OwnLayer
from gose_kernels.huggingface.packed import PackedExperts
from tests.huggingface.compare import relative_error
from tests.huggingface.families import Family, families, tiny_model

FAMILIES = {f.name: f for f in families()}

# Routers that `route` does not compute, each with a word of the reason in the table.
OWN_ROUTER = {
    "AfmoeExperts": "no weight",
    "DeepseekV4Experts": "input_ids",
    "DiffusionGemmaTextExperts": "no weight",
    "Ernie4_5_MoeExperts": "no policy",
    "Ernie4_5_VLMoeMoeExperts": "no policy",
    "Gemma4TextExperts": "no weight",
    "HunYuanMoEV1Experts": "no weight",
    "InklingExperts": "does not return",
    "Inkling2Experts": "bfloat16",
    "Kolibri1Experts": "no policy",
    "MuseSparkExperts": "not tokens times weight",
    "OpenAIPrivacyFilterExperts": "no policy",
    "PhimoeExperts": "no policy",
    "ZayaExperts": "no weight",
}


def _model(name: str, **options: Any) -> Any:
    return tiny_model(FAMILIES[name], experts_implementation="eager", **options)


def _ids() -> Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    outputs = model(input_ids=_ids())
    return outputs["logits" if "logits" in outputs else "last_hidden_state"]


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("family", families(), ids=str)
@pytest.mark.matrix(keep=16)
def test_routers_give_their_own_numbers_or_are_named(family: Family) -> None:
    if family.name == "Qwen3OmniMoeTalkerTextExperts":
        return  # its tokens come as embeddings; the router is that of the Qwen2-MoE family
    model = _model(family.name)
    want, before = _logits(model), _bits(model)
    done = gk.huggingface.replace_moe_layers(model, router={})
    routers = [row for row in done.rows if "xperts" not in row.kind]
    assert routers, str(done)
    reason = OWN_ROUTER.get(family.name)
    swapped = [row for row in routers if row.swapped]
    assert any(reason in row.how for row in routers) if reason else len(swapped) == len(routers)
    assert relative_error(_logits(model), want) < 1e-5
    done.restore()
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)
    _assert_same_bits(model, before)
    done.restore()  # nothing is left to undo


@pytest.mark.parametrize(
    "name", ["MixtralExperts", "OlmoeExperts", "Qwen3MoeExperts", "JambaExperts"]
)
def test_a_swapped_router_keeps_capture_and_auxiliary_loss(name: str) -> None:
    model = _model(name)
    ids = _ids()

    def run() -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        model.zero_grad()
        outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
        outputs.loss.backward()
        gate = next(m for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "weight"))
        return outputs.loss, outputs.aux_loss, list(outputs.router_logits), gate.weight.grad.clone()

    want = run()
    done = gk.huggingface.replace_moe_layers(model, router={})
    got = run()
    assert len(got[2]) == len(want[2]) and want[1] > 0
    for ours, theirs in zip(
        [*got[:2], *got[2], got[3]], [*want[:2], *want[2], want[3]], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    done.restore()


def test_adaptive_and_entropy_routing_wake_fewer_experts() -> None:
    model = _model("OlmoeExperts")
    experts = next(m for m in model.modules() if type(m).__name__ == "OlmoeExperts")
    seen: list[Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    own = _logits(model)
    done = gk.huggingface.replace_moe_layers(model, router={"adaptive": "mass", "mass": 0.14})
    changed = _logits(model)
    assert (seen[0] < 8).all() and (seen[1] == 8).any() and (seen[1][:, 0] < 8).all()
    assert relative_error(changed, own) > 1e-4
    model.set_experts_implementation("eager")  # it skips unused slots too
    assert relative_error(_logits(model), changed) < 1e-5
    done.restore()
    names = [n for n, m in model.named_modules() if type(m).__name__ == "OlmoeTopKRouter"]
    entropy = {name: torch.arange(8.0).roll(i) for i, name in enumerate(names)}
    done = gk.huggingface.replace_moe_layers(model, router={"policy": "egs"}, entropy_E=entropy)
    seen.clear()
    _logits(model)
    assert (seen[0].sort().values == torch.tensor([0, 1])).all()  # the two surest
    done.restore()
    torch.testing.assert_close(_logits(model), own, rtol=0, atol=0)
    hook.remove()


@pytest.mark.parametrize(
    "name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_weights_alone_give_the_same_and_come_back(name: str, dtype: torch.dtype) -> None:
    model = _model(name).to(dtype)
    model.set_experts_implementation("gose")
    before, want = _bits(model), _logits(model)
    parameters = dict(model.named_parameters())
    done = gk.huggingface.replace_moe_layers(model, keep="packed")
    packed = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert packed and all("packed" in row.how for row in done.rows)
    held = sum(
        p.numel()
        for n, p in parameters.items()
        if n.endswith(("up_proj", "down_proj")) and p.dim() == 3
    )
    assert held == 0
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)
    _assert_same_bits(model, before)  # state_dict unpacks
    doubled = {n: t * 2 if ".experts." in n else t for n, t in before.items()}
    model.load_state_dict(doubled)
    assert not torch.equal(_logits(model), want)
    model.load_state_dict(before)
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({n: t[:1] if t.dim() == 3 else t for n, t in before.items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({n: t for n, t in before.items() if not n.endswith("down_proj")})
    model.load_state_dict(before)
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="weights are packed, so experts_implementation='eager'"):
        _logits(model)
    done.restore()
    model.set_experts_implementation("gose")
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)
    _assert_same_bits(model, before)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_those_that_come_back(name: str, weights: str) -> None:
    model = _model(name)
    model.set_experts_implementation("gose")
    before = _bits(model)
    done = gk.huggingface.replace_moe_layers(model, weights=weights)  # type: ignore[arg-type]
    assert all(f"packed as {weights}, " in row.how for row in done.rows)
    quantized = _logits(model)
    done.restore()
    assert relative_error(quantized, _logits(model)) < 1e-5
    error = 0.0
    for n, t in _bits(model).items():
        if n.endswith(("up_proj", "down_proj")) and t.dim() == 3:
            error = max(error, relative_error(t, before[n]))
        else:
            assert torch.equal(t, before[n])
    assert {"int8": 1e-3, "int4": 2e-2}[weights] < error < {"int8": 1e-2, "int4": 8e-2}[weights]


def test_a_weight_that_is_not_finite_is_met_before_any_is_rounded() -> None:
    model = _model("MixtralExperts")
    last = [m for m in model.modules() if hasattr(m, "gate_up_proj")][-1]
    last.gate_up_proj.data[1, 2, 3] = torch.nan  # type: ignore[union-attr, operator]
    before = _bits(model)
    with pytest.raises(ValueError, match=r"weights of \S+ must be finite to be int8"):
        gk.huggingface.replace_moe_layers(model, weights="int8")
    for n, t in _bits(model).items():
        torch.testing.assert_close(t, before[n], rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_packed_stays_and_says_why() -> None:
    model = _model("MuseSparkExperts")
    want = _logits(model)
    done = gk.huggingface.replace_moe_layers(model, keep="packed")
    assert all("not packed: a norm stands after its experts" in row.how for row in done.rows)
    assert relative_error(_logits(model), want) < 1e-5
    model = _model("MixtralExperts").double()
    done = gk.huggingface.replace_moe_layers(model, keep="packed")
    assert "not torch.float64" in str(done)


class _Expert(nn.Module):
    def __init__(self, D: int, F: int, names: tuple[str, ...], act: Any, bias: bool) -> None:
        super().__init__()
        self.act, self.names = act, names
        for name in names:
            sizes = (F, D) if name == names[-1] else (D, F)
            setattr(self, name, nn.Linear(*sizes, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        first, *more = (getattr(self, n) for n in self.names[:-1])
        hidden = self.act(first(x))
        return getattr(self, self.names[-1])(hidden * more[0](x) if more else hidden)


class _Block(nn.Module):
    """The usual MoE block with a list of experts."""

    def __init__(
        self, experts: list[nn.Module], D: int, top_k: int, norm: bool, logits: bool
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(D, len(experts), bias=False)
        self.experts, self.top_k = nn.ModuleList(experts), top_k
        self.norm, self.logits = norm, logits

    def forward(self, x: Tensor) -> Any:
        x_TD = x.reshape(-1, x.shape[-1])
        logits = self.gate(x_TD)
        weight, index = functional.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        if self.norm:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(index == e)
            out = out.index_add(0, t, weight[t, k, None] * expert(x_TD[t]))
        return (out.view(x.shape), logits) if self.logits else out.view(x.shape)


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)


def _lists() -> list[Any]:
    silu, gelu, relu = functional.silu, functional.gelu, functional.relu
    return [
        pytest.param(("gate_proj", "up_proj", "down_proj"), silu, False, True, True, id="llama"),
        pytest.param(("w1", "w3", "w2"), silu, False, True, False, id="mixtral"),
        pytest.param(("fc1", "fc2"), gelu, True, False, False, id="vit"),
        pytest.param(("wi", "wo"), relu, False, False, True, id="switch"),
    ]


@pytest.mark.parametrize(("names", "act", "bias", "norm", "logits"), _lists())
def test_a_list_of_experts_becomes_a_moe(
    names: tuple[str, ...], act: Any, bias: bool, norm: bool, logits: bool
) -> None:
    torch.manual_seed(0)
    D, F, E = 16, 24, 4
    experts = [_Expert(D, F, names, act, bias) for _ in range(E)]
    model = _Holder(_Block(experts, D, 2, norm, logits))
    x = torch.randn(3, 5, D, requires_grad=True)
    before, old = _bits(model), model.layer
    want = model(x)
    done = gk.huggingface.replace_moe_layers(model)
    assert isinstance(model.layer, OwnLayer) and done.rows[0].swapped, str(done)
    got = model(x)
    for ours, theirs in zip(*((o if logits else (o,)) for o in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad((o[0] if logits else o).square().sum(), x)[0] for o in (got, want)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    done.restore()
    assert model.layer is old
    _assert_same_bits(model, before)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)


def test_changed_weights_come_back_with_the_own_layer() -> None:
    torch.manual_seed(0)
    experts = [_Expert(16, 24, ("w1", "w3", "w2"), functional.silu, False) for _ in range(4)]
    model = _Holder(_Block(experts, 16, 2, True, False))
    done = gk.huggingface.replace_moe_layers(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    x = torch.randn(9, 16)
    want = model(x)
    done.restore()
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


class _Fast(nn.Module):
    """FastMoE's FMoETransformerMLP: gate.gate, experts.htoh4 and h4toh with an expert dimension."""

    def __init__(self, D: int, F: int, E: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate, self.experts = nn.Module(), nn.Module()
        self.gate.gate = nn.Linear(D, E)
        nn.init.zeros_(self.gate.gate.bias)
        for name, rows, columns in (("htoh4", F, D), ("h4toh", D, F)):
            part = nn.Module()
            part.weight = nn.Parameter(torch.randn(E, rows, columns) / columns**0.5)
            part.bias = nn.Parameter(torch.randn(E, rows) * 0.1)
            setattr(self.experts, name, part)

    def forward(self, x: Tensor) -> Tensor:
        value, index = self.gate.gate(x).topk(self.top_k, dim=-1)
        weight = value.softmax(dim=-1)
        up, down = self.experts.htoh4, self.experts.h4toh
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            e = index[:, k]
            hidden = functional.gelu(torch.einsum("tfd,td->tf", up.weight[e], x) + up.bias[e])
            y = torch.einsum("tdf,tf->td", down.weight[e], hidden) + down.bias[e]
            out = out + weight[:, k, None] * y
        return out


class _Scatter(nn.Module):
    """ScatterMoE's MLP or GLUMLP: the caller routes; of a GLU the up half stands first."""

    def __init__(self, D: int, F: int, E: int, top_k: int, glu: bool) -> None:
        super().__init__()
        self.top_k, self.glu = top_k, glu
        self.experts, self.output_experts = nn.Module(), nn.Module()
        rows = 2 * F if glu else F
        self.experts.weight = nn.Parameter(torch.randn(E, rows, D) / D**0.5)
        self.output_experts.weight = nn.Parameter(torch.randn(E, D, F) / F**0.5)

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            e = expert_idxs[:, k]
            hidden = torch.einsum("tfd,td->tf", self.experts.weight[e], x)
            if self.glu:
                h, gates = hidden.chunk(2, dim=-1)
                hidden = functional.silu(gates) * h
            else:
                hidden = functional.gelu(hidden, approximate="tanh")
            y = torch.einsum("tdf,tf->td", self.output_experts.weight[e], hidden)
            out = out + expert_p[:, k, None] * y
        return out


class _Mega(nn.Module):
    """MegaBlocks' dMoE: router.layer, experts.mlp.w1, v1, w2 of [experts * hidden, width]."""

    def __init__(self, D: int, F: int, E: int, top_k: int, glu: bool) -> None:
        super().__init__()
        self.E, self.glu = E, glu
        self.router, self.experts = nn.Module(), nn.Module()
        self.router.layer, self.router.moe_top_k = nn.Linear(D, E, bias=False), top_k
        self.experts.mlp = nn.Module()
        for name in ("w1", "v1", "w2") if glu else ("w1", "w2"):
            setattr(self.experts.mlp, name, nn.Parameter(torch.randn(E * F, D) / D**0.5))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router.layer(x).softmax(dim=-1).topk(self.router.moe_top_k, dim=-1)
        of = {n: p.view(self.E, -1, x.shape[1]) for n, p in self.experts.mlp.named_parameters()}
        out = torch.zeros_like(x)
        for k in range(weight.shape[1]):
            e = index[:, k]
            hidden = torch.einsum("tfd,td->tf", of["w1"][e], x)
            if self.glu:
                hidden = functional.silu(hidden) * torch.einsum("tfd,td->tf", of["v1"][e], x)
            else:
                hidden = functional.gelu(hidden, approximate="tanh")
            out = out + weight[:, k, None] * torch.einsum("tfd,tf->td", of["w2"][e], hidden)
        return out


def _layouts() -> list[Any]:
    return [
        pytest.param(lambda: _Fast(16, 24, 4, 2), "FastMoE, gelu", id="fastmoe"),
        pytest.param(lambda: _Scatter(16, 24, 4, 2, True), "ScatterMoE, swiglu", id="scatter-glu"),
        pytest.param(lambda: _Scatter(16, 24, 4, 2, False), "ScatterMoE, gelu_tanh", id="scatter"),
        pytest.param(lambda: _Mega(16, 24, 4, 2, True), "MegaBlocks, swiglu", id="mega-glu"),
        pytest.param(lambda: _Mega(16, 24, 4, 2, False), "MegaBlocks, gelu_tanh", id="mega"),
    ]


@pytest.mark.parametrize(("make", "how"), _layouts())
def test_known_layouts_are_swapped_and_come_back(make: Any, how: str) -> None:
    torch.manual_seed(0)
    model = _Holder(make())
    old, before = model.layer, _bits(model)
    routes = torch.rand(9, 4).topk(2, dim=1)
    args = (torch.randn(9, 16), *(routes if isinstance(old, _Scatter) else ()))
    want = model(*args)
    done = gk.huggingface.replace_moe_layers(model)
    assert done.rows[0].how.startswith(how), str(done)
    assert isinstance(model.layer, OwnExperts if isinstance(old, _Scatter) else OwnLayer)
    torch.testing.assert_close(model(*args), want, rtol=1e-5, atol=1e-5)
    done.restore()
    assert model.layer is old
    _assert_same_bits(model, before)


def test_a_layer_that_does_something_else_stays_with_the_reason() -> None:
    torch.manual_seed(0)
    experts = [_Expert(16, 24, ("w1", "w3", "w2"), functional.silu, False) for _ in range(4)]

    class Noisy(_Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + x

    model = _Holder(Noisy(experts, 16, 2, True, False))
    done = gk.huggingface.replace_moe_layers(model)
    assert [row.swapped for row in done.rows] == [False]
    assert "no activation and policy of ours gives its output" in done.rows[0].how

    class Broken(_Block):
        def forward(self, x: Tensor) -> Any:
            raise OverflowError("not today")

    model = _Holder(Broken(experts, 16, 2, True, False))
    how = gk.huggingface.replace_moe_layers(model).rows[0].how
    assert "OverflowError: not today" in how


def test_bad_arguments_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="Linear has no MoE layers"):
        gk.huggingface.replace_moe_layers(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="keep must be 'both' or 'packed', got 'none'"):
        gk.huggingface.replace_moe_layers(nn.Linear(3, 3), keep="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replace_moe_layers: weights must be one of int8, int4"):
        gk.huggingface.replace_moe_layers(nn.Linear(3, 3), weights="int3")  # type: ignore[arg-type]
    model = _model("MixtralExperts")
    want = _logits(model)
    with pytest.raises(ValueError, match="policy must be one of"):
        gk.huggingface.replace_moe_layers(model, router={"policy": "surest"})
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)  # nothing is left half done


def test_a_copy_of_a_changed_model_works_alone() -> None:
    model = _model("MixtralExperts")
    gk.huggingface.replace_moe_layers(model, router={}, keep="packed")
    want = _logits(model)
    torch.testing.assert_close(_logits(copy.deepcopy(model)), want, rtol=0, atol=0)
