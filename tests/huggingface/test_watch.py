"""adaptive_k of replace_moe_layers, and what watch_routers counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk

E, K, D, F = 8, 4, 32, 16


def _model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=99,
        hidden_size=D,
        intermediate_size=48,
        moe_intermediate_size=F,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.6)
            layer.mlp.gate.weight[5] = -30 * layer.mlp.gate.weight[0]  # rarely or never chosen
    return model


def _run(model: Any) -> tuple[Tensor, dict[str, Any], dict[str, list[Tensor]]]:
    """Logits, what was watched, and the outputs of the first router, caught by hand."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    caught: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, n=name: caught.setdefault(n, list(out)))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad(), gk.huggingface.watch_routers(model) as watches:
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return logits, watches, caught


@pytest.mark.parametrize("swap", [False, True], ids=["stock", "swapped"])
def test_counts_are_those_of_the_routers_outputs(swap: bool) -> None:
    model = _model()
    if swap:
        gk.huggingface.replace_moe_layers(model, router={})
    _, watches, caught = _run(model)
    assert list(watches) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    for name, watch in watches.items():
        logits_TE, _, expert_TK = caught[name]
        p_TE = logits_TE.double().softmax(dim=1)
        entropy = -(p_TE * p_TE.clamp_min(1e-300).log()).sum() / torch.tensor(float(E)).log()
        load_E = torch.zeros(E, dtype=torch.int64)
        for e in expert_TK.flatten().tolist():
            load_E[e] += 1
        assert torch.equal(watch.load_E, load_E) and torch.equal(watch.kept_E, load_E)
        assert watch.tokens == 24 and watch.flops == 24 * K * 2 * 3 * D * F
        assert watch.entropy_sum == pytest.approx(float(entropy), rel=1e-5)


def test_adaptive_k_keeps_the_fewest_experts_that_reach_the_mass() -> None:
    model = _model()
    done = gk.huggingface.replace_moe_layers(model, adaptive_k=0.6)
    assert "adaptive=mass, mass=0.6" in str(done)
    _, watches, caught = _run(model)
    for name, watch in watches.items():
        logits_TE, weight_TK, expert_TK = caught[name]
        kept = 0
        for logits, weights, experts in zip(logits_TE, weight_TK, expert_TK, strict=True):
            p = logits.double().softmax(dim=0).sort(descending=True).values[:K]
            want = min(K, 1 + int((p.cumsum(0) < 0.6).sum()))
            assert int((experts < E).sum()) == want
            assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
            kept += want
        assert int(watch.kept_E.sum()) == kept < 24 * K
    done.restore()


def test_adaptive_k_by_entropy_and_by_router() -> None:
    model = _model()
    wanted = gk.huggingface.replace_moe_layers(
        model, router={"adaptive": "bands", "bands": [0.3, 0.5]}
    )
    banded, _, caught = _run(model)
    wanted.restore()
    done = gk.huggingface.replace_moe_layers(model, adaptive_k=[0.3, 0.5])
    assert torch.equal(_run(model)[0], banded)
    done.restore()
    for out in caught.values():
        entropy_T = gk.entropy(out[0].unsqueeze(1)).squeeze(1)
        used_T = 1 + sum((entropy_T > band).long() for band in (0.3, 0.5))
        assert torch.equal((out[2] < E).sum(dim=1), used_T)
    one = {"model.layers.1.mlp.gate": 1e-6}
    done = gk.huggingface.replace_moe_layers(model, adaptive_k=one)
    _, watches, _ = _run(model)
    used = [int(w.kept_E.sum()) / w.tokens for w in watches.values()]
    assert used == [K, 1]
    done.restore()


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 1e9])
def test_tokens_leave_the_waves_that_could_add_little(tolerance: float) -> None:
    model = _model()
    block = model.model.layers[0].mlp
    x_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        _, weight_TK, expert_TK = block.gate(x_TD)
    up_EHD, down_EDF = block.experts.gate_up_proj, block.experts.down_proj
    want, ran = torch.zeros(20, D), 0
    with torch.no_grad():
        for t, x in enumerate(x_TD):
            used = torch.zeros(())
            for w, e in zip(weight_TK[t], expert_TK[t], strict=True):
                gate, linear = (up_EHD[e] @ x).chunk(2)
                y = w * (down_EDF[e] @ (torch.nn.functional.silu(gate) * linear))
                want[t] += y
                used, ran = used + w, ran + 1
                if (weight_TK[t].sum() - used) * y.norm() / w <= tolerance * want[t].norm():
                    break
            want[t] *= weight_TK[t].sum() / used
    done = gk.huggingface.replace_moe_layers(model, early_exit=tolerance)
    assert f"in waves, early_exit={tolerance}" in str(done)
    with torch.no_grad(), gk.huggingface.watch_routers(block) as watches:
        got = block(x_TD[None])[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert int(watches["gate"].kept_E.sum()) == ran
    assert ran == 20 or tolerance < 1e9
    assert 20 < ran < 80 or tolerance != 0.3
    done.restore()
    assert "_gose_early_exit" not in vars(block.experts)


def test_capacity_drops_are_seen() -> None:
    model = _model()
    gk.huggingface.replace_moe_layers(model, router={"capacity": 3})
    _, watches, _ = _run(model)
    for watch in watches.values():
        assert int(watch.load_E.sum()) == 24 * K
        assert torch.equal(watch.kept_E, watch.load_E.clamp_max(3))


def test_own_layers_are_watched_too() -> None:
    moe = gk.MoE(D, F, E, 2, capacity=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), gk.huggingface.watch_routers(moe) as watches:
        _, stats = moe(x)
    watch = watches[""]
    assert torch.equal(watch.load_E, stats.load_E.long())
    assert int(watch.kept_E.sum()) == int((stats.expert_TK < E).sum()) < 60
    assert watch.flops == int(watch.kept_E.sum()) * 2 * 3 * D * F


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_k": 1.5}, "adaptive_k must be a mass in"),
        ({"adaptive_k": 0.0}, "adaptive_k must be a mass in"),
        ({"adaptive_k": [0.5, 0.2]}, "bands must be ascending"),
        ({"early_exit": -0.1}, "early_exit must be a share of at least 0"),
        ({"early_exit": 0.1, "keep": "packed"}, "and keep 'both'"),
        ({"adaptive_k": {"nobody": 0.5}}, "adaptive_k names 'nobody', which is no router"),
        ({"adaptive_k": 0.5, "router": {"adaptive": "mass"}}, "both say what adaptive is"),
    ],
)
def test_what_is_no_adaptive_k_is_refused(options: dict[str, Any], message: str) -> None:
    model = _model()
    before = _run(model)[0]
    with pytest.raises(ValueError, match=message):
        gk.huggingface.replace_moe_layers(model, **options)
    assert torch.equal(_run(model)[0], before)


def test_a_model_without_routers_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="Linear has no router"),
        gk.huggingface.watch_routers(torch.nn.Linear(2, 2)),
    ):
        pass
