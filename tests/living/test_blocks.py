"""LivingExperts on blocks of transformers models and on layers that were swapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gose_kernels as gk

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"head_dim": 8},
    "Qwen3Moe": {"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "GptOss": {"head_dim": 8, "sliding_window": 16},  # biases, also of the router
    "DeepseekV3": {
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def _model(name: str, experts: int) -> Any:
    import transformers

    count = {"Mixtral": "num_local_experts", "GptOss": "num_local_experts"}
    count["DeepseekV3"] = "n_routed_experts"
    options = {**SIZES, **FAMILIES[name], count.get(name, "num_experts"): experts}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # routers that tell tokens apart
            if parameter.dim() == 2 and parameter.shape == (experts, 32):
                parameter.normal_(0, 0.5)
    return model


def _logits(model: Any) -> Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _blocks(model: Any) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_changes_of_a_model_equal_a_smaller_model(name: str) -> None:
    model, small = _model(name, 4), _model(name, 3)
    stock = _logits(model)
    done = gk.huggingface.replace_moe_layers(model, router={})
    wanted = _logits(model)
    living = [gk.LivingExperts(block, capacity=6) for block in _blocks(model)]
    torch.testing.assert_close(_logits(model), wanted, rtol=1e-5, atol=1e-5)
    for experts in living:
        experts.add("asleep", like="expert0", router="zero")
    before = _logits(model)
    torch.testing.assert_close(before, wanted, rtol=1e-5, atol=1e-5)
    for experts in living:
        experts.remove("expert1")
        experts.remove("asleep")
    kept = [0, 2, 3]
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith(("live_E", "frozen_E")):
            continue
        of_block = tensor.dim() > 0 and len(tensor) == 6 and ".mlp." in key
        state[key] = tensor[kept] if of_block else tensor
    small.load_state_dict(state)
    want = _logits(small)
    torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, stock, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"restore: .* call its settle\(\) first"):
        done.restore()
    for experts in living:
        experts.settle()
    done.restore()
    torch.testing.assert_close(_logits(model), want, rtol=1e-4, atol=1e-4)
    assert {
        len(block.gate.weight if hasattr(block, "gate") else block.router.weight)
        for block in _blocks(model)
    } == {3}


def test_frozen_experts_of_a_model_keep_their_bits() -> None:
    model = _model("GptOss", 4).train()
    gk.huggingface.replace_moe_layers(model, router={})
    steps = gk.optim.MaskedAdamW(model.parameters(), lr=1e-2)
    living = [gk.LivingExperts(b, capacity=5, optimizer=steps) for b in _blocks(model)]
    for experts in living:
        experts.freeze("expert2", router=True)
        experts.add("new", like="expert2", router="copy")
    before = [(e.weights("expert2"), e.column("expert2"), e.weights("new")) for e in living]
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        steps.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
    for experts, (weights, column, new) in zip(living, before, strict=True):
        assert all(torch.equal(experts.weights("expert2")[k], w) for k, w in weights.items())
        assert all(torch.equal(experts.column("expert2")[k], c) for k, c in column.items())
        assert not all(torch.equal(experts.weights("new")[k], w) for k, w in new.items())


def test_layers_without_what_is_needed_are_refused() -> None:
    model = _model("Mixtral", 4)
    block = _blocks(model)[0]
    with pytest.raises(ValueError, match=r"after replace_moe_layers\(model, router={}\), got Mix"):
        gk.LivingExperts(block)
    options = {"policy": "group_limited", "num_groups": 2, "top_groups": 1}
    living = gk.LivingExperts(gk.MoE(8, 4, 4, 1, **options))
    with pytest.raises(ValueError, match="groups of neighbouring experts"):
        living.reserve(6)
    living.remove("expert0")
