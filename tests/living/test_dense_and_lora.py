"""Experts from a dense MLP and from low-rank adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import gose_kernels as gk

D, F, R = 16, 24, 4


class _Gated(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.down_proj, self.act = nn.Linear(F, D, bias=False), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


def _x(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("mlp", "activation"),
    [
        (_Gated(functional.silu), "swiglu"),
        (_Gated(functional.gelu), "geglu"),
        (nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)), "relu"),
    ],
    ids=["swiglu", "geglu", "relu"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_upcycled_mlp_starts_as_the_mlp(mlp: Any, activation: str, transposed: bool) -> None:
    seed = torch.Generator().manual_seed(3)
    moe = gk.upcycle(mlp, 6, 2, generator=seed, transposed=transposed)
    assert moe.options["activation"] == activation
    with torch.no_grad():
        out, stats = moe(_x())
        torch.testing.assert_close(out, mlp(_x()), rtol=1e-5, atol=1e-5)
    assert (stats.load_E > 0).sum() > 1  # the router tells tokens apart
    noisy = gk.upcycle(mlp, 6, 2, noise=0.1, generator=torch.Generator().manual_seed(3))
    off = noisy.experts.down_proj - noisy.experts.down_proj.mean(dim=0)
    share = (off.square().mean() / noisy.experts.down_proj.square().mean()).sqrt()
    assert 0.07 < share.item() < 0.11


def test_an_mlp_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="upcycle: mlp must have two linear layers"):
        gk.upcycle(nn.Linear(D, D), 4, 2)
    odd = nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D))
    with pytest.raises(ValueError, match="no activation of expert_mlp gives the output"):
        gk.upcycle(odd, 4, 2)
    half = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D, bias=False))
    with pytest.raises(ValueError, match="must have a bias, or none"):
        gk.upcycle(half, 4, 2)
    with pytest.raises(ValueError, match="noise must be at least 0"):
        gk.upcycle(_Gated(functional.silu), 4, 2, noise=-1.0)


def _adapters(*ranks: int) -> dict[str, gk.Adapter]:
    seed = torch.Generator().manual_seed(7)
    return {
        f"task{i}": gk.Adapter(
            torch.randn(r, D, generator=seed), torch.randn(F, r, generator=seed), 0.5 + i
        )
        for i, r in enumerate(ranks)
    }


def test_adapters_equal_a_loop_over_tokens_and_train() -> None:
    adapters = _adapters(2, 4, 3)
    base = nn.Linear(D, F)
    before = base.weight.detach().clone()
    lora = gk.LoraExperts(base, adapters)
    seed = torch.Generator().manual_seed(2)
    expert_TK = torch.randint(0, 4, (20, 2), generator=seed)  # 3 = unused
    weight_TK = torch.rand(20, 2, generator=seed)
    got = lora(_x(), expert_TK, weight_TK)
    for t, x in enumerate(_x()):
        want = base(x)
        for w, e in zip(weight_TK[t], expert_TK[t].tolist(), strict=True):
            if e < 3:
                a_RD, b_FR, scale = adapters[f"task{e}"]
                want = want + w * scale * (b_FR @ (a_RD @ x))
        torch.testing.assert_close(got[t], want, rtol=1e-5, atol=1e-5)
    only = torch.full((20, 1), lora.slot("task1"))
    a_RD, b_FR, scale = adapters["task1"]
    merged = functional.linear(_x(), base.weight + scale * b_FR @ a_RD, base.bias)
    torch.testing.assert_close(lora(_x(), only), merged, rtol=1e-4, atol=1e-4)
    steps = gk.optim.MaskedAdamW(
        [p for p in lora.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    lora(_x(), only).square().sum().backward()
    steps.step()
    assert torch.equal(base.weight, before)
    assert torch.equal(lora.lora_B[0, :, :2], adapters["task0"].b_FR)
    assert not torch.equal(lora.lora_B[1], adapters["task1"].b_FR)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_of_peft_are_read_and_others_refused(tmp_path: Path) -> None:
    a_RD, b_FR, _ = _adapters(R)["task0"]
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A.weight": a_RD, f"{path}.lora_B.weight": b_FR}
    plain = {"peft_type": "LORA", "r": R, "lora_alpha": 8}
    found = gk.read_peft(_write(tmp_path / "plain", plain, tensors))
    assert list(found) == ["model.layers.0.self_attn.q_proj"]
    adapter = found["model.layers.0.self_attn.q_proj"]
    assert torch.equal(adapter.a_RD, a_RD) and torch.equal(adapter.b_FR, b_FR)
    assert adapter.scale == 2.0
    stable = gk.read_peft(_write(tmp_path / "rslora", {**plain, "use_rslora": True}, tensors))
    assert stable["model.layers.0.self_attn.q_proj"].scale == 4.0
    one = {f"{path}.lora_A.weight": a_RD}
    for n, (config, held, message) in enumerate(
        [
            ({**plain, "peft_type": "IA3"}, tensors, "peft_type must be LORA, got 'IA3'"),
            ({**plain, "use_dora": True}, tensors, "use_dora is not supported"),
            (plain, one, "must have lora_A and lora_B of rank 4"),
            ({**plain, "r": 5}, tensors, "must have lora_A and lora_B of rank 5"),
            (plain, {**tensors, "x.lora_magnitude_vector": a_RD.clone()}, "no LoRA weight"),
            (plain, {**tensors, f"{path}.lora_A.weight": a_RD / 0}, "is not finite"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            gk.read_peft(_write(tmp_path / str(n), config, held))
    with pytest.raises(ValueError, match=r"adapter 'a' must be \[R, 16\] and \[24, R\]"):
        gk.LoraExperts(nn.Linear(D, F), {"a": gk.Adapter(b_FR, a_RD, 1.0)})
    with pytest.raises(ValueError, match="no adapter 'b'; adapters: task0"):
        gk.LoraExperts(nn.Linear(D, F), _adapters(R)).slot("b")
    with pytest.raises(ValueError, match="at least one adapter"):
        gk.LoraExperts(nn.Linear(D, F), {})
