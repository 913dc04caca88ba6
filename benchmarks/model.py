"""Whole transformers models with random weights: prefill and decode, the share of the MoE layers.

Every implementation of the experts runs in the same model, one after the other in every round, so
that a busy machine disturbs all alike. `moe` is the time inside the experts modules, `model` that
of the whole call. Correctness is checked first: float32 logits of the first layers' width.

    python -m benchmarks model [--model olmoe-4layer|qwen3moe-4layer] [--quick] [--threads N]
                               [--tokens T] [--rounds N] [--heap kept|default] [--packed]

--heap kept tells the C library to keep freed memory, as a server does; the default gives large
blocks back to the system at every call. --packed holds only the packed weights (then gose runs
alone, and what is reported is its memory beside its time).
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gose_kernels as gk
from benchmarks import _record

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe-4layer": (
        "Olmoe",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
    ),
    "qwen3moe-4layer": (
        "Qwen3Moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
}
PEERS = ("eager", "grouped_mm")
_DECODE_CACHE = 64  # tokens in the key-value cache before the first decoded one


def build(name: str, layers: int, dtype: torch.dtype) -> Any:
    """The model; layers share their values, not their memory: drawing them takes longest."""
    import transformers

    family, sizes = MODELS[name]
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    seed = torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for p in model.parameters():
            shape = tuple(p.shape)
            if p.dim() == 1:
                p.fill_(1)
            elif shape in drawn:
                p.copy_(drawn[shape])
            else:
                drawn[shape] = p.uniform_(-1, 1, generator=seed).mul_((3 / p.shape[-1]) ** 0.5)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


class _Clock:
    """Seconds inside the experts modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = self._start = 0.0
        for module in model.modules():
            if hasattr(module, "_is_expert_parallel"):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _leave(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def time(self, run: Any) -> tuple[float, float]:
        """(seconds in the experts, seconds of the call)."""
        self.seconds = 0.0
        start = time.perf_counter()
        run()
        return self.seconds, time.perf_counter() - start


def _keep_heap() -> None:
    """No freed block goes back to the system (mallopt: M_TRIM_THRESHOLD, M_MMAP_MAX)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)
    libc.mallopt(-4, 0)


@torch.inference_mode()
def measure(
    model: Any, phase: str, names: Sequence[str], tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Implementation -> median milliseconds of the experts and of the call, and first-call ones."""
    clock = _Clock(model)
    seed = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    length = tokens if phase == "prefill" else _DECODE_CACHE
    prompt = torch.randint(vocabulary, (1, length), generator=seed)
    steps = torch.randint(vocabulary, (rounds + 1, 1, 1), generator=seed)
    caches: dict[str, Any] = {}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def run(name: str, at: int) -> None:
        if phase == "prefill":
            model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        else:
            caches[name] = model(input_ids=steps[at], past_key_values=caches[name]).past_key_values

    for at in range(rounds + 1):
        for name in names if at % 2 else reversed(names):
            if name != "packed":
                model.set_experts_implementation(name)
            if phase == "decode" and at == 0:
                caches[name] = model(input_ids=prompt, use_cache=True).past_key_values
            seen[name].append(clock.time(lambda name=name, at=at: run(name, at)))
    table = {}
    for name, pairs in seen.items():
        experts, whole = zip(*pairs[1:], strict=True)
        table[name] = {
            "moe_ms": 1e3 * statistics.median(experts),
            "model_ms": 1e3 * statistics.median(whole),
            "moe_spread": (max(experts) - min(experts)) / statistics.median(experts),
            "first_moe_ms": 1e3 * pairs[0][0],
        }
    return table


def _ratios(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster than the better of grouped_mm and eager."""
    peers = [row for name, row in table.items() if name in ("eager", "grouped_mm")]
    return {
        key: min(row[f"{key}_ms"] for row in peers) / table["gose"][f"{key}_ms"]
        for key in ("moe", "model")
    }


def check(name: str) -> float:
    """Relative difference of float32 logits between gose and eager, one layer."""
    model = build(name, 1, torch.float32)
    ids = torch.arange(8)[None]
    logits = []
    with torch.inference_mode():
        for implementation in ("eager", "gose"):
            model.set_experts_implementation(implementation)
            logits.append(model(input_ids=ids).logits)
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    if not error < 1e-4:
        raise RuntimeError(f"benchmarks model: gose is off by {error:.3g} from eager on {name}")
    return error


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes benchmarks/results/model_<name>.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks model", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="olmoe-4layer")
    parser.add_argument("--quick", action="store_true", help="one layer, few rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1024, help="of the prefill")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heap", choices=("kept", "default"), default="kept")
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.heap == "kept":
        _keep_heap()
    gk.huggingface.register()
    error = 0.0 if options.packed else check(options.model)
    model = build(options.model, 1 if options.quick else 4, torch.bfloat16)
    if options.packed:
        model.set_experts_implementation("gose")
        print(gk.huggingface.replace_moe_layers(model, keep="packed"))
    rounds = 3 if options.quick else options.rounds
    phases: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        names = ("packed",) if options.packed else (*PEERS, "gose")
        repeats = rounds if phase == "prefill" else 4 * rounds
        table = measure(model, phase, names, options.tokens, repeats)
        if phase == "decode" and not options.packed:
            # Apart: it copies the weights of every token's experts, which empties all caches.
            table |= measure(model, phase, ("batched_mm",), options.tokens, rounds)
        ratios = {} if options.packed else _ratios(table)
        phases[phase] = {"rows": table, "ratios": ratios}
        for name, row in table.items():
            print(
                f"{phase:8}{name:12} experts {row['moe_ms']:9.2f} ms  model {row['model_ms']:9.2f}"
                f" ms  first {row['first_moe_ms']:9.2f}  spread {row['moe_spread']:.0%}"
            )
        if ratios:
            print(f"{phase:8}experts {ratios['moe']:.2f}x, model {ratios['model']:.2f}x")
    suffix = ("_quick" if options.quick else "") + ("_packed" if options.packed else "")
    path = _record.save(
        f"model_{options.model.split('-')[0]}{suffix}",
        f"python -m benchmarks model {' '.join(argv)}".strip(),
        options.threads,
        {"phases": phases, "heap": options.heap, "error": error, "peak_bytes": _peak_bytes()},
    )
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
