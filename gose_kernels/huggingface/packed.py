"""Experts whose only copy of the weights is the packed one: for inference in half the memory.

`PackedExperts` stands in the place of an experts module. Its weights go over expert by expert: an
expert's packed row is written, then its pages in the old tensors are given back to the system, so
at no time are there both copies of more than one expert. `unpack` goes the same way back. Quantized
weights go over in the same way, and come back as what they were rounded to.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch
from torch import Tensor, nn

from gose_kernels.huggingface.experts import NAME, check, slots
from gose_kernels.huggingface.forms import Form, form_of
from gose_kernels.ops.activations import ACTIVATIONS
from gose_kernels.ops.expert_mlp_packed import expert_mlp_packed
from gose_kernels.packing import pack_experts, quantize_experts, unpack_experts

_COPIED = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "config")


@functools.cache
def _madvise() -> Any:
    """The C library's madvise, or None where there is none with Linux's meaning."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor uses the memory: one reference is the tensor's, one is ours."""
    storage = tensor.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) <= 2)


def _give_back(tensor: Tensor) -> None:
    """Lets the system take the whole pages of a contiguous tensor, whose values are then lost."""
    madvise = _madvise()
    if madvise is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        madvise(start, stop - start, mmap.MADV_DONTNEED)


class PackedExperts(nn.Module):
    """What an experts module computes, from packed weights; biases stay parameters.

    state_dict gives the weights unpacked under their own names (both copies then exist), and
    load_state_dict packs what it is given. No gradient.
    """

    packed_EB: Tensor
    config: Any

    def __init__(self, module: Any, form: Form, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights
        for name in _COPIED:
            setattr(self, name, getattr(module, name))
        self._is_expert_parallel = module._is_expert_parallel
        self.form = form
        self.up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = getattr(module, self.up_name), module.down_proj
        self.shapes = (tuple(up.shape), tuple(down.shape))
        self.dtype: torch.dtype = up.dtype
        self.hidden, self.width = down.shape[1:] if module.is_transposed else down.shape[:0:-1]
        for name in (f"{self.up_name}_bias", "down_proj_bias"):
            self.register_parameter(name, getattr(module, name) if module.has_bias else None)
        self._module = [module]  # in a list: not a submodule
        self.register_buffer("packed_EB", self._take(up, down), persistent=False)
        for parameter in (up, down):
            parameter.data = parameter.data.new_empty(0)

    def _pack(self, up: Tensor, down: Tensor, out: Tensor | None = None) -> Tensor:
        layout = {
            "gated": ACTIVATIONS[self.form.activation].gated,
            "interleaved": self.form.interleaved,
            "transposed": bool(self.is_transposed),
        }
        if self.weights is None:
            return pack_experts(up, down, **layout, out=out)
        return quantize_experts(up, down, weights=self.weights, **layout, out=out)

    @torch.no_grad()
    def _take(self, up: Tensor, down: Tensor) -> Tensor:
        """packed_EB; the pages of both tensors are given back as their experts are packed."""
        alone = [_alone(p) for p in (up, down)]
        up, down = up.data, down.data
        lone = [t for t, is_alone in zip((up, down), alone, strict=True) if is_alone]
        first = self._pack(up[:1], down[:1])
        packed_EB = first.new_empty(up.shape[0], first.shape[1])
        for e in range(len(up)):
            self._pack(up[e : e + 1], down[e : e + 1], packed_EB[e : e + 1])
            for tensor in lone:
                _give_back(tensor[e])
        return packed_EB

    def weights_of(self, row_B: Tensor) -> tuple[Tensor, Tensor]:
        """(up, down) of one expert's row of packed_EB, in the module's layout."""
        up_1HD, down_1DF = unpack_experts(
            row_B[None],
            width=self.width,
            hidden=self.hidden,
            dtype=self.dtype,
            gated=ACTIVATIONS[self.form.activation].gated,
            weights=self.weights,
        )
        if self.form.interleaved:
            up_1HD = up_1HD.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if self.is_transposed:
            up_1HD, down_1DF = up_1HD.mT, down_1DF.mT
        return up_1HD[0], down_1DF[0]

    @torch.no_grad()
    def row_of(self, up: Tensor, down: Tensor) -> Tensor:
        """The row of packed_EB of one expert with these weights, as `weights_of` gives them.
        ValueError for quantized weights that are not finite."""
        row_B: Tensor = self._pack(up[None].to(self.dtype), down[None].to(self.dtype))[0]
        return row_B

    def set_rows(self, packed_EB: Tensor) -> None:
        """These experts in the place of those that are there, as many as there are rows."""
        E = len(packed_EB)
        self.packed_EB = packed_EB
        self.num_experts = self._module[0].num_experts = E
        up, down = self.shapes
        self.shapes = ((E, *up[1:]), (E, *down[1:]))

    @torch.no_grad()
    def _unpacked(self, give_back: bool) -> tuple[Tensor, Tensor]:
        up, down = (self.packed_EB.new_empty(s, dtype=self.dtype) for s in self.shapes)
        for e in range(len(up)):
            for into, tensor in zip(
                (up[e], down[e]), self.weights_of(self.packed_EB[e]), strict=True
            ):
                into.copy_(tensor)
            if give_back:
                _give_back(self.packed_EB[e])
        return up, down

    def unpack(self) -> Any:
        """The module that was packed, the same bits (of quantized weights: what they became) in its
        own parameters; this one is used up. ValueError while a LivingExperts has it."""
        if "frozen_E" in self._buffers:
            raise ValueError(
                "restore: packed experts are in a LivingExperts; call its settle() first"
            )
        module = self._module.pop()
        up, down = self._unpacked(give_back=_alone(self.packed_EB))
        del self.packed_EB
        getattr(module, self.up_name).data, module.down_proj.data = up, down
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `experts_forward`. RuntimeError if another implementation than gose is asked for."""
        if (asked := self.config._experts_implementation) != NAME:
            raise RuntimeError(
                f"gose experts: the weights are packed, so experts_implementation={asked!r} cannot "
                f"run; undo the swap first (restore() of what replace_moe_layers returned)"
            )
        check(self._module[0], hidden_states, top_k_index, top_k_weights, self.dtype)
        if hidden_states.shape[1] != self.width:
            raise ValueError(
                f"gose experts: hidden_states must be of width D = {self.width}, "
                f"got {hidden_states.shape[1]}"
            )
        weight_TK = top_k_weights.to(torch.promote_types(self.dtype, torch.float32))
        bias_up, bias_down = getattr(self, f"{self.up_name}_bias"), self.down_proj_bias
        out_TD: Tensor = expert_mlp_packed(
            *(hidden_states.to(self.dtype), weight_TK, slots(self, top_k_index)),
            *(self.packed_EB, self.hidden, bias_up, bias_down),
            activation=self.form.activation,
            interleaved=self.form.interleaved,
            limit=self.form.limit,
            alpha=self.form.alpha,
            weights=self.weights,
        )
        return out_TD.to(hidden_states.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        up, down = self._unpacked(give_back=False)
        destination[prefix + self.up_name], destination[f"{prefix}down_proj"] = up, down

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        names = [prefix + self.up_name, f"{prefix}down_proj"]
        taken = {name: state.pop(name) for name in names if name in state}
        super()._load_from_state_dict(state, prefix, *others)
        state.update(taken)
        missing_keys, unexpected_keys, errors = others[-3:]
        if len(taken) < len(names):
            missing_keys.extend(name for name in names if name not in taken)
            return
        unexpected_keys[:] = [name for name in unexpected_keys if name not in names]
        for (name, tensor), shape in zip(taken.items(), self.shapes, strict=True):
            if tuple(tensor.shape) != shape:
                errors.append(f"size mismatch for {name}: {tuple(tensor.shape)}, wanted {shape}")
                return
        up, down = (tensor.to(self.dtype) for tensor in taken.values())
        for e in range(len(up)):
            self._pack(up[e : e + 1], down[e : e + 1], self.packed_EB[e : e + 1])


def finite(module: Any) -> bool:
    """Whether all weights of an experts module are, looked at expert by expert."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return all(bool(w.isfinite().all()) for w in (*up.data, *module.down_proj.data))


def why_not_packed(module: Any) -> str | None:
    """Why an experts module cannot be packed, or None."""
    if module.has_post_expert_norm:
        return "a norm stands after its experts"
    if form_of(module) is None:
        return "its activation has no kernel"
    down = module.down_proj
    if down.device.type != "cpu":
        return f"its weights are on {down.device}, packed weights are for the CPU kernels"
    if down.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"packed weights are float32, bfloat16 or float16, not {down.dtype}"
    return None
