import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from gose import checkpoint, config, rundir
from gose.checkpoint import State
from gose.config import SystemConfig

TINY = config.override(SystemConfig(), ["seeds=0", "threads=1"])
TOTAL = 6


def units(run, stop=TOTAL):
    """A run in small: every unit draws from its own generator and adds to a tensor."""
    state = run.state if run.step else State({"w": torch.zeros(5)}, {"sum": 0.0})
    for index in range(run.step, stop):
        generator = torch.Generator().manual_seed(index)
        w = state.tensors["w"] * 0.9 + torch.randn(5, generator=generator)
        state = State({"w": w}, {"sum": state.meta["sum"] + w.sum().item()})
        run.record({"kind": "unit", "index": index, "sum": state.meta["sum"]})
        run.record({"kind": "odd", "text": "ü\n", "none": None})
        run.record_timing({"unit": index, "seconds": 0.5})
        run.commit(index + 1, TOTAL, state)
        yield index


def whole(path):
    """metrics.jsonl of a run that nobody disturbed."""
    with rundir.create(path, TINY) as run:
        assert list(units(run)) == list(range(TOTAL))
    return (path / "metrics.jsonl").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    wanted = whole(tmp_path / "whole")
    with rundir.create(tmp_path / "run", TINY) as run:
        list(units(run, stop=2))
        run.record({"kind": "unit", "index": 2, "sum": 99.0})  # never committed
        run.record_timing({"unit": 2, "seconds": 99.0})
    assert rundir.status(tmp_path / "run") == (2, TOTAL)
    for stop in (3, 4, TOTAL, TOTAL):
        with rundir.resume(tmp_path / "run") as run:
            assert run.config == TINY
            assert (run.threads, run.notes) == (1, [])
            list(units(run, stop=stop))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == wanted
    timings = rundir.read_rows(tmp_path / "run" / "timings.jsonl")
    assert [row["unit"] for row in timings] == list(range(TOTAL))
    assert rundir.status(tmp_path / "run") == (TOTAL, TOTAL)


KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from gose import rundir
from tests.gose.test_rundir import TINY, units

def killed(moments, path):
    left = [moments]
    def failpoint(_moment):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    opened = rundir.resume(path, failpoint=failpoint) if (path / "environment.json").exists() \
        else rundir.create(path, TINY, failpoint=failpoint)
    with opened as run:
        list(units(run))

source = random.Random(int(sys.argv[2]))
for index in range(int(sys.argv[3])):
    status = -9
    while status == -9:
        moments = source.randrange(25)
        if (child := os.fork()) == 0:
            killed(moments, Path(sys.argv[1]) / str(index))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status)
"""


def test_killed_again_and_again_it_still_ends_with_the_same_bytes(tmp_path):
    wanted = whole(tmp_path / "whole")
    runs = 3
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, "0", str(runs)], capture_output=True, text=True
    )
    statuses = done.stdout.split()
    assert statuses.count("0") == runs, done.stderr
    assert statuses.count("-9") >= runs
    for index in range(runs):
        assert (tmp_path / str(index) / "metrics.jsonl").read_bytes() == wanted


def test_damage_is_told_and_an_older_checkpoint_taken(tmp_path):
    wanted = whole(tmp_path)
    newest = tmp_path / "checkpoints" / f"step-{TOTAL:08d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with rundir.resume(tmp_path) as run:
        assert run.step == TOTAL - 1
        assert len(run.notes) == 1
        assert re.search(r"checkpoint not used: step-00000006.safetensors: \d+ bytes", run.notes[0])
        list(units(run))
    assert (tmp_path / "metrics.jsonl").read_bytes() == wanted


def test_altered_metrics_are_seen(tmp_path):
    wanted = whole(tmp_path)
    altered = bytearray(wanted)
    altered[10] ^= 1
    (tmp_path / "metrics.jsonl").write_bytes(altered)
    with rundir.resume(tmp_path) as run:
        assert run.step == 0
        assert "step 6: metrics.jsonl is shorter or was altered since" in run.notes[0]
        list(units(run))
    assert (tmp_path / "metrics.jsonl").read_bytes() == wanted


def test_one_process_at_a_time(tmp_path):
    with rundir.create(tmp_path / "run", TINY):
        holder = f"in use by process {os.getpid()} on "
        with pytest.raises(ValueError, match=re.escape(holder)), rundir.resume(tmp_path / "run"):
            pass
    with rundir.resume(tmp_path / "run"):
        pass


def test_the_lock_of_a_dead_process_is_stale(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gose import rundir, config\n"
        "with rundir.create(Path(sys.argv[1]), config.SystemConfig()):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        message = f"in use by process {holder.pid} on"
        with pytest.raises(ValueError, match=message), rundir.resume(tmp_path / "run"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with rundir.resume(tmp_path / "run") as run:
        assert run.step == 0


def test_create_refuses_what_is_not_empty(tmp_path):
    whole(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for path, message in [
        (tmp_path / "run", "holds a run already; resume it"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "mine", "is not empty ('thesis.tex')"),
        (tmp_path / "file" / "below", "cannot be made: Not a directory"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)), rundir.create(path, TINY):
            pass


def test_create_goes_on_where_creation_was_cut_short(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "config.toml").write_text("half")
    (tmp_path / ".environment.json.tmp").write_text("{")
    with rundir.create(tmp_path, TINY) as run:
        assert run.step == 0
    with rundir.resume(tmp_path) as run:
        assert run.config == TINY


def test_resume_refuses_another_config(tmp_path):
    whole(tmp_path)
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("top_k = ", "top_k =  "))
    message = "config.toml: changed since the run began; put it back"
    with pytest.raises(ValueError, match=re.escape(message)), rundir.resume(tmp_path):
        pass


def test_resume_refuses_a_directory_without_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run; start one with"), rundir.resume(tmp_path):
        pass
    with pytest.raises(ValueError, match="holds no run"):
        rundir.status(tmp_path / "absent")


@pytest.mark.parametrize("threads", [None, 0, "2", True, 1.5])
def test_an_environment_without_threads_is_refused(tmp_path, threads):
    with rundir.create(tmp_path, TINY):
        pass
    recorded = json.loads((tmp_path / "environment.json").read_text()) | {"threads": threads}
    (tmp_path / "environment.json").write_text(json.dumps(recorded))
    refused = pytest.raises(ValueError, match="threads must be a positive number")
    with refused, rundir.resume(tmp_path):
        pass


def test_resume_tells_another_environment(tmp_path):
    whole(tmp_path)
    recorded = json.loads((tmp_path / "environment.json").read_text())
    recorded["packages"]["torch"] = "1.0"
    recorded["threads"] = 7
    (tmp_path / "environment.json").write_text(json.dumps(recorded))
    with rundir.resume(tmp_path) as run:
        assert run.threads == 7
        assert len(run.notes) == 1
        assert "packages was {'torch': '1.0'" in run.notes[0]


def test_rows_are_refused_before_they_spoil_the_file(tmp_path):
    with rundir.create(tmp_path, TINY) as run:
        with pytest.raises(ValueError, match=r"metrics.jsonl: row summary: acc is nan; write None"):
            run.record({"kind": "summary", "acc": float("nan")})
        run.commit(1, 1, State({}, {}))
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_read_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rundir.read_rows(path) == []
    path.write_bytes(b'{"a":1}\n{"b":2}\n{"c":')
    assert rundir.read_rows(path) == [{"a": 1}, {"b": 2}]
    for damaged in (b"{\n", b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(b'{"a":1}\n' + damaged)
        with pytest.raises(ValueError, match="line 2 is not a JSON object"):
            rundir.read_rows(path)


def test_environment_holds_what_may_change_a_number(tmp_path):
    found = rundir.environment(TINY)
    assert found["threads"] == 1
    assert found["seeds"] == [0]
    assert found["packages"]["torch"] == torch.__version__
    assert checkpoint.json_line(found, "environment")
    assert rundir.environment(SystemConfig())["threads"] == len(os.sched_getaffinity(0))
