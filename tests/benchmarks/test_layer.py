"""The layer benchmark: what it accepts, refuses, compares and goes on from."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

import gose_kernels as gk
from benchmarks import _cells, _peers, _record, _roofline, _rounds, _team, _worker, layer
from tests import readme

TINY = _peers.SHAPES["tiny"]


def _probe(_unit):
    return 1e12


def _options(*argv):
    base = ["--shape", "tiny", "--dtype", "float32", "--threads", "1", "--rounds", "2"]
    return layer.parse(
        [*base, "--allocator", "kept", "--caches", "cold", "--rows", "steady", *argv]
    )


def _disturbed(readings, quiet=100.0):
    """A gate that reads `quiet` until it has settled, then what the list says."""
    values = iter([quiet] * 25 + list(readings))
    return _rounds.Gate(lambda: next(values), known=quiet)


def test_a_disturbed_round_is_rejected():
    # round 0 quiet; round 1 disturbed at its end; round 2 not even begun; round 3 quiet
    gate = _disturbed([100, 95, 99, 60, 70, 91, 100])
    begun = []

    def contestant(number):
        begun.append(number)
        return float(number)

    taken = _rounds.run({"a": contestant}, 2, gate, pause_seconds=0)
    assert taken == _rounds.Rounds({"a": [0.0, 3.0]}, [0, 3], 2)
    assert begun == [0, 1, 3]


def test_a_machine_that_stays_disturbed_gives_no_figures():
    gate = _disturbed([50.0] * 100)
    taken = _rounds.run({"a": lambda _: 1.0}, 3, gate, pause_seconds=0)
    assert taken == _rounds.Rounds({"a": []}, [], 9)


def test_who_starts_changes_by_the_round():
    order = []

    def contestant(name):
        return lambda _: order.append(name) or 1.0

    _rounds.run({n: contestant(n) for n in "abc"}, 3, _disturbed([100.0] * 9), pause_seconds=0)
    assert "".join(order) == "abcbcacab"


def test_quiet_is_the_upper_quartile_and_no_lower_than_known():
    values = iter([1.0, 2.0, 3.0, 4.0, 100.0])
    assert _rounds.Gate(lambda: next(values), settle=5).quiet == 4.0
    assert _rounds.Gate(lambda: 1.0, known=7.0, settle=5).quiet == 7.0


def _cell(**peers):
    """A steady cell of three rounds."""
    return {
        "kind": "steady",
        "shape": "tiny",
        "dtype": "float32",
        "tokens": 4,
        "cap": "",
        "allocator": "kept",
        "caches": "cold",
        "rounds": 3,
        "rejected": 0,
        "bound": "memory",
        "floor_seconds": [1.0, 2.0, 4.0],
        "peers": {name: {"seconds": list(s)} for name, s in peers.items()},
    }


def test_ratios_pair_the_rounds():
    # The machine is half as fast in each round as in the one before it: ratios of medians mislead.
    cell = _cell(gose=(2.0, 3.0, 10.0), slow=(4.0, 9.0, 10.0), fast=(1.0, 2.0, 30.0))
    assert _cells.best_peer(cell) == "fast"
    assert _cells.speedup(cell, "slow") == 2.0  # of 2, 3, 1
    assert _cells.speedup(cell, "fast") == statistics.median([1 / 2, 2 / 3, 3.0])
    assert _cells.figures(cell)["gose"].floors == 2.0  # of 2, 1.5, 2.5
    assert _cells.speedup(cell, "absent") is None
    assert _cells.speedup(_cell(slow=(1.0,)), "slow") is None
    text = _cells.table([cell])
    assert (
        "| tiny float32 | 4 | 2e+03 memory | 3e+03 (2.00×) | `fast` 2e+03 (1.00×) | 0.67 | – |"
        in text
    )


def test_a_first_call_is_compared_with_the_calls_after_it():
    cell = _cell(gose=(2.0, 3.0, 10.0))
    cell["peers"]["gose"]["steady_seconds"] = [1.0, 3.0, 5.0]
    assert _cells.first_call(cell, "gose") == 2.0


def _backwards(shape, weights):
    """Takes the up rows for the gate."""
    gate, up = weights.up_EHD.chunk(2, dim=1)
    return _peers.gose(shape, _peers.Weights(torch.cat([up, gate], dim=1), weights.down_EDF))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["gose", "backwards"])
def test_a_wrong_peer_fails_the_check(peer, dtype, tmp_path, monkeypatch):
    wrong = _peers.Peer("gose", _backwards)
    monkeypatch.setattr(_worker, "PEERS", {**_peers.PEERS, "backwards": wrong})
    worker = _worker.Worker(peer)
    where = {"folder": str(tmp_path), "shape": TINY, "dtype": dtype}
    worker.answer({"do": "make", "seed": 0, **where})
    worker.answer({"do": "truth", "tokens": 5, "routing": 1, **where})
    worker.answer({"do": "build", **where})

    class Team(_team.Team):
        def ask(self, name, do, **arguments):
            return worker.answer({"do": do, **arguments})

    team = Team(str(tmp_path))
    team.workers = {peer: worker}
    plan = layer.Plan(TINY, dtype, "kept", "", [])
    gate = _rounds.Gate(lambda: 1.0, settle=2)
    monkeypatch.setattr(layer, "num_routings", lambda _: 1)
    request = {"do": "check", "folder": str(tmp_path), "tokens": 5, "routing": 1}
    error = worker.answer(request)["error"]
    # An independent truth: token by token, in float64.
    weights = _worker._map(str(tmp_path), TINY, getattr(torch, dtype))
    given = _peers.inputs(TINY, getattr(torch, dtype), 5, 1)
    out_TD = torch.stack([_token(weights, *row) for row in zip(*given, strict=True)])
    got_TD = worker._call(5, 1)().double()
    assert error == pytest.approx(((got_TD - out_TD).norm() / out_TD.norm()).item(), rel=0.05)
    worker.answer({"do": "truth", "tokens": 5, "routing": 0, **where})
    found = layer.Bench(plan, team, gate, 1, 1)._check(5, 1)[peer]
    if peer == "gose":
        assert "reason" not in found and found["error"] < layer.ERROR_LIMIT[dtype]
    else:
        assert found["reason"].startswith("wrong: relative error")


def _token(weights, x_D, weight_K, expert_K):
    out_D = torch.zeros(TINY.width, dtype=torch.float64)
    for weight, e in zip(weight_K.double(), expert_K, strict=True):
        gate, up = (weights.up_EHD[e].double() @ x_D.double()).chunk(2)
        out_D += weight * (weights.down_EDF[e].double() @ (gate * gate.sigmoid() * up))
    return out_D


def test_cells_are_measured_once(tmp_path):
    """A run that is stopped after its first cell goes on with the second."""
    options = _options("--tokens", "1", "4", "--peers", "gose", "hf_grouped")
    options.out = tmp_path
    saved = []

    def save(cells):
        _record.save("layer", "", 1, {"cells": cells}, tmp_path)
        saved.append(sorted(cells))
        if len(saved) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer.run(options, save, {}, _probe)
    path = tmp_path / "layer.json"
    first = json.loads(path.read_text())["cells"]
    layer.run(options, save, layer.load(path, 1), _probe)
    both = json.loads(path.read_text())["cells"]
    names = [f"steady tiny float32 {tokens} kept cold" for tokens in (1, 4)]
    assert saved == [names[:1], names]
    assert both[names[0]] == first[names[0]]
    layer.run(options, save, layer.load(path, 1), _probe)
    assert len(saved) == 2  # nothing is missing
    for cell in both.values():
        assert cell["peers"]["gose"]["error"] < 1e-6
        # The peer is measured where it is installed, and says why where it is not.
        if (reason := cell["peers"]["hf_grouped"].get("reason")) is not None:
            assert reason == "No module named 'transformers'"
        for peer in cell["peers"].values():
            assert "reason" in peer or len(peer["seconds"]) == 2 == len(cell["floor_seconds"])


def _half_a_gradient(shape, weights):
    """Its gradient of x lacks the last expert's share."""
    built = _peers.gose(shape, weights)

    def train(given, _):
        id_TK = given.expert_TK.int()
        no_expert_TK = torch.where(id_TK == shape.num_experts - 1, shape.num_experts, id_TK)

        def call(x_TD, weight_TK, *weights):
            whole = gk.expert_mlp(x_TD.detach(), weight_TK, id_TK, *weights)
            part = gk.expert_mlp(x_TD, weight_TK.detach(), no_expert_TK, *weights)
            return whole + part - part.detach()

        return _peers.training(call, given, weights)

    return built._replace(train=train)


def test_training_steps_are_checked_and_timed(monkeypatch):
    found = []

    class Here(_team.Process):
        """A worker in this process."""

        def __init__(self, _python, peer, *_):
            self._worker = _worker.Worker(peer)

        def ask(self, do, **arguments):
            return json.loads(json.dumps(self._worker.answer({"do": do, **arguments})))

        def close(self):
            return ""

    wrong = _peers.Peer("gose", _half_a_gradient)
    peers = {**_peers.PEERS, "wrong": wrong}
    monkeypatch.setattr(_worker, "PEERS", peers)
    monkeypatch.setattr(_team, "Process", Here)
    options = _options("--rows", "train", "--tokens", "9", "--peers", "gose", "sglang")
    options.peers = ["gose", "wrong"]
    layer.run(options, lambda cells: found.append(dict(cells)), {}, _probe)
    (cell,) = found[0].values()
    ours = cell["peers"]["gose"]
    assert ours["error"] < 2e-6 and cell["peers"]["wrong"]["reason"].startswith("wrong")
    for name in ("seconds", "backward_seconds", "frozen_backward_seconds"):
        assert len(ours[name]) == 2
    assert all(b < s for b, s in zip(ours["backward_seconds"], ours["seconds"], strict=True))
    # Three matrices of 4 experts move thrice at least.
    moved = 3 * 3 * 4 * 64 * 96 * 4
    assert cell["floor_seconds"][0] >= moved / cell["bandwidth"][0]
    assert "| tiny float32 | 9 |" in _cells.train_table([cell])


def test_results_of_another_machine_are_refused(tmp_path, capsys):
    path = _record.save("layer", "", 1, {"cells": {}}, tmp_path)
    result = json.loads(path.read_text())
    result["machine"]["cpu"] = "another"
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="its cells have cpu 'another', here it is"):
        layer.load(path, 1)
    assert layer.main(["--out", str(tmp_path), "--threads", "1"]) == 2
    assert "name another --out" in capsys.readouterr().err


def test_a_cell_without_enough_accepted_rounds_is_missing():
    plan = next(layer.plans(_options("--tokens", "4", "--peers", "gose")))
    cells = {_cells.key(_cell()): _cell(gose=(1.0, 1.0, 1.0))}
    assert not layer.missing(plan, cells, ["gose"])
    assert layer.missing(plan, cells, ["gose", "hf_eager"]) == plan.cells
    cells[_cells.key(_cell())]["rounds"] = 4
    assert layer.missing(plan, cells, ["gose"]) == plan.cells


def test_a_peer_that_dies_is_a_row_with_its_last_words():
    peers = ["nobody", "gose"]
    with _team.gathered(
        peers, TINY, "float32", [], threads=1, pythons=[layer.sys.executable], environment={}
    ) as team:
        assert team.reasons == {"nobody": "died: exit code 1: KeyError: 'nobody'"}
        assert list(team.workers) == ["gose"]
        team.workers["gose"]._process.kill()
        assert team.ask("gose", "pack") == {"reason": "died: signal 9"}
        assert team.ask("gose", "pack") == {"reason": "died: signal 9"}


def test_the_floor_counts_touched_experts_or_products():
    plan = layer.Plan(TINY, "float32", "kept", "", [])
    bench = layer.Bench(plan, None, _rounds.Gate(lambda: 1e3, settle=2), 1, 1)
    expert = 3 * 64 * 96
    # one token: its two experts, and the token in and out
    assert bench._floor(1, 0, 1e9) == (2 * 2 * expert / 1e3, "compute")
    assert bench._floor(1, 0, 1.0) == ((2 * expert + 2 * 64) * 4, "memory")


def test_readme_takes_the_cells_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "_RESULTS", tmp_path)
    command = "python -m benchmarks layer --allocator kept --caches cold --peer-python PYTHON"
    assert readme.layer_table() == f"No measurement is committed: `{command}` makes one."
    shown = _cell(gose=(1.0, 2.0, 4.0))
    cells = {"a": {**shown, "tokens": 16}, "b": shown, "c": {**shown, "caches": "warm"}}
    _record.save("layer", "the command of the last cell", 1, {"cells": cells}, tmp_path)
    assert readme.layer_table().endswith(f"`{command}`.")
    rows = [line for line in readme.layer_table().splitlines() if "tiny" in line]
    assert [row.split(" | ")[1] for row in rows] == ["4", "16"]


def test_quantized_weights_are_compared_with_our_own_dtype(tmp_path, capsys):
    words = ("--weights", "int8,int4", "--tokens", "4", "--dtype", "bfloat16")
    options = _options(*words)
    assert options.peers == ["gose", "gose_int8", "gose_int4"]
    options.out = tmp_path
    kept = {}
    layer.run(options, kept.update, {}, _probe)
    peers = kept["steady tiny bfloat16 4 kept cold"]["peers"]
    assert peers["gose"]["error"] < 5e-3
    # Of four tokens and 64 columns: what is allowed of a layer of some size scatters here.
    assert 5e-3 < peers["gose_int8"]["error"] < 2e-2
    assert 5e-2 < peers["gose_int4"]["error"] < 0.15
    capsys.readouterr()
    cell = _cell(gose=(2.0, 4.0, 6.0), gose_int8=(1.0, 2.0, 2.0))
    cell["peers"]["gose_int8"]["error"] = 0.012
    table = _cells.weights_table([cell], ["int8", "int4"])
    assert table.splitlines()[-1] == "| tiny | 4 | 4e+03 | 2e+03 | 0.012 | 2.00 | – | – | – |"


def test_a_plot_is_drawn(tmp_path):
    _cells.plot([_cell(gose=(1.0, 2.0, 4.0)), _cell(slow=(2.0, 2.0, 4.0))], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_probes_of_the_machine():
    units = _roofline.units("float32")
    assert set(units) <= set(_roofline.units("bfloat16"))
    assert _roofline.units("bfloat16", "avx2") == ["fma_avx2"]
    assert 1e9 < _roofline.flops(units[-1], 1, 0.005) < 1e13
    assert 1e8 < _roofline.flush(1) < 1e13


@pytest.mark.parametrize(
    "argv",
    [["--rounds", "0"], ["--tokens", "0"], ["--shape", "huge"], ["--weights", "int8,int2"]],
)
def test_bad_options_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        layer.main(argv)
    assert stopped.value.code == 2
    capsys.readouterr()
