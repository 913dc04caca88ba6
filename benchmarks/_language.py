"""A small MoE language model of bytes, and the text that it is trained on: real, and installed
wherever this runs."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gose import checkpoint

LENGTH, BATCH = 256, 16  # bytes of a window, windows of a step
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
_PARTS = 20  # of the files, one part is validated on and one tested on


class Text(NamedTuple):
    """Bytes of files, one after the other, uint8, and how many files. Every file is in one of three
    parts: what is trained on, what numbers are chosen on, and what they are judged on."""

    train_N: Tensor
    validation_N: Tensor
    test_N: Tensor
    train_files: int
    validation_files: int
    test_files: int


def python_library() -> Text:
    """The source of the standard library of the Python that runs."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _read(root, (p for p in root.rglob("*.py") if not _SKIPPED & set(p.parts)), 1 << 30)


def cpp_headers(most_bytes: int) -> Text:
    """The C++ headers that come with torch, of every 4th file at most `most_bytes` in all."""
    root = Path(torch.__file__).parent / "include"
    return _read(root, sorted(root.rglob("*.h"))[::4], most_bytes)


def _read(root: Path, paths: Iterable[Path], most_bytes: int) -> Text:
    parts: tuple[list[bytes], ...] = ([], [], [])
    size = 0
    for path in sorted(paths):
        content = path.read_bytes()
        size += len(content)
        if size > most_bytes:
            break
        drawn = hashlib.sha256(str(path.relative_to(root)).encode()).digest()[0] % _PARTS
        parts[{0: 2, 1: 1}.get(drawn, 0)].append(content)
    train, validation, test = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts
    )
    return Text(train, validation, test, *(len(part) for part in parts))


def spread(text_N: Tensor, most: int) -> Tensor:
    """[B, LENGTH] int64: B <= most windows spread evenly over a text, none over another."""
    whole = len(text_N) // LENGTH
    count = min(most, whole)
    index_B = torch.arange(count) * whole // max(count, 1)
    return text_N[: whole * LENGTH].view(whole, LENGTH)[index_B].long()


def windows(text_N: Tensor, count: int, seed: int) -> Tensor:
    """[count, LENGTH] int64: windows of a text at places that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    start_B = torch.randint(len(text_N) - LENGTH, (count,), generator=generator)
    return text_N[start_B[:, None] + torch.arange(LENGTH)].long()


def model(seed: int, experts: int = 16, top_k: int = 4) -> Any:
    """A Qwen3-MoE of 4 layers on bytes, 2 million parameters in experts; on these kernels."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    options: dict[str, Any] = {"head_dim": 32}  # which the class takes and does not declare
    config = Qwen3MoeConfig(
        **options,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def train(
    net: Any,
    optimizer: torch.optim.Optimizer,
    text_N: Tensor,
    *,
    steps: int,
    seed: int,
    rate: float,
    folder: Path,
    tell: Callable[[str], None],
    horizon: int | None = None,
    balance: bool = True,
    every: int = 100,
) -> float:
    """CPU seconds of steps on windows that (seed, step) alone decide; goes on from the newest
    checkpoint in `folder` and leaves one every `every` steps.

    horizon   steps of the cosine that the rate follows after 5 % of warm-up; None: `steps`. Of a
              longer one the first `steps` are run, the last eighth of them with a rate that also
              falls to zero in a line
    balance   with the model's own load-balancing loss, which knows the experts of its config alone
    """
    found = checkpoint.latest(folder).checkpoint if folder.is_dir() else None
    done, before = 0, 0.0
    if found is not None:
        done, before = found.step, float(str(found.extra["cpu_seconds"]))
        net.load_state_dict(_part(found.state.tensors, "net."))
        state = optimizer.state_dict()
        state["state"] = _nested(_part(found.state.tensors, "optimizer."))
        optimizer.load_state_dict(state)
    net.train()
    start = time.process_time() - before
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _share_of_rate(step, steps, horizon or steps)
        ids_BT = windows(text_N, BATCH, seed * 1_000_003 + step)
        loss = net(input_ids=ids_BT, labels=ids_BT, output_router_logits=balance).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 25 == 0:
            tell(f"step {step + 1}/{steps}: loss {loss.item():.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            before = time.process_time() - start
            tensors = {f"net.{name}": t for name, t in net.state_dict().items()}
            for index, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{name}": t for name, t in entry.items()}
            tensors = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
            trained = checkpoint.State(tensors, {})
            checkpoint.save(folder, trained, step=step + 1, extra={"cpu_seconds": before})
    return before


def _share_of_rate(step: int, steps: int, horizon: int) -> float:
    warm = min(1.0, (step + 1) / (0.05 * horizon))
    cosine = max(0.5 * (1 + math.cos(math.pi * step / horizon)), 0.05)
    end = min(1.0, (steps - step) * 8 / steps) if steps < horizon else 1.0
    return warm * cosine * end


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, of = name.partition(".")
        found.setdefault(int(index), {})[of] = tensor
    return found


@torch.no_grad()
def loss_of(net: Any, ids_BT: Tensor) -> float:
    """Mean nats per byte of windows, without the first of each."""
    net.eval()
    total = 0.0
    for part_BT in ids_BT.split(BATCH):
        logits_BTC = net(input_ids=part_BT, output_router_logits=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits_BTC.double().flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum"
        )
        total += float(losses)
    return total / (ids_BT.numel() - len(ids_BT))
