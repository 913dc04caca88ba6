from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import gose_kernels as gk
from gose_kernels import tuning
from gose_kernels.triton import _chosen, warps_of

FASTEST = {"combine": 8, "dispatch": 2, "masked_update": 4, "quantize": 8}
SAMPLE = {"format": 1, "device": "Some GPU", "warps": FASTEST}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU whose times are made up; what was timed on it."""
    timed: list[str] = []
    name_of = {op: kernels for kernels, (op, _) in tuning._TUNED.items()}

    def seconds(op: str, args: tuple[object, ...]) -> float:
        timed.append(op)
        kernels = name_of[op]
        return 1.0 if warps_of(kernels) == FASTEST[kernels] else 1.02 if op == "dispatch" else 2.0

    monkeypatch.setattr(tuning, "_device", lambda: "Some GPU")
    monkeypatch.setattr(tuning, "_seconds", seconds)
    table = {kernels: (op, tuple) for kernels, (op, _) in tuning._TUNED.items()}
    monkeypatch.setattr(tuning, "_TUNED", table)
    yield timed
    _chosen.clear()


def _version() -> str:
    return str(tuning.importlib.metadata.version("triton"))


def test_measures_once_and_reads_what_it_wrote(device: list[str], tmp_path: Path) -> None:
    """dispatch is no clear winner: it keeps the closed form."""
    path, wanted = tmp_path / "warps.json", {**FASTEST, "dispatch": 4}
    assert gk.tune(path=path) == wanted
    assert {k: warps_of(k) for k in wanted} == wanted
    assert len(device) == 3 * 4
    assert json.loads(path.read_text()) == {**SAMPLE, "triton": _version(), "warps": wanted}
    assert list(tmp_path.iterdir()) == [path]
    _chosen.clear()
    assert gk.tune(path=str(path)) == wanted
    assert len(device) == 3 * 4
    assert {k: warps_of(k) for k in wanted} == wanted


def test_nothing_is_chosen_or_written_where_measuring_fails(
    device: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(op: str, args: tuple[object, ...]) -> float:
        if op == "masked_adam_" and warps_of("masked_update") == 8:
            raise RuntimeError("out of memory")
        return 1.0 / warps_of("combine")

    monkeypatch.setattr(tuning, "_seconds", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        gk.tune(path=tmp_path / "warps.json")
    assert not list(tmp_path.iterdir())
    assert {warps_of(k) for k in FASTEST} == {4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"is for format 2, this is 1; remove it to measure"),
        ({"device": "Other GPU"}, r"is for device 'Other GPU', this is 'Some GPU'"),
        ({"triton": "0.1"}, r"is for triton '0.1', this is"),
        ({"more": 1}, r"must hold format, device, triton, warps and nothing else"),
        ({"warps": {"combine": 4}}, r"warps must name combine, dispatch, .*, got \{'combine': 4\}"),
        ({"warps": {**FASTEST, "combine": 3}}, r"warps of combine must be one of .*, got 3"),
        ({"warps": {**FASTEST, "combine": True}}, r"warps of combine must be one of .*, got True"),
        ({"warps": {**FASTEST, "combine": [4]}}, r"warps of combine must be one of .*, got \[4\]"),
    ],
)
def test_refuses_files_of_others(
    device: list[str], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "warps.json"
    path.write_text(json.dumps({**SAMPLE, "triton": _version(), **change}))
    with pytest.raises(ValueError, match=f"tune: {path}.*{message}"):
        gk.tune(path=path)
    assert not device
    assert {warps_of(k) for k in FASTEST} == {4}


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]"])
def test_refuses_what_is_no_json_object(device: list[str], tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "warps.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"must be JSON|must hold format"):
        gk.tune(path=path)


def test_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "triton_reason", lambda: "no GPU or driver is visible to torch")
    with pytest.raises(RuntimeError, match="tune: needs a GPU that Triton can use: "):
        gk.tune(path=tmp_path / "warps.json")
    assert not list(tmp_path.iterdir())
