"""LoraExperts: low-rank adapters of one linear layer as cheap experts, each token through its own.

    y[t] = base(x[t]) + sum_k weight[t, k] * scale[e] * B[e] (A[e] x[t]),  e = expert[t, k]

The adapters of all tokens are two `grouped_gemm`s between `dispatch` and `combine`. Adapters of
lower rank are padded with zeros, which changes no bit of their sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gose_kernels.ops.combine import combine
from gose_kernels.ops.dispatch import dispatch
from gose_kernels.ops.grouped_gemm import grouped_gemm

_FOREIGN = ("use_dora", "lora_bias", "fan_in_fan_out", "alpha_pattern", "rank_pattern")


class Adapter(NamedTuple):
    """One adapter: a_RD and b_FR of a layer from D to F, and the factor of b a x."""

    a_RD: Tensor
    b_FR: Tensor
    scale: float


class LoraExperts(nn.Module):
    """A linear layer with adapters by name; the base keeps its bits, the adapters train.

    base      the linear layer; its parameters stop needing a gradient
    adapters  name -> Adapter, at least one; the largest rank is that of the stack
    Parameters lora_A [E, R, D] and lora_B [E, F, R] in the dtype of the base; `scale_E` a buffer.
    ValueError for adapters that do not fit the base.
    """

    scale_E: Tensor

    def __init__(self, base: nn.Linear, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("LoraExperts: adapters must name at least one adapter")
        F, D = base.weight.shape
        for name, (a_RD, b_FR, scale) in adapters.items():
            rank = a_RD.shape[0] if a_RD.dim() == 2 else 0
            if rank < 1 or a_RD.shape != (rank, D) or b_FR.shape != (F, rank):
                raise ValueError(
                    f"LoraExperts: adapter {name!r} must be [R, {D}] and [{F}, R] with R > 0, got "
                    f"{tuple(a_RD.shape)} and {tuple(b_FR.shape)}"
                )
            if not math.isfinite(scale):
                raise ValueError(f"LoraExperts: scale of {name!r} must be finite, got {scale}")
        self.base = base.requires_grad_(False)
        self.names = tuple(adapters)
        E, R = len(adapters), max(a.a_RD.shape[0] for a in adapters.values())
        like: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        a_ERD, b_EFR = torch.zeros(E, R, D, **like), torch.zeros(E, F, R, **like)
        for e, (a_RD, b_FR, _) in enumerate(adapters.values()):
            a_ERD[e, : len(a_RD)], b_EFR[e, :, : len(a_RD)] = a_RD, b_FR
        self.lora_A, self.lora_B = nn.Parameter(a_ERD), nn.Parameter(b_EFR)
        scales = [adapter.scale for adapter in adapters.values()]
        scale_E = torch.tensor(scales, dtype=torch.float32, device=base.weight.device)
        self.register_buffer("scale_E", scale_E)

    def slot(self, name: str) -> int:
        """The id of an adapter in `expert_TK`; ValueError for a name that is not there."""
        if name not in self.names:
            raise ValueError(
                f"LoraExperts.slot: no adapter {name!r}; adapters: {', '.join(self.names)}"
            )
        return self.names.index(name)

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
        """[T, F] in the dtype of x.

        expert_TK  int32 | int64, ids of `slot`; len(names) = unused slot
        weight_TK  float32; None: 1 for every slot
        """
        E = len(self.names)
        row_TK, token_N, offset_E1 = dispatch(expert_TK, E)
        down_NR = grouped_gemm(x_TD[token_N.clamp_min(0)], self.lora_A, offset_E1)
        y_NF = grouped_gemm(down_NR, self.lora_B, offset_E1)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        scale_TK = self.scale_E.to(dtype)[expert_TK.long().clamp_max(E - 1)]
        weight_TK = scale_TK if weight_TK is None else weight_TK * scale_TK
        out_TF: Tensor = self.base(x_TD) + combine(y_NF, weight_TK, row_TK)
        return out_TF


def read_peft(folder: Path | str) -> dict[str, Adapter]:
    """Module path -> adapter of a folder that PEFT's `save_pretrained` wrote, nothing run from it.

    Reads adapter_config.json and adapter_model.safetensors. ValueError for another kind of adapter
    than plain LoRA, for halves without their other half, and for values that are not finite.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"read_peft: {folder}: peft_type must be LORA, got {config.get('peft_type')!r}"
        )
    foreign = [name for name in _FOREIGN if config.get(name)]
    if foreign:
        raise ValueError(f"read_peft: {folder}: {', '.join(foreign)} is not supported")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, half = key.removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise ValueError(f"read_peft: {folder}: no LoRA weight of a linear layer: {key!r}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"read_peft: {folder}: {key} is not finite")
        halves.setdefault(path.removeprefix("base_model.model."), {})[half] = tensor
    for path, pair in halves.items():
        if len(pair) != 2 or len(pair["lora_A"]) != rank or pair["lora_B"].shape[1:] != (rank,):
            raise ValueError(
                f"read_peft: {folder}: {path} must have lora_A and lora_B of rank {rank}"
            )
    return {path: Adapter(pair["lora_A"], pair["lora_B"], scale) for path, pair in halves.items()}
