"""The command line. Nothing but it, `data.commands` and `model_commands` prints."""

from __future__ import annotations

import difflib
import functools
import json
import shlex
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table as Grid

import gose
import gose_kernels as gk
from gose import config, model_commands, rundir, system
from gose import doctor as machine
from gose import report as reports
from gose.data import DataError, TaskSpec
from gose.data import commands as data_commands
from gose.data.sources import locate
from gose.recipes import RECIPES
from gose.report.text import quantity
from gose.rundir import Progress, RunDir

app = typer.Typer(
    help="Graph of specialized experts: recycle retired models, route by entropy, merge sites.",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_commands.app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
_LINE_SECONDS = 5.0  # between progress lines where there is no terminal to draw a bar on


class _Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Entry point of `gose` and of `python -m gose`."""
    app(prog_name="gose")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(gose.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    recipe: Annotated[
        str | None, typer.Argument(help=f"{', '.join(RECIPES)}, or a config as a .toml file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new directory; without it runs/RECIPE-<n>.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe and write its report. Stopped at any moment, it can be resumed."""
    with ExitStack() as stack:
        stack.enter_context(_signals_stop())
        with _bad_input_exits_2():
            if resume is None:
                chosen = config.override(_config_of(recipe), settings or [])
                _refuse_missing_data(chosen)
                opened = rundir.create(out or _free(recipe), chosen)
            elif recipe or settings or out:
                raise ValueError("--resume takes no RECIPE, --set or --out: a run keeps its config")
            else:
                opened = rundir.resume(resume)
            directory = stack.enter_context(opened)
        _work(directory)
    path = directory.path
    if as_json:
        rows = rundir.read_rows(path / rundir.METRICS)
        files = {"run": path, "report_html": path / "report.html", "report_md": path / "report.md"}
        kinds = {kind: [r for r in rows if r.get("kind") == kind] for kind in ("claim", "summary")}
        _print_json({name: str(file) for name, file in files.items()} | kinds)
    else:
        _print_claims(reports.read(path).parts)
        typer.echo(f"report: {path / 'report.html'}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    write: Annotated[
        bool, typer.Option("--report", help="Write report.html and report.md again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a run has found so far."""
    with _bad_input_exits_2():
        found = reports.read(path)
        done, total = rundir.status(path)
        rows = rundir.read_rows(path / rundir.METRICS)
        environment = rundir.read_environment(path)
        if write:
            reports.write(path)
    html = path / "report.html"
    if as_json:
        kinds = dict.fromkeys(str(row.get("kind")) for row in rows)
        _print_json(
            {
                "run": str(path),
                "units_done": done,
                "units_total": total,
                "report_html": str(html) if html.exists() else None,
                "environment": environment,
                "rows": {kind: [row for row in rows if row.get("kind") == kind] for kind in kinds},
            }
        )
        return
    typer.echo(f"{found.title}: {found.standing}")
    _print_claims(found.parts)
    _print_tables(part for part in found.parts if part.title != "Claims")
    if html.exists():
        typer.echo(f"report: {html}")
    if not 0 < total == done:
        typer.echo(f"go on with: gose run --resume {shlex.quote(str(path))}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What will run on this machine, what will not, and what to do; exit 1 if that is broken."""
    checks = machine.examine()
    healthy = all(check.state != "broken" for check in checks)
    if as_json:
        _print_json({"ok": healthy, "checks": [check._asdict() for check in checks]})
    else:
        colors = {"ok": "green", "absent": "yellow", "broken": "red"}
        for check in checks:
            typer.secho(f"{check.state:<8}", fg=colors[check.state], nl=False)
            typer.echo(f"{check.name:<19}{check.found}")
            if check.advice:
                typer.echo(f"{'':<27}-> {check.advice}")
    raise typer.Exit(0 if healthy else 1)


@app.command()
def explain(
    op: Annotated[str | None, typer.Argument(help="Name of an op; without it all ops.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], typer.Option()
    ] = "float32",
    cc: Annotated[
        int | None,
        typer.Option(help="Compute capability, such as 90: also what a layer launches there."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="With --cc: T.")] = 4096,
    experts: Annotated[int, typer.Option(help="With --cc: E.")] = 64,
    top_k: Annotated[int, typer.Option(help="With --cc: K.")] = 8,
    width: Annotated[int, typer.Option(help="With --cc: D.")] = 2048,
    hidden: Annotated[int, typer.Option(help="With --cc: F.")] = 1024,
    activation: Annotated[str, typer.Option(help="With --cc.")] = "swiglu",
    as_json: AsJson = False,
) -> None:
    """Which backend of an op runs for a device and dtype, and why the others do not.

    With --device cuda --cc 90: which kernels, tiles and launches an expert layer takes there.
    """
    sizes: dict[str, Any] = dict(zip("TEKDF", (tokens, experts, top_k, width, hidden), strict=True))
    with _bad_input_exits_2():
        if cc is not None and (op is None or device != "cuda"):
            raise ValueError("explain: --cc wants an op and --device cuda")
        if op is not None and op not in gk.OPS:
            raise ValueError(f"explain: no op named {op!r}{_nearest(op, gk.OPS)}; ops: {_ops()}")
        names = [op] if op is not None else [n for n in gk.OPS if gk.OPS[n].example is not None]
        rows = {
            name: gk.explain(name, device=device, dtype=getattr(torch, dtype)) for name in names
        }
        plan = None
        if cc is not None and op is not None:
            own = {"dtype": getattr(torch, dtype), "activation": activation, "cc": cc}
            try:
                plan = gk.gpu_plan(op, **sizes | own)
            except RuntimeError as error:  # no triton
                raise ValueError(str(error)) from None
    if as_json:
        document: dict[str, Any] = {n: [row._asdict() for row in r] for n, r in rows.items()}
        if plan is not None:
            launches = [launch._asdict() for launch in plan.launches]
            document["plan"] = {**sizes, **plan._asdict(), "launches": launches}
        _print_json(document)
        return
    grid = Grid("op", "backend", "", "kernel, or why not", box=None, pad_edge=False)
    for name, found in rows.items():
        for row in found:
            verdict = "[green]picked[/]" if row.chosen else "" if row.reason else "able"
            grid.add_row(name, row.backend, verdict, escape(row.reason or row.path or ""))
            name = ""  # once per op is enough
    _stdout().print(grid)
    if device == "cuda" and not torch.cuda.is_available():
        typer.echo("No CUDA device is visible here: this is what tensors on one would meet.")
    if plan is not None:
        shape = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        _print_plan(plan, f"{shape}, {dtype}")


@app.command()
@functools.wraps(model_commands.calibrate)
def calibrate(**options: Any) -> None:
    with _bad_input_exits_2():
        model_commands.calibrate(**options)


@app.command()
@functools.wraps(model_commands.inspect)
def inspect(**options: Any) -> None:
    with _bad_input_exits_2():
        model_commands.inspect(**options)


@app.command()
@functools.wraps(model_commands.quantize)
def quantize(**options: Any) -> None:
    with _bad_input_exits_2():
        model_commands.quantize(**options)


def _config_of(recipe: str | None) -> config.SystemConfig:
    if recipe is None:
        raise ValueError(
            f"run: wanted a recipe ({', '.join(RECIPES)}), a .toml file or --resume DIR"
        )
    if recipe in RECIPES:
        return RECIPES[recipe]()
    if recipe.endswith(".toml") or Path(recipe).is_file():
        return config.load(Path(recipe))
    known = ", ".join(RECIPES)
    raise ValueError(
        f"run: no recipe named {recipe!r}{_nearest(recipe, RECIPES)}; recipes: {known}; "
        "a config file ends in .toml"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _ops() -> str:
    return ", ".join(sorted(gk.OPS))


def _refuse_missing_data(chosen: config.SystemConfig) -> None:
    """Raise DataError before a run directory is made, if a set of the stream is not here."""
    for task in chosen.data.tasks:
        locate(TaskSpec.parse(task).source, root=chosen.data.root)


def _free(recipe: str | None) -> Path:
    stem = Path(recipe or "run").stem
    number = 1
    while (path := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return path


def _work(directory: RunDir) -> None:
    """What is left of the run, and its report; stopped or failed, the way to go on is told."""
    again = f"gose run --resume {shlex.quote(str(directory.path))}"
    try:
        _draw(_units(directory), directory)
        reports.write(directory.path)
    except _Stopped as stopped:
        _tell(f"stopped after {directory.step} units; go on with: {again}")
        raise typer.Exit(128 + stopped.number) from None
    except Exception:
        _tell(f"failed after {directory.step} units; try again with: {again}")
        raise


def _units(directory: RunDir) -> Iterator[Progress]:
    """The units that are left; what the user can mend at the first one exits with 2."""
    units = system.run(directory.config, directory)
    with _bad_input_exits_2():
        first = next(units, None)
    if first is not None:
        yield first
        yield from units


def _draw(units: Iterator[Progress], directory: RunDir) -> None:
    """Progress on stderr: a bar on a terminal, else a line every few seconds."""
    console = Console(stderr=True, highlight=False)
    for note in directory.notes:
        _tell(note)
    what = f"going on after unit {directory.step}" if directory.step else "starting"
    if not console.is_terminal:
        _tell(f"{what}: {directory.path}")
        next_line = 0.0
        for unit in units:
            if time.monotonic() >= next_line or unit.done == unit.total:
                _tell(f"{unit.done}/{unit.total}  {unit.phase}  {unit.label}  {_rate(unit)}")
                next_line = time.monotonic() + _LINE_SECONDS
        return
    columns = (
        TextColumn("{task.completed:.0f}/{task.total}", style="bold"),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(f"{what}: {directory.path}", total=None, completed=directory.step)
        for unit in units:
            text = f"{unit.phase}  {unit.label}  {_rate(unit)}"
            bar.update(task, completed=unit.done, total=unit.total, description=text)


def _rate(unit: Progress) -> str:
    if unit.seconds <= 0 or unit.amount <= 0:
        return ""
    return f"{quantity(unit.amount / unit.seconds)} {unit.unit}/s"


def _print_claims(parts: Iterable[reports.Part]) -> None:
    """A line per claim; what is said beside it stands in the report."""
    blocks = [block for part in parts if part.title == "Claims" for block in part.blocks]
    for table in blocks:
        assert isinstance(table, reports.Table)
        for name, wanted, value, verdict, *_ in table.rows:
            typer.secho(verdict[0], fg="green" if verdict[0] == "✓" else "red", nl=False)
            typer.echo(f" {name}: {value} (wanted {wanted})")


def _print_plan(plan: gk.Plan, call: str) -> None:
    """The GEMMs with their tiles; programs that the groups' sizes leave over end at once."""
    major, minor = divmod(plan.cc, 10)
    typer.echo(
        f"\nCompute capability {major}.{minor}, {call}: chosen by closed forms, not measured."
    )
    typer.echo(f"CUDA C++ kernels: {plan.code}. Triton compiles its own at the first call.")
    columns = ("phase", "kernel", "launches", "programs", "tile", "warps", "stages", "KB", "with")
    grid = Grid(*columns, box=None, pad_edge=False)
    for one in plan.launches:
        programs = "" if one.programs is None else str(one.programs)
        cells = [one.phase, one.kernel, str(one.launches), programs]
        if one.rows:
            kb = "" if one.shared_kb is None else f"{one.shared_kb:g}"
            kb += "" if one.fits else " (too many)"
            tile = f"{one.rows} x {one.columns} x {one.depth}"
            cells += [tile, str(one.warps), str(one.stages), kb, one.instruction]
        grid.add_row(*cells)
    _stdout().print(grid)
    totals = (
        f"{sum(one.launches for one in plan.launches if one.phase == phase)} {phase}"
        for phase in ("forward", "backward")
    )
    scored = any(one.kernel == "score" for one in plan.launches)
    note = "; where gradients are needed torch multiplies by the router" if scored else ""
    typer.echo(f"Launches: {', '.join(totals)}{note}.")


def _print_tables(parts: Iterable[reports.Part]) -> None:
    console = _stdout()
    for part in parts:
        tables = [block for block in part.blocks if isinstance(block, reports.Table)]
        if tables:
            console.print(f"\n[bold]{escape(part.title)}[/]")
        for table in tables:
            grid = Grid(box=None, pad_edge=False)
            for column in table.columns:
                grid.add_column(escape(column), overflow="fold")
            for row in table.rows:
                grid.add_row(*(escape(cell) for cell in row))
            console.print(grid)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))


def _stdout() -> Console:
    """For tables: as wide as the terminal, and wide enough where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _tell(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _bad_input_exits_2() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, DataError, OSError) as error:
        _tell(f"error: {error}")
        raise typer.Exit(2) from None


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Ctrl-C and a polite kill raise _Stopped inside the block; past it, they are the exit code."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise _Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped as stopped:  # before the first unit, or while the report was written
        raise typer.Exit(128 + stopped.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
