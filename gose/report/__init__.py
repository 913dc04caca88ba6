"""report.html and report.md of a run: one file each, nothing fetched, no package beyond the core.

contents: what is said. svg: its figures. render: how it is shown.
"""

from gose.report.contents import Figure, Part, Report, Table, read
from gose.report.render import html, markdown, write

__all__ = ["Figure", "Part", "Report", "Table", "html", "markdown", "read", "write"]
