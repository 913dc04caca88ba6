"""gk.MoE: the op with its parameters, and what a module must get along with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gose_kernels as gk
from gose_kernels.ops.activations import ACTIVATIONS

D, F, E, K = 16, 12, 6, 2


def _moe(**options: Any) -> gk.MoE:
    return gk.MoE(D, F, E, K, generator=torch.Generator().manual_seed(0), **options)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_layer_equals_a_loop_over_tokens(activation: str, transposed: bool) -> None:
    moe = _moe(
        activation=activation,
        transposed=transposed,
        bias=True,
        renormalize=True,
        shared_hidden=8,
        shared_gate=True,
        scale=1.5,
    )
    with torch.no_grad():
        for p in moe.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    x = _x(2, 5)
    out, stats = moe(x)
    assert out.shape == x.shape
    act, experts = ACTIVATIONS[activation], moe.experts
    up = getattr(experts, experts.up_name)
    bias = getattr(experts, f"{experts.up_name}_bias")
    for token, got in zip(x.view(-1, D), out.view(-1, D), strict=True):
        p = (moe.gate.weight @ token).softmax(0)
        weight, chosen = p.topk(K)
        want = torch.zeros(D)
        for w, e in zip(weight / weight.sum(), chosen, strict=True):
            pre = (up[e].mT if transposed else up[e]) @ token + bias[e]
            if act.gated:
                limit = act.limit or 1e9
                gate, linear = pre[:F].clamp(max=limit), pre[F:].clamp(-limit, limit)
                alpha = 1.702 if activation == "swiglu_oai" else 1.0
                hidden = act.phi(gate, alpha) * (linear + act.shift)
            else:
                hidden = act.phi(pre, 1.0)
            down = experts.down_proj[e].mT if transposed else experts.down_proj[e]
            want = want + w * (down @ hidden + experts.down_proj_bias[e])
        shared = moe.shared_expert(token) * moe.shared_expert_gate(token).sigmoid()
        torch.testing.assert_close(got, 1.5 * want + shared, rtol=2e-5, atol=2e-5)
    assert stats.load_E.sum() == 10 * K


def test_state_dict_is_that_of_transformers_blocks() -> None:
    from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"hidden_size": D, "num_experts_per_tok": K, "experts_implementation": "eager"}
    mixtral = MixtralConfig(**sizes, intermediate_size=F, num_local_experts=E)
    qwen = Qwen2MoeConfig(
        **sizes,
        moe_intermediate_size=F,
        num_experts=E,
        shared_expert_intermediate_size=8,
        norm_topk_prob=False,
    )
    deepseek = DeepseekV3Config(
        **sizes,
        moe_intermediate_size=F,
        n_routed_experts=E,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    grouped = {"policy": "group_limited", "gate": "sigmoid", "num_groups": 2, "top_groups": 1}
    pairs: list[tuple[nn.Module, gk.MoE]] = [
        (MixtralSparseMoeBlock(mixtral), _moe(renormalize=True)),
        (Qwen2MoeSparseMoeBlock(qwen), _moe(shared_hidden=8, shared_gate=True)),
        (
            DeepseekV3MoE(deepseek),
            _moe(
                shared_hidden=F,
                shared_name="shared_experts",
                correction_bias=True,
                scale=2.5,
                renormalize=True,
                **grouped,
            ),
        ),
    ]
    for block, moe in pairs:
        block = block.eval()
        with torch.no_grad():
            for tensor in [*block.parameters(), *block.buffers()]:
                tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        moe.load_state_dict(block.state_dict())
        x = _x(2, 7)
        torch.testing.assert_close(moe(x)[0], block(x), rtol=2e-5, atol=2e-5)


def test_losses_come_back_and_reach_the_router_alone() -> None:
    moe = _moe()
    _, stats = moe(_x(3, 5))
    assert [stats.loss(name).item() for name in gk.LOSSES] == stats.loss_L.tolist()
    stats.loss("balance").backward()
    assert moe.gate.weight.grad is not None and moe.experts.down_proj.grad is None
    with pytest.raises(ValueError, match="no loss named 'aux'; losses: balance"):
        stats.loss("aux")


@pytest.mark.parametrize(
    "routing",
    [
        {"policy": "softmax", "softmax_before": False},
        {"policy": "sigmoid", "renormalize": True},
        {"policy": "group_limited", "num_groups": 3, "top_groups": 2},
        {"policy": "expert_choice", "capacity": 4},
        {"policy": "egs"},
        {"adaptive": "mass", "mass": 0.5},
        {"capacity": 2, "capacity_order": "priority"},
    ],
    ids=str,
)
def test_every_policy_is_that_of_the_op(routing: dict[str, Any]) -> None:
    moe, x_TD = _moe(**routing), _x(9)
    entropy = torch.rand(9, E) if routing.get("policy") == "egs" else None
    out_TD, stats = moe(x_TD, entropy_TE=entropy)
    want = gk.moe(
        *(x_TD, moe.experts.gate_up_proj, moe.experts.down_proj, K, moe.gate.weight),
        entropy_TE=entropy,
        **routing,
    )
    for ours, theirs in zip((out_TD, *stats), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_bad_sizes_and_options_are_refused_at_once() -> None:
    for options, message in [
        ({"activation": "swish"}, "MoE: activation must be one of swiglu, .* got 'swish'"),
        ({"policy": "surest"}, "policy must be one of"),
        ({"policy": "expert_choice"}, "capacity"),
        ({"correction_bias": True}, "bias_E"),
    ]:
        with pytest.raises(ValueError, match=message):
            _moe(**options)
    with pytest.raises(ValueError, match="top_k must be in"):
        gk.MoE(D, F, E, E + 1)


def test_compiles_whole_checkpoints_and_casts() -> None:
    moe, x = _moe(renormalize=True), _x(2, 5).requires_grad_()
    want = moe(x)[0]
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], want, rtol=0, atol=0)
    again = checkpoint(lambda t: moe(t)[0], x, use_reentrant=False)
    gradients = [
        torch.autograd.grad(o.square().sum(), [x, *moe.parameters()]) for o in (want, again)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        low, stats = moe(x)
    assert low.dtype == torch.bfloat16 and stats.weight_TK.dtype == torch.float32
    assert (low.float() - want).norm() < 0.02 * want.norm()


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.usefixtures("one_process")
def test_data_parallel_wrappers_train_as_the_bare_layer(wrap: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = _moe(shared_hidden=8)

        def forward(self, x: Tensor) -> Tensor:
            out, stats = self.moe(x)
            return out.square().mean() + 0.01 * stats.loss("balance")

    bare = Net()
    other: Any = copy.deepcopy(bare)
    if wrap == "ddp":
        other = DistributedDataParallel(other)
    else:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(other.moe, mesh=mesh)
        fully_shard(other, mesh=mesh)
    for net in (bare, other):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            net(_x(4, 5)).backward()
            optimizer.step()
    plain = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in other.parameters()]
    for p, q in zip(bare.parameters(), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_frozen_experts_get_no_gradient() -> None:
    moe, frozen_E = _moe(), torch.arange(E) < 3
    moe(_x(40), frozen_E=frozen_E)[0].square().sum().backward()
    assert (moe.experts.gate_up_proj.grad[:3] == 0).all()
    assert (moe.experts.gate_up_proj.grad[3:] != 0).any()


def test_shared_expert_of_an_ungated_layer() -> None:
    moe = _moe(activation="relu2", shared_hidden=8)
    x = _x(3)
    routed = gk.moe(
        x, moe.experts.up_proj, moe.experts.down_proj, K, moe.gate.weight, activation="relu2"
    )
    hidden = functional.relu(moe.shared_expert.up_proj(x)).square()
    want = routed[0] + moe.shared_expert.down_proj(hidden)
    torch.testing.assert_close(moe(x)[0], want)
