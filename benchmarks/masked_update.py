"""Steps of AdamW on 50 million float32 parameters, masked and not, beside the alternatives.

All ways are timed in turn in one process on one parameter of 8 x 6104 x 1024, each between two
steps of torch's fused AdamW, to which it is compared. Before, each is checked on a small one: live
elements take torch's step, frozen ones keep their bits (but for the way named "moves").

    python -m benchmarks masked_update [--quick] [--threads N] [--rounds N]

torchao and bitsandbytes take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import gose_kernels as gk
from benchmarks import _record

SHAPE, QUICK_SHAPE = (8, 6104, 1024), (8, 72, 256)
_OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
_SLOW_SECONDS = 0.5  # a way that takes longer is timed in the first rounds only
_SLOW_ROUNDS = 3


class Way(NamedTuple):
    """One way to make a step: its name, what it freezes, and how it is made."""

    name: str
    mask: str  # a key of masks()
    make: Callable[[Parameter, Any], Callable[[], object]]
    keeps: bool = True  # whether frozen elements keep their bits
    approximate: bool = False  # moments of 8 bits: not torch's step


def masks(shape: Sequence[int], random: torch.Generator) -> dict[str, Any]:
    """Name -> a mask of a parameter of `shape`, of the share that its name says."""
    experts, rows, width = shape

    def drawn(share: float, *sizes: int) -> Tensor:
        return torch.rand(sizes, generator=random) < share

    return {
        "none": None,
        "experts 50 %": torch.arange(experts).view(-1, 1, 1) % 2 == 0,
        "rows 50 %": drawn(0.5, experts, rows, 1),
        "rows 75 %": drawn(0.75, experts, rows, 1),
        "rows 90 %": drawn(0.9, experts, rows, 1),
        "blocks of 4 x 1024 50 %": drawn(0.5, experts, rows // 4, 1),
        "blocks of 4 x 256 50 %": drawn(0.5, experts, rows // 4, width // 256),
        "elements 50 %": drawn(0.5, *shape),
        "scores 50 %": gk.optim.Importance(torch.rand(shape, generator=random), 0.5),
    }


def as_bool(mask: Any, shape: Sequence[int]) -> Tensor:
    """What a mask of masks() freezes, as bool of `shape`."""
    if mask is None:
        return torch.zeros(tuple(shape), dtype=torch.bool)
    return gk.masks.frozen("mask", mask, torch.Size(shape)).spread(shape)


def _ours(param: Parameter, mask: Any) -> Callable[[], object]:
    frozen = {} if mask is None else {param: mask}
    return gk.optim.MaskedAdamW([param], frozen=frozen, **_OPTIONS).step


def _torch(**options: Any) -> Callable[[Parameter, Any], Callable[[], object]]:
    return lambda param, _mask: torch.optim.AdamW([param], **options, **_OPTIONS).step


def _copy_back(**options: Any) -> Callable[[Parameter, Any], Callable[[], object]]:
    """The correct way without masks in the optimizer: no gradient, a step, and the old values."""

    def make(param: Parameter, mask: Any) -> Callable[[], object]:
        frozen = as_bool(mask, param.shape)
        optimizer = torch.optim.AdamW([param], **options, **_OPTIONS)

        def step() -> None:
            assert param.grad is not None
            with torch.no_grad():
                before, grad = param.clone(), param.grad
                param.grad = grad.masked_fill(frozen, 0)
                optimizer.step()
                param.copy_(torch.where(frozen, before, param))
                param.grad = grad

        return step

    return make


def _copy_rows_back(param: Parameter, mask: Any) -> Callable[[], object]:
    """The same for masks of whole rows, by index: the least that it can cost."""
    row = as_bool(mask, param.shape)[..., 0].reshape(-1).nonzero()[:, 0]
    optimizer = torch.optim.AdamW([param], fused=True, **_OPTIONS)
    width = param.shape[-1]

    def step() -> None:
        assert param.grad is not None
        with torch.no_grad():
            param.grad.view(-1, width)[row] = 0
            before = param.view(-1, width)[row]
            optimizer.step()
            param.view(-1, width)[row] = before

    return step


def _masked_gradient(param: Parameter, mask: Any) -> Callable[[], object]:
    """Gradients set to zero and no more: weight decay and momentum move what is frozen."""
    frozen = as_bool(mask, param.shape)
    optimizer = torch.optim.AdamW([param], fused=True, **_OPTIONS)

    def step() -> None:
        assert param.grad is not None
        param.grad.masked_fill_(frozen, 0)
        optimizer.step()

    return step


def _installed(module: str, name: str) -> Callable[[Parameter, Any], Callable[[], object]]:
    def make(param: Parameter, _mask: Any) -> Callable[[], object]:
        optimizer = getattr(importlib.import_module(module), name)([param], **_OPTIONS)
        step: Callable[[], object] = optimizer.step
        return step

    return make


WAYS = (
    Way("torch fused", "none", _torch(fused=True)),
    Way("torch foreach", "none", _torch(foreach=True)),
    Way("torch for-loop", "none", _torch(foreach=False)),
    Way("torchao AdamW8bit", "none", _installed("torchao.optim", "AdamW8bit"), approximate=True),
    Way(
        "bitsandbytes AdamW8bit",
        "none",
        _installed("bitsandbytes.optim", "AdamW8bit"),
        approximate=True,
    ),
    Way("gose", "none", _ours),
    Way("gose", "experts 50 %", _ours),
    Way("gose", "rows 50 %", _ours),
    Way("gose", "rows 75 %", _ours),
    Way("gose", "rows 90 %", _ours),
    Way("gose", "blocks of 4 x 1024 50 %", _ours),
    Way("gose", "blocks of 4 x 256 50 %", _ours),
    Way("gose", "elements 50 %", _ours),
    Way("gose", "scores 50 %", _ours),
    Way("torch fused, gradient masked: moves", "rows 50 %", _masked_gradient, keeps=False),
    Way("torch fused, rows copied back", "rows 50 %", _copy_rows_back),
    Way("torch fused, all copied back", "rows 50 %", _copy_back(fused=True)),
    Way("torch foreach, all copied back", "rows 50 %", _copy_back(foreach=True)),
)


def check(way: Way) -> None:
    """AssertionError unless a few steps of a way are torch's where live and keep frozen bits."""
    random = torch.Generator().manual_seed(1)
    shape = (8, 24, 256)
    mask = masks(shape, random)[way.mask]
    frozen = as_bool(mask, shape)
    param = Parameter(torch.randn(shape, generator=random))
    twin, start = Parameter(param.detach().clone()), param.detach().clone()
    step = way.make(param, mask)
    expected = torch.optim.AdamW([twin], **_OPTIONS)
    for _ in range(3):
        param.grad = torch.randn(shape, generator=random)
        twin.grad = param.grad.clone()
        step()
        expected.step()
    torch.testing.assert_close(param[~frozen], twin[~frozen], rtol=1e-5, atol=1e-5)
    if way.keeps:
        assert torch.equal(param[frozen].view(torch.int32), start[frozen].view(torch.int32)), way


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_share(shape: Sequence[int], mask: Any) -> float:
    """State of MaskedAdamW under a mask / state without one."""
    out = []
    for frozen in (mask, None):
        param = Parameter(torch.zeros(tuple(shape)))
        param.grad = torch.zeros(tuple(shape))
        optimizer = gk.optim.MaskedAdamW([param], frozen={} if frozen is None else {param: frozen})
        optimizer.step()
        out.append(state_bytes(optimizer))
    return out[0] / out[1]


def measure(shape: Sequence[int], rounds: int) -> dict[str, Any]:
    """What every way took, in the order of WAYS, and the state that rows leave out."""
    random = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(tuple(shape), generator=random))
    param.grad = torch.randn(tuple(shape), generator=random)
    found = masks(shape, random)
    steps: dict[Way, Callable[[], object]] = {}
    for way in WAYS:
        try:
            if not way.approximate:
                check(way)
            steps[way] = way.make(param, found[way.mask])
        except ImportError as error:
            print(f"{way.name}: not timed: {error}")
            continue
        steps[way]()
    times: dict[Way, list[float]] = {way: [] for way in steps}
    ratios: dict[Way, list[float]] = {way: [] for way in steps}
    for index in range(rounds):
        for way, step in steps.items():
            slow = times[way] and min(times[way]) > _SLOW_SECONDS
            if slow and index >= _SLOW_ROUNDS:
                continue
            # The baseline runs before and after: a machine's speed drifts from minute to minute.
            before, own, after = (_seconds(run) for run in (steps[WAYS[0]], step, steps[WAYS[0]]))
            times[way].append(own)
            ratios[way].append((before + after) / 2 / own)
    rows = [
        {
            "way": way.name,
            "mask": way.mask,
            "keeps": way.keeps,
            "median_ms": 1e3 * statistics.median(seconds),
            "min_ms": 1e3 * min(seconds),
            "max_ms": 1e3 * max(seconds),
            "speedup": statistics.median(ratios[way]),
        }
        for way, seconds in times.items()
    ]
    shares = {
        name: state_share(shape, found[name]) for name in ("rows 75 %", "blocks of 4 x 256 50 %")
    }
    return {"parameters": param.numel(), "rounds": rounds, "rows": rows, "state_share": shares}


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes benchmarks/results/masked_update.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks masked_update")
    parser.add_argument("--quick", action="store_true", help="0.15 million parameters")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result = measure(QUICK_SHAPE if options.quick else SHAPE, options.rounds)
    print(f"{'way':38}{'frozen':26}{'ms':>9}{'min':>9}{'max':>9}{'x fused':>9}")
    for row in result["rows"]:
        print(
            f"{row['way']:38}{row['mask']:26}{row['median_ms']:9.2f}{row['min_ms']:9.2f}"
            f"{row['max_ms']:9.2f}{row['speedup']:9.2f}"
        )
    for name, share in result["state_share"].items():
        print(f"state with {name} frozen / without: {share:.4f}")
    path = _record.save(
        "masked_update_quick" if options.quick else "masked_update",
        f"python -m benchmarks masked_update {' '.join(argv)}".strip(),
        options.threads,
        result,
    )
    print(f"wrote {path}")
    return 0
