"""gpu_plan against what the launchers launch: kernels, grids, tiles, the shared memory and the
tensor-core instruction of what Triton compiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import gose_kernels as gk
from gose_kernels.gpu_plan import SHARED_KB, Launch
from tests.gpu import triton_host
from tests.gpu.gemm_ops import GEMM_KERNELS, OPS, mlp_backward_call, mlp_call

WORDS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


def _launched(target: str, name: str, launcher: str, *args: Any) -> list[triton_host.Launched]:
    found: list[triton_host.Launched] = []
    with triton_host.launches_go_to(target, found.append):
        OPS[name].triton(launcher)(*args)
    return found


def _check(planned: list[Launch], launched: list[triton_host.Launched]) -> None:
    """The GEMMs one by one, the others by their numbers."""
    gemms = [one for one in launched if one.compiled.metadata.name in GEMM_KERNELS]
    wanted = [one for one in planned if one.rows]
    for one, real in zip(wanted, gemms, strict=True):
        meta = real.compiled.metadata
        values = dict(zip(real.compiled.src.fn.arg_names, (v for _, v in real.args), strict=True))
        assert f"_{one.kernel}_kernel" == meta.name
        assert one.programs == real.grid[0]
        assert (one.rows, one.columns, one.depth) == tuple(
            values[size] for size in ("ROWS", "COLUMNS", "DEPTH")
        )
        assert (one.warps, one.stages) == (meta.num_warps, meta.num_stages)
        assert WORDS[one.instruction] in real.compiled.asm["ptx"]
        # What ends a kernel may take more than its copies, and Hopper's barriers some bytes.
        if one.shared_kb is not None:
            assert 0 <= meta.shared - 1024 * one.shared_kb <= 1024 or one.shared_kb < 33
    others = Counter(one.compiled.metadata.name for one in launched) - Counter(
        one.compiled.metadata.name for one in gemms
    )
    assert others.total() == sum(one.launches for one in planned if not one.rows)
    maps = [one for one in launched if one.compiled.metadata.name == "_tile_map_kernel"]
    assert [one.grid[0] for one in maps] == [
        one.programs for one in planned if one.kernel == "tile_map"
    ]


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("T", "activation"), [(4096, "swiglu"), (16, "gelu")])
def test_expert_mlp(T: int, activation: str, target: str) -> None:
    call = mlp_call(T, torch.bfloat16, activation)
    call = call._replace(bias_up_EH=None, bias_down_ED=None, frozen_E=None, frozen_EF=None)
    forward = _launched(target, "expert_mlp_train", "expert_mlp", call)
    both, back = mlp_backward_call(call)
    back = back._replace(need_bias_up=False, need_bias_down=False)
    backward = _launched(target, "expert_mlp_backward", "expert_mlp_backward", both, back)
    sizes = {"T": T, "E": 8, "K": 2, "D": 512, "F": 512}
    plan = gk.gpu_plan(
        "expert_mlp", **sizes, dtype=torch.bfloat16, activation=activation, cc=int(target[3:])
    )
    for phase, launched in (("forward", forward), ("backward", backward)):
        _check([one for one in plan.launches if one.phase == phase], launched)
    moe = gk.gpu_plan("moe", **sizes, dtype=torch.bfloat16, activation=activation)
    extra = [one for one in moe.launches if one.kernel.startswith(("score", "route"))]
    assert [one.kernel for one in extra] == ["score", "route", "route_backward"]
    router = torch.empty(8, 512, dtype=torch.bfloat16, device="meta")
    _check(extra[:1], _launched("sm_90", "moe", "moe", call.x_TD, router))


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_grouped_gemm(target: str) -> None:
    N, E, F, D = 512, 8, 256, 512
    x, w, offset, _ = (
        torch.empty(s, dtype=d, device="meta")
        for s, d in (
            ((N, D), torch.float32),
            ((E, F, D), torch.float32),
            (E + 1, torch.int32),
            (1, torch.int32),
        )
    )
    y = x.new_empty(N, F)
    launched = _launched(target, "grouped_gemm", "grouped_gemm", x, w, offset)
    launched += _launched(target, "grouped_gemm", "grouped_gemm", y, w.mT, offset)
    launched += _launched(target, "grouped_gemm", "grouped_gemm_backward", y, x, offset)
    plan = gk.gpu_plan(
        "grouped_gemm", T=N, K=1, E=E, D=D, F=F, dtype=torch.float32, cc=int(target[3:])
    )
    _check(list(plan.launches), launched)


def test_architectures() -> None:
    """Every tile of 16-bit elements fits everywhere, and the library's code is told."""
    for cc in SHARED_KB:
        plan = gk.gpu_plan("moe", T=65536, cc=cc)
        assert all(one.fits for one in plan.launches), cc
    assert gk.gpu_plan("moe", cc=90).code == "sm_90a"
    assert "PTX" in gk.gpu_plan("moe", cc=120).code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "route"}, "op must be one of moe, expert_mlp, grouped_gemm, got 'route'"),
        ({"T": 0}, "T must be at least 1, got 0"),
        ({"cc": 75}, "cc must be one of 80, 86, .* got 75"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"activation": "tanh"}, "activation must be one of swiglu, .* got 'tanh'"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.gpu_plan(**{"op": "moe", **options})
