"""benchmarks/gpu_gemm.py against the PTX machine: a whole layer, forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_gemm
from gose_kernels.ops.mlp_call import BackwardCall, MlpCall
from tests.gpu import triton_host
from tests.gpu.gemm_ops import OPS
from tests.ptx.faults import Counts

T = 128
LAYER = gpu_gemm.Layer(E=2, K=1, D=128, F=128)
LOADS = [T // 2] * 2


def _counted() -> dict[str, Counts]:
    """Of a balanced layer of whole tiles, without biases: forward for training, and backward."""
    E, K, D, F = LAYER
    seed = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=seed).to(torch.bfloat16)

    call = MlpCall(
        *(normal(T, D), torch.ones(T, K), torch.arange(T, dtype=torch.int32)[:, None] % E),
        *(normal(E, 2 * F, D), normal(E, D, F)),
    )
    train, back = (OPS[n].triton(n) for n in ("expert_mlp_train", "expert_mlp_backward"))
    (_, pre_NH), forward = triton_host.run_on_ptx(train, call)
    _, backward = triton_host.run_on_ptx(back, call, BackwardCall(pre_NH, normal(T, D)))
    return {"forward": forward, "backward": backward}


@pytest.fixture(scope="module")
def counted() -> dict[str, Counts]:
    return _counted()


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_layer_moves_and_launches_what_is_said(counted: dict[str, Counts], phase: str) -> None:
    """Each input and output of a launch once, and no more than 1.15 times what tiles must fetch."""
    counts, backward = counted[phase], phase == "backward"
    work = gpu_gemm.layer_work(LOADS, LAYER, T, backward=backward)
    besides = gpu_gemm.plan_bytes(LOADS, LAYER, T)
    assert work.bytes <= counts.bytes <= work.bytes + besides
    assert counts.mma_flops == work.mma_flops
    # torch makes the weights of 1 with which the gradient of x is summed.
    assert counts.launches == work.launches - backward
    fetched = 32 * counts.block_sectors
    tiled = gpu_gemm.tiled_bytes(LOADS, LAYER, T, backward=backward)
    assert fetched <= 1.15 * (tiled + besides)


def test_schemes_by_hand() -> None:
    """Qwen3's layer at 16384 tokens: 131072 rows of 2048 and 768."""
    layer, N = gpu_gemm.MODELS["qwen3"], 131072
    forward = N * (3 * 2048 + 2 * 768 + 2 * 768) + 16384 * 2048
    assert gpu_gemm.activation_bytes("gose", "forward", layer, 16384) == 2 * forward
    assert gpu_gemm.activation_bytes("grouped_mm", "forward", layer, 16384) == 2 * (
        N * (9 * 2048 + 2 * 768 + 6 * 768) + 16384 * 2048
    )
    launches = {s: tuple(len(n) for n in own.values()) for s, own in gpu_gemm.LAUNCHES.items()}
    assert launches == {
        "gose": (7, 12),
        "sonicmoe": (6, 5),
        "scattermoe": (8, 11),
        "grouped_mm": (15, 13),
    }


def test_most_of_what_tensor_cores_do_is_useful() -> None:
    """T >= 4096: nothing is wasted on balanced loads, an eighth at most on skewed ones."""
    for layer in gpu_gemm.MODELS.values():
        for T_ in (4096, 16384):
            for backward in (False, True):
                share = {
                    kind: gpu_gemm.issued_share(layer, T_, kind, backward=backward)
                    for kind in gpu_gemm.KINDS
                }
                assert share["balanced"] <= 1.10
                assert max(share.values()) <= 1.25
