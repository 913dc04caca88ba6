"""What of a layer belongs to one expert: its rows of the stacked weights and of the router.

E slots, C of them after `resize`; an expert lives in one slot and stays there
rows      what is stored of one expert, by name: its rows of the stacked parameters. Of experts that
          are kept packed only (`PackedExperts`), its row of packed_EB and of the biases
weights   the same as plain weights by parameter name
live_E    bool buffer of the router: True = routing may choose it, else its score is -inf
frozen_E  bool buffer of the experts: True = its weights get a gradient of 0
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gose_kernels import packing
from gose_kernels.huggingface.experts import FLAGS
from gose_kernels.huggingface.layouts import OwnLayer
from gose_kernels.huggingface.packed import PackedExperts
from gose_kernels.living.following import rows_from
from gose_kernels.living.turns import Turns
from gose_kernels.moe import MoE

_PACKED = "packed_EB"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class LivingLayer:
    """The parts of a layer by name, and its forward in turns with changes.

    layer    a gk.MoE, the layer that `replace_moe_layers` put in the place of an own one, or an
             MoE block of transformers whose router runs on `route`
    ValueError for any other layer, with what is missing.
    """

    def __init__(self, layer: nn.Module) -> None:
        layer = layer.moe if isinstance(layer, OwnLayer) else layer
        self.layer = layer
        self.router, self.experts = _parts_of(layer)
        whole: Any = self.router
        self.num_slots = len(whole.weight)
        self.turns = Turns()
        E = self.num_slots
        if "live_E" in self.router._buffers:
            raise ValueError(f"LivingExperts: this {type(layer).__name__} has a LivingExperts")
        on = whole.weight.device
        self.router.register_buffer("live_E", torch.ones(E, dtype=torch.bool, device=on))
        self.experts.register_buffer("frozen_E", torch.zeros(E, dtype=torch.bool, device=on))
        vars(layer)["_gose_turns"] = self.turns
        own_class: Any = type(layer)
        layer.__class__ = _in_turns(own_class)

    @property
    def live_E(self) -> Tensor:
        found = self.router._buffers["live_E"]
        assert found is not None
        return found

    @property
    def frozen_E(self) -> Tensor:
        found = self.experts._buffers["frozen_E"]
        assert found is not None
        return found

    def of_experts(self) -> dict[str, Tensor]:
        """The tensors with a row per expert: parameters, or packed_EB and biases."""
        held: list[tuple[str, Tensor]] = list(self.experts.named_parameters(recurse=False))
        if isinstance(self.experts, PackedExperts):
            held.append((_PACKED, self.experts.packed_EB))
        return {name: t for name, t in held if t.dim() and len(t) == self.num_slots}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one expert's weights."""
        found = {name: tuple(t.shape[1:]) for name, t in self.of_experts().items()}
        if isinstance(self.experts, PackedExperts):
            del found[_PACKED]
            names = (self.experts.up_name, "down_proj")
            found |= {n: s[1:] for n, s in zip(names, self.experts.shapes, strict=True)}
        return found

    def weights_of(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that rows hold."""
        if not isinstance(self.experts, PackedExperts):
            return rows
        weights = {name: row for name, row in rows.items() if name != _PACKED}
        up, down = self.experts.weights_of(rows[_PACKED])
        return {self.experts.up_name: up, "down_proj": down, **weights}

    def rows_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that hold weights; ValueError for what cannot be quantized."""
        rows = dict(weights)
        if isinstance(self.experts, PackedExperts):
            up, down = rows.pop(self.experts.up_name), rows.pop("down_proj")
            rows[_PACKED] = self.experts.row_of(up, down)
        return rows

    def of_router(self) -> dict[str, Tensor]:
        """The router's tensors with a row per expert, parameters and buffers."""
        router = self.router
        held: list[tuple[str, Tensor]] = list(router.named_parameters(recurse=False))
        held += [(n, b) for n, b in router.named_buffers(recurse=False) if n != "live_E"]
        return {name: t for name, t in held if t.dim() and len(t) == self.num_slots}

    def changing(self, *slots: int) -> Any:
        """`packing.changing_experts` of these slots; of packed experts there is no other copy."""
        if isinstance(self.experts, PackedExperts):
            return contextlib.nullcontext()
        found = self.of_experts()
        up = found["gate_up_proj" if "gate_up_proj" in found else "up_proj"]
        return packing.changing_experts(up, found["down_proj"], slots)

    def resize(self, source: list[int]) -> dict[Tensor, Tensor]:
        """Slot i gets the rows of slot source[i], zeros for -1; parameters keep their identity.
        Returns every parameter's new values, which the caller has to give it."""
        changed: dict[Tensor, Tensor] = {}
        for module, tensors in ((self.experts, self.of_experts()), (self.router, self.of_router())):
            for name, tensor in tensors.items():
                values = rows_from(tensor.detach(), source)
                if isinstance(tensor, nn.Parameter):
                    changed[tensor] = values
                elif isinstance(module, PackedExperts):
                    module.set_rows(values)
                else:
                    module._buffers[name] = values
        self.router._buffers["live_E"] = rows_from(self.live_E, source)
        self.experts._buffers["frozen_E"] = rows_from(self.frozen_E, source)
        for module in (self.layer, self.router, self.experts):
            for name in _COUNTS:
                if vars(module).get(name) == self.num_slots:
                    setattr(module, name, len(source))
        self.num_slots = len(source)
        return changed

    def release(self) -> None:
        """The layer without turns and masks."""
        del self.router._buffers["live_E"], self.experts._buffers["frozen_E"]
        del vars(self.layer)["_gose_turns"]
        self.layer.__class__ = type(self.layer).__mro__[1]


def _parts_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(router, experts) of a layer."""
    if isinstance(layer, MoE):
        return layer.gate, layer.experts
    kind = type(layer).__name__
    children = list(layer.children())
    experts: list[Any] = [
        m
        for m in children
        if isinstance(m, PackedExperts) or all(hasattr(m, f) for f in (*FLAGS, "down_proj"))
    ]
    routers = [m for m in children if "_gose_routing" in vars(m)]
    if len(experts) != 1 or len(routers) != 1:
        raise ValueError(
            "LivingExperts: layer must be a gk.MoE or an MoE block of transformers after "
            f"replace_moe_layers(model, router={{}}), got {kind} with {len(experts)} experts "
            f"modules and {len(routers)} routers on `route`"
        )
    routing: Any = vars(routers[0])["_gose_routing"]
    if routing.takes_bias or routing.entropy_E is not None:
        given = "entropies" if routing.entropy_E is not None else "a bias from outside"
        raise ValueError(f"LivingExperts: the router of this {kind} takes {given}, one per expert")
    return routers[0], experts[0]


def _forward(self: Any, *args: Any, **named: Any) -> Any:
    own: Any = type(self).__mro__[1]
    if torch.compiler.is_compiling():  # a graph cannot wait: its callers use reading()
        return own.forward(self, *args, **named)
    with self._gose_turns.reading():
        return own.forward(self, *args, **named)


@functools.cache
def _in_turns(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(layer_class.__name__, (layer_class,), {"forward": _forward})
