"""Memory while packing, mapped and unaligned weights, threads, forks, and many calls."""

from __future__ import annotations

import copy
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import gose_kernels as gk
from gose_kernels.huggingface.experts import experts_forward
from tests.huggingface.families import families, tiny_model

FAMILIES = {f.name: f for f in families()}

gk.huggingface.register()


def _experts(name: str = "MixtralExperts") -> Any:
    model = tiny_model(FAMILIES[name])
    return next(m for m in model.modules() if type(m) is FAMILIES[name].experts)


def _inputs(module: Any, T: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.Generator().manual_seed(0)
    top = torch.rand(T, module.num_experts, generator=seed).topk(2, dim=1)
    return torch.randn(T, 32, generator=seed), top.indices, top.values


_PACKING = """
import sys, torch, transformers
import gose_kernels as gk

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(name))

torch.set_num_threads(1)
config = transformers.MixtralConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, num_local_experts=24)
model = transformers.MixtralForCausalLM._from_config(config).eval()
expert = 3 * 512 * 1024 * 4
ids = torch.arange(8)[None]
with torch.no_grad():
    want = model(input_ids=ids).logits
small = transformers.MixtralForCausalLM._from_config(transformers.MixtralConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, num_local_experts=4)).eval()
gk.huggingface.replace_moe_layers(small, keep="packed").restore()  # what is imported once is there
for turn in ("pack", "unpack"):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    before = status("VmRSS")
    if turn == "pack":
        done = gk.huggingface.replace_moe_layers(model, keep="packed")
    else:
        done.restore()
    print(turn, (status("VmHWM") - before) / expert, (status("VmRSS") - before) / expert)
with torch.no_grad():
    got = model(input_ids=ids).logits
assert torch.equal(got, want)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_packing_never_holds_both_copies_of_more_than_an_expert() -> None:
    """Peak growth in experts, of a model of two layers of 24: both ways."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PACKING],
        capture_output=True,
        text=True,
        # What is freed goes back at once: the resident pages are then what the code holds, and not
        # also the up to 64 MiB that glibc keeps for later once it has seen a large block freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["pack", "unpack"]
    for line in lines:
        peak, after = map(float, line.split()[1:])
        # An expert's new row beside its old one, and the temporaries of unpacking.
        assert peak < 3 and after < 0.5, line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_and_unaligned_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """A safetensors file whose header has an odd length, mapped and not copied."""
    module = _experts().to(dtype)
    x_TD, index, weight = _inputs(module)
    want = experts_forward(module, x_TD.to(dtype), index, weight.to(dtype))
    names, at, header, body = ["gate_up_proj", "down_proj"], 0, {}, b""
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    for name in names:
        raw = getattr(module, name).detach().contiguous().view(torch.uint8).numpy().tobytes()
        shape = list(getattr(module, name).shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at, body = at + len(raw), body + raw
    text = json.dumps(header)
    text += " " * (1 - len(text) % 2)  # an odd length: no element stands at its alignment
    file = tmp_path / "odd.safetensors"
    file.write_bytes((len(text)).to_bytes(8, "little") + text.encode() + body)
    other = copy.deepcopy(module)
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    for name in names:
        start, stop = header[name]["data_offsets"]
        raw_tensor = torch.frombuffer(
            mapped, dtype=torch.uint8, offset=8 + len(text) + start, count=stop - start
        )
        tensor = raw_tensor.untyped_storage()
        p = getattr(other, name)
        p.data = torch.empty(0, dtype=dtype).set_(tensor)[: p.numel()].view(p.shape)
        assert p.data_ptr() % dtype.itemsize != 0
    got = experts_forward(other, x_TD.to(dtype), index, weight.to(dtype))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_model(FAMILIES["OlmoeExperts"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match=r"not fully covered|[Ii]ncomplete"):
        type(model).from_pretrained(tmp_path, experts_implementation="gose")


def test_threads_give_the_bits_of_one() -> None:
    """First calls at once, so that the copy of the weights is made under contention."""
    for keep in ("both", "packed"):
        gk.packing.forget_packed()
        model = tiny_model(FAMILIES["OlmoeExperts"], experts_implementation="gose")
        gk.huggingface.replace_moe_layers(model, router={}, keep=keep)
        ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
        results: list[Tensor] = []
        start = threading.Barrier(8)

        def run(
            model: Any = model, ids: Tensor = ids, start: Any = start, results: Any = results
        ) -> None:
            start.wait()
            with torch.no_grad():
                results.extend(model(input_ids=ids).logits for _ in range(3))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            want = model(input_ids=ids).logits
        assert len(results) == 24
        for got in results:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


_FORK = """
import os, sys, warnings
import torch
warnings.simplefilter("ignore")
import gose_kernels as gk
torch.set_num_threads(int(sys.argv[1]))
args = (torch.randn(64, 64), torch.full((64, 2), 0.5), torch.arange(128).view(64, 2) % 8,
        torch.randn(8, 256, 64), torch.randn(8, 64, 128))
want = gk.expert_mlp(*args)
child = os.fork()
if child == 0:
    try:
        same = torch.equal(gk.expert_mlp(*args), want)
        os.write(1, b"same" if same else b"different")
    except (RuntimeError, ValueError) as error:
        os.write(1, str(error).encode())
    os._exit(0)
os.waitpid(child, 0)
"""


def _forked(threads: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(threads)], capture_output=True, text=True, timeout=200
    )
    return done.stdout


def test_a_forked_child_with_one_thread_works_and_with_more_raises() -> None:
    assert _forked(1) == "same"
    assert "call torch.set_num_threads(1) in it" in _forked(2)


def test_many_calls_leak_nothing(pytestconfig: pytest.Config) -> None:
    """Resident memory after the first thousand calls stays; 1e5 calls with --whole."""
    module = _experts()
    inputs = _inputs(module, T=2)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with torch.no_grad():
        for _ in range(1000):
            experts_forward(module, *inputs)
        before = resident()
        for _ in range(100_000 if pytestconfig.getoption("--whole") else 3000):
            experts_forward(module, *inputs)
    assert resident() - before < 2**20
