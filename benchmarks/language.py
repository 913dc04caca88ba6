"""A small MoE language model of the Python standard library, and what its experts can be spared.

    python -m benchmarks language [--steps N] [--folder DIR] [--threads N] [--quick]

Trains a model of bytes (seeded; stopped at any moment, it goes on from its last checkpoint in
DIR), and on files that training never saw measures
    adaptive   perplexity and expert FLOPs with adaptive_k at several masses, beside fixed top-k
    weights    perplexity with int8 and int4 experts (`gose quantize`)
    second     C++ headers as a second domain: all weights trained, or two new experts a layer in a
               model that is otherwise frozen, whose first domain stays to the bit while they sleep
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gose_kernels as gk
from benchmarks import _language, _record
from gose import adaptive, language, shrink

_MASSES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.72, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
_HEADER_BYTES = 2_000_000
_RATE = 4e-3


def _optimizer(parameters: Any) -> gk.optim.MaskedAdamW:
    return gk.optim.MaskedAdamW(parameters, lr=_RATE, weight_decay=0.05, max_grad_norm=1.0)


def adaptive_rows(net: Any, text: _language.Text, windows: int) -> list[dict[str, Any]]:
    """A row per mass and per fixed top-k: expert FLOPs and perplexity against the whole top-k."""
    ids_BT = _language.windows(text.held_N, windows, seed=7)
    full = adaptive.run(net, ids_BT, None)
    rows: list[dict[str, Any]] = []
    top_k = net.config.num_experts_per_tok

    def row(way: str, point: adaptive.Point) -> None:
        rows.append(
            {
                "way": way,
                "fewer_flops": 1 / (1 - point.saving),
                "perplexity": point.perplexity,
                "rise": point.perplexity / full.perplexity - 1,
            }
        )

    row(f"top {top_k}", full)
    for mass in _MASSES:
        row(f"mass {mass}", adaptive.run(net, ids_BT, mass))
    routers = [layer.mlp.gate for layer in net.model.layers]
    for fixed in range(top_k - 1, 0, -1):
        for router in routers:
            router.top_k = fixed
        point = adaptive.run(net, ids_BT, None)
        row(f"top {fixed}", point._replace(saving=1 - fixed / top_k))
    for router in routers:
        router.top_k = top_k
    return rows


def weights_rows(net: Any, text: _language.Text, windows: int) -> list[dict[str, Any]]:
    """A row per format of the experts' weights: bytes and perplexity against float32."""
    ids_BT = _language.windows(text.held_N, windows, seed=7)
    full = language.perplexity(net, ids_BT)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        net.save_pretrained(whole)
        for weights in shrink.FORMATS:
            planned = [row for row in shrink.plan(whole, weights) if row.quantized]
            shrink.quantize(whole, Path(folder) / weights, weights)
            perplexity = language.perplexity(language.load(Path(folder) / weights), ids_BT)
            before, after = (sum(column) for column in zip(*(r[-2:] for r in planned), strict=True))
            rows.append(
                {
                    "weights": weights,
                    "smaller": before / after,
                    "perplexity": perplexity,
                    "rise": perplexity / full - 1,
                }
            )
    return rows


def second_domain(
    base: Any, first: _language.Text, *, steps: int, windows: int, folder: Path
) -> list[dict[str, Any]]:
    """Nats per byte of both domains before and after training on the second, by arm."""
    second = _language.cpp_headers(_HEADER_BYTES)

    def losses(net: Any) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            _language.loss_of(net, text.held_N, windows) for text in (first, second)
        )

    rows: list[dict[str, Any]] = []

    def row(arm: str, found: tuple[float, float], **more: Any) -> None:
        rows.append({"arm": arm, "python": found[0], "headers": found[1], **more})
        _tell(f"{arm}: {found}")

    gk.huggingface.replace_moe_layers(base, router={})
    row("before", losses(base))

    everything = copy.deepcopy(base)
    _train(everything, _optimizer(everything.parameters()), second, steps, folder / "everything")
    row("all weights trained", losses(everything))

    grown = copy.deepcopy(base)
    steps_of = _optimizer(grown.parameters())
    layers = [
        gk.LivingExperts(layer.mlp, capacity=18, optimizer=steps_of) for layer in grown.model.layers
    ]
    slots = losses(grown)  # 18 columns: a matrix product of another shape may round otherwise
    of_layers = {p for living in layers for p in living.parameters()}
    for p in set(grown.parameters()) - of_layers:
        steps_of.set_frozen(p, torch.ones((), dtype=torch.bool))
    busiest = _busiest(grown, second)
    for living, like in zip(layers, busiest, strict=True):
        for name in living.names:
            living.freeze(name, router=True)
        for name, source in zip(("headers0", "headers1"), like, strict=True):
            living.add(name, like=living.names[source], router="copy")
    _train(grown, steps_of, second, steps, folder / "grown")
    row("two new experts a layer, awake", losses(grown))
    for living in layers:
        for name in ("headers0", "headers1"):
            living.sleep(name)
    asleep = losses(grown)
    row("two new experts a layer, asleep", asleep, same_bits=asleep == slots)
    return rows


def _busiest(net: Any, text: _language.Text) -> list[list[int]]:
    """Per layer the two experts that the text loads most."""
    with torch.no_grad(), gk.huggingface.watch_routers(net) as watches:
        ids_BT = _language.windows(text.train_N, _language.BATCH, seed=11)
        net(input_ids=ids_BT, output_router_logits=False)
    return [watch.load_E.topk(2).indices.tolist() for watch in watches.values()]


def _train(
    net: Any, optimizer: gk.optim.MaskedAdamW, text: _language.Text, steps: int, folder: Path
) -> float:
    return _language.train(
        net,
        optimizer,
        text.train_N,
        steps=steps,
        seed=0,
        rate=_RATE if folder.name == "base" else _RATE / 4,
        folder=folder,
        tell=_tell,
        balance=folder.name == "base",
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Writes benchmarks/results/language.json, but for --quick."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--second-steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows measured on")
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4 steps, nothing is saved")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.steps, options.second_steps, options.windows = 4, 2, 4
    text = _language.python_library()
    net = _language.model(seed=0)
    swapped = gk.huggingface.replace_moe_layers(net, router={})
    seconds = _train(
        net, _optimizer(net.parameters()), text, options.steps, options.folder / "base"
    )
    loss = _language.loss_of(net, text.held_N, options.windows)
    swapped.restore()
    rows = adaptive_rows(net, text, options.windows)
    weights = weights_rows(net, text, options.windows)
    second = second_domain(
        net, text, steps=options.second_steps, windows=options.windows, folder=options.folder
    )
    for found in (*rows, *weights, *second):
        print(found)
    if not options.quick:
        values = {
            "steps": options.steps,
            "second_steps": options.second_steps,
            "train_bytes": options.steps * _language.BATCH * _language.LENGTH,
            "train_cpu_seconds": seconds,
            "held_files": text.held_files,
            "held_bytes": options.windows * _language.LENGTH,
            "perplexity": math.exp(loss),
            "adaptive": rows,
            "weights": weights,
            "second": second,
        }
        command = " ".join(["python -m benchmarks language", *argv])
        print(_record.save("language", command, options.threads, values))
    return 0
