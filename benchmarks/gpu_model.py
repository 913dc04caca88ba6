"""What the GPU kernels should take by a roofline: predicted, not measured.

    seconds = launches * LAUNCH_SECONDS + max(bytes / (BANDWIDTH_SHARE * bandwidth), flops / peak)

bytes: every input read once and every output written once (the op's declared cost; the tests assert
that it is what the compiled kernels move). flops: of float32 units, reductions included; those of
masked_square_sum are float64. Data-sheet peaks; the shares are assumptions until a GPU calibrates
them. Caches, latency and the last wave of blocks are left out.

    python -m benchmarks gpu-model [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gose_kernels as gk

LAUNCH_SECONDS = 2.5e-6
BANDWIDTH_SHARE = 0.85
WARP = 32
MASKED = ("sgd", "adam", "lion")


class Device(NamedTuple):
    bandwidth: float  # bytes a second of device memory
    float32: float  # flops a second of the vector units


# Data sheets: A100 80 GB SXM, H100 SXM, B200 SXM, MI300X.
DEVICES = {
    "A100": Device(2.039e12, 19.5e12),
    "H100": Device(3.35e12, 67e12),
    "B200": Device(8.0e12, 80e12),
    "MI300": Device(5.3e12, 163.4e12),
}


class Shape(NamedTuple):
    """A layer of a known model at T tokens."""

    T: int
    E: int
    K: int
    D: int


# T tokens of: OLMoE, Qwen3-30B-A3B, Mixtral at half width.
MODELS = {"olmoe": (64, 8, 2048), "qwen3": (128, 8, 2048), "mixs": (8, 2, 1024)}
SHAPES = {f"{m} T={T}": Shape(T, *sizes) for m, sizes in MODELS.items() for T in (1, 256, 4096)}


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _row_sums(rows: int, columns: int, threads: int, item_bytes: int) -> int:
    """Additions of Triton's sums over the rows of a tile: in a thread, then by halves."""
    vector = min(16 // item_bytes, rows * columns // threads)
    row_threads = min(threads, columns // vector)
    steps = columns // row_threads - 1 + (row_threads - 1).bit_length()
    return rows * row_threads * steps


def _combine_backward_reductions(backend: str, grad: Tensor, *args: Tensor) -> int:
    (T, K), D, item = args[2].shape, grad.shape[1], grad.element_size()
    if backend == "cuda":
        return T * K * WARP * 5  # the shuffles of one warp a slot
    rows = _power_of_two(K)
    columns = min(_power_of_two(D), 128 * 16 // item, 4096 // rows)
    warps = max(1, min(4, rows * columns * item // (16 * WARP)))
    return T * _row_sums(rows, columns, warps * WARP, item)


_SQUARE_CHUNK = 4096  # elements of a block, of whole tiles in Triton


def _square_sum_parts(grad: Tensor) -> int:
    return -(-grad.numel() // _SQUARE_CHUNK)


def _square_sum_reductions(backend: str, grad: list[Tensor], frozen: list[Tensor]) -> int:
    """Of every chunk's sums in 128 threads, then of every tensor's chunks."""
    parts = [_square_sum_parts(g) for g in grad]
    if backend == "cuda":  # the shuffles of four warps, whose sums one thread adds
        return (sum(parts) + len(grad)) * (4 * WARP * 5 + 3) + sum(parts)
    added = 0
    for n, g in enumerate(grad):
        by_element = bool(frozen) and frozen[n].shape == g.shape  # added to zeros in two passes
        side_by_side = _SQUARE_CHUNK // 2 if by_element else _SQUARE_CHUNK
        squares = 0 if by_element else _SQUARE_CHUNK
        added += parts[n] * (_row_sums(1, side_by_side, 128, 4) - squares)
        added += 128 * -(-parts[n] // 128) + _row_sums(1, 128, 128, 8)
    return added


# Additions that a kernel makes beyond its op's declared flops.
REDUCTIONS: dict[str, Callable[..., int]] = {
    "combine_backward": _combine_backward_reductions,
    "masked_square_sum": _square_sum_reductions,
}


def _quantize_flops(
    backend: str,
    x: Tensor,
    residual: Tensor | None = None,
    frozen: Tensor | None = None,
    *,
    format: str = "int8_b256_f32",  # noqa: A002
    rounding: str = "nearest",
    **_options: Any,
) -> int:
    """Divisions, comparisons and conversions are none; whether a scale must be one higher is a
    product, in float32 a fused one, in every thread of its block."""
    given, drawn = residual is not None, rounding == "stochastic"
    form = gk.FORMATS[format]
    fused = 2 if form.scale_dtype == torch.float32 else 1
    if backend == "cuda":  # 8 elements a thread; two blocks of 64, or one of 256
        return int(x.numel() * (2 + given + 3 * drawn) + x.numel() // 8 * 2)
    widest = 4 if given or form.bits == 4 else x.element_size()
    return int(x.numel() * (6 if given else 3) + x.numel() * widest // 16 * fused)


def _masked_flops(op: str, backend: str, *args: Any, **options: Any) -> int:
    """Of lists of live elements in whole programs. Square roots and divisions are none; adam's
    bias corrections come on top, in every thread."""
    P, given = sum(p.numel() for p in args[0]), len(args) > 8 and args[8] is not None
    scaled = backend == "cuda" or given
    decays = options.get("weight_decay", 0.0) != 0
    if op == "masked_sgd_" and backend == "cuda":  # computes what an option then selects
        return int(P * (10 if options.get("momentum", 0.0) != 0 else 5))
    if op == "masked_sgd_":
        moments = 3 * (options.get("momentum", 0.0) != 0) + 2 * options.get("nesterov", False)
        return int(P * (2 + scaled + moments + 2 * decays))
    # 1 - lr * decay in every thread: of 8 elements, or of 4
    keep = 2 * decays * P // (8 if backend == "cuda" else 4)
    kept = backend == "cuda" or decays  # CUDA multiplies by 1 too
    return int(P * ((8 if op == "masked_lion_" else 11) + scaled + kept) + keep)


# Float additions and multiplications of kernels that compute otherwise than their op declares.
FLOPS: dict[str, Callable[..., int]] = {
    "quantize": _quantize_flops,
    **{f"masked_{rule}_": partial(_masked_flops, f"masked_{rule}_") for rule in MASKED},
}
# Ops whose exponentials the closed forms leave out: what is counted is no less.
AT_LEAST = (
    *("entropy", "entropy_backward", "distill_loss", "distill_loss_train"),
    *("route", "route_backward", "masked_adam_"),
)
# Kernels of one call, where there are several.
LAUNCHES = {
    "dispatch": 3,
    "distill_loss": 2,
    "distill_loss_train": 2,
    "route": 2,
    "route_backward": 3,
    "masked_adam_": 2,
    "masked_square_sum": 2,
}


def _launches(op: str, backend: str, *args: Any) -> int:
    """Kernels of a call. Triton's of lists are of a tensor each, but for the one of all sums."""
    each = LAUNCHES.get(op, 1)
    if backend != "triton" or not op.startswith("masked"):
        return each
    return len(args[0]) + 1 if op == "masked_square_sum" else each * len(args[0])


def _route_scratch(backend: str, score: Tensor) -> int:
    """Sums of every program's tokens, written and read again: a load of theirs in 16 bits; and
    totals, read for the losses."""
    (T, E), block_e = score.shape, _power_of_two(score.shape[1])
    tokens = 64 if T >= 4096 else 32 if T >= 2048 else 16
    if backend == "cuda":
        group = 16 if E > 128 else tokens
    else:
        least = max(16, 1024 // block_e)
        group = least * max(1, min(tokens // least, 16 // max(4, block_e // 256)))
    programs = -(-T // min(8192, group * max(1, -(-T // (512 * group)))))
    return int(2 * programs * (6 * E + 12) + 12 * E)


def _route_backward_scratch(score: Tensor) -> int:
    """What all tokens share; importance and a flag an expert, which say what takes part."""
    return int(14 * score.shape[1] + 16)


def scratch_bytes(op: str, backend: str, *args: Any) -> int:
    """At most so many bytes does a call move besides its inputs and outputs, each once: counts of
    chunks, written, scanned and read again, inputs and sums that a later launch reads again, and
    numbers that every launch reads."""
    if op == "route":
        return _route_scratch(backend, args[0])
    if op == "route_backward":
        return _route_backward_scratch(args[0])
    if op.startswith("distill_loss"):
        return int(4 * args[0].shape[0] + 4)  # the terms, and their mean
    if op == "masked_square_sum":  # sums of chunks, and where Triton's of a tensor end
        ends = 2 * 8 * len(args[0]) if backend == "triton" else 0
        return ends + 2 * 8 * sum(_square_sum_parts(g) for g in args[0])
    if op in FLOPS and op.startswith("masked"):
        return int(args[7].element_size() + 4 * len(args[3]))
    if op != "dispatch":
        return 0
    expert, E = args
    chunk = 512 if backend == "cuda" else 256
    counts = -(-expert.numel() // chunk) * (E + 1) * 4
    return int(6 * counts + expert.numel() * expert.element_size() + 4 * 4 * (E + 1))


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int
    launches: int


def work(op: str, backend: str, *args: Any, **options: Any) -> Work:
    """Bytes, flops and launches of a call of a GPU kernel, by closed forms.

    The flops of entropy, route and distill_loss are the declared ones: exponentials come on top,
    and how often a sum is rescaled or a series is taken depends on the data. So do those of adam's
    bias corrections.
    """
    cost = gk.OPS[op].cost_of(*args, **options)
    if op in FLOPS:
        return Work(cost.bytes, FLOPS[op](backend, *args, **options), _launches(op, backend, *args))
    extra = REDUCTIONS[op](backend, *args) if op in REDUCTIONS else 0
    return Work(cost.bytes, cost.flops + extra, _launches(op, backend, *args))


def predicted_seconds(work: Work, device: Device) -> tuple[float, str]:
    """Seconds and what bounds them: "memory", "compute" or "launch"."""
    memory = work.bytes / (BANDWIDTH_SHARE * device.bandwidth)
    compute = work.flops / device.float32
    launch = work.launches * LAUNCH_SECONDS
    body = max(memory, compute)
    bound = "launch" if launch > body else "memory" if memory >= compute else "compute"
    return launch + body, bound


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _combine(s: Shape) -> tuple[Any, ...]:
    slots = (s.T, s.K)
    y = _meta(s.T * s.K, s.D)
    return y, _meta(*slots, dtype=torch.float32), _meta(*slots, dtype=torch.int32)


def _distill(s: Shape) -> tuple[Any, ...]:
    """T samples of 4 * D classes."""
    logits = (s.T, 4 * s.D)
    return _meta(*logits), _meta(*logits), _meta(s.T, dtype=torch.int64)


def _route_backward(s: Shape) -> tuple[Any, ...]:
    """Gradients of the weights and of the losses."""
    f32, i32 = torch.float32, torch.int32
    slots = (s.T, s.K)
    outputs = (_meta(*slots, dtype=i32), _meta(s.E, dtype=i32), _meta(s.E, dtype=f32))
    grads = (_meta(*slots, dtype=f32), None, None, _meta(5, dtype=f32))
    return (_meta(s.T, s.E, dtype=f32), s.K, *[None] * 4, *outputs, *grads)


def _coded(s: Shape) -> tuple[Tensor, Tensor]:
    """Code and scales of an update of T rows of width D, int8_b256_f32."""
    P = s.T * s.D
    return _meta(P, dtype=torch.uint8), _meta(-(-P // 256), dtype=torch.float32)


def _masked(moments: int, s: Shape) -> tuple[Any, ...]:
    """A step of T rows of width D in float32, a mask value a row."""
    param, grad, *state = (_meta(s.T, s.D, dtype=torch.float32) for _ in range(2 + moments))
    step = [_meta(dtype=torch.float32)] if moments == 2 else []
    frozen = [_meta(s.T, 1, dtype=torch.bool)]
    return [param], [grad], state, step, [], frozen, [], _meta(dtype=torch.float32)


# An op's arguments at a shape; activations bfloat16, router logits and updates float32.
ARGUMENTS: dict[str, Callable[[Shape], tuple[Any, ...]]] = {
    "combine": _combine,
    "combine_backward": lambda s: (_meta(s.T, s.D), *_combine(s)),
    "dequantize": lambda s: (*_coded(s), s.T * s.D),
    "dequantize_add_": lambda s: (_meta(s.T * s.D, dtype=torch.float32), *_coded(s)),
    "dispatch": lambda s: (_meta(s.T, s.K, dtype=torch.int32), s.E),
    "distill_loss": _distill,
    "distill_loss_train": _distill,
    "entropy": lambda s: (_meta(s.T, s.E, dtype=torch.float32),),
    "entropy_backward": lambda s: (
        _meta(s.T, dtype=torch.float32),
        _meta(s.T, s.E, dtype=torch.float32),
    ),
    "masked_adam_": partial(_masked, 2),
    "masked_lion_": partial(_masked, 1),
    "masked_sgd_": partial(_masked, 0),
    "masked_square_sum": lambda s: (
        [_meta(s.T, s.D, dtype=torch.float32)],
        [_meta(s.T, 1, dtype=torch.bool)],
    ),
    "quantize": lambda s: (
        _meta(s.T, s.D, dtype=torch.float32),
        _meta(s.T, s.D, dtype=torch.float32),
    ),
    "route": lambda s: (_meta(s.T, s.E, dtype=torch.float32), s.K),
    "route_backward": _route_backward,
}


def predictions() -> Iterator[dict[str, Any]]:
    for op, arguments in ARGUMENTS.items():
        for label, shape in SHAPES.items():
            done = work(op, "cuda", *arguments(shape))
            for name, device in DEVICES.items():
                seconds, bound = predicted_seconds(done, device)
                yield {
                    "op": op,
                    "shape": label,
                    "device": name,
                    **asdict(done),
                    "predicted_microseconds": round(1e6 * seconds, 2),
                    "bound": bound,
                }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-model")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    options = parser.parse_args(argv)
    rows = list(predictions())
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("us by roofline: predicted, not measured (bound by m memory, c compute, l launch)")
    print(f"{'op':<18}{'shape':<15}{'MB':>9}" + "".join(f"{d:>11}" for d in DEVICES))
    for start in range(0, len(rows), len(DEVICES)):
        first = rows[start]
        times = rows[start : start + len(DEVICES)]
        cells = "".join(f"{r['predicted_microseconds']:>9.2f} {r['bound'][0]}" for r in times)
        print(f"{first['op']:<18}{first['shape']:<15}{first['bytes'] / 1e6:>9.3f}{cells}")
    return 0
