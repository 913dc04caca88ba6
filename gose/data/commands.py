"""`gose data list|fetch|check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gose.data.fetch import fetch
from gose.data.sources import SOURCES, DataError, check, locate, source_of

app = typer.Typer(help="Sets of real images: where they are, and how to get them.")

Root = Annotated[
    Path | None, typer.Option(help="A folder of yours that is searched before the usual places.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("list")
def list_sets(root: Root = None, as_json: AsJson = False) -> None:
    """Every set that gose can read, and whether it is on this machine."""
    rows = []
    for name, source in SOURCES.items():
        state, where, problem = _state(name, root, verify=False)
        rows.append(
            {
                "name": name,
                "title": source.title,
                "images": source.num_images,
                "classes": source.num_classes,
                "licence": source.licence,
                "where": where,
                "state": state,
                "problem": problem,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = ("name", "images", "classes", "licence", "where", "state")
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    for row in rows:
        if row["problem"]:
            typer.echo(row["problem"])


@app.command("fetch")
def fetch_set(
    name: Annotated[str, typer.Argument(help="The set, as in `gose data list`.")],
    to: Annotated[Path, typer.Option(help="The folder that gets the files.")],
    as_json: AsJson = False,
) -> None:
    """Bring a set into a folder, checked; nothing is downloaded if it is there."""
    with _exit_2(), Console(stderr=True).status(f"fetching {name} ..."):
        paths = [str(path) for path in fetch(name, to)]
    if as_json:
        typer.echo(json.dumps({"name": name, "files": paths}, indent=2))
        return
    for path in paths:
        typer.echo(path)


@app.command("check")
def check_sets(
    names: Annotated[list[str] | None, typer.Argument(help="Sets; none: all of them.")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file with its pinned sha256; exit 2 for damage or a missing named set."""
    with _exit_2():
        for name in names or ():
            source_of(name)
    rows = []
    for name in names or SOURCES:
        state, where, problem = _state(name, root, verify=True)
        rows.append({"name": name, "state": state, "where": where, "problem": problem})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            typer.echo(f"{row['name']:<14} {row['state']:<8} {row['problem'] or row['where']}")
    if any(row["state"] == "damaged" or (names and row["state"] == "missing") for row in rows):
        raise typer.Exit(2)


def _state(name: str, root: Path | None, *, verify: bool) -> tuple[str, str, str]:
    """(state, folder, problem) of a set; state: ok (verified), found (not), missing, damaged."""
    try:
        paths = [path for path, _ in locate(name, root=root)]
    except DataError as error:
        return "missing", "", str(error)
    where = str(paths[0].parent)
    if not verify:
        return "found", where, ""
    try:
        check(name, root=root)
    except DataError as error:
        return "damaged", where, str(error)
    return "ok", where, ""


@contextmanager
def _exit_2() -> Iterator[None]:
    try:
        yield
    except (DataError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
