from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from gose.data import DataError, load
from gose.data.fetch import fetch
from gose.data.sources import SOURCES
from tests.gose.data.sets import idx_contents, small_fashion_mnist

SHELL = shutil.which("sh")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose apt-get and dpkg-deb are scripts: the package holds a small fashion-mnist."""
    contents, *_ = idx_contents(num_train=7, num_test=3)
    package = tmp_path / "package"
    source = small_fashion_mnist(package, contents, num_test=3)
    monkeypatch.setitem(SOURCES, "fashion-mnist", source._replace(home="/usr/share/small-fashion"))
    (tmp_path / "bin").mkdir()
    for tool in ("cp", "mkdir", "sleep"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script(tmp_path, "apt-get", 'echo package > "small_1.deb"')
    unpack = f'mkdir -p "$3/usr/share/small-fashion"; cp {package}/* "$3/usr/share/small-fashion"'
    script(tmp_path, "dpkg-deb", unpack)
    return tmp_path


def script(machine, name: str, body: str) -> None:
    path = machine / "bin" / name
    path.write_text(f'#!{SHELL}\necho "{name} $@" >> {machine}/log\n{body}\n')
    path.chmod(0o755)


def commands(machine) -> list[str]:
    return (machine / "log").read_text().splitlines()


def test_the_files_arrive_whole_and_readable(machine):
    paths = fetch("fashion-mnist", machine / "new" / "sets")
    assert sorted(path.name for path in paths) == sorted(os.listdir(machine / "new" / "sets"))
    fetched, original = (
        load("fashion-mnist", root=root) for root in (machine / "new" / "sets", machine / "package")
    )
    assert torch.equal(fetched.x_BD, original.x_BD)
    assert commands(machine)[0] == "apt-get download dataset-fashion-mnist"


def test_what_is_there_is_checked_and_not_fetched_again(machine):
    fetch("fashion-mnist", machine / "sets")
    ran = len(commands(machine))
    [first, *_] = fetch("fashion-mnist", machine / "sets")
    assert len(commands(machine)) == ran
    first.write_bytes(b"")
    with pytest.raises(DataError, match=r"'fashion-mnist' is damaged: .*train-images"):
        fetch("fashion-mnist", machine / "sets")


def test_a_relative_folder_is_that_of_the_caller(machine, monkeypatch):
    monkeypatch.chdir(machine)
    script(machine, "apt-get", '[ "$1" = download ] && exit 100; echo package > small_1.deb')
    [first, *_] = fetch("fashion-mnist", Path("sets"))
    assert (machine / "sets" / first.name).is_file()


def test_without_package_lists_private_ones_are_made(machine):
    script(
        machine,
        "apt-get",
        '[ "$1" = download ] && exit 100\n'
        '[ "$5" = update ] && [ -d lists/partial ] && [ -d cache/archives/partial ] && exit 0\n'
        '[ "$5" = download ] && echo package > "small_1.deb"',
    )
    fetch("fashion-mnist", machine / "sets")
    first, update, download, *_ = commands(machine)
    assert first == "apt-get download dataset-fashion-mnist"
    private = "-o Dir::State::Lists=.*/lists -o Dir::Cache=.*/cache"
    assert re.fullmatch(f"apt-get {private} update", update)
    assert re.fullmatch(f"apt-get {private} download dataset-fashion-mnist", download)


def test_a_failing_command_is_reported_with_its_last_words_and_leaves_nothing(machine):
    script(
        machine, "apt-get", 'echo first >&2; echo "E: Temporary failure resolving" >&2; exit 100'
    )
    wanted = "`apt-get .* update` failed with status 100: E: Temporary failure resolving"
    with pytest.raises(DataError, match=wanted):
        fetch("fashion-mnist", machine / "sets")
    assert os.listdir(machine / "sets") == []


def test_a_package_with_other_content_is_refused_and_leaves_nothing(machine):
    name = SOURCES["fashion-mnist"].files[-1].name
    (machine / "package" / name).write_bytes(gzip.compress(b"other"))
    with pytest.raises(
        DataError, match=f"'fashion-mnist' is damaged: .*{name}: content has sha256"
    ):
        fetch("fashion-mnist", machine / "sets")
    assert os.listdir(machine / "sets") == []


def test_a_command_that_does_not_end_is_stopped(machine, monkeypatch):
    script(machine, "dpkg-deb", "exec sleep 60")
    monkeypatch.setattr("gose.data.fetch.TIMEOUT_SECONDS", 0.3)
    with pytest.raises(DataError, match=r"no end of `dpkg-deb -x .*` in 0.3 s"):
        fetch("fashion-mnist", machine / "sets")


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-deb"])
def test_a_machine_without_debian_tools_is_told_what_to_copy(tool, machine):
    (machine / "bin" / tool).unlink()
    with pytest.raises(DataError, match=f"{tool} is not on this machine; .*copy train-images-idx3"):
        fetch("fashion-mnist", machine / "sets")


def test_a_folder_that_cannot_be_is_named(machine):
    (machine / "sets").write_text("a file")
    with pytest.raises(DataError, match=f"cannot write to {machine}/sets: .*name another folder"):
        fetch("fashion-mnist", machine / "sets")


def test_a_set_inside_a_python_package_is_only_located(machine):
    [path] = fetch("digits", machine / "sets")
    assert path.name == "digits.csv.gz"
    assert not (machine / "sets").exists()
    assert not (machine / "log").exists()
