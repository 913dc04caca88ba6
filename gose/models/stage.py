"""Stages: the residual multilayer perceptrons that teacher, meta model and experts are chains of.

B inputs, D width, F hidden units, C classes. A stage is a dict of named tensors; the names present
say what it does, in this order:

    pre    x = W x + b                             stitch from another width
    embed  x = W norm(x) + b                       input pixels to width D
    0, 1.. x = x + W_down relu(W_up norm(x) + b_up) + b_down
    post   x = W x + b                             stitch to another width
    head   x = W norm(x) + b                       class logits

norm is layer normalization without parameters, so the weights of a stage are matrices and biases
and nothing else: `embed.weight` [D, inputs], `embed.bias` [D], `0.up.weight` [F, D], ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu

Params: TypeAlias = Mapping[str, Tensor]


class Tap(NamedTuple):
    """One linear layer as it ran: its name in the stage, its input and its output."""

    layer: str
    input_BD: Tensor
    output_BF: Tensor


def init_stage(
    width: int,
    hidden: int,
    num_blocks: int,
    *,
    generator: torch.Generator,
    num_inputs: int | None = None,
    num_classes: int | None = None,
) -> dict[str, Tensor]:
    """A stage with random weights; num_inputs gives it an embedding, num_classes a head.

    Weights are normal with variance gain^2 / inputs; gain sqrt(2) before a relu, 0.5 at the end of
    a block (a deep chain starts near the identity), else 1. Biases are 0.
    """
    params: dict[str, Tensor] = {}

    def layer(name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        weight = torch.randn(outputs, inputs, generator=generator)
        params[f"{name}.weight"] = weight * (gain / math.sqrt(inputs))
        params[f"{name}.bias"] = torch.zeros(outputs)

    if num_inputs is not None:
        layer("embed", width, num_inputs)
    for block in range(num_blocks):
        layer(f"{block}.up", hidden, width, math.sqrt(2))
        layer(f"{block}.down", width, hidden, 0.5)
    if num_classes is not None:
        layer("head", num_classes, width)
    return params


def apply_stage(params: Params, x_BD: Tensor, *, taps: list[Tap] | None = None) -> Tensor:
    """Output of the stage; taps collects every linear layer that ran."""

    def layer(name: str, x: Tensor) -> Tensor:
        y = linear(x, params[f"{name}.weight"], params[f"{name}.bias"])
        if taps is not None:
            taps.append(Tap(name, x, y))
        return y

    if "pre.weight" in params:
        x_BD = layer("pre", x_BD)
    if "embed.weight" in params:
        x_BD = layer("embed", normalized(x_BD))
    block = 0
    while f"{block}.up.weight" in params:
        x_BD = x_BD + layer(f"{block}.down", relu(layer(f"{block}.up", normalized(x_BD))))
        block += 1
    if "post.weight" in params:
        x_BD = layer("post", x_BD)
    if "head.weight" in params:
        x_BD = layer("head", normalized(x_BD))
    return x_BD


def normalized(x_BD: Tensor) -> Tensor:
    """x with mean 0 and variance 1 over its last dimension (eps 1e-5)."""
    return layer_norm(x_BD, x_BD.shape[-1:])


def apply_chain(stages: Sequence[Params], x_BD: Tensor) -> Tensor:
    """Output of the stages one after another; no stage gives x back."""
    for params in stages:
        x_BD = apply_stage(params, x_BD)
    return x_BD


def tap_stages(stages: Sequence[Params], x_BD: Tensor) -> tuple[Tensor, list[list[Tap]]]:
    """Output of the chain, and the taps of each stage."""
    taps: list[list[Tap]] = [[] for _ in stages]
    for params, found in zip(stages, taps, strict=True):
        x_BD = apply_stage(params, x_BD, taps=found)
    return x_BD, taps


def num_macs(*stages: Params) -> int:
    """Multiply-adds of the linear layers for one input: the elements of the matrices.

    Forward FLOPs are twice that; norms, relus and biases are not counted.
    """
    return sum(
        tensor.numel() for params in stages for tensor in params.values() if tensor.dim() == 2
    )
