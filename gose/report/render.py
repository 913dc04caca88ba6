"""A report as one HTML file and as Markdown."""

from __future__ import annotations

from html import escape
from pathlib import Path

from gose import checkpoint
from gose.report import svg
from gose.report.contents import Figure, Part, Report, Table, read

_STYLE = (
    svg.STYLE
    + """
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1080px; background: var(--surface);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 2px; }
p { margin: 2px 0 12px; color: var(--muted); max-width: 75ch; }
figure { margin: 20px 0 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; max-width: 100ch; }
.images { display: flex; flex-wrap: wrap; gap: 20px 28px; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--grid); }
td.number { white-space: nowrap; }
tbody tr + tr td { border-top: 1px solid var(--grid); }
.good { color: var(--good); white-space: nowrap; }
.bad { color: var(--bad); white-space: nowrap; font-weight: 600; }
details { margin: 8px 0; font-size: 14px; }
summary { cursor: pointer; color: var(--muted); }
pre { overflow-x: auto; background: var(--stripe); padding: 12px; font-size: 13px; }
"""
)


def write(path: Path) -> tuple[Path, Path]:
    """Paths of report.html and report.md, written for the run in `path` as far as it has come."""
    report = read(path)
    written = path / "report.html", path / "report.md"
    for target, text in zip(written, (html(report), markdown(report)), strict=True):
        checkpoint.write_file(target, text.encode())
    return written


def html(report: Report) -> str:
    """One page that needs nothing else: style and figures inside, no script, no address."""
    parts = "\n".join(_html_part(part) for part in report.parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(report.title)}</h1>\n<p>{escape(report.standing)}</p>\n{parts}\n"
        "<h2>Config</h2>\n<details><summary>config.toml</summary>"
        f"<pre>{escape(report.config)}</pre></details>\n</body>\n</html>\n"
    )


def markdown(report: Report) -> str:
    """The same parts as Markdown; a figure is given by its numbers."""
    blocks = [f"# {_plain_line(report.title)}", _plain_line(report.standing)]
    for part in report.parts:
        blocks += [f"## {part.title}", part.text]
        for block in part.blocks:
            if isinstance(block, Table):
                blocks.append(_markdown_table(block))
            elif block.numbers is not None:
                blocks += [f"**{_plain_line(block.title)}**", _markdown_table(block.numbers)]
    return "\n\n".join([*blocks, "## Config", f"```toml\n{report.config}```"]) + "\n"


def _html_part(part: Part) -> str:
    blocks = "\n".join(
        _html_table(block) if isinstance(block, Table) else _html_figure(block)
        for block in part.blocks
    )
    head = f"<h2>{escape(part.title)}</h2>\n<p>{escape(part.text)}</p>"
    return f"<section>\n{head}\n{blocks}\n</section>"


def _html_figure(figure: Figure) -> str:
    numbers = ""
    if figure.numbers is not None:
        table = _html_table(figure.numbers)
        numbers = f"<details><summary>numbers</summary>{table}</details>"
    return (
        f"<figure><figcaption>{escape(figure.title)}</figcaption>"
        f'<div class="images">{"".join(figure.images)}</div>{numbers}</figure>'
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "\n".join(
        "<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _html_cell(cell: str) -> str:
    if cell.startswith(("✓", "✗")):
        return f'<td class="{"good" if cell[0] == "✓" else "bad"}">{escape(cell)}</td>'
    number = ' class="number"' if cell[:1] in "<>–-+.0123456789" and len(cell) < 24 else ""
    return f"<td{number}>{escape(cell)}</td>"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_plain_line(cell) for cell in line) + " |" for line in lines)


def _plain_line(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
