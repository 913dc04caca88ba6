"""Imports point left: csrc -> gose_kernels -> gose -> benchmarks, tests; and each package imports
only the third-party packages it may."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Left to right; modules of one layer may use each other.
LAYERS = [
    ["gose_kernels.native", "gose_kernels.quantized"],
    ["gose_kernels.backends"],
    ["gose_kernels.registry"],
    [
        "gose_kernels.profiling",
        "gose_kernels.philox",
        "gose_kernels.masks",
        "gose_kernels.repeats",
        "gose_kernels.packing",
        "gose_kernels.memory",
    ],
    ["gose_kernels.shards"],
    ["gose_kernels.triton"],
    ["gose_kernels.ops"],
    ["gose_kernels.optim", "gose_kernels.moe", "gose_kernels.tuning", "gose_kernels.gpu_plan"],
    ["gose_kernels.huggingface"],
    ["gose_kernels.living"],
    ["gose_kernels"],
    ["gose"],
    ["benchmarks"],
    ["tests"],
]

# Third-party packages a package may import at module level, and inside functions.
THIRD_PARTY = {
    "gose_kernels.triton": ({"torch", "triton"}, set()),
    "gose_kernels": ({"torch"}, {"nvtx", "triton", "transformers"}),
    "gose_kernels.living": ({"torch"}, {"safetensors"}),
    "gose": (
        {"torch", "numpy", "safetensors", "pydantic", "typer", "rich"},
        {"matplotlib", "jinja2"},
    ),
    "gose.language": ({"torch"}, {"transformers"}),
}


def layer_of(module: str) -> int:
    known = [(name, i) for i, layer in enumerate(LAYERS) for name in layer]
    matches = [(len(name), i) for name, i in known if (module + ".").startswith(name + ".")]
    assert matches, f"{module} stands in no layer"
    return max(matches)[1]


def _module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module, at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                # "from gose_kernels import native" imports a module when there is one.
                submodule = f"{node.module}.{alias.name}"
                file = ROOT.joinpath(*submodule.split("."))
                exists = file.is_dir() or file.with_suffix(".py").exists()
                yield node.lineno, submodule if exists else node.module, node not in inner


def violations(packages: tuple[str, ...] = ("gose_kernels", "gose", "benchmarks")) -> Iterator[str]:
    ours = {"gose_kernels", "gose", "benchmarks", "tests"}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = _module_of(path)
            for line, imported, top in _imports(path):
                root = imported.split(".")[0]
                where = f"{path.relative_to(ROOT)}:{line}: {module} may not import {imported}"
                if root in ours:
                    if layer_of(imported) > layer_of(module):
                        yield where
                    if root == "gose_kernels" and package == "gose" and imported != root:
                        yield f"{where}: gose uses `import gose_kernels as gk`"
                elif root not in sys.stdlib_module_names:
                    rules = [r for r in THIRD_PARTY if (module + ".").startswith(r + ".")]
                    if not rules:
                        continue
                    at_top, inside = THIRD_PARTY[max(rules, key=len)]
                    if root not in at_top and (top or root not in inside):
                        yield where


def test_imports_only_point_left() -> None:
    assert not list(violations())


def test_kernel_sources_know_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"} and not path.name.startswith("bind"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not line.startswith("#include <torch"), f"{path.name}:{number}: {line}"


def test_import_of_kernels_needs_torch_alone() -> None:
    """`import gose_kernels` leaves the optional packages unloaded."""
    code = (
        "import sys, torch; before = set(sys.modules); import gose_kernels;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'gose_kernels', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"triton", "nvtx", "transformers", "pydantic", "gose"}
