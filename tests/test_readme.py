"""What README.md says is so: generated tables, the tree, the examples, the two commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import readme

ROOT = readme.README.parent
TEXT = readme.README.read_text()


def test_generated_blocks_are_fresh() -> None:
    """In a process of its own: other tests register ops."""
    code = "from tests import readme; t = readme.README.read_text(); assert readme.filled(t) == t"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tree_lists_what_is_there() -> None:
    """Every path of the tree exists, and every module and op source stands in it."""
    block = re.search(r"## The tree\n+```\n(.*?)```", TEXT, flags=re.DOTALL)
    assert block is not None
    listed: set[str] = set()
    folder = ""
    for line in block[1].splitlines():
        paths, _, _ = line.partition("  #")
        if not line.startswith(" "):
            folder = ""
        for path in paths.split():
            full = folder + path
            assert (ROOT / full).exists(), f"README's tree names {full}, which is not there"
            listed.add(full.rstrip("/"))
            if path.endswith("/") and not line.startswith(" "):
                folder = path
    folders = [p for p in listed if (ROOT / p).is_dir()]
    for package in ("gose", "gose_kernels"):
        for file in sorted((ROOT / package).glob("*")):
            name = str(file.relative_to(ROOT))
            if file.name.startswith(("__pycache__", "__init__", "libgose", "py.typed")):
                continue
            assert name in listed or name in folders, f"README's tree misses {name}"


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(_examples())))
def test_python_example_runs(index: int, tmp_path: Path) -> None:
    code = _examples()[index]
    assert len(code.strip().splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("run", "test", "test-all"):
        assert f"`make {target}`" in TEXT or f"make {target}\n" in TEXT
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_every_file_that_readme_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).exists(), target


def test_the_repository_speaks_of_the_product_alone() -> None:
    """No machine paths and no words of a workplace in what is shipped."""
    # Written in pieces, so that this file does not match itself.
    banned = re.compile("|".join(["/wo" + "rk/", r"\.\./sha" + "red", r"\bTO" + r"DO\b"]))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".toml", ".txt"}:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not banned.search(line), f"{name}:{number}: {line.strip()}"
