"""A small MoE language model of the Python standard library, and what its experts can be spared.

    python -m benchmarks language [--steps N] [--folder DIR] [--threads N] [--quick]

Trains a model of bytes, seeded, and measures on files that training never saw
    adaptive   perplexity and expert FLOPs with adaptive_k at several masses, beside fixed top-k,
               on a validation text and on a test text; the mass is chosen on the first
    weights    perplexity with int8 and int4 experts (`gose quantize`)
    second     C++ headers as a second domain: all weights trained, or two new experts a layer in a
               model that is otherwise frozen, whose first domain stays to the bit while they sleep
               and once they are removed
Stopped at any moment it goes on: training from its last checkpoint in DIR, measuring from the rows
in DIR/rows. Another model or text wants another DIR. Runs with different --part may go side by
side once the model is trained; one without it then writes the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gose_kernels as gk
from benchmarks import _language, _record
from gose import adaptive, checkpoint, language, shrink

_MASSES = (0.95, 0.9, 0.85, 0.8, 0.77, 0.74, 0.71, 0.68, 0.65, 0.6, 0.5, 0.4, 0.3)
_PARTS = ("validation", "adaptive", "weights", "second")
_MOST_RISE = 0.008  # of the perplexity of the validation text: another text rises a little more
_HEADER_BYTES = 8_000_000
_RATE = 4e-3
_NEW = ("headers0", "headers1")

Row = dict[str, Any]
Keep = Callable[[str, Callable[[], Row]], Row]  # the row of a name: kept, or made and kept


def keep_in(folder: Path) -> Keep:
    """Rows by name, each in a JSON file of its own: several runs may share a folder."""

    def keep(name: str, make: Callable[[], Row]) -> Row:
        path = folder / f"{name}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_file(path, (json.dumps(make(), indent=1) + "\n").encode())
        row: Row = json.loads(path.read_text("utf-8"))
        _tell(f"{name}: {row}")
        return row

    return keep


def _optimizer(parameters: Any) -> gk.optim.MaskedAdamW:
    return gk.optim.MaskedAdamW(parameters, lr=_RATE, weight_decay=0.05, max_grad_norm=1.0)


def curve(net: Any, ids_BT: Tensor, of: str, keep: Keep) -> dict[str, Row]:
    """A row per mass and, of the test text, per fixed top-k: expert FLOPs, and perplexity against
    the whole top-k."""
    top_k = net.config.num_experts_per_tok
    routers = [layer.mlp.gate for layer in net.model.layers]

    def row(way: str, mass: float | None = None, fixed: int = top_k) -> Row:
        def make() -> Row:
            for router in routers:
                router.top_k = fixed
            try:
                point = adaptive.run(net, ids_BT, mass)
            finally:
                for router in routers:
                    router.top_k = top_k
            left = (1 - point.saving) * fixed / top_k
            return {"way": way, "fewer_flops": 1 / left, "perplexity": point.perplexity}

        return keep(f"adaptive {of} {way}", make)

    rows = [row(f"top {top_k}")]
    rows += [row(f"mass {mass}", mass=mass) for mass in _MASSES]
    if of == "test":
        rows += [row(f"top {fixed}", fixed=fixed) for fixed in range(top_k - 1, 0, -1)]
    full = rows[0]["perplexity"]
    return {row["way"]: {**row, "rise": row["perplexity"] / full - 1} for row in rows}


def adaptive_rows(net: Any, validation_BT: Tensor, test_BT: Tensor, keep: Keep) -> list[Row]:
    """The curve of the test text; of the masses also `validation_rise`. `chosen` is the smallest
    mass of those whose perplexity of the validation text rises by at most 0.8 %."""
    test, validation = (
        curve(net, ids_BT, of, keep)
        for of, ids_BT in (("test", test_BT), ("validation", validation_BT))
    )
    fits = [w for w, r in validation.items() if "mass" in w and r["rise"] <= _MOST_RISE]
    chosen = max(fits, key=lambda way: validation[way]["fewer_flops"], default=None)
    return [
        {**row, "chosen": way == chosen}
        | ({"validation_rise": validation[way]["rise"]} if way in validation else {})
        for way, row in test.items()
    ]


def weights_rows(net: Any, test_BT: Tensor, keep: Keep) -> list[Row]:
    """A row per format of the experts' weights: bytes and perplexity against float32."""
    full = keep("weights float32", lambda: {"perplexity": language.perplexity(net, test_BT)})

    def make(weights: str) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            whole, out = Path(folder) / "whole", Path(folder) / weights
            net.save_pretrained(whole)
            planned = [row for row in shrink.plan(whole, weights) if row.quantized]
            shrink.quantize(whole, out, weights)
            perplexity = language.perplexity(language.load(out), test_BT)
        before, after = (sum(column) for column in zip(*(r[-2:] for r in planned), strict=True))
        rise = perplexity / full["perplexity"] - 1
        smaller = before / after
        return {"weights": weights, "smaller": smaller, "perplexity": perplexity, "rise": rise}

    return [keep(f"weights {weights}", partial(make, weights)) for weights in shrink.FORMATS]


def second_domain(
    base: Any, test_BT: Tensor, second: _language.Text, *, steps: int, folder: Path, keep: Keep
) -> list[Row]:
    """Nats per byte of both domains' test texts before and after training on the second, by arm.

    same_bits: of the first domain's loss, against the same number of slots before training.
    """
    texts = {"python": test_BT, "headers": _language.spread(second.test_N, len(test_BT) // 2)}
    rows: list[Row] = []

    def row(arm: str, net: Any, like: Row | None = None) -> Row:
        def make() -> Row:
            found = {of: _language.loss_of(net, ids_BT) for of, ids_BT in texts.items()}
            same = {} if like is None else {"same_bits": found["python"] == like["python"]}
            return {"arm": arm, **found, **same}

        return keep(f"second {arm}", make)

    gk.huggingface.replace_moe_layers(base, router={})
    before = row("before", base)
    rows.append(before)

    everything = copy.deepcopy(base)
    _train(everything, _optimizer(everything.parameters()), second, steps, folder / "everything")
    rows.append(row("all weights trained", everything))

    grown = copy.deepcopy(base)
    steps_of = _optimizer(grown.parameters())
    layers = [
        gk.LivingExperts(layer.mlp, capacity=18, optimizer=steps_of) for layer in grown.model.layers
    ]
    slots = row("18 slots", grown)  # a matrix product of another shape may round otherwise
    of_layers = {p for living in layers for p in living.parameters()}
    for p in set(grown.parameters()) - of_layers:
        steps_of.set_frozen(p, torch.ones((), dtype=torch.bool))
    busiest = _busiest(grown, second)
    for living, like in zip(layers, busiest, strict=True):
        for name in living.names:
            living.freeze(name, router=True)
        for name, source in zip(_NEW, like, strict=True):
            living.add(name, like=living.names[source], router="copy")
    _train(grown, steps_of, second, steps, folder / "grown")
    rows.append(row("two new experts a layer, awake", grown))
    for living in layers:
        for name in _NEW:
            living.sleep(name)
    rows.append(row("two new experts a layer, asleep", grown, slots))
    for living in layers:
        for name in _NEW:
            living.remove(name)
        living.settle()
    rows.append(row("two new experts a layer, removed", grown, before))
    return rows


def _busiest(net: Any, text: _language.Text) -> list[list[int]]:
    """Per layer the two experts that the text loads most."""
    with torch.no_grad(), gk.huggingface.watch_routers(net) as watches:
        ids_BT = _language.windows(text.train_N, _language.BATCH, seed=11)
        net(input_ids=ids_BT, output_router_logits=False)
    return [watch.load_E.topk(2).indices.tolist() for watch in watches.values()]


def _train(
    net: Any,
    optimizer: gk.optim.MaskedAdamW,
    text: _language.Text,
    steps: int,
    folder: Path,
    horizon: int | None = None,
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
        horizon=horizon,
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
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--horizon", type=int, help="of the learning rate; --steps of it are run")
    parser.add_argument("--second-steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=1200, help="test windows, at most")
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=_PARTS, help="only this one")
    parser.add_argument("--quick", action="store_true", help="4 steps, nothing is saved")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.steps, options.second_steps, options.windows = 4, 2, 4
        with tempfile.TemporaryDirectory() as folder:
            _measure(options, Path(folder))
        return 0
    found = _measure(options, options.folder)
    if options.part is not None:
        return 0
    command = " ".join(["python -m benchmarks language", *argv])
    print(_record.save("language", command, options.threads, found))
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    keep = keep_in(folder / "rows")
    text = _language.python_library()
    second = _language.cpp_headers(_HEADER_BYTES)
    test_BT = _language.spread(text.test_N, options.windows)
    validation_BT = _language.spread(text.validation_N, options.windows // 2)
    net = _language.model(seed=0)
    swapped = gk.huggingface.replace_moe_layers(net, router={})
    steps_of, base = _optimizer(net.parameters()), folder / "base"
    seconds = _train(net, steps_of, text, options.steps, base, options.horizon)
    net.eval()
    swapped.restore()
    at: dict[str, Any] = {"steps": options.second_steps, "folder": folder, "keep": keep}
    if options.part == "validation":
        curve(net, validation_BT, options.part, keep)
    parts: dict[str, Callable[[], list[Row]]] = {
        "adaptive": lambda: adaptive_rows(net, validation_BT, test_BT, keep),
        "weights": lambda: weights_rows(net, test_BT, keep),
        "second": lambda: second_domain(net, test_BT, second, **at),  # last: it changes the model
    }
    rows = {part: make() for part, make in parts.items() if options.part in (None, part)}
    return {
        "steps": options.steps,
        "horizon": options.horizon,
        "second_steps": options.second_steps,
        "train_bytes": options.steps * _language.BATCH * _language.LENGTH,
        "train_cpu_seconds": seconds,
        "train_files": text.train_files,
        "validation_files": text.validation_files,
        "validation_bytes": validation_BT.numel(),
        "test_files": text.test_files,
        "test_bytes": test_BT.numel(),
        **rows,
    }
