"""Compiled kernels against budget.json: registers, spills, shared memory, occupancy, the width of
their accesses, the instructions they are made of. `python -m tests.build.budget` writes it anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.build import budget
from tests.gpu import triton_host


@pytest.fixture(scope="module")
def wanted() -> budget.Table:
    table: budget.Table = json.loads(budget.PATH.read_text())
    return table


def assert_within(now: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert now.keys() == wanted.keys(), "run python -m tests.build.budget"
    found = {k: words for k in now if (words := budget.worse(now[k], wanted[k]))}
    assert not found, "\n".join(f"{k}: {', '.join(v)}" for k, v in found.items())


def test_cuda_kernels_keep_their_budget(
    compiled: Mapping[str, tuple[Path, str]], wanted: budget.Table
) -> None:
    for arch, kernels in budget.cuda({s: lib for s, (lib, _) in compiled.items()}).items():
        assert_within(kernels, wanted[arch])


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("target", triton_host.TARGETS)
def test_triton_kernels_keep_their_budget(
    target: str, wanted: budget.Table, tmp_path: Path
) -> None:
    key = f"triton {target}"
    assert_within(budget.triton(target, tmp_path)[key], wanted[key])


@pytest.mark.matrix(keep=1)
@pytest.mark.parametrize("target", triton_host.TARGETS)
def test_expert_gemms_keep_their_budget(target: str, wanted: budget.Table, tmp_path: Path) -> None:
    key = f"gemm {target}"
    assert_within(budget.gemms(target, tmp_path)[key], wanted[key])


def test_a_worse_kernel_is_found(wanted: budget.Table) -> None:
    """Each fact of a report, made worse alone."""
    good = wanted["cuda sm_80"]["combine_kernel<float, 4>"]
    assert budget.worse(good, good) == []
    for change, words in (
        ({"registers": good["registers"] + 1}, "registers"),
        ({"spills": 8}, "8 bytes of spills"),
        ({"shared": 16}, "shared 16 > 0"),
        ({"warps": good["warps"] - 4}, "warps"),
        ({"load_bits": 32}, "load_bits 32 < 128"),
        ({"store_bits": 64}, "store_bits 64 < 128"),
        ({"opcodes": ["RED"]}, "now RED"),
    ):
        assert any(words in text for text in budget.worse({**good, **change}, good)), change
    backward = wanted["cuda sm_80"]["combine_backward_kernel<float, 4>"]
    assert budget.worse({**backward, "opcodes": []}, backward) == ["no more SHFL"]


# Kernels that look at ids, ranks, flags or sums of programs.
_NARROW = (
    *("dispatch", "count_kernel", "distill_mean", "route_keep", "route_finish"),
    *("route_live", "route_shared", "route_total", "total_kernel"),
)
# Kernels that store a number a row or a program, or slots, or codes.
_NUMBER_A_ROW = ("entropy_kernel", "route_kernel", "route_win", "quantize", "square_kernel")


def _stores_little(name: str) -> bool:
    of_forward = name.startswith("distill_kernel") and not name.endswith("_train")
    return of_forward or name.startswith(_NUMBER_A_ROW)


def _least(key: str, name: str) -> int:
    """A tile of route is 4 elements a thread in wavefronts of 64."""
    half = name.endswith(("bfloat16", "float16"))
    return 64 if "gfx" in key and name.startswith("route") and half else 128


def test_vector_kernels_move_16_bytes(wanted: budget.Table) -> None:
    """The budget itself: the wide kernels of every architecture are wide, and nothing spills."""
    for key, kernels in wanted.items():
        for name, report in kernels.items():
            assert report["spills"] == 0
            wide = key.startswith("triton") or any(n in name for n in (", 4>", ", 8>"))
            wide |= name.startswith(("update_kernel", "square_kernel")) or (
                "quantize" in name and ", 1>" in name
            )
            if not wide or name.startswith(_NARROW):
                continue
            # Codes are read.
            if not name.startswith("dequantize"):
                assert report["load_bits"] >= _least(key, name), (key, name)
            if not _stores_little(name):
                assert report["store_bits"] >= _least(key, name), (key, name)
