"""One peer in a process of its own: `python -m benchmarks._worker PEER`, JSON lines in and out.

    {"do": "make", "folder", "shape", "dtype", "seed"}      writes the layer's weights
    {"do": "truth", "folder", "shape", "dtype", "tokens", "routing"}   writes the true output
    {"do": "build", "folder", "shape", "dtype"}             takes the weights -> {"version"}
    {"do": "check", "folder", "tokens", "routing"}          -> {"error": relative L2, "seconds"}
    {"do": "time", "tokens", "routing", "warm"}             -> {"seconds"} of one call
    {"do": "pack"}                                          -> {"seconds"}

Every answer is one line: a JSON object, with "reason" where the peer cannot do what was asked. Any
other failure ends the process with its traceback. Weights lie in files that all workers map; inputs
are drawn anew from (tokens, routing), so equal in all of them. Truth is computed in float64, for
bfloat16 weights in float32. A routing is a number: another one chooses other experts. Caches are
flushed by whoever asks. The process dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._peers import PEERS, Built, CannotRunError, Inputs, Shape, Weights, inputs


@torch.inference_mode(False)
def _map(folder: str, shape: Shape, dtype: torch.dtype) -> Weights:
    """Tensors that count their versions, like parameters."""
    E, _, D, F = shape[1:]
    up_EHD, down_EDF = (
        torch.from_file(
            f"{folder}/{name}", shared=True, size=size[0] * size[1] * size[2], dtype=dtype
        ).view(size)
        for name, size in {"up": (E, 2 * F, D), "down": (E, D, F)}.items()
    )
    return Weights(up_EHD, down_EDF)


def _make(weights: Weights, seed: int) -> None:
    """Normal values of variance 1 / fan-in: an output of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights:
        for expert in tensor:
            expert.copy_(torch.randn(expert.shape, generator=generator) / tensor.shape[2] ** 0.5)


def _truth(weights: Weights, given: Inputs) -> Tensor:
    exact = torch.float64 if given.x_TD.dtype == torch.float32 else torch.float32
    x_TD, weight_TK = given.x_TD.to(exact), given.weight_TK.to(exact)
    out_TD = torch.zeros_like(x_TD)
    for e in given.expert_TK.unique().tolist():
        token_n, slot_n = (given.expert_TK == e).nonzero(as_tuple=True)
        gate, up = (x_TD[token_n] @ weights.up_EHD[e].to(exact).mT).chunk(2, dim=1)
        y_nD = (nn.functional.silu(gate) * up) @ weights.down_EDF[e].to(exact).mT
        out_TD.index_add_(0, token_n, y_nD * weight_TK[token_n, slot_n, None])
    return out_TD


def _truth_file(folder: str, tokens: int, routing: int) -> Path:
    return Path(folder) / f"truth-{tokens}-{routing}"


class Worker:
    """The state between requests: a layer, and its calls bound to inputs."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._shape: Shape | None = None
        self._dtype = torch.float32
        self._built: Built | None = None
        self._calls: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._awake = torch.zeros(1 << 16)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        request = dict(request)
        if "shape" in request:
            self._shape = Shape(*request.pop("shape"))
            self._dtype = getattr(torch, request.pop("dtype"))
        method = getattr(self, f"do_{request.pop('do')}")
        answer: dict[str, Any] = method(**request)
        return answer

    def do_make(self, folder: str, seed: int) -> dict[str, Any]:
        assert self._shape is not None
        _make(_map(folder, self._shape, self._dtype), seed)
        return {}

    def do_truth(self, folder: str, tokens: int, routing: int) -> dict[str, Any]:
        assert self._shape is not None
        given = inputs(self._shape, self._dtype, tokens, routing)
        out_TD = _truth(_map(folder, self._shape, self._dtype), given)
        file = str(_truth_file(folder, tokens, routing))
        torch.from_file(file, shared=True, size=out_TD.numel()).copy_(out_TD.flatten())
        return {}

    def do_build(self, folder: str) -> dict[str, Any]:
        assert self._shape is not None
        peer = PEERS[self._peer]
        try:
            self._built = peer.build(self._shape, _map(folder, self._shape, self._dtype))
        except (ImportError, CannotRunError) as error:
            return {"reason": str(error)}
        try:
            return {"version": f"{peer.package} {version(peer.package)}"}
        except PackageNotFoundError:
            return {"version": f"{peer.package}, not installed"}

    def do_check(self, folder: str, tokens: int, routing: int) -> dict[str, Any]:
        assert self._shape is not None
        size = tokens * self._shape.width
        truth = torch.from_file(str(_truth_file(folder, tokens, routing)), size=size)
        try:
            call = self._call(tokens, routing)
        except CannotRunError as error:
            return {"reason": str(error)}
        start = time.perf_counter()
        out_TD = call()
        seconds = time.perf_counter() - start
        gap = out_TD.float().flatten() - truth
        return {"error": (gap.norm() / truth.norm()).item(), "seconds": seconds}

    def do_time(self, tokens: int, routing: int, warm: bool) -> dict[str, Any]:
        call = self._call(tokens, routing)
        if warm:
            call()
        self._awake.add_(1)  # threads of torch's pool that went to sleep
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}

    def do_pack(self) -> dict[str, Any]:
        assert self._built is not None
        if self._built.pack is None:
            return {"reason": "takes the weights as they are"}
        start = time.perf_counter()
        self._built.pack()
        return {"seconds": time.perf_counter() - start}

    def _call(self, tokens: int, routing: int) -> Callable[[], Tensor]:
        """Bound on first use; the calls of another number of tokens are let go."""
        assert self._shape is not None and self._built is not None
        if (tokens, routing) not in self._calls:
            self._calls = {key: call for key, call in self._calls.items() if key[0] == tokens}
            given = inputs(self._shape, self._dtype, tokens, routing)
            self._calls[tokens, routing] = self._built.bind(given)
        return self._calls[tokens, routing]


def main(argv: list[str]) -> int:
    """Serves requests until stdin ends."""
    die_with_parent = 1  # PR_SET_PDEATHSIG: a stopped worker would outlive a killed parent
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
    # Peers print; what they print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    worker = Worker(argv[0])
    with torch.inference_mode():
        for line in sys.stdin:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
