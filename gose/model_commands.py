"""`gose calibrate`, `gose inspect` and `gose quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gose import adaptive, checkpoint, inspection, language, shrink

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder of transformers.")]
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
Windows = Annotated[int, typer.Option(help="At most so many windows of the text are read.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def calibrate(
    model: Model,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A file to measure on.")],
    saving: Annotated[
        float, typer.Option(help="Share of the experts' FLOPs to save, between 0 and 1.")
    ] = 0.33,
    length: Length = 256,
    windows: Windows = 32,
    as_json: AsJson = False,
) -> None:
    """The adaptive_k that saves a share of the experts' FLOPs, and the perplexity it costs."""
    net, ids_BT = _read(model, text, length, windows)
    found = adaptive.calibrate(net, ids_BT, saving)
    chosen, full = found.chosen, found.full
    if as_json:
        _print_json(
            {
                "adaptive_k": chosen.mass,
                "tokens": ids_BT.numel(),
                "chosen": chosen._asdict(),
                "full": full._asdict(),
                "tried": [point._asdict() for point in found.tried],
            }
        )
        return
    table = Table("", "adaptive_k", "saving", "expert FLOPs a token", "perplexity", box=None)
    for point in (full, *reversed(found.tried)):
        mark = "all" if point is full else "chosen" if point == chosen else ""
        mass = "" if point is full else f"{point.mass:.6g}"
        flops = f"{point.expert_flops_per_token:,.0f}"
        table.add_row(mark, mass, f"{point.saving:.1%}", flops, f"{point.perplexity:.4f}")
    _console().print(table)
    rise = chosen.perplexity / full.perplexity - 1
    typer.echo(
        f"replace_moe_layers(model, adaptive_k={chosen.mass:.6g}) saves {chosen.saving:.1%} of the "
        f"experts' FLOPs; perplexity {full.perplexity:.4f} -> {chosen.perplexity:.4f} "
        f"({rise:+.2%}) on {ids_BT.numel()} tokens"
    )


def inspect(
    model: Model,
    text: Annotated[Path, typer.Option(help="A file that the model reads.")],
    out: Annotated[Path | None, typer.Option(help="An SVG file for the picture.")] = None,
    length: Length = 256,
    windows: Windows = 32,
    as_json: AsJson = False,
) -> None:
    """What every router does with a text: load, entropy, drops, dead experts; --out: a picture."""
    net, ids_BT = _read(model, text, length, windows)
    found = inspection.inspect(net, ids_BT)
    if out is not None:
        checkpoint.write_file(out, inspection.picture(found).encode())
    if as_json:
        _print_json({"rows": [row._asdict() for row in found.rows], "share": found.share_E})
        return
    columns = ("router", "tokens", "busiest / mean", "entropy", "experts a token", "dropped")
    table = Table(*columns, "dead", box=None)
    for row in found.rows:
        dead = f"{len(row.dead)} of {row.experts}" + (f": {_ids(row.dead)}" if row.dead else "")
        figures = (f"{row.busiest:.2f}", f"{row.entropy:.3f}", f"{row.used_k:.2f}")
        table.add_row(row.name, str(row.tokens), *figures, f"{row.drop_rate:.1%}", dead)
    _console().print(table)
    if out is not None:
        typer.echo(f"picture: {out}")


def quantize(
    model: Model,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A new folder; not with --plan.")
    ] = None,
    weights: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, from the headers alone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A copy of a model whose expert weights are int8 or int4, and the error of every layer."""
    if plan == (out is not None):
        raise ValueError("quantize: wants either OUT or --plan")
    rows = shrink.plan(model, weights)
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    chosen = [row for row in rows if row.quantized]
    report: dict[str, Any] = {"bytes_before": before, "bytes_after": after}
    report |= {"tensors": len(rows), "quantized": len(chosen)}
    if out is not None:
        size_of = {row.name: row.bytes_before for row in rows}
        layers: dict[str, list[tuple[float, int]]] = {}
        for entry in shrink.quantize(model, out, weights):
            layer = entry.name.split(".experts.")[0]
            layers.setdefault(layer, []).append((entry.error, size_of[entry.name]))
        report["layers"] = {
            name: {
                "mean_error": sum(e * n for e, n in found) / sum(n for _, n in found),
                "largest_error": max(e for e, _ in found),
            }
            for name, found in layers.items()
        }
    if as_json:
        _print_json(report)
        return
    if out is not None:
        table = Table("layer", "mean error", "largest error", box=None)
        for name, errors in report["layers"].items():
            figures = (errors["mean_error"], errors["largest_error"])
            table.add_row(name, *(f"{error:.2e}" for error in figures))
        _console().print(table)
    typer.echo(
        f"{len(chosen)} of {len(rows)} tensors to {weights}: {before:,} -> {after:,} bytes "
        f"({before / after:.2f}x smaller)"
    )


def _read(model: Path, text: Path, length: int, windows: int) -> tuple[Any, Any]:
    net = language.load(model)
    return net, language.windows(model, net, text, length=length, most=windows)


def _ids(dead: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, dead[:8]))
    return shown + (", ..." if len(dead) > 8 else "")


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))


def _console() -> Console:
    """As wide as the terminal, and wide enough where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
