"""Routing against the chain of torch ops that models use: softmax, entropy, top-k, normalise.

Three ways in turn, between two probes of the machine: the chain, `gk.route`, and an op that does
nothing but make the same outputs (what any op of that signature costs). With gradients the figure
is forward and backward of the weights' sum. Results go to benchmarks/results/route.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import _record, _roofline, _rounds


class Case(NamedTuple):
    """T rows of logits over E experts, K of them chosen."""

    T: int
    E: int
    K: int
    dtype: str


SIZES = ((1, 64, 8), (64, 64, 8), (1024, 64, 8), (4096, 64, 8), (4096, 128, 8), (4096, 8, 2))
CASES = [Case(*size, dtype) for size in SIZES for dtype in ("float32", "bfloat16")]
# One round of a way repeats it until this has passed: a call takes microseconds.
_ROUND_SECONDS = 0.02


def chain(score_TE: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and entropy in [0, 1] as models compute them, in float32."""
    p_TE = score_TE.softmax(dim=-1, dtype=torch.float32)
    log_TE = score_TE.log_softmax(dim=-1, dtype=torch.float32)
    entropy_T = -(p_TE * log_TE).sum(dim=-1) / torch.log(torch.tensor(float(p_TE.shape[1])))
    weight_TK, expert_TK = p_TE.topk(K, dim=-1)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), expert_TK, entropy_T


class _Nothing(torch.autograd.Function):
    """The outputs of route, unset, through the machinery of an op with a gradient."""

    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, K: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(score_TE)
        return nothing(score_TE, K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def nothing(score_TE: Tensor, K: int) -> tuple[Tensor, ...]:
    """The six outputs of `gk.route`, unset."""
    T, E = score_TE.shape
    return (
        torch.empty(T, K),
        torch.empty(T, K, dtype=torch.int32),
        torch.empty(T),
        torch.empty(E, dtype=torch.int32),
        torch.empty(E),
        torch.empty(5),
    )


def ways(case: Case, grad: bool) -> dict[str, Callable[[], Any]]:
    """The contestants on one input, `gose` first; each checked against the chain."""
    seed = torch.Generator().manual_seed(0)
    score_TE = torch.randn(case.T, case.E, generator=seed).to(getattr(torch, case.dtype))
    empty = partial(_Nothing.apply if grad else nothing, score_TE, case.K)
    forward: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "gose": partial(gk.route, score_TE, case.K, renormalize=True),
        "torch": partial(chain, score_TE, case.K),
        "empty op": empty,
    }
    got, want = forward["gose"](), forward["torch"]()
    for ours, theirs in ((got[0], want[0]), (got[2], want[2])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if not grad:
        return dict(forward)
    score_TE.requires_grad_()
    up_TK = torch.ones(case.T, case.K)

    def both(call: Callable[[], tuple[Tensor, ...]]) -> None:
        torch.autograd.grad(call()[0], score_TE, up_TK)

    return {name: partial(both, call) for name, call in forward.items()}


def _timed(call: Callable[[], Any], _round: int) -> float:
    """Seconds of one call, of as many as fit in a round."""
    calls, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < _ROUND_SECONDS or calls < 3:
        call()
        calls += 1
    return taken / calls


def measure(case: Case, grad: bool, rounds: int, gate: _rounds.Gate) -> dict[str, Any]:
    """Seconds of every way by round, and the case."""
    mode: AbstractContextManager[object] = nullcontext() if grad else torch.inference_mode()
    with mode:
        contestants = {name: partial(_timed, call) for name, call in ways(case, grad).items()}
        taken = _rounds.run(contestants, rounds, gate)
    return {**case._asdict(), "grad": grad, "seconds": taken.seconds, "rejected": taken.rejected}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Microseconds, and the median over rounds of torch / gose."""
    lines = [
        "| T × E, K | dtype | | `gose` µs | torch µs | an empty op µs | torch / `gose` |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["seconds"]["gose"]:
            continue
        micro = {name: statistics.median(s) * 1e6 for name, s in row["seconds"].items()}
        lines.append(
            f"| {row['T']} × {row['E']}, {row['K']} | {row['dtype']} "
            f"| {'with gradient' if row['grad'] else 'inference'} | {micro['gose']:.1f} "
            f"| {micro['torch']:.1f} | {micro['empty op']:.1f} "
            f"| {_rounds.ratio(row['seconds']['torch'], row['seconds']['gose']):.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes route.json (route_quick.json with --quick)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks route", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 1024 rows, 3 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="accepted ones per row")
    parser.add_argument("--out", type=Path, default=_record.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    unit = _roofline.units("float32")[-1]
    gate = _rounds.Gate(partial(_roofline.flops, unit, options.threads))
    cases = [case for case in CASES if case.T in (1, 1024)] if options.quick else CASES
    rounds = 3 if options.quick else options.rounds
    rows = [measure(case, grad, rounds, gate) for case in cases for grad in (False, True)]
    print(table(rows))
    name = "route_quick" if options.quick else "route"
    command = f"python -m benchmarks route {' '.join(argv)}".strip()
    path = _record.save(name, command, options.threads, {"rows": rows}, options.out)
    print(f"wrote {path}")
    return 0
