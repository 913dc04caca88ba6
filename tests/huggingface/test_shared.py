"""transformers' shared model tests, from its source distribution, with gose as the default."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

_HERE = Path(__file__).parent / "shared"
# Files that the mixins import and the distribution leaves out.
_STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def _unpack(folder: Path) -> Path:
    """tests/ of the installed version, as a package that can be run."""
    wanted = f"transformers=={transformers.__version__}"
    flags = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *flags, "-d", str(folder), wanted],
        check=True,
    )
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = folder / "tests"
    shutil.move(next(folder.glob("transformers-*/tests")), tests)
    for name, text in _STUBS.items():
        (tests / name).parent.mkdir()
        (tests / name).write_text(text)
        (tests / name).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    shutil.copy(_HERE / "tiny_models.py", tests / "test_tiny_models.py")
    return folder


def _outcomes(folder: Path, implementation: str) -> dict[str, str]:
    """Test -> PASSED | FAILED | SKIPPED | ..."""
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "GOSE_EXPERTS": implementation,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, str(folder)]),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "ignore"),
            *("--timeout=0", "tests/test_tiny_models.py"),
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^\S+::(\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR)", done.stdout, re.MULTILINE)
    assert len(lines) > 500, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(lines)


@pytest.mark.timeout(3000)
def test_shared_model_tests_do_as_with_the_default(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Five families; the same tests pass and the same are skipped. With --whole: it downloads
    transformers' source distribution from the package index."""
    if not pytestconfig.getoption("--whole"):
        return
    folder = _unpack(tmp_path)
    stock, ours = _outcomes(folder, "grouped_mm"), _outcomes(folder, "gose")
    assert ours.keys() == stock.keys()
    different = {name: (stock[name], ours[name]) for name in ours if ours[name] != stock[name]}
    assert not different
    assert not [name for name, outcome in ours.items() if outcome not in ("PASSED", "SKIPPED")]
