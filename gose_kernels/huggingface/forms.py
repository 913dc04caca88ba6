"""What an experts module computes between its two products, found by asking it.

A module of transformers says what it does in code: `_apply_gate(pre) -> a` with a gate, `act_fn`
without one. `form_of` runs that code on a grid of values and looks for the activation of
`expert_mlp` that gives the same numbers, so a model family needs no name here, and one that
computes something of its own is found out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gose_kernels.ops.activations import ACTIVATIONS

# Both sides of every place where some activation bends, and far out where gelu is its tanh form.
_GRID = (-40.0, -9.0, -4.0, -2.6, -1.0, -0.5, -1e-3, 0.0, 1e-3, 0.4, 0.9, 1.5, 2.7, 5.0, 11.0, 40.0)
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # float32 against float64; the closest two forms differ by 1e-4


class Form(NamedTuple):
    """The arguments with which `expert_mlp` computes an activation; interleaved as it has it."""

    activation: str
    limit: float | None = None
    alpha: float = 1.702
    interleaved: bool = False


def _numbers(module: nn.Module, *words: str) -> list[float]:
    """Plain numbers among a module's attributes whose name has one of the words."""
    return [
        float(value)
        for name, value in vars(module).items()
        if type(value) in (int, float) and any(word in name for word in words)
    ]


def _candidates(module: nn.Module, gated: bool) -> Iterator[Form]:
    names = [name for name, act in ACTIVATIONS.items() if act.gated == gated]
    if not gated:
        yield from (Form(name) for name in names)
        return
    limits = [None, *(x for x in _numbers(module, "limit", "clamp", "clip") if x > 0)]
    alphas = _numbers(module, "alpha") or [Form._field_defaults["alpha"]]
    for name, limit, interleaved in itertools.product(names, limits, (False, True)):
        if name == "swiglu_oai":
            bound = math.inf if limit is None else limit
            yield from (Form(name, bound, alpha, interleaved) for alpha in alphas)
        else:
            yield Form(name, limit, interleaved=interleaved)


def _probe(module: nn.Module, gated: bool) -> Tensor:
    """Rows of pre-activations, float32: gate and up values side by side in every combination."""
    limits = _numbers(module, "limit", "clamp", "clip")
    near = [s * x for x in limits if 0 < x < 1e4 for s in (-2, -1.01, -0.99, 0.99, 1.01, 2)]
    grid = torch.tensor([*_GRID, *near], device="cpu")
    if not gated:
        return grid[None]
    gate, up = (side.reshape(-1) for side in torch.meshgrid(grid, grid, indexing="ij"))
    one, other = torch.full_like(gate, 0.3), torch.full_like(gate, 0.7)
    # Two units a row. First gates apart from ups, then in turns: each order tells itself apart.
    return torch.cat(
        [torch.stack(row, 1) for row in ((gate, one, up, other), (gate, up, one, other))]
    )


def _activation(pre_NH: Tensor, form: Form) -> Tensor:
    """a_NF as `expert_mlp` has it."""
    act = ACTIVATIONS[form.activation]
    if not act.gated:
        return act.phi(pre_NH, 1.0)
    half = pre_NH.shape[1] // 2
    apart = pre_NH[:, :half], pre_NH[:, half:]
    gate, up = (pre_NH[:, 0::2], pre_NH[:, 1::2]) if form.interleaved else apart
    limit = math.inf if form.limit is None else form.limit
    scale = form.alpha if form.activation == "swiglu_oai" else 1.0
    return act.phi(gate.clamp(max=limit), scale) * (up.clamp(-limit, limit) + act.shift)


@torch.no_grad()
def find_form(module: Any) -> Form | None:
    """The first form that agrees with the module on the probe; None if it has its own.

    module has `has_gate`, and `_apply_gate` or `act_fn`, as transformers' experts modules do.
    """
    gated = bool(module.has_gate)
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None:
        return None  # it may be trained away from whatever it is now
    pre = _probe(module, gated)
    try:
        wanted = module._apply_gate(pre) if gated else module.act_fn(pre)
    except (RuntimeError, TypeError, ValueError):
        return None  # made for other shapes or devices
    if not isinstance(wanted, Tensor) or wanted.shape != (len(pre), pre.shape[1] // (1 + gated)):
        return None
    allowed = _RELATIVE * wanted.double().abs() + _ABSOLUTE * pre.abs().amax(dim=1, keepdim=True)
    for form in _candidates(module, gated):
        if bool(((_activation(pre.double(), form) - wanted).abs() <= allowed).all()):
            return form
    return None


def _signature(module: Any) -> tuple[object, ...]:
    """What may change in a module after its form was found."""
    numbers = _numbers(module, "limit", "clamp", "clip", "alpha")
    return (module.has_gate, type(module)._apply_gate, getattr(module, "act_fn", None), *numbers)


def form_of(module: nn.Module) -> Form | None:
    """`find_form`, kept on the module until one of the things that decide it changes."""
    signature = _signature(module)
    known = vars(module).get("_gose_form")
    if known is None or known[0] != signature:
        known = (signature, find_form(module))
        vars(module)["_gose_form"] = known
    form: Form | None = known[1]
    return form


# What torch.compiler.assume_constant_result sets; that function imports all of torch._dynamo.
vars(form_of)["_dynamo_marked_constant"] = True
