"""`make gpu` without a GPU: the same commands on the CPU kernels, in a process that imports torch,
triton, numpy and pytest alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu_model
from tests.gpu.ops import every_case
from tests.gpu.params import ROOT

# What a machine with a GPU need not have.
ABSENT = ("hypothesis", "pydantic", "safetensors", "typer", "rich", "sklearn", "mlxtend", "scipy")

_BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(name + " is not installed here", name=name)
sys.meta_path.insert(0, Absent())
"""


def _run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(_BLOCK.format(names=set(ABSENT)))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **plugins, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_tests_of_the_device(tmp_path: Path) -> None:
    command = "pytest -q -c tests/gpu/device.ini tests/gpu/test_device.py -m gpu --device cpu"
    done = _run(tmp_path, *command.split())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{len(every_case())} passed" in done.stdout


def test_benchmark_of_the_device(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = _run(tmp_path, *f"benchmarks gpu --device cpu --quick --out {out}".split())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["dry_run"] is True
    shapes = [s for s, shape in gpu_model.SHAPES.items() if shape.T <= 256]
    assert len(result["rows"]) == len(gpu_model.ARGUMENTS) * len(shapes)
    for row in result["rows"]:
        assert row["backend"] == "cpu"
        seconds = row["microseconds"] / 1e6
        assert (
            row["gigabytes_per_second"] * seconds * 1e9 == row["bytes"]
            or abs(row["gigabytes_per_second"] * seconds * 1e9 / row["bytes"] - 1) < 1e-9
        )
