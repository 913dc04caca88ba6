"""Every experts class of the installed transformers against its own forward, module by module."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gose_kernels as gk
from gose_kernels.huggingface.experts import experts_forward
from gose_kernels.huggingface.forms import Form, find_form, form_of
from tests.huggingface.compare import assert_equals_eager, relative_error
from tests.huggingface.families import Family, families, modelling_files, tiny_model

ALL = pytest.mark.parametrize("family", families(), ids=str)

# Activations that no kernel has: these modules run their own code between two grouped products.
OWN_ACTIVATION = {"Inkling2Experts": "both factors are soft-capped apart from the gate's sigmoid"}
OWN_NORM = {"MuseSparkExperts": "a norm of every expert output stands before the gate weights"}

# One family's eager form computes in float32 whatever the dtype, so nothing is known to be closer
# to the truth than float32, and in bfloat16 eager rounds once where all others round thrice.
EAGER_IN_FLOAT32 = {torch.bfloat16: 5e-3, torch.float32: 4e-6}

_BUILT: dict[str, nn.Module] = {}


def _experts(family: Family) -> nn.Module:
    if family.name not in _BUILT:
        model = tiny_model(family)
        _BUILT[family.name] = next(m for m in model.modules() if type(m) is family.experts)
    return _BUILT[family.name]


def unit_scale(module: nn.Module) -> nn.Module:
    """Weights that keep the scale of what they multiply: an error of 1 % then shows as 1 %."""
    seed = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=seed, dtype=torch.float64)
        p.data = (noise / (max(p.shape[1:]) ** 0.5 if p.dim() == 3 else 1.0)).to(p.dtype)
        if "norm" in name:
            p.data += 1
    return module


def _module(family: Family, dtype: torch.dtype) -> Any:
    return unit_scale(copy.deepcopy(_experts(family)).to(torch.float64)).to(dtype)


def _inputs(module: Any, dtype: torch.dtype, T: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices that leave the last expert idle, weights."""
    seed = torch.Generator().manual_seed(2)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x_TD = torch.randn(T, width, generator=seed).to(dtype)
    top = torch.rand(T, module.num_experts - 1, generator=seed).topk(2, dim=1)
    return x_TD, top.indices, (0.2 + top.values).to(dtype)


def _gradients(run: Any, module: Any, x_TD: Tensor, index: Tensor, weight: Tensor) -> list[Tensor]:
    """Output, then gradients of tokens, weights and every parameter."""
    x_TD, weight = x_TD.clone().requires_grad_(), weight.clone().requires_grad_()
    module.zero_grad()
    out_TD = run(module, x_TD, index, weight)
    seed = torch.Generator().manual_seed(3)
    out_TD.backward(torch.randn(out_TD.shape, generator=seed).to(out_TD.dtype))
    parameters = [p.grad for _, p in sorted(module.named_parameters())]
    return [t.detach().clone() for t in (out_TD, x_TD.grad, weight.grad, *parameters)]


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_output_and_gradients_equal_eager(family: Family, dtype: torch.dtype) -> None:
    module = _module(family, dtype)
    x_TD, index, weight = _inputs(module, dtype)
    got = _gradients(experts_forward, module, x_TD, index, weight)
    reference = _gradients(family.eager, module, x_TD, index, weight)
    exact = module.double()
    truth = _gradients(family.eager, exact, x_TD.double(), index, weight.double())
    rule = EAGER_IN_FLOAT32[dtype] if family.name == "OpenAIPrivacyFilterExperts" else None
    names = ("out", "x", "weight", *sorted(n for n, _ in module.named_parameters()))
    for name, ours, theirs, true in zip(names, got, reference, truth, strict=True):
        assert true.norm() > 0, name
        assert_equals_eager(name, ours, theirs, true, rule)


@ALL
def test_no_family_is_refused(family: Family) -> None:
    """Each runs as expert_mlp but those that compute what no kernel does, named with the reason."""
    own = family.name in OWN_ACTIVATION
    assert (find_form(_experts(family)) is None) == own
    assert family.flags["has_post_expert_norm"] == (family.name in OWN_NORM)


def test_the_list_of_families_is_whole() -> None:
    """Every decorator in every file is found, and the contract has no flag that we do not know."""
    count = sum(f.read_text().count("\n@use_experts_implementation") for f in modelling_files())
    assert len(families()) == count >= 65
    known = {"has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"}
    for family in families():
        assert set(family.flags) == known, family
        for name in ("num_experts", "_is_expert_parallel", "config", "_apply_gate"):
            assert hasattr(_experts(family), name), f"{family} has no {name}"


def _one(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return _module(next(f for f in families() if f.name == name), dtype)


@pytest.mark.parametrize("name", ["MixtralExperts", "MuseSparkExperts", "Inkling2Experts"])
@pytest.mark.parametrize("parallel", [False, True])
def test_unused_slots_and_sentinels_add_nothing(name: str, parallel: bool) -> None:
    """Sentinels of expert parallelism: no output, no gradient of token or weight, even with NaN."""
    module = _one(name)
    x_TD, index, weight = _inputs(module, torch.float32)
    module._is_expert_parallel = parallel
    first = index.clone()
    first[:, 1] = module.num_experts
    first[0] = module.num_experts
    if parallel:
        first[1:9, 1] += torch.arange(8)
    x_TD[0] = torch.nan  # a token that goes nowhere is not read
    got, grad_x, grad_weight, *_ = _gradients(experts_forward, module, x_TD, first, weight)
    alone = experts_forward(module, x_TD[1:], index[1:, :1], weight[1:, :1])
    torch.testing.assert_close(got[1:], alone, rtol=0, atol=0)
    assert (got[0] == 0).all() and (grad_x[0] == 0).all()
    assert (grad_weight[:, 1] == 0).all() and (grad_weight[0] == 0).all()


def test_form_follows_the_module() -> None:
    module = _one("GptOssExperts")
    assert form_of(module) == Form("swiglu_oai", module.limit, module.alpha, interleaved=True)
    module.limit = 0.25
    assert form_of(module) == Form("swiglu_oai", 0.25, module.alpha, interleaved=True)
    module = _one("MixtralExperts")
    assert form_of(module) == Form("swiglu")
    module.act_fn = nn.GELU()
    assert form_of(module) == Form("geglu")
    module.act_fn = nn.GELU(approximate="tanh")
    assert form_of(module) == Form("geglu_tanh")
    module.act_fn = nn.Tanh()
    assert form_of(module) is None
    module.act_fn = nn.PReLU(init=0.0)  # relu for now, but it learns
    assert form_of(module) is None


@pytest.mark.parametrize("act_fn", [nn.Tanh(), nn.PReLU()])
def test_an_activation_without_a_kernel_runs_as_its_own_code(act_fn: nn.Module) -> None:
    module = _one("MixtralExperts")
    family = next(f for f in families() if f.name == "MixtralExperts")
    module.act_fn = act_fn
    inputs = _inputs(module, torch.float32)
    got = _gradients(experts_forward, module, *inputs)
    want = _gradients(family.eager, module, *inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_interleaved_weights_equal_concatenated_ones() -> None:
    """gate and up rows in turns, with the module's own gate reading them so."""
    module = _one("MixtralExperts")
    inputs = _inputs(module, torch.float32)
    want = experts_forward(module, *inputs)
    E, H, D = module.gate_up_proj.shape
    turns = module.gate_up_proj.data.view(E, 2, H // 2, D).transpose(1, 2).reshape(E, H, D)
    module.gate_up_proj.data = turns

    class Turns(type(module)):  # type: ignore[misc]
        def _apply_gate(self, pre: Tensor) -> Tensor:
            return self.act_fn(pre[..., 0::2]) * pre[..., 1::2]

    module.__class__ = Turns
    assert form_of(module) == Form("swiglu", interleaved=True)
    torch.testing.assert_close(experts_forward(module, *inputs), want, rtol=1e-6, atol=1e-6)


def test_bad_calls_say_what_to_do() -> None:
    module = _one("MixtralExperts")
    x_TD, index, weight = _inputs(module, torch.float32)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x_TD, index, weight[:, :1]), r"top_k_weights must be of shape \(19, 2\) as top_k_index"),
        ((x_TD[:5], index, weight), r"top_k_index must be of shape \[tokens = 5, k\]"),
        ((x_TD[None], index, weight), r"hidden_states must be of shape \[tokens, width\]"),
        ((x_TD.bfloat16(), index, weight), "must be torch.float32 as gate_up_proj .*autocast"),
        ((x_TD.to("meta"), index, weight), "hidden_states must be on cpu as gate_up_proj"),
        ((x_TD, index.float(), weight), "top_k_index must be int32 or int64, got torch.float32"),
        ((x_TD, index + 3, weight), "8 marks an unused slot, got 3 to 9; .*_is_expert_parallel"),
        ((x_TD, index - 1, weight), "experts in .0, num_experts = 8., .* got -1 to 5"),
        ((x_TD[:, :30], index, weight), "width D = 32"),
    ]
    for arguments, message in wrong:
        for training in (True, False):
            with (
                torch.set_grad_enabled(training),
                pytest.raises(ValueError, match=r"gose experts of MixtralExperts: .*" + message),
            ):
                experts_forward(module, *arguments)
    module._is_expert_parallel = True
    experts_forward(module, x_TD, index + 3, weight)
    del module.is_transposed
    with pytest.raises(ValueError, match="attribute is_transposed must be set by transformers"):
        experts_forward(module, x_TD, index, weight)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "MuseSparkExperts"])
def test_autocast_computes_in_its_dtype_and_returns_that_of_the_tokens(name: str) -> None:
    module = _one(name)
    family = next(f for f in families() if f.name == name)
    inputs = _inputs(module, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = experts_forward(module, *inputs), family.eager(module, *inputs)
    x_TD, index, weight = inputs
    truth = family.eager(copy.deepcopy(module).double(), x_TD.double(), index, weight.double())
    assert got.dtype == want.dtype == torch.float32
    assert relative_error(got, truth) <= 1.2 * relative_error(want, truth) + 2.6e-3
    assert relative_error(got, truth) > 1e-4


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "Inkling2Experts"])
def test_compiles_as_one_graph(name: str) -> None:
    module = _one(name)
    inputs = _inputs(module, torch.float32)
    want = _gradients(experts_forward, module, *inputs)
    run = torch.compile(experts_forward, fullgraph=True, backend="aot_eager")
    got = _gradients(run, module, *inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_empty_batches_and_permuted_tokens() -> None:
    module = _one("OlmoeExperts")
    x_TD, index, weight = _inputs(module, torch.float32)
    assert experts_forward(module, x_TD[:0], index[:0], weight[:0]).shape == (0, x_TD.shape[1])
    order = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(5))
    got = experts_forward(module, x_TD[order], index[order], weight[order])
    torch.testing.assert_close(got, experts_forward(module, x_TD, index, weight)[order])


def test_register_without_transformers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(
        RuntimeError, match=r"needs transformers >= 5.23 .*pip install 'gose\[hf\]'"
    ):
        gk.huggingface.register()


def test_register_twice_and_ask_for_it_by_name() -> None:
    gk.huggingface.register()
    gk.huggingface.register()
    family = next(f for f in families() if f.name == "OlmoeExperts")
    model = tiny_model(family, experts_implementation="gose")
    assert model.config._experts_implementation == "gose"
    with pytest.raises(ValueError, match="gose"):  # the list of what there is names it
        model.set_experts_implementation("goose")
