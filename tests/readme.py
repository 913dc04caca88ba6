"""The generated blocks of README.md: `python -m tests.readme` writes them, test_readme compares."""

from __future__ import annotations

import re
from pathlib import Path

import gose_kernels as gk
from gose_kernels.registry import BACKENDS

README = Path(__file__).parent.parent / "README.md"


def ops_table() -> str:
    """Ops by backends: a dot where a kernel is written, else the cell is empty."""
    lines = [
        "| op | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |",
        "|---|" + ":-:|" * len(BACKENDS),
    ]
    for name in sorted(n for n in gk.OPS if not n.startswith("test_")):
        written = {b.name for b in gk.OPS[name].backends}
        cells = " | ".join("●" if b in written else " " for b in BACKENDS)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


BLOCKS = {"ops": ops_table}


def filled(text: str) -> str:
    """README's text with every generated block made anew."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"README.md must have one block <!-- {name}: --> ... <!-- /{name} -->")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
