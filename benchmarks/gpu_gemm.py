"""Work of the expert GEMMs on a GPU by closed forms: predicted from shapes, nothing is measured.

    python -m benchmarks gpu-gemm [--json]

prints for models at T tokens what share of the tensor cores' FLOPs is useful, with balanced, random
and skewed loads, and the activation bytes and launches of a layer beside those of other published
schemes. The tests assert that the PTX machine counts what `grouped_gemm`, `weight_grad` and
`layer_work` say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_model
from gose_kernels.packing import expert_bytes
from gose_kernels.triton import expert_mlp_packed, tiles
from gose_kernels.triton.moe import tile_of as score_tile_of
from gose_kernels.triton.squared_grad import tile_of as squared_tile_of
from gose_kernels.triton.tiles import Tile
from gose_kernels.triton.weight_grad import tile_of

# float32 is three products of tf32.
_PRODUCTS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 1}


class Work(NamedTuple):
    bytes: int  # inputs that are used and outputs, each once
    flops: int  # 2 * multiply-adds that the op declares
    mma_flops: int  # what the tensor cores are told to do, padding included
    launches: int


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _issued(loads: Sequence[int], columns: int, depth: int, tile: Tile) -> int:
    """Multiply-adds, times 2, of a product [rows of every expert, depth] @ [depth, columns]."""
    rows = sum(_up(n, tile.rows) for n in loads)
    return 2 * rows * _up(columns, tile.columns) * _up(depth, tile.depth)


def grouped_gemm(loads: Sequence[int], F: int, D: int, dtype: torch.dtype) -> Work:
    """[N, D] @ [E, F, D] with `loads` rows for the experts, all rows used."""
    N, busy = sum(loads), sum(n > 0 for n in loads)
    tile = tiles.row_tile(N, len(loads), N, dtype)
    moved = (N * (D + F) + busy * F * D) * dtype.itemsize
    issued = _issued(loads, F, D, tile) * _PRODUCTS[dtype]
    return Work(moved, 2 * N * F * D, issued, 2)


def map_bytes(N: int, E: int, dtype: torch.dtype) -> int:
    """At most so many bytes move besides: offsets, and the map of tiles, written and read."""
    rows = tiles.row_tile(N, E, N, dtype).rows
    groups = min(E + 1, N)
    return 4 * (E + 1) + 2 * 12 * (groups + (N - groups) // rows)


def weight_grad(loads: Sequence[int], A: int, B: int, dtype: torch.dtype) -> Work:
    """The gradient [E, A, B] of weights, every row of both sides used."""
    N, E, tile = sum(loads), len(loads), tile_of(dtype)
    moved = (N * (A + B) + E * A * B) * dtype.itemsize
    steps = sum(_up(n, 16) for n in loads)
    issued = 2 * steps * _up(A, tile.rows) * _up(B, tile.columns) * _PRODUCTS[dtype]
    return Work(moved, 2 * N * A * B, issued, 1)


def squared_grad(
    loads: Sequence[int], F: int, D: int, dtype: torch.dtype, samples: Sequence[int] | None = None
) -> Work:
    """Squared gradients [E, F, D] of experts with `loads` rows; `samples`: rows of every sample, in
    place of one a row. The bias reads grad_NF again."""
    N, E, tile = sum(loads), len(loads), squared_tile_of(dtype, samples is not None)
    moved = N * (2 * F + D) * dtype.itemsize + 4 * E * F * (D + 1) + 8 * (E + 1)
    if samples is not None:  # every place's row, and where every sample ends
        moved += 8 * (N + len(samples))
    steps = sum(_up(n, tile.depth) for n in (loads if samples is None else samples))
    products = _PRODUCTS[torch.float32 if samples is None else dtype]
    issued = 2 * steps * _up(F, tile.rows) * _up(D, tile.columns) * products
    return Work(moved, 2 * N * F * D, issued, 2)


def scores(T: int, E: int, D: int, dtype: torch.dtype, router_dtype: torch.dtype) -> Work:
    """[T, D] @ [E, D] of a router."""
    widen = dtype != router_dtype or dtype == torch.float32
    tile = score_tile_of(T, widen)
    issued = _issued([T], E, D, tile) * _PRODUCTS[torch.float32 if widen else dtype]
    moved = T * D * dtype.itemsize + E * D * router_dtype.itemsize + 4 * T * E
    return Work(moved, 2 * T * E * D, issued, 1)


def packed_layer(
    loads: Sequence[int], F: int, D: int, dtype: torch.dtype, weights: str | None
) -> Work:
    """A gated layer over packed weights, one expert a token: a and y are written and read."""
    N, busy = sum(loads), sum(n > 0 for n in loads)
    tile = expert_mlp_packed.narrowed(tiles.row_tile(N, len(loads), N, dtype), dtype, weights)
    issued = _issued(loads, 2 * _up(F, 32), D, tile) + _issued(loads, _up(D, 32), F, tile)
    read = busy * expert_bytes(width=D, hidden=F, dtype=dtype, weights=weights)
    moved = read + N * (4 * D + 2 * F) * dtype.itemsize
    # The plan takes three launches, the map of tiles, two GEMMs and the combine one each.
    return Work(moved, 6 * N * F * D, issued * _PRODUCTS[dtype], 7)


KINDS = ("balanced", "random", "zipf")


class Layer(NamedTuple):
    """A gated layer of a known model."""

    E: int
    K: int
    D: int
    F: int


MODELS = {
    "olmoe": Layer(64, 8, 2048, 1024),
    "qwen3": Layer(128, 8, 2048, 768),
    "mixtral": Layer(8, 2, 4096, 14336),
}


def loads_of(kind: str, rows: int, experts: int) -> list[int]:
    """balanced: equal; random: every row draws its expert; zipf: popularity 1 / rank."""
    if kind == "balanced":
        return [rows // experts] * experts
    random = torch.Generator().manual_seed(0)
    share = torch.ones(experts) if kind == "random" else 1 / torch.arange(1.0, experts + 1)
    drawn = torch.multinomial(share, rows, replacement=True, generator=random)
    return [int(n) for n in torch.bincount(drawn, minlength=experts)]


def issued_share(layer: Layer, T: int, kind: str, *, backward: bool) -> float:
    """Issued tensor-core FLOPs over useful ones, bfloat16, of a layer's forward or backward."""
    loads, (E, _, D, F) = loads_of(kind, T * layer.K, layer.E), layer
    N = sum(loads)
    tile = tiles.row_tile(N, E, min(T, N), torch.bfloat16)
    gated = tile._replace(columns=tile.columns // 2)
    if not backward:
        issued = 2 * _issued(loads, F, D, gated) + _issued(loads, D, F, tile)
        return issued / (6 * N * D * F)
    issued = _issued(loads, F, D, gated) + _issued(loads, D, 2 * F, tile)
    issued += weight_grad(loads, 2 * F, D, torch.bfloat16).mma_flops
    issued += weight_grad(loads, D, F, torch.bfloat16).mma_flops
    return issued / (12 * N * D * F)


def _tiles(loads: Sequence[int], layer: Layer, T: int) -> tuple[Tile, Tile, int]:
    """The tile of the plain GEMMs and that of the gated ones, and how many tiles have rows."""
    tile = tiles.row_tile(sum(loads), layer.E, min(T, sum(loads)), torch.bfloat16)
    used = sum(-(-n // tile.rows) for n in loads)
    return tile, tile._replace(columns=tile.columns // 2), used


def layer_work(loads: Sequence[int], layer: Layer, T: int, *, backward: bool) -> Work:
    """A gated layer in bfloat16 from chosen experts to combined output, or back to all gradients:
    inputs and outputs of every launch, each once. What is moved for a slot or a tile, and not for
    its rows, is left out (`plan_bytes`)."""
    E, _, D, F = layer
    N, H, busy = sum(loads), 2 * F, sum(n > 0 for n in loads)
    tile, gated, _ = _tiles(loads, layer, T)
    up = _issued(loads, F, D, gated)
    if not backward:
        moved = (T * D + busy * H * D + N * (H + F)) + (N * (F + D) + busy * D * F) + (N + T) * D
        issued = 2 * up + _issued(loads, D, F, tile)
        return Work(2 * moved, 6 * N * D * F, issued, len(LAUNCHES["gose"]["forward"]))
    of_up, of_down = (weight_grad(loads, A, B, torch.bfloat16) for A, B in ((H, D), (D, F)))
    moved = (T * D + busy * D * F + N * (2 * H + F)) + (N * (H + D) + busy * H * D) + (N + T) * D
    moved += (N * H + T * D + E * H * D) + (T * D + N * F + E * D * F)
    shares = 2 * 4 * N * -(-F // gated.columns)  # of the gate gradient, written and read
    issued = up + _issued(loads, D, H, tile) + of_up.mma_flops + of_down.mma_flops
    return Work(2 * moved + shares, 12 * N * D * F, issued, len(LAUNCHES["gose"]["backward"]))


def plan_bytes(loads: Sequence[int], layer: Layer, T: int) -> int:
    """At most so many bytes does `layer_work` leave out: the plan, the map of tiles, which each
    GEMM reads, and what a launch reads or writes of every slot."""
    tile, _, _ = _tiles(loads, layer, T)
    N, E = sum(loads), layer.E
    expert_TK = torch.empty(T, N // T, dtype=torch.int32, device="meta")
    plan = gpu_model.work("dispatch", "triton", expert_TK, E).bytes
    plan += gpu_model.scratch_bytes("dispatch", "triton", expert_TK, E)
    return plan + 3 * 12 * tiles.most_tiles(N, E, tile.rows) + 3 * 4 * (E + 1) + 13 * 4 * N


def tiled_bytes(loads: Sequence[int], layer: Layer, T: int, *, backward: bool) -> int:
    """What the blocks of `layer_work` fetch and write at least: the rows and columns of each tile,
    its output."""
    E, _, D, F = layer
    N, H = sum(loads), 2 * F
    tile, gated, used = _tiles(loads, layer, T)

    def across(columns: int, of: Tile) -> int:
        return -(-columns // of.columns)

    if not backward:
        moved = N * D * across(F, gated) + used * H * D + N * (H + F)
        moved += N * F * across(D, tile) + used * D * F + N * D
        return 2 * (moved + (N + T) * D)
    moved = N * D * across(F, gated) + used * D * F + N * (2 * H + F)
    moved += N * H * across(D, tile) + used * H * D + N * D + (N + T) * D
    own = tile_of(torch.bfloat16)
    for A, B in ((H, D), (D, F)):
        moved += N * (A * across(B, own) + B * -(-A // own.rows)) + E * A * B
    return 2 * moved + 2 * 4 * N * across(F, gated)


# Launches that pass over activations, as (N x D, N x H, N x F, T x D) elements, read plus written;
# H = 2F. Rows gathered from tokens count as rows. Weights are read and their gradients written
# alike by all. Then the launches that move none, between chosen experts and the layer's output.
Pass = tuple[int, int, int, int]
_FUSED: dict[str, dict[str, Pass]] = {
    "forward": {"up": (1, 1, 1, 0), "down": (1, 0, 1, 0), "combine": (1, 0, 0, 1)},
    "backward": {
        "gradient of a": (1, 2, 1, 0),
        "gradient of x": (1, 1, 0, 0),
        "combine": (1, 0, 0, 1),
        "w_up": (1, 1, 0, 0),
        "w_down": (1, 0, 1, 0),
    },
}
SCHEMES: dict[str, dict[str, dict[str, Pass]]] = {
    "gose": _FUSED,
    # Its epilogues are the same; Hopper and Blackwell only.
    "sonicmoe": _FUSED,
    # Gathers in the GEMMs; the activation and the weights are passes of their own; y is kept.
    "scattermoe": {
        "forward": {
            "up": (1, 1, 0, 0),
            "silu": (0, 0, 2, 0),
            "product": (0, 0, 3, 0),
            "down": (1, 0, 1, 0),
            "combine": (1, 0, 0, 1),
        },
        "backward": {
            "gate weights": (1, 0, 0, 1),
            "weighted group": (2, 0, 0, 0),
            "gradient of a": (1, 0, 1, 0),
            "w_down": (1, 0, 1, 0),
            "product": (0, 0, 5, 0),
            "silu": (0, 0, 3, 0),
            "halves": (0, 0, 2, 0),
            "gradient of x": (1, 1, 0, 0),
            "sum over slots": (1, 0, 0, 1),
            "group": (2, 0, 0, 0),
            "w_up": (1, 1, 0, 0),
        },
    },
    # transformers' grouped_mm.
    "grouped_mm": {
        "forward": {
            "gather": (2, 0, 0, 0),
            "up": (1, 1, 0, 0),
            "silu": (0, 0, 2, 0),
            "product": (0, 0, 3, 0),
            "down": (1, 0, 1, 0),
            "weights": (2, 0, 0, 0),
            "inverse gather": (2, 0, 0, 0),
            "sum": (1, 0, 0, 1),
        },
        "backward": {
            "expand": (1, 0, 0, 1),
            "inverse scatter": (2, 0, 0, 0),
            "weights": (2, 0, 0, 0),
            "gate weights": (4, 0, 0, 0),
            "gradient of a": (1, 0, 1, 0),
            "w_down": (1, 0, 1, 0),
            "product": (0, 0, 6, 0),
            "silu": (0, 0, 3, 0),
            "halves": (0, 1, 2, 0),
            "gradient of x": (1, 1, 0, 0),
            "w_up": (1, 1, 0, 0),
            "scatter-add": (1, 0, 0, 1),
        },
    },
}
_PLAN = ("count", "scan", "place", "map of tiles")
# A sort counts as one launch, though it is several.
_WITHOUT_ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "gose": {
        "forward": _PLAN,
        "backward": (*_PLAN, "weights of rows", "gate gradient", "weights of 1"),
    },
    "sonicmoe": {"forward": ("count and scan", "sort", "scatter"), "backward": ()},
    "scattermoe": {"forward": ("sort", "count", "scan"), "backward": ()},
    "grouped_mm": {
        "forward": ("sort", "token", "gate weights", "count", "scan", "arange", "inverse"),
        "backward": ("gate weights",),
    },
}
LAUNCHES = {
    scheme: {phase: (*_WITHOUT_ROWS[scheme][phase], *passes) for phase, passes in phases.items()}
    for scheme, phases in SCHEMES.items()
}


def activation_bytes(scheme: str, phase: str, layer: Layer, T: int) -> int:
    """Bytes of bfloat16 activations that one layer's forward (for training) or backward moves."""
    N, (_, _, D, F) = T * layer.K, layer
    units = (N * D, 2 * N * F, N * F, T * D)
    passes = SCHEMES[scheme][phase].values()
    return 2 * sum(c * u for one in passes for c, u in zip(one, units, strict=True))


def rows() -> Iterator[dict[str, Any]]:
    for name, layer in MODELS.items():
        for T in (4096, 16384):
            shares = {
                f"{kind} {phase}": round(
                    issued_share(layer, T, kind, backward=phase == "backward"), 3
                )
                for kind in KINDS
                for phase in ("forward", "backward")
            }
            moved = {
                f"{scheme} {phase}": activation_bytes(scheme, phase, layer, T)
                for scheme in SCHEMES
                for phase in ("forward", "backward")
            }
            launches = {
                f"{scheme} {phase}": len(names)
                for scheme, phases in LAUNCHES.items()
                for phase, names in phases.items()
            }
            yield {
                "model": name,
                "T": T,
                "issued_share": shares,
                "activation_bytes": moved,
                "launches": launches,
            }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-gemm")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    options = parser.parse_args(argv)
    found = list(rows())
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print("expert layers in bfloat16 by closed forms: predicted, not measured")
    print("issued tensor-core FLOPs over useful ones, forward / backward")
    for row in found:
        share = row["issued_share"]
        cells = [f"{k} {share[f'{k} forward']:.2f} / {share[f'{k} backward']:.2f}" for k in KINDS]
        print(f"  {row['model']:<8} T={row['T']:<6} " + "   ".join(cells))
    print("MB of activations read and written, forward / backward")
    for row in found:
        moved = row["activation_bytes"]
        cells = [
            f"{s} {moved[f'{s} forward'] / 1e6:.0f} / {moved[f'{s} backward'] / 1e6:.0f}"
            for s in SCHEMES
        ]
        print(f"  {row['model']:<8} T={row['T']:<6} " + "   ".join(cells))
    cells = [f"{s} {len(own['forward'])} / {len(own['backward'])}" for s, own in LAUNCHES.items()]
    print("launches, forward / backward: " + "   ".join(cells))
    return 0
