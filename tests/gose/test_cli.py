import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

import gose_kernels as gk
from gose import cli, config, doctor, report, rundir, system
from gose.checkpoint import State
from gose.data import DataError
from gose.recipes import RECIPES
from gose.rundir import Progress
from tests.gose import fake_run

ROWS = fake_run.rows(seeds=(0,))
UNITS = 5


def small_run(run_config, directory):
    """system.run in small: the rows of a made-up run in five units."""
    share = -(-len(ROWS) // UNITS)
    for index in range(directory.step, UNITS):
        for row in ROWS[index * share : (index + 1) * share]:
            directory.record(row)
        directory.commit(index + 1, UNITS, State({"w": torch.full((2,), index)}, {}))
        yield Progress(index + 1, UNITS, "learn", f"unit {index}", 500, "images", 0.25)


def signalled(number):
    """small_run, stopped by a signal in its third unit."""

    def run(run_config, directory):
        for progress in small_run(run_config, directory):
            if progress.done == 3:
                os.kill(os.getpid(), number)
            yield progress

    return run


@pytest.fixture
def gose(monkeypatch, tmp_path):
    """gose(*arguments) in an empty working directory, with the small run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(system, "run", small_run)
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def refusal(result):
    """What a command says that ends as bad input does."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    return result.stderr


def test_version_is_that_of_the_package(gose):
    assert gose("--version").stdout.strip() == version("gose")


def test_no_command_prints_help(gose):
    result = gose()
    assert result.exit_code == 0
    for command in ("run", "show", "data", "doctor", "explain"):
        assert f" {command} " in result.stdout


def test_run_writes_a_whole_run_directory(gose, tmp_path):
    result = gose("run", "quickstart", "--set", "seeds=0", "--set", "preserve=none")
    assert result.exit_code == 0, result.output
    path = tmp_path / "runs" / "quickstart-1"
    assert rundir.read_rows(path / "metrics.jsonl") == json.loads(json.dumps(ROWS))
    expected = config.override(RECIPES["quickstart"](), ["seeds=0", "preserve=none"])
    assert config.load(path / "config.toml") == expected
    assert (path / "report.html").read_text() == report.html(report.read(path))
    assert "report: runs/quickstart-1/report.html" in result.stdout
    assert "✓ student's training FLOPs: 0.37 (wanted <= 0.6)" in result.stdout
    assert re.search(r"5/5  learn  unit 4  2.00 k images/s", result.stderr)
    assert gose("run", "quickstart").exit_code == 0
    assert (tmp_path / "runs" / "quickstart-2" / "report.md").exists()


def test_run_json_is_one_document(gose):
    document = json.loads(gose("run", "quickstart", "--out", "here", "--json").stdout)
    assert document["report_html"] == "here/report.html"
    assert document["claim"] == [row for row in ROWS if row["kind"] == "claim"]
    assert document["summary"] == [row for row in ROWS if row["kind"] == "summary"]


def test_run_takes_a_file(gose, tmp_path):
    (tmp_path / "mine.toml").write_text('seeds = [4]\nmerge = "none"')
    assert gose("run", "mine.toml", "--set", "threads=1").exit_code == 0
    written = config.load(tmp_path / "runs" / "mine-1" / "config.toml")
    assert (written.seeds, written.merge.method, written.threads) == ((4,), "none", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: wanted a recipe (quickstart), a .toml file or --resume DIR"),
        (["quickstrat"], "no recipe named 'quickstrat'; did you mean quickstart?"),
        (["absent.toml"], "absent.toml: cannot be read: No such file"),
        (["quickstart", "--set", "preserv=none"], "preserv is not a key; did you mean preserve?"),
        (["quickstart", "--set", "merge=mena"], "got 'mena'; did you mean mean?"),
        (["quickstart", "--set", "preserve"], "--set wants key=value, got 'preserve'"),
        (["--resume", "absent"], "absent: holds no run; start one with"),
        (["quickstart", "--resume", "absent"], "--resume takes no RECIPE, --set or --out"),
        (["--resume", "absent", "--set", "seeds=0"], "--resume takes no RECIPE, --set or --out"),
        (["quickstart", "--frobnicate"], "No such option"),
    ],
)
def test_bad_input_exits_2_and_makes_nothing(gose, tmp_path, arguments, message):
    assert message in refusal(gose("run", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_set_exits_2_and_makes_nothing(gose, monkeypatch, tmp_path):
    def missing(name, root=None):
        raise DataError(f"data: set {name!r} is missing; run: gose data fetch {name}")

    monkeypatch.setattr(cli, "locate", missing)
    assert "is missing; run: gose data fetch mnist-5k" in refusal(gose("run", "quickstart"))
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_refuses_exits_2(gose, tmp_path):
    (tmp_path / "here" / "lock").mkdir(parents=True)
    assert "Is a directory: 'here/lock'" in refusal(gose("run", "quickstart", "--out", "here"))


def test_what_the_first_unit_refuses_exits_2(gose, monkeypatch):
    def damaged(run_config, directory):
        raise DataError("data: set 'digits' is damaged; run: this")
        yield

    monkeypatch.setattr(system, "run", damaged)
    assert "error: data: set 'digits' is damaged; run: this" in refusal(gose("run", "quickstart"))


def test_an_existing_run_is_not_overwritten(gose):
    assert gose("run", "quickstart", "--out", "here").exit_code == 0
    assert "here: holds a run already; resume it" in refusal(
        gose("run", "quickstart", "--out", "here")
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_resumed_to_the_same_bytes(gose, monkeypatch, tmp_path, number, code):
    assert gose("run", "quickstart", "--out", "whole").exit_code == 0
    before = signal.getsignal(number)
    monkeypatch.setattr(system, "run", signalled(number))
    result = gose("run", "quickstart", "--out", "my run")
    assert result.exit_code == code
    assert "stopped after 3 units; go on with: gose run --resume 'my run'" in result.stderr
    assert signal.getsignal(number) == before
    shown = gose("show", "my run")
    assert "unfinished: 3 of 5 units" in shown.stdout
    assert "go on with: gose run --resume 'my run'" in shown.stdout
    monkeypatch.setattr(system, "run", small_run)
    result = gose("run", "--resume", "my run")
    assert result.exit_code == 0
    assert "going on after unit 3" in result.stderr
    for name in ("metrics.jsonl", "config.toml"):
        assert (tmp_path / "my run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert gose("run", "--resume", "my run").exit_code == 0


@pytest.mark.parametrize("moment", ["create", "write"])
def test_a_signal_outside_of_the_units_is_no_traceback(gose, monkeypatch, moment):
    def signal_here(*_arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached: the signal stops here")

    monkeypatch.setattr(cli.rundir if moment == "create" else cli.reports, moment, signal_here)
    result = gose("run", "quickstart", "--out", "here")
    assert result.exit_code == 143
    assert isinstance(result.exception, SystemExit)


def test_a_failure_tells_how_to_go_on(gose, monkeypatch):
    def failing(run_config, directory):
        yield from list(small_run(run_config, directory))[:2]
        raise OSError("No space left on device")

    monkeypatch.setattr(system, "run", failing)
    result = gose("run", "quickstart", "--out", "here")
    assert result.exit_code == 1
    assert isinstance(result.exception, OSError)
    assert "try again with: gose run --resume here" in result.stderr


def test_show_prints_the_tables_of_the_report(gose, tmp_path):
    path = fake_run.write(tmp_path / "run", fake_run.rows())
    result = gose("show", "run", "--report")
    assert result.exit_code == 0
    assert (path / "report.html").exists()
    assert result.stdout.startswith("run: complete; seeds 0, 1, 2")
    summary = next(p for p in report.read(path).parts if p.title == "Learning the stream").blocks[0]
    for row in summary.rows:
        assert all(cell in result.stdout for cell in row)
    assert "go on with" not in result.stdout


def test_show_json_holds_every_row(gose, tmp_path):
    rows = fake_run.rows()
    fake_run.write(tmp_path / "run", rows, done=7)
    document = json.loads(gose("show", "run", "--json").stdout)
    assert (document["units_done"], document["units_total"]) == (7, fake_run.TOTAL)
    assert document["rows"] == {
        kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}
    }


def test_show_refuses_what_is_no_run(gose, tmp_path):
    assert "absent: holds no run" in refusal(gose("show", "absent"))
    path = fake_run.write(tmp_path / "run", [])
    (path / "metrics.jsonl").write_bytes(b"{}\nnonsense\n")
    assert "metrics.jsonl: line 2 is not a JSON object" in refusal(gose("show", "run"))


def test_doctor_tells_what_is_here(gose):
    result = gose("doctor", "--json")
    document = json.loads(result.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert result.exit_code == (0 if document["ok"] else 1)
    assert checks["torch"]["found"].startswith(torch.__version__)
    loaded = gk.native.why_not() is None
    assert (checks["compiled kernels"]["state"] == "ok") == loaded
    if loaded:
        assert f"level {gk.native.cpu_level()} of" in checks["cpu"]["found"]
    assert (checks["CUDA device"]["state"] == "ok") == torch.cuda.is_available()
    assert checks["threads"]["found"].startswith(f"{torch.get_num_threads()} of torch")
    assert f"pytest {pytest.__version__}" in checks["extra test"]["found"]
    text = gose("doctor").stdout
    for check in document["checks"]:
        assert check["found"] in text
        assert check["advice"] in text
        assert (check["advice"] != "") == (check["state"] != "ok") or check["name"] == "CUDA device"


def test_doctor_fails_where_the_quickstart_could_not_run(gose, monkeypatch):
    def missing(name, root=None):
        raise DataError("missing")

    monkeypatch.setattr(doctor, "locate", missing)
    result = gose("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["data mnist-5k"]["state"] == "broken"
    assert checks["data mnist-5k"]["advice"].startswith("the recipe quickstart needs it; run: ")
    assert checks["data fashion-mnist"]["state"] == "absent"


def test_doctor_names_a_library_that_does_not_load(gose, monkeypatch):
    monkeypatch.setattr(gk.native, "why_not", lambda: "libgose_kernels.so does not load: no symbol")
    monkeypatch.setattr(doctor, "_library_exists", lambda: True)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["compiled kernels"].state == "broken"
    assert "no symbol" in checks["compiled kernels"].found
    monkeypatch.setattr(doctor, "_library_exists", lambda: False)
    assert {check.name: check for check in doctor.examine()}["compiled kernels"].state == "absent"


def test_doctor_names_an_unknown_instruction_set():
    done = subprocess.run(
        [sys.executable, "-m", "gose", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"GOSE_ISA": "sse9"},
    )
    cpu = next(c for c in json.loads(done.stdout)["checks"] if c["name"] == "cpu")
    if gk.native.why_not() is None:
        assert (done.returncode, cpu["state"]) == (1, "broken")
        assert "GOSE_ISA must be one of" in cpu["found"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_gives_the_reasons_of_the_registry(gose, device):
    document = json.loads(gose("explain", "combine", "--device", device, "--json").stdout)
    rows = gk.explain("combine", device=device)
    assert document == {"combine": [row._asdict() for row in rows]}
    assert [row["backend"] for row in document["combine"]] == [
        b.name for b in gk.OPS["combine"].backends
    ]
    assert sum(row["chosen"] for row in document["combine"]) == 1
    text = " ".join(gose("explain", "combine", "--device", device).stdout.split())
    for row in rows:
        assert f"{row.backend} " in text
        assert (row.reason or "picked").split()[0] in text
    if device == "cuda" and not torch.cuda.is_available():
        assert "No CUDA device is visible here" in text


def test_explain_without_a_name_tells_of_every_op(gose):
    document = json.loads(gose("explain", "--json").stdout)
    assert list(document) == [name for name, op in gk.OPS.items() if op.example is not None]


def test_explain_refuses_with_the_nearest_name(gose):
    assert "no op named 'combin'; did you mean combine?; ops: " in refusal(
        gose("explain", "combin")
    )
    assert gose("explain", "combine", "--device", "tpu").exit_code == 2
    assert gose("explain", "combine", "--dtype", "int3").exit_code == 2


def test_explain_tells_the_tiles_of_an_architecture(gose):
    sizes = ("--tokens", "256", "--experts", "8", "--top-k", "2", "--width", "512")
    call = ("explain", "moe", "--device", "cuda", "--cc", "90", *sizes, "--dtype", "bfloat16")
    document = json.loads(gose(*call, "--json").stdout)
    wanted = gk.gpu_plan("moe", T=256, E=8, K=2, D=512, cc=90, dtype=torch.bfloat16)
    found = document["plan"]
    assert list(document) == ["moe", "plan"]
    assert (found["T"], found["F"], found["cc"], found["code"]) == (256, 1024, 90, "sm_90a")
    assert found["launches"] == [launch._asdict() for launch in wanted.launches]
    text = " ".join(gose(*call).stdout.split())
    assert "Compute capability 9.0, T = 256, E = 8, K = 2, D = 512, F = 1024, bfloat16" in text
    up = next(launch for launch in wanted.launches if launch.kernel == "up")
    row = f"forward up 1 {up.programs} {up.rows} x {up.columns} x {up.depth} {up.warps} {up.stages}"
    assert f"{row} {up.shared_kb:g} wgmma" in text
    assert "chosen by closed forms, not measured" in text


def test_explain_refuses_an_architecture_where_nothing_is_chosen(gose):
    assert "--cc wants an op and --device cuda" in refusal(gose("explain", "moe", "--cc", "90"))
    wanted = "op must be one of moe, expert_mlp, grouped_gemm, got 'combine'"
    assert wanted in refusal(gose("explain", "combine", "--device", "cuda", "--cc", "90"))
    assert "cc must be one of 80, 86" in refusal(
        gose("explain", "moe", "--device", "cuda", "--cc", "75")
    )


def test_data_is_mounted(gose):
    names = {row["name"] for row in json.loads(gose("data", "list", "--json").stdout)}
    assert {"mnist-5k", "digits", "fashion-mnist"} <= names
