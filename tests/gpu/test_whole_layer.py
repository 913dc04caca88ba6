"""Whole layers as their users call them, on Triton's launchers: gk.MoE and a block of transformers,
forward and backward, every kernel's sm_80 code executed by the PTX machine; what is chosen for
tensors on CUDA; and that nothing of it waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gose_kernels as gk
from gose_kernels import backends, native
from tests.checks import assert_chain_close_to_truth
from tests.gpu import triton_host

T, E, K, D, F = 24, 4, 2, 32, 16


def _forget() -> None:
    for op in gk.OPS.values():
        op._direct.clear()


@contextmanager
def _triton_on_cpu() -> Iterator[None]:
    """Triton's backends take CPU tensors, as under its interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "triton_interprets", lambda: True)
        patch.setattr(backends, "triton_reason", lambda: None)
        _forget()
        yield
        _forget()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch saw one and the library had CUDA kernels."""
    for name in ("triton_reason", "cuda_reason"):
        monkeypatch.setattr(backends, name, lambda: None)
    for name in ("why_not", "why_not_cuda"):
        monkeypatch.setattr(native, name, lambda: None)


WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "item"),
    *("is_nonzero", "equal", "repeat_interleave", "unique_consecutive", "unique_dim"),
}


class _NoWaiting(TorchDispatchMode):
    """Refuses what on a GPU would wait for the device, also inside our ops."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "gose":
            with self:
                return gk.OPS[name].run(*args, **(kwargs or {}))
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def _refuse(*_: Any) -> Any:
    raise AssertionError("a tensor is read on the host")


@contextmanager
def _nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch, _NoWaiting():
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, _refuse)
        yield


def _trained(run: Callable[[Tensor], Tensor], module: nn.Module, x_TD: Tensor) -> list[Tensor]:
    """out, then the gradients of x and of every parameter, from a fixed gradient of out."""
    x_TD = x_TD.clone().requires_grad_()
    out_TD = run(x_TD)
    seed = torch.Generator().manual_seed(2)
    grad_TD = torch.randn(out_TD.shape, generator=seed, dtype=torch.float64).to(out_TD.dtype)
    inputs = [x_TD, *module.parameters()]
    return [out_TD.detach(), *torch.autograd.grad(out_TD, inputs, grad_TD)]


def _compare(got: list[Tensor], same: list[Tensor], truth: list[Tensor]) -> None:
    for i, (g, s, t) in enumerate(zip(got, same, truth, strict=True)):
        slack = t.abs() * 4 * 2.0**-23 if g.dtype == torch.float32 else 0 * t
        moved = t + (g.double() - t).clamp(-slack, slack)
        assert_chain_close_to_truth(g, s, moved, gradient=i > 0, rounded_parts=True)


def _values(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, nn.Module]:
    """x and the module with weights that keep its scale, both exact in dtype."""
    seed = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=seed).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=seed) / p.shape[-1] ** 0.5)
    return x_TD, module.to(dtype)


def _run_on_ptx(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], set[tuple[str, str]]]:
    """What it returns, and (op, backend) of the ops that ran."""
    with _triton_on_cpu(), gk.profiling.record() as counts:
        got, executed = triton_host.run_on_ptx(run, count=False)
    assert executed.launches > 0
    return got, set(counts.table)


def _moe(dtype: torch.dtype, **options: Any) -> tuple[Tensor, gk.MoE]:
    x_TD, layer = _values(gk.MoE(D, F, E, K, **options), dtype)
    assert isinstance(layer, gk.MoE)
    return x_TD, layer


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gk_moe(dtype: torch.dtype) -> None:
    x_TD, layer = _moe(dtype)

    def on(module: nn.Module, backend: str | None = None) -> Callable[[Tensor], Tensor]:
        return lambda x: module(x, backend=backend)[0]

    got, ran = _run_on_ptx(lambda: _trained(on(layer), layer, x_TD))
    assert ran == {
        (op, "triton")
        for op in ("route", "route_backward", "expert_mlp_train", "expert_mlp_backward")
    }
    same = _trained(on(layer, "torch"), layer, x_TD)
    exact = copy.deepcopy(layer).double()
    _compare(got, same, _trained(on(exact, "torch"), exact, x_TD.double()))


def test_transformers_block() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral")
    gk.huggingface.register()
    config = mixtral.MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=K,
        num_attention_heads=2,
        num_key_value_heads=2,
    )

    def on(module: Any, implementation: str) -> Callable[[Tensor], Tensor]:
        def run(x_TD: Tensor) -> Tensor:
            module.experts.config._experts_implementation = implementation
            out = module(x_TD.unsqueeze(0))
            return (out[0] if isinstance(out, tuple) else out).view_as(x_TD)

        return run

    block = mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    x_TD, block = _values(block, torch.bfloat16)
    got, ran = _run_on_ptx(lambda: _trained(on(block, "gose"), block, x_TD))
    assert ran == {(op, "triton") for op in ("expert_mlp_train", "expert_mlp_backward")}
    exact = copy.deepcopy(block).double()
    same = _trained(on(block, "eager"), block, x_TD)
    _compare(got, same, _trained(on(exact, "eager"), exact, x_TD.double()))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are compiled, none is executed: what is looked at is torch's part."""
    x_TD, layer = _moe(torch.bfloat16, bias=True)
    frozen_E = torch.zeros(E, dtype=torch.bool)
    launched: list[triton_host.Launched] = []
    with (
        triton_host.launches_go_to("sm_80", launched.append),
        _triton_on_cpu(),
        _nothing_waits(monkeypatch),
    ):
        _trained(lambda x: layer(x, frozen_E=frozen_E)[0], layer, x_TD)
    assert {"_up_kernel", "_hidden_grad_kernel", "_weight_grad_kernel"} <= {
        one.compiled.metadata.name for one in launched
    }


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x.tolist()]
)
def test_waiting_is_noticed(
    waits: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _nothing_waits(monkeypatch), pytest.raises(AssertionError, match=r"device|host"):
        waits(torch.ones(2))


def test_what_tensors_on_cuda_meet(a_gpu: None) -> None:
    """Nothing is allocated: tensors are fake."""
    wanted = {
        **dict.fromkeys(("route", "route_backward", "dispatch", "combine"), "cuda"),
        **dict.fromkeys(
            (
                *("expert_mlp", "expert_mlp_train", "expert_mlp_backward"),
                *("grouped_gemm", "grouped_gemm_backward"),
                *("expert_mlp_backward_add_", "grouped_gemm_backward_add_"),
            ),
            "triton",
        ),
    }
    for name, backend in wanted.items():
        op = gk.OPS[name]
        assert op.example is not None
        with FakeTensorMode():
            reasons = op.reasons(*op.example(torch.device("cuda"), torch.float32))
        assert next(b for b, reason in reasons.items() if reason is None) == backend, name
        assert "takes tensors on cpu" in str(reasons["cpu"])
