import json
import os
import random
import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gose import checkpoint
from gose.checkpoint import CheckpointError, State

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def state_of(step: int) -> State:
    """A small state that differs for every step, with awkward tensors."""
    generator = torch.Generator().manual_seed(step)
    base = torch.randn(4, 6, generator=generator)
    tensors = {f"z/{str(dtype)[6:]}": (base * 9).to(dtype) for dtype in DTYPES}
    tensors |= {
        "a.strided": base.t(),
        "a.alias": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(step),
        "odd values": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    tensors["odd"] = tensors.pop("odd values")
    return State(tensors, {"z": step, "a": [0.1 * step, None, True, {"y": "ü", "x": -0.0}]})


def assert_same_state(got: State, wanted: State) -> None:
    assert list(got.tensors) == list(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        came = got.tensors[name]
        assert (came.dtype, came.shape) == (tensor.dtype, tensor.shape)
        assert came.contiguous().view(-1).untyped_storage().tolist() == (
            tensor.contiguous().clone().view(-1).untyped_storage().tolist()
        )
    assert repr(got.meta) == repr(wanted.meta)


def test_state_comes_back_bit_equal_and_in_order(tmp_path):
    checkpoint.save(tmp_path, state_of(3), step=3, extra={"total": 9})
    found = checkpoint.latest(tmp_path)
    assert found.refused == {}
    assert (found.checkpoint.step, found.checkpoint.extra) == (3, {"total": 9})
    assert_same_state(found.checkpoint.state, state_of(3))
    assert all(t.data_ptr() % 64 == 0 for t in found.checkpoint.state.tensors.values())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_json_line_reads_back_to_the_last_bit(value):
    assert repr(json.loads(checkpoint.json_line(value, "test", sort_keys=False))) == repr(value)


def test_keep_and_rewind(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, state_of(step), step=step, keep=2)
    assert names(tmp_path) == [
        f"step-0000000{s}.{end}" for s in (3, 4) for end in ("json", "safetensors")
    ]
    (tmp_path / "step-00000004.json").write_bytes(b"damaged")
    (tmp_path / "step-00000003.json").write_bytes(b"damaged")
    (tmp_path / "notes.txt").write_bytes(b"not ours")
    checkpoint.save(tmp_path, state_of(2), step=2, keep=2)
    assert names(tmp_path) == ["notes.txt", "step-00000002.json", "step-00000002.safetensors"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_every_truncation_of_the_manifest_falls_back(tmp_path):
    checkpoint.save(tmp_path, state_of(1), step=1)
    manifest = checkpoint.save(tmp_path, State({"w": torch.ones(2)}, {"i": 1}), step=2)
    whole = manifest.read_bytes()
    for length in range(len(whole)):
        manifest.write_bytes(whole[:length])
        found = checkpoint.latest(tmp_path)
        assert found.checkpoint.step == 1
        assert "step-00000002.json: incomplete or altered" in found.refused[manifest.name]
    manifest.write_bytes(whole)
    assert checkpoint.latest(tmp_path).checkpoint.step == 2


def test_every_flipped_or_added_byte_is_seen(tmp_path):
    manifest = checkpoint.save(tmp_path, State({"w": torch.ones(2)}, {"i": 1}), step=2)
    source = random.Random(0)
    for path in (manifest, manifest.with_suffix(".safetensors")):
        whole = path.read_bytes()
        for position in range(len(whole)):
            altered = bytearray(whole)
            altered[position] ^= 1 << source.randrange(8)
            path.write_bytes(altered)
            assert checkpoint.latest(tmp_path).checkpoint is None, (path.name, position)
        for altered in (whole + b"\n", b" " + whole, whole[:-1], b"", whole + whole):
            path.write_bytes(altered)
            assert checkpoint.latest(tmp_path).checkpoint is None
        path.write_bytes(whole)
    assert checkpoint.latest(tmp_path).checkpoint.step == 2


def test_missing_tensor_file_falls_back(tmp_path):
    checkpoint.save(tmp_path, state_of(1), step=1)
    checkpoint.save(tmp_path, state_of(2), step=2)
    (tmp_path / "step-00000002.safetensors").unlink()
    found = checkpoint.latest(tmp_path)
    assert found.checkpoint.step == 1
    assert "step-00000002.safetensors: cannot be opened" in found.refused["step-00000002.json"]


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") == (None, {})
    (tmp_path / ".step-00000001.json.tmp").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == (None, {})


def test_files_that_are_not_regular_are_refused(tmp_path):
    manifest = checkpoint.save(tmp_path, state_of(1), step=1)
    tensors = manifest.with_suffix(".safetensors")
    real = tensors.rename(tmp_path / "elsewhere")
    tensors.symlink_to(real)
    assert "cannot be opened" in checkpoint.latest(tmp_path).refused[manifest.name]
    tensors.unlink()
    os.mkfifo(tensors)
    assert "not a regular file" in checkpoint.latest(tmp_path).refused[manifest.name]
    tensors.unlink()
    tensors.mkdir()
    assert "not a regular file" in checkpoint.latest(tmp_path).refused[manifest.name]


def forge(tmp_path, change, payload=None):
    """A checkpoint whose digests are right but whose manifest was written by somebody else."""
    manifest = checkpoint.save(tmp_path, State({"w": torch.ones(2)}, {}), step=1)
    document = json.loads(manifest.read_bytes())["manifest"]
    change(document)
    manifest.write_bytes(checkpoint._seal(json.dumps(document, separators=(",", ":")).encode()))
    if payload is not None:
        manifest.with_suffix(".safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(manifest)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "not a manifest of version 1"),
        (lambda m: m.update(step=7), "written for step 7"),
        (lambda m: m.update(step=-1), "not a manifest of version 1"),
        (
            lambda m: m["file"].update(name="../secret.safetensors"),
            "and file '../secret.safetensors'",
        ),
        (lambda m: m["file"].update(bytes=1 << 60), "bytes; wanted 1152921504606846976"),
        (lambda m: m["file"].update(bytes="80"), "not a manifest of version 1"),
        (lambda m: m.pop("tensors"), "not a manifest of version 1"),
        (lambda m: m.update(more=1), "not a manifest of version 1"),
        (
            lambda m: m["tensors"].update(v={"dtype": "float32", "shape": [2]}),
            "tensor 'v' is missing",
        ),
        (lambda m: m["tensors"].clear(), "tensor 'w' is not in the manifest"),
        (
            lambda m: m["tensors"]["w"].update(shape=[1, 2]),
            "must be float32 [1, 2], got float32 [2]",
        ),
        (lambda m: m["tensors"]["w"].update(dtype="int32"), "must be int32 [2], got float32 [2]"),
    ],
)
def test_a_manifest_with_right_digests_is_still_checked(tmp_path, change, message):
    assert message in forge(tmp_path, change)


def test_deep_json_is_refused_not_a_crash(tmp_path):
    manifest = checkpoint.save(tmp_path, State({}, {}), step=1)
    body = b'{"version":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    manifest.write_bytes(checkpoint._seal(body))
    with pytest.raises(CheckpointError, match="not a manifest of version 1"):
        checkpoint.load(manifest)


def test_bytes_that_are_not_safetensors_are_refused(tmp_path):
    payload = struct.pack("<Q", 1 << 60) + b"{}"
    digest = checkpoint.hashlib.sha256(payload).hexdigest()
    message = forge(
        tmp_path, lambda m: m["file"].update(bytes=len(payload), sha256=digest), payload=payload
    )
    assert "not safetensors" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_finite_option(tmp_path, value):
    manifest = checkpoint.save(tmp_path, State({"w": torch.tensor([1.0, value])}, {}), step=1)
    assert checkpoint.load(manifest).step == 1
    with pytest.raises(CheckpointError, match="tensor 'w' holds NaN or infinities"):
        checkpoint.load(manifest, finite=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (State({"../w": torch.ones(1)}, {}), "tensor name '../w'"),
        (State({"/w": torch.ones(1)}, {}), "tensor name '/w'"),
        (State({"": torch.ones(1)}, {}), "tensor name ''"),
        (State({"w\n": torch.ones(1)}, {}), "tensor name 'w\\n'"),
        (State({"w": torch.ones(1, dtype=torch.complex128)}, {}), "safetensors cannot hold"),
        (State({}, {"a": {"b": float("nan")}}), "meta.a.b is nan; write None"),
        (
            State({}, {"a": [1, (2, 3)]}),
            "meta.a[1] must be None, bool, int, float, str, list or dict, got tuple",
        ),
        (State({}, {"a": {1: 2}}), "keys must be strings, got 1 in meta.a"),
        (State({}, {"a": torch.ones(1)}), "got Tensor"),
    ],
)
def test_save_refuses_what_would_not_come_back(tmp_path, state, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.save(tmp_path, state, step=1)
    assert names(tmp_path) == []


def test_save_refuses_bad_counts(tmp_path):
    with pytest.raises(ValueError, match=r"step must be in \[0, 10\*\*8\), got -1"):
        checkpoint.save(tmp_path, State({}, {}), step=-1)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path, State({}, {}), step=1, keep=0)


MOMENTS = [
    "nothing written",
    *[
        f"{end} {what}"
        for end in (".safetensors", ".json")
        for what in ("half written", "written", "renamed")
    ],
    "committed",
]
# One process starts torch; every case is a fork of it that kills itself.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from gose import checkpoint
from gose.checkpoint import State

def save(directory, step, failpoint=lambda moment: None):
    state = State({"w": torch.full((3,), float(step))}, {"step": step})
    checkpoint.save(directory, state, step=step, failpoint=failpoint)

def run(directory, moment, last):
    for step in range(1, last):
        save(directory, step)
    kill = lambda reached: reached == moment and os.kill(os.getpid(), signal.SIGKILL)
    save(directory, last, kill)

for index, (moment, last) in enumerate(eval(sys.argv[2])):
    if (child := os.fork()) == 0:
        run(Path(sys.argv[1]) / str(index), moment, last)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_at_every_moment_leaves_the_newest_committed(tmp_path):
    cases = [(moment, last) for moment in MOMENTS for last in (1, 3)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, repr(cases)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["-9"] * len(cases), done.stderr
    for index, (moment, last) in enumerate(cases):
        directory = tmp_path / str(index)
        wanted = last if moment in (".json renamed", "committed") else last - 1
        found = checkpoint.latest(directory).checkpoint
        assert (0 if found is None else found.step) == wanted, moment
        if found is not None:
            assert found.state.meta == {"step": wanted}
            assert found.state.tensors["w"].tolist() == [float(wanted)] * 3
        # the next save goes on from there and clears what the kill left behind
        checkpoint.save(directory, State({}, {}), step=wanted + 1)
        assert not [name for name in names(directory) if name.endswith(".tmp")]
        assert checkpoint.latest(directory).checkpoint.step == wanted + 1


def test_write_file_replaces_a_synced_whole_and_syncs_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    events = []

    def fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.write_file(path, b"new", lambda moment: events.append((moment, path.read_bytes())))
    assert events == [
        (".json half written", b"old"),
        ("fsync", str(tmp_path / ".a.json.tmp"), b"old"),
        (".json written", b"old"),
        (".json renamed", b"new"),
        ("fsync", str(tmp_path), b"new"),
    ]
