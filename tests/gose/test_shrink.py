"""Quantized checkpoints: what is written, read back, planned from headers, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import gose_kernels as gk
from gose import cli, language, shrink

BITS = {"int8": 8, "int4": 4}


def _tensors() -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(0)
    experts = {
        f"model.layers.{n}.mlp.experts.{e}.up_proj.weight": torch.randn(24, 40, generator=seed)
        for n in range(2)
        for e in range(2)
    }
    return {
        **experts,
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, 5, 7, generator=seed).bfloat16(),
        "model.layers.0.mlp.experts.bias": torch.randn(9, generator=seed),
        "model.layers.0.mlp.gate.weight": torch.randn(2, 40, generator=seed),
        "model.experts_count": torch.tensor([2]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    held = _tensors()
    names = list(held)
    save_file({n: held[n] for n in names[:3]}, path / "model-00001-of-00002.safetensors")
    save_file({n: held[n] for n in names[3:]}, path / "model-00002-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "config.json").write_text('{"hidden_size": 40}')
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize("weights", BITS)
def test_what_is_written_reads_back(folder: Path, tmp_path: Path, weights: str) -> None:
    out = tmp_path / "small"
    entries = {e.name: e.error for e in shrink.quantize(folder, out, weights)}
    back, held = dict(shrink.read(out)), _tensors()
    assert back.keys() == held.keys()
    for name, tensor in held.items():
        got = back[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        if name not in entries:
            assert torch.equal(got, tensor)
            continue
        code, scale, _ = gk.quantize(tensor, format=shrink.FORMATS[weights])
        flat = gk.dequantize(code, scale, tensor.numel(), format=shrink.FORMATS[weights])
        assert torch.equal(got, flat.view(tensor.shape).to(tensor.dtype))
        error = (flat.double() - tensor.flatten().double()).norm() / tensor.double().norm()
        assert entries[name] == pytest.approx(float(error))
        assert 0 < entries[name] < {"int8": 0.01, "int4": 0.15}[weights]
    assert sorted(entries) == sorted(n for n, t in held.items() if "experts." in n and t.dim() > 1)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "quantized.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("weights", BITS)
def test_a_plan_reads_headers_alone_and_is_what_is_written(
    folder: Path, tmp_path: Path, weights: str
) -> None:
    rows = {row.name: row for row in shrink.plan(folder, weights)}
    shrink.quantize(folder, tmp_path / "small", weights)
    for path in (tmp_path / "small").glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                whole = name.removesuffix(".code")
                if name.endswith(".scale"):
                    continue
                size = opened.get_tensor(name).nbytes
                if whole != name:
                    size += opened.get_tensor(f"{whole}.scale").nbytes
                assert rows[whole].bytes_after == size
                assert rows[whole].bytes_before == _tensors()[whole].nbytes
    for path in folder.glob("*.safetensors"):  # a hole where the data was
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:length])
        with path.open("r+b") as file:
            file.truncate(len(content))
    assert {row.name: row for row in shrink.plan(folder, weights)} == rows


def test_what_was_changed_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    shrink.quantize(folder, out, "int8")
    files = [*sorted(out.glob("model*")), out / "quantized.json"]
    for path in files:
        content = path.read_bytes()
        for at in (0, 9, len(content) // 2, len(content) - 1):
            broken = bytearray(content)
            broken[at] ^= 0x11
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=path.name):
                shrink.read(out)
        for broken in (content[:-1], content + b" ", b""):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=path.name):
                shrink.read(out)
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            shrink.read(out)
        path.write_bytes(content)
    assert len(dict(shrink.read(out))) == len(_tensors())


def test_what_cannot_be_quantized_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    first = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(ValueError, match="weights must be int8 or int4, got 'int2'"):
        shrink.plan(folder, "int2")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        shrink.quantize(folder, folder, "int8")
    shrink.quantize(folder, out, "int8")
    with pytest.raises(ValueError, match="is quantized already"):
        shrink.plan(out, "int8")
    content = first.read_bytes()
    for broken in (b"", content[:20], content[:-3], b"\xff" * 40, content + b"x"):
        first.write_bytes(broken)
        with pytest.raises(ValueError, match=first.name):
            shrink.plan(folder, "int8")
    held = _tensors()
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    save_file({name: held[name] / 0}, first)
    with pytest.raises(ValueError, match=rf"{first.name}: {name}: .*finite"):
        shrink.quantize(folder, tmp_path / "nan", "int8")
    left = list((tmp_path / "nan").iterdir())  # neither config nor manifest: no model
    assert left == []
    save_file({next(reversed(held)): torch.ones(3)}, first)
    with pytest.raises(ValueError, match="stands in two files"):
        shrink.plan(folder, "int8")
    save_file({"weight": torch.ones(3, 3)}, first)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="no floating matrix has `experts`"):
        shrink.plan(folder, "int8")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        shrink.plan(folder, "int8")


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).eval()


def test_the_command_and_the_restored_model(tmp_path: Path) -> None:
    model = _mixtral()
    model.save_pretrained(tmp_path / "model")
    run = CliRunner().invoke
    planned = run(cli.app, ["quantize", str(tmp_path / "model"), "--plan", "--json"])
    out = tmp_path / "small"
    done = run(cli.app, ["quantize", str(tmp_path / "model"), str(out), "--json"])
    assert planned.exit_code == done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    layers = report.pop("layers")
    assert json.loads(planned.stdout) == report and report["quantized"] == 2 * 4 * 3
    assert list(layers) == [f"model.layers.{n}.block_sparse_moe" for n in range(2)]
    assert all(0 < e["mean_error"] <= e["largest_error"] < 0.01 for e in layers.values())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        got, want = language.load(out)(input_ids=ids).logits, model(input_ids=ids).logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.02
    for argv in (
        ["quantize", str(out), str(tmp_path / "x")],
        ["quantize", str(tmp_path / "model")],
    ):
        refused = run(cli.app, argv)
        assert refused.exit_code == 2


_PEAK = """
import sys
from pathlib import Path
from gose import shrink

def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

small, model, out = map(Path, sys.argv[1:])
shrink.quantize(small, out / "out0", "int8")  # what is loaded once
before = peak()
shrink.quantize(model, out / "out1", "int8")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(folder: Path, tmp_path: Path) -> None:
    """Four layers of 48 MiB in one file: what is taken on top is less than one layer."""
    layer = {
        "gate_up_proj": torch.ones(8, 1024, 2048, dtype=torch.bfloat16),
        "down_proj": torch.ones(8, 1024, 1024, dtype=torch.bfloat16),
    }
    layer_bytes = sum(tensor.nbytes for tensor in layer.values())
    model = tmp_path / "layers"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file(
        {f"layers.{n}.experts.{k}": t.clone() for n in range(4) for k, t in layer.items()},
        model / "model.safetensors",
    )
    command = [sys.executable, "-c", _PEAK, folder, model, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= layer_bytes
