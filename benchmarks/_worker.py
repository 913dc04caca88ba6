"""One peer in a process of its own: `python -m benchmarks._worker PEER`, JSON lines in and out.

    {"do": "make", "folder", "shape", "dtype", "seed"}      writes the layer's weights
    {"do": "truth", "folder", "shape", "dtype", "tokens", "routing"}   writes the true output
    {"do": "build", "folder", "shape", "dtype"}             takes the weights -> {"version"}
    {"do": "check", "folder", "tokens", "routing"}          -> {"error": relative L2, "seconds"}
    {"do": "time", "tokens", "routing", "warm"}             -> {"seconds"} of one call
    {"do": "pack"}                                          -> {"seconds"}
    {"do": "train_truth", "folder", "shape", "dtype", "tokens"}   writes out and gradients
    {"do": "train_check", "folder", "tokens"}               -> {"error", "seconds", "peak_bytes"}
    {"do": "train", "tokens", "frozen"}                     -> {"seconds", "backward_seconds"}

The error of a step is the largest of those of its output, of the gradient of x and of the gradients
of the expert with most tokens. peak_bytes: how far the process grew in a step that began without
kept memory, less the gradients of the weights.

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
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._peers import (
    PEERS,
    SHAPES,
    Built,
    CannotRunError,
    Inputs,
    Shape,
    Step,
    Weights,
    inputs,
    training,
)


@torch.inference_mode(False)
def _map(folder: str, shape: Shape, dtype: torch.dtype) -> Weights:
    """Tensors that count their versions, like parameters."""
    up_EHD, down_EDF = (
        torch.from_file(
            f"{folder}/{name}", shared=True, size=size[0] * size[1] * size[2], dtype=dtype
        ).view(size)
        for name, size in zip(("up", "down"), _sizes(shape), strict=True)
    )
    return Weights(up_EHD, down_EDF)


def _sizes(shape: Shape) -> tuple[tuple[int, int, int], ...]:
    E, _, D, F = shape[1:]
    return (E, 2 * F, D), (E, D, F)


def _experts(weights: Weights) -> list[tuple[Tensor, ...]]:
    """(up_HD, down_DF) of each."""
    return list(zip(*weights, strict=True))


def _judged(step: Step) -> list[Tensor]:
    """What is compared: not the gradient of the routing, which peers round differently."""
    return [step.out_TD, step.gradients[0], *step.gradients[2:]]


def _make(weights: Weights, seed: int) -> None:
    """Normal values of variance 1 / fan-in: an output of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights:
        for expert in tensor:
            expert.copy_(torch.randn(expert.shape, generator=generator) / tensor.shape[2] ** 0.5)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _truth(experts: Sequence[tuple[Tensor, ...]], given: Inputs) -> Tensor:
    exact = _exact(given.x_TD.dtype)
    x_TD, weight_TK = given.x_TD.to(exact), given.weight_TK.to(exact)
    out_TD = torch.zeros_like(x_TD)
    for e in given.expert_TK.unique().tolist():
        up_HD, down_DF = (w.to(exact) for w in experts[e])
        token_n, slot_n = (given.expert_TK == e).nonzero(as_tuple=True)
        gate, up = (x_TD[token_n] @ up_HD.mT).chunk(2, dim=1)
        y_nD = (nn.functional.silu(gate) * up) @ down_DF.mT
        out_TD = out_TD.index_add(0, token_n, y_nD * weight_TK[token_n, slot_n, None])
    return out_TD


def _truth_file(folder: str, tokens: int, routing: int) -> Path:
    return Path(folder) / f"truth-{tokens}-{routing}"


def _train_file(folder: str, tokens: int) -> Path:
    return Path(folder) / f"train-{tokens}.pt"


def _busiest(given: Inputs) -> int:
    """The expert with most tokens."""
    return int(given.expert_TK.flatten().bincount().argmax())


def _memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    return int(line[1]) * 1024


class Worker:
    """The state between requests: a layer, and its calls bound to inputs."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._shape: Shape | None = None
        self._dtype = torch.float32
        self._weights: Sequence[Tensor] = ()
        self._built: Built | None = None
        self._calls: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._steps: dict[tuple[int, float], Callable[[], Step]] = {}
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
        weights = _map(folder, self._shape, self._dtype)
        out_TD = _truth(_experts(weights), given)
        file = str(_truth_file(folder, tokens, routing))
        torch.from_file(file, shared=True, size=out_TD.numel()).copy_(out_TD.flatten())
        return {}

    def do_build(self, folder: str) -> dict[str, Any]:
        assert self._shape is not None
        peer = PEERS[self._peer]
        self._weights = _map(folder, self._shape, self._dtype)
        try:
            self._built = peer.build(self._shape, self._weights)
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

    @torch.inference_mode(False)
    def do_train_truth(self, folder: str, tokens: int) -> dict[str, Any]:
        assert self._shape is not None
        given, exact = inputs(self._shape, self._dtype, tokens, 0), _exact(self._dtype)
        experts, e = _experts(_map(folder, self._shape, self._dtype)), _busiest(given)

        def call(x_TD: Tensor, weight_TK: Tensor, *busiest: Tensor) -> Tensor:
            experts[e] = busiest
            return _truth(experts, given._replace(x_TD=x_TD, weight_TK=weight_TK))

        step = training(call, given, Weights(*[w.to(exact) for w in experts[e]]))()
        parts = [t.flatten().float() for t in _judged(step)]
        file = str(_train_file(folder, tokens))
        torch.from_file(file, shared=True, size=sum(map(len, parts))).copy_(torch.cat(parts))
        return {}

    @torch.inference_mode(False)
    def do_train_check(self, folder: str, tokens: int) -> dict[str, Any]:
        assert self._shape is not None and self._built is not None
        if self._built.train is None:
            return {"reason": "has no backward"}
        small = SHAPES["tiny"]._replace(name="warm-up")  # what it loads once is not the step's
        weights = Weights(*[torch.randn(size).to(self._dtype) for size in _sizes(small)])
        warm = PEERS[self._peer].build(small, weights).train
        assert warm is not None
        warm(inputs(small, self._dtype, 5, 0), 0.0)()
        for w in self._weights:
            w.view(-1)[::1024].sum()  # its pages are the process's from now on
        self._steps.clear()
        if self._built.release is not None:
            self._built.release()
        ctypes.CDLL(None).malloc_trim(0)
        step, e = self._step(tokens, 0.0), _busiest(inputs(self._shape, self._dtype, tokens, 0))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = _memory("VmRSS"), time.perf_counter()
        done = step()
        seconds = time.perf_counter() - start
        grown = _memory("VmHWM") - before - sum(g.nbytes for g in done.gradients[2:])
        *rest, up_EHD, down_EDF = done.gradients
        parts = _judged(done._replace(gradients=(*rest, up_EHD[e], down_EDF[e])))
        file = str(_train_file(folder, tokens))
        truths = torch.from_file(file, size=sum(t.numel() for t in parts))
        error = max(
            ((t.flatten().float() - truth).norm() / truth.norm()).item()
            for t, truth in zip(parts, truths.split([t.numel() for t in parts]), strict=True)
        )
        return {"error": error, "seconds": seconds, "peak_bytes": grown}

    @torch.inference_mode(False)
    def do_train(self, tokens: int, frozen: float) -> dict[str, Any]:
        step = self._step(tokens, frozen)
        self._awake.add_(1)
        done = step()
        seconds = done.forward_seconds + done.backward_seconds
        return {"seconds": seconds, "backward_seconds": done.backward_seconds}

    def _step(self, tokens: int, frozen: float) -> Callable[[], Step]:
        """Bound on first use; the steps of another number of tokens are let go."""
        assert self._shape is not None and self._built is not None
        assert self._built.train is not None
        if (tokens, frozen) not in self._steps:
            self._steps = {key: step for key, step in self._steps.items() if key[0] == tokens}
            given = inputs(self._shape, self._dtype, tokens, 0)
            self._steps[tokens, frozen] = self._built.train(given, frozen)
        return self._steps[tokens, frozen]

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
