"""Module-to-module distillation of a retired teacher into small modules (m2mKD).

L = 3 stages: stem, body, expert. The teacher is given as its stages T_0 .. T_2 only, as they were
saved; nothing of it is trained again. A meta model M has one small block per stage and the
teacher's width, so any M_i and T_i can change places. For every i on its own:

    z_i = M_{i-1} o ... o M_0 (x)                              prefix, constant
    t_i = M_{L-1} o ... o M_{i+1} o T_i (z_i)                  teacher hybrid, constant
    s_i = M_{L-1} o ... o M_{i+1} o post o S_i o pre (z_i)     the gradient passes the suffix
    loss = mean of  a * CE(s_i, y) + (1 - a) * tau^2 * KL(softmax(t_i / tau) || softmax(s_i / tau))

Inputs are not augmented, so z_i and t_i are computed once. Stitches pre and post are linear; in the
assembled student each post and the pre after it are multiplied into one matrix, exactly.

Differs from [Lo et al. 2024, m2mKD]: there the teacher is trained to fit the meta model's
interfaces (Deep Incubation); a retired teacher cannot be, so each M_i learns to stand in for T_i:
mean squared error at T_i's output, KL at the logits. KL is per image (batchmean), not per element.
A student stage starts as the slice of the teacher's stage with the most sensitive units
(`recycled`), and its most sensitive weights stay frozen while the others learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

import gose_kernels as gk
from gose import preserve
from gose.config import DistillConfig, TeacherConfig
from gose.data import Examples
from gose.models import Params, apply_chain, apply_stage, init_stage, num_macs
from gose.plasticity import task_weights
from gose.training import Fit, Loss, fit

STAGES = ("stem", "body", "expert")


class Cached(NamedTuple):
    """Outputs that a frozen model gives for all training images, and what they cost."""

    output_BD: Tensor
    flops: int


def cached(stages: Sequence[Params], x_BD: Tensor) -> Cached:
    """The chain's outputs, without gradient."""
    with torch.no_grad():
        return Cached(apply_chain(stages, x_BD), 2 * num_macs(*stages) * len(x_BD))


def init_teacher(
    config: TeacherConfig, *, num_inputs: int, num_classes: int, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """The three stages of a teacher, fresh: stage 0 owns the embedding, stage 2 the head."""
    return _init_chain(
        config.width, [config.hidden] * 3, config.num_blocks, num_inputs, num_classes, generator
    )


def init_meta(
    teacher: Sequence[Params], hidden: int, *, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """One block per stage, with the interfaces of the teacher."""
    width, num_inputs = teacher[0]["embed.weight"].shape
    num_classes = len(teacher[-1]["head.bias"])
    return _init_chain(width, [hidden] * 3, 1, num_inputs, num_classes, generator)


def _init_chain(
    width: int,
    hidden: Sequence[int],
    num_blocks: int,
    num_inputs: int,
    num_classes: int,
    generator: torch.Generator,
) -> list[dict[str, Tensor]]:
    ends = [{"num_inputs": num_inputs}, {}, {"num_classes": num_classes}]
    return [
        init_stage(width, units, num_blocks, generator=generator, **end)
        for units, end in zip(hidden, ends, strict=True)
    ]


def label_loss(train: Examples, label_smoothing: float = 0.0) -> Loss:
    """Cross entropy of the chain's logits with the labels."""

    def loss(stages: Sequence[Params], index_B: Tensor) -> Tensor:
        logits_BC = apply_chain(stages, train.x_BD[index_B])
        return cross_entropy(logits_BC, train.label_B[index_B], label_smoothing=label_smoothing)

    return loss


def meta_loss(input_BD: Tensor, wanted_BD: Tensor, *, is_last: bool) -> Loss:
    """How far a meta stage is from the teacher's stage on the teacher's own inputs to it."""
    variance = wanted_BD.var()

    def loss(stages: Sequence[Params], index_B: Tensor) -> Tensor:
        output_BD = apply_stage(stages[0], input_BD[index_B])
        if not is_last:
            return mse_loss(output_BD, wanted_BD[index_B]) / variance
        teacher_BC = wanted_BD[index_B]
        unused = teacher_BC.argmax(-1)  # task_weight 0: the labels count for nothing
        loss: Tensor = gk.distill_loss(output_BD, teacher_BC, unused, task_weight=0.0)
        return loss

    return loss


def distill_loss(
    config: DistillConfig,
    input_BD: Tensor,
    label_B: Tensor,
    teacher_BC: Tensor,
    suffix: Sequence[Params],
) -> Loss:
    """The loss of a student chain between constant inputs and a frozen suffix."""
    weight_B = task_weights(
        teacher_BC, task_weight=config.task_weight, span=config.uncertainty_span
    )

    def loss(stages: Sequence[Params], index_B: Tensor) -> Tensor:
        student_BC = apply_chain([*stages, *suffix], input_BD[index_B])
        loss: Tensor = gk.distill_loss(
            student_BC,
            teacher_BC[index_B],
            label_B[index_B],
            task_weight_B=weight_B[index_B],
            tau=config.tau,
        )
        return loss

    return loss


class Recipe(NamedTuple):
    """Which units of the teacher a student keeps: width units, and hidden units of each stage."""

    width_D: Tensor
    hidden: tuple[Tensor, ...]


def most_sensitive_units(
    teacher: Sequence[Params], scores: Sequence[preserve.Scores], config: DistillConfig
) -> Recipe:
    """The units with the largest sum of sensitivity over the weights into and out of them.

    Hidden units are those of the last block of each stage: the block a student stage begins with.
    """
    width_D = sum(
        (
            score.sum(0) if name.endswith("up.weight") or name == "head.weight" else score.sum(1)
            for stage in scores
            for name, score in stage.items()
            if name.endswith("weight")
        ),
        torch.zeros(()),
    )
    hidden = []
    for params, stage, units in zip(teacher, scores, config.hidden, strict=True):
        block = _last_block(params)
        mass_F = stage[f"{block}.up.weight"].sum(1) + stage[f"{block}.down.weight"].sum(0)
        hidden.append(_top(mass_F, units))
    return Recipe(_top(width_D, config.width), tuple(hidden))


def recycled_stage(params: Params, stage: int, recipe: Recipe) -> dict[str, Tensor]:
    """The slice of a teacher's stage that the recipe names: embedding, last block, head."""
    D, F = recipe.width_D, recipe.hidden[stage]
    block = _last_block(params)
    cut = {
        "0.up.weight": params[f"{block}.up.weight"][F][:, D],
        "0.up.bias": params[f"{block}.up.bias"][F],
        "0.down.weight": params[f"{block}.down.weight"][D][:, F],
        "0.down.bias": params[f"{block}.down.bias"][D],
    }
    if "embed.weight" in params:
        cut = {
            "embed.weight": params["embed.weight"][D],
            "embed.bias": params["embed.bias"][D],
        } | cut
    if "head.weight" in params:
        cut |= {"head.weight": params["head.weight"][:, D], "head.bias": params["head.bias"]}
    return {name: tensor.clone() for name, tensor in cut.items()}


class Start(NamedTuple):
    """A student stage between its stitches before distillation, and its frozen mask."""

    params: dict[str, Tensor]
    frozen: dict[str, Tensor]


def start_stage(
    stage: int,
    teacher: Sequence[Params],
    scores: Sequence[preserve.Scores],
    config: DistillConfig,
    *,
    generator: torch.Generator,
) -> Start:
    """Stage `stage` of the student with stitches to the teacher's width.

    recycled: the teacher's slice, stitches that pick and place its width units, the most sensitive
    `frozen_fraction` of each sliced matrix frozen. random: fresh weights, nothing frozen.
    """
    teacher_width = len(teacher[0]["embed.bias"])
    if config.start == "recycled":
        recipe = most_sensitive_units(teacher, scores, config)
        module = recycled_stage(teacher[stage], stage, recipe)
        sensitive = {
            name: score
            for name, score in recycled_stage(scores[stage], stage, recipe).items()
            if name.endswith("weight")
        }
        frozen = preserve.freeze(
            sensitive,
            preserve.nothing_frozen(sensitive),
            fraction=config.frozen_fraction,
            generator=generator,
        )
        pick_SD = torch.nn.functional.one_hot(recipe.width_D, teacher_width).float()
        place_DS = pick_SD.T.clone()
    else:
        num_inputs, num_classes = teacher[0]["embed.weight"].shape[1], len(teacher[2]["head.bias"])
        chain = _init_chain(config.width, config.hidden, 1, num_inputs, num_classes, generator)
        module, frozen = chain[stage], {}
        pick_SD = torch.randn(config.width, teacher_width, generator=generator)
        pick_SD /= teacher_width**0.5
        place_DS = torch.randn(teacher_width, config.width, generator=generator)
        place_DS /= config.width**0.5
    if stage > 0:
        module = {"pre.weight": pick_SD, "pre.bias": torch.zeros(config.width)} | module
    if stage < len(teacher) - 1:
        module |= {"post.weight": place_DS, "post.bias": torch.zeros(teacher_width)}
    return Start(module, frozen)


def distill_stage(
    stage: int,
    start: Start,
    teacher: Sequence[Params],
    meta: Sequence[Params],
    train: Examples,
    config: DistillConfig,
    *,
    generator: torch.Generator,
) -> Fit:
    """Stage `stage` of the student after learning from its teacher hybrid."""
    prefix = cached(meta[:stage], train.x_BD)
    hybrid = cached([teacher[stage], *meta[stage + 1 :]], prefix.output_BD)
    suffix = meta[stage + 1 :]
    trained = fit(
        [start.params],
        distill_loss(config, prefix.output_BD, train.label_B, hybrid.output_BD, suffix),
        num_images=len(train.label_B),
        batch_size=config.batch_size,
        epochs=range(config.epochs),
        total_epochs=config.epochs,
        lr=config.lr,
        weight_decay=0.01,
        generator=generator,
        frozen=[start.frozen],
    )
    return trained._replace(flops=trained.flops + prefix.flops + hybrid.flops)


def agreement(
    stage: int, student: Params, teacher: Sequence[Params], meta: Sequence[Params], x_BD: Tensor
) -> float:
    """Share of images to which the student's hybrid gives the teacher hybrid's class."""
    prefix_BD = cached(meta[:stage], x_BD).output_BD
    classes = [
        cached([module, *meta[stage + 1 :]], prefix_BD).output_BD.argmax(-1)
        for module in (student, teacher[stage])
    ]
    return float((classes[0] == classes[1]).double().mean())


def assemble(stages: Sequence[Params]) -> list[dict[str, Tensor]]:
    """The student's stages with every post stitch multiplied into the pre stitch after it.

    pre(post(x)) = (W_pre W_post) x + (W_pre b_post + b_pre): the same function, D_S x D_S.
    """
    student = [dict(params) for params in stages]
    for before, after in pairwise(student):
        weight, bias = after["pre.weight"], after["pre.bias"]
        after["pre.weight"] = weight @ before.pop("post.weight")
        after["pre.bias"] = weight @ before.pop("post.bias") + bias
    return student


def scratch_student(
    config: DistillConfig, *, num_inputs: int, num_classes: int, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """Fresh stages in the shapes of an assembled student: the control of distillation."""
    width = config.width
    fresh = _init_chain(width, config.hidden, 1, num_inputs, num_classes, generator)
    joints = []
    for _ in fresh[1:]:
        weight = torch.randn(width, width, generator=generator) / width**0.5
        joints.append({"pre.weight": weight, "pre.bias": torch.zeros(width)})
    return [fresh[0], *(joint | stage for joint, stage in zip(joints, fresh[1:], strict=True))]


def _last_block(params: Mapping[str, Tensor]) -> int:
    return max(int(name.split(".")[0]) for name in params if name[0].isdigit())


def _top(mass: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest; ties to the smaller index."""
    if count > len(mass):
        raise ValueError(
            f"distill: a student may keep at most the teacher's {len(mass)} units, got {count}"
        )
    return mass.sort(descending=True, stable=True).indices[:count].sort().values
