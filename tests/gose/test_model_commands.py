"""calibrate and inspect on a tiny model in a folder, as functions and as commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from gose import adaptive, cli, inspection, language

EXPERTS, TOP_K = 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.5)
        model.model.layers[1].mlp.gate.weight[3] = 0  # rarely chosen
    path: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    (path / "text.py").write_bytes(Path(__file__).read_bytes())
    return path


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, torch.Tensor]:
    model = language.load(folder)
    return model, language.windows(folder, model, folder / "text.py", length=32, most=6)


def test_windows_are_the_bytes_and_perplexity_their_likelihood(folder: Path, loaded: Any) -> None:
    model, ids_BT = loaded
    content = (folder / "text.py").read_bytes()
    assert ids_BT.shape == (6, 32) and bytes(ids_BT.flatten().tolist()) == content[: 6 * 32]
    total = 0.0
    with torch.no_grad():
        for ids_T in ids_BT:
            p_TC = model(input_ids=ids_T[None]).logits[0].double().softmax(dim=1)
            total -= sum(math.log(p_TC[t, ids_T[t + 1]]) for t in range(31))
    assert language.perplexity(model, ids_BT) == pytest.approx(math.exp(total / (6 * 31)), rel=1e-5)


def test_calibration_finds_the_saving_and_puts_the_model_back(loaded: Any) -> None:
    model, ids_BT = loaded
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stock = language.perplexity(model, ids_BT)
    found = adaptive.calibrate(model, ids_BT, 0.33)
    assert abs(found.chosen.saving - 0.33) <= 0.02
    assert found.full.saving == 0 and found.full.perplexity == pytest.approx(stock, rel=1e-4)
    assert found.full.expert_flops_per_token == 2 * TOP_K * 2 * 3 * 32 * 16
    flops = (1 - found.chosen.saving) * found.full.expert_flops_per_token
    assert found.chosen.expert_flops_per_token == pytest.approx(flops)
    savings = [point.saving for point in found.tried]
    assert savings == sorted(savings, reverse=True)  # the higher the mass, the less is saved
    again = adaptive.run(model, ids_BT, found.chosen.mass)
    assert again == found.chosen
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert language.perplexity(model, ids_BT) == stock
    with pytest.raises(ValueError, match=r"saving must be at most 0\.750, which is that of one"):
        adaptive.calibrate(model, ids_BT, 0.8)
    with pytest.raises(ValueError, match="saving must be between 0 and 1, got 1"):
        adaptive.calibrate(model, ids_BT, 1)


def test_inspection_and_its_picture(loaded: Any) -> None:
    model, ids_BT = loaded
    model.model.layers[1].mlp.gate.weight.data[3] = -100 * model.model.layers[1].mlp.gate.weight[0]
    found = inspection.inspect(model, ids_BT)
    assert [row.name for row in found.rows] == [f"model.layers.{n}.mlp.gate" for n in range(2)]
    for row in found.rows:
        share = found.share_E[row.name]
        assert sum(share) == pytest.approx(1)
        assert row.busiest == pytest.approx(max(share) * EXPERTS)
        assert row.dead == tuple(e for e, s in enumerate(share) if s == 0)
        assert row.tokens == 192 and row.used_k == TOP_K and row.drop_rate == 0
        assert 0 < row.entropy < 1
    root = ElementTree.fromstring(inspection.picture(found))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert len(root.findall(f"{space}rect")) == 2 * EXPERTS
    crossed = sum(len(row.dead) for row in found.rows)
    assert len(root.findall(f"{space}line")) == crossed


def _command(*argv: str) -> Any:
    return CliRunner().invoke(cli.app, list(argv))


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    text, picture = str(folder / "text.py"), tmp_path / "load.svg"
    few = ("--length", "32", "--windows", "3")
    done = _command("calibrate", str(folder), text, "--saving", "0.3", *few, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tokens"] == 96 and abs(found["chosen"]["saving"] - 0.3) <= 0.03
    done = _command("calibrate", str(folder), text, "--saving", "0.3", *few)
    assert f"replace_moe_layers(model, adaptive_k={found['adaptive_k']:.6g})" in done.stdout
    done = _command("inspect", str(folder), "--text", text, "--out", str(picture), *few)
    assert done.exit_code == 0 and "model.layers.1.mlp.gate" in done.stdout
    assert ElementTree.parse(picture).getroot() is not None
    done = _command("inspect", str(folder), "--text", text, *few, "--json")
    assert [row["tokens"] for row in json.loads(done.stdout)["rows"]] == [96, 96]


def test_what_cannot_be_read_exits_2(folder: Path, tmp_path: Path) -> None:
    text, empty = str(folder / "text.py"), tmp_path / "empty"
    empty.write_bytes(b"")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    cases = [
        (["calibrate", str(tmp_path), text], "is no model: it has no config.json"),
        (["calibrate", str(bare), text], "weights of other formats are not read"),
        (["calibrate", str(folder), str(empty)], "less than one window of 256"),
        (["calibrate", str(folder), text, "--saving", "2"], "saving must be between 0 and 1"),
        (["inspect", str(folder), "--text", text, "--length", "1"], "length must be at least 2"),
        (["inspect", str(folder), "--text", str(tmp_path / "none")], "none"),
    ]
    for argv, message in cases:
        done = _command(*argv)
        assert done.exit_code == 2 and message in done.output, (argv, done.output)
