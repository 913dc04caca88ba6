"""The first half of a run: a teacher is trained and retired, and its stages become small modules.

Reads and writes, per seed: model `teacher` (its stages, as a checkpoint stores them, are all that
is left of it), `sensitivity` (Fisher scores in the shapes of the teacher), model `meta`, model
`student`, masks `recycled`, meta value `flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gose import distill, metrics, preserve, units
from gose.checkpoint import Json, State
from gose.config import SystemConfig
from gose.data import Task
from gose.distill import STAGES
from gose.models import apply_chain, num_macs
from gose.training import Fit, fit
from gose.units import Outcome, Unit


def recycle(config: SystemConfig, seed: int, tasks: Callable[[], Sequence[Task]]) -> Iterator[Unit]:
    """Units from nothing to a distilled student, for the first task of the stream."""

    def unit(name: str, phase: str, step: Callable[..., Outcome], *args: int) -> Unit:
        def run(state: State) -> Outcome:
            return step(config, seed, tasks()[0], *args, state)

        return Unit(f"seed {seed}, {name}", phase, run)

    for epoch in range(config.teacher.epochs):
        yield unit(f"teacher epoch {epoch}", "teacher", _teacher_epoch, epoch)
    yield unit("retire", "evaluate", _retire)
    if config.distill.method == "m2m":
        yield unit("sensitivity", "sensitivity", _sensitivity)
        for stage in range(len(STAGES)):
            yield unit(f"meta {STAGES[stage]}", "meta", _meta_stage, stage)
        for stage in range(len(STAGES)):
            yield unit(f"distill {STAGES[stage]}", "distill", _distill_stage, stage)
        yield unit("assemble", "distill", _assemble)
    yield unit("scratch", "control", _scratch)
    yield unit("student", "evaluate", _measure_student)


def _teacher_epoch(
    config: SystemConfig, seed: int, task: Task, epoch: int, state: State
) -> Outcome:
    teacher_config = config.teacher
    if epoch == 0:
        stages = distill.init_teacher(
            teacher_config,
            num_inputs=task.train.x_BD.shape[1],
            num_classes=config.data.num_classes,
            generator=units.generator_of(seed, "teacher"),
        )
        state = units.put(units.drop(state, "student"), meta={"flops": {}})
    else:
        stages = units.model_of(state, "teacher", STAGES)
    trained = fit(
        stages,
        distill.label_loss(task.train, teacher_config.label_smoothing),
        num_images=len(task.train.label_B),
        batch_size=teacher_config.batch_size,
        epochs=range(epoch, epoch + 1),
        total_epochs=teacher_config.epochs,
        lr=teacher_config.lr,
        weight_decay=teacher_config.weight_decay,
        generator=units.generator_of(seed, f"teacher epoch {epoch}"),
        moments={
            key.removeprefix("moments/"): t
            for key, t in state.tensors.items()
            if key.startswith("moments/")
        },
    )
    tensors = units.model_tensors("teacher", STAGES, trained.stages)
    tensors |= {f"moments/{key}": t for key, t in trained.moments.items()}
    return _spent(units.put(state, tensors), "teacher", trained)


def _retire(config: SystemConfig, seed: int, task: Task, state: State) -> Outcome:
    state = units.drop(state, "moments")
    row = _accuracy(units.model_of(state, "teacher", STAGES), task) | {
        "kind": "teacher",
        "seed": seed,
        "train_flops": _flops(state)["teacher"],
    }
    return Outcome(state, [row], images=len(task.test.label_B))


def _sensitivity(config: SystemConfig, seed: int, task: Task, state: State) -> Outcome:
    teacher = units.model_of(state, "teacher", STAGES)
    generator = units.generator_of(seed, "sensitivity")
    order_B = torch.randperm(len(task.train.label_B), generator=generator)
    x_BD = task.train.x_BD[order_B[: config.distill.sensitivity_images]]
    scores = preserve.fisher(teacher, x_BD, generator=generator)
    # forward, gradient of the layers' outputs, and the product of squares: three products a layer
    flops = 6 * num_macs(*teacher) * len(x_BD)
    state = units.put(state, units.model_tensors("sensitivity", STAGES, scores))
    return _add_flops(state, "sensitivity", flops, images=len(x_BD))


def _meta_stage(config: SystemConfig, seed: int, task: Task, stage: int, state: State) -> Outcome:
    teacher = units.model_of(state, "teacher", STAGES)
    generator = units.generator_of(seed, f"meta {stage}")
    meta = distill.init_meta(teacher, config.distill.meta_hidden, generator=generator)[stage]
    before = distill.cached(teacher[:stage], task.train.x_BD)
    wanted = distill.cached([teacher[stage]], before.output_BD)
    trained = fit(
        [meta],
        distill.meta_loss(before.output_BD, wanted.output_BD, is_last=stage == len(STAGES) - 1),
        num_images=len(task.train.label_B),
        batch_size=config.distill.batch_size,
        epochs=range(config.distill.meta_epochs),
        total_epochs=config.distill.meta_epochs,
        lr=config.distill.lr,
        weight_decay=0.01,
        generator=generator,
    )
    tensors = units.model_tensors("meta", STAGES[stage : stage + 1], trained.stages)
    whole = trained._replace(flops=trained.flops + before.flops + wanted.flops)
    return _spent(units.put(state, tensors), "meta", whole)


def _distill_stage(
    config: SystemConfig, seed: int, task: Task, stage: int, state: State
) -> Outcome:
    teacher = units.model_of(state, "teacher", STAGES)
    meta = units.model_of(state, "meta", STAGES)
    start = distill.start_stage(
        stage,
        teacher,
        units.model_of(state, "sensitivity", STAGES),
        config.distill,
        generator=units.generator_of(seed, f"start {stage}"),
    )
    trained = distill.distill_stage(
        stage,
        start,
        teacher,
        meta,
        task.train,
        config.distill,
        generator=units.generator_of(seed, f"distill {stage}"),
    )
    agreement = distill.agreement(stage, trained.stages[0], teacher, meta, task.validation.x_BD)
    name = STAGES[stage : stage + 1]
    tensors = units.model_tensors("student", name, trained.stages)
    tensors |= units.model_tensors("recycled", name, [start.frozen])
    state = units.put(state, tensors, {f"agreement/{stage}": agreement})
    return _spent(state, "distill", trained)


def _assemble(config: SystemConfig, seed: int, task: Task, state: State) -> Outcome:
    teacher = units.model_of(state, "teacher", STAGES)
    student = distill.assemble(units.model_of(state, "student", STAGES))
    logits = distill.cached(teacher, task.train.x_BD)
    state = units.drop(state, "student")
    trained = fit(
        student,
        distill.distill_loss(
            config.distill, task.train.x_BD, task.train.label_B, logits.output_BD, ()
        ),
        num_images=len(task.train.label_B),
        batch_size=config.distill.batch_size,
        epochs=range(config.distill.finetune_epochs),
        total_epochs=config.distill.finetune_epochs,
        lr=config.distill.lr,
        weight_decay=0.01,
        generator=units.generator_of(seed, "assemble"),
        frozen=units.model_of(state, "recycled", STAGES),
    )
    tensors = units.model_tensors("student", STAGES, trained.stages)
    whole = trained._replace(flops=trained.flops + logits.flops)
    return _spent(units.put(state, tensors), "finetune", whole)


def _scratch(config: SystemConfig, seed: int, task: Task, state: State) -> Outcome:
    """The student's architecture learned from labels alone, for as long as the fine-tuning."""
    generator = units.generator_of(seed, "scratch")
    fresh = distill.scratch_student(
        config.distill,
        num_inputs=task.train.x_BD.shape[1],
        num_classes=config.data.num_classes,
        generator=generator,
    )
    trained = fit(
        fresh,
        distill.label_loss(task.train),
        num_images=len(task.train.label_B),
        batch_size=config.distill.batch_size,
        epochs=range(config.distill.finetune_epochs),
        total_epochs=config.distill.finetune_epochs,
        lr=config.distill.lr,
        weight_decay=0.01,
        generator=generator,
    )
    top1 = _accuracy(trained.stages, task)["top1"]
    state = units.put(state, meta={"scratch_top1": top1})
    if config.distill.method == "scratch":
        state = units.put(state, units.model_tensors("student", STAGES, trained.stages))
    return _spent(state, "scratch", trained)


def _measure_student(config: SystemConfig, seed: int, task: Task, state: State) -> Outcome:
    flops = _flops(state)
    parts = ("scratch",) if config.distill.method == "scratch" else _STUDENT_PARTS
    agreements = [
        state.meta[f"agreement/{stage}"]
        for stage in range(len(STAGES))
        if f"agreement/{stage}" in state.meta
    ]
    row: dict[str, Json] = _accuracy(units.model_of(state, "student", STAGES), task) | {
        "kind": "student",
        "seed": seed,
        "train_flops": sum(flops[part] for part in parts),
        "meta_flops": flops.get("meta", 0),
        "agreement": agreements,
        "scratch_top1": state.meta["scratch_top1"],
        "scratch_flops": flops["scratch"],
    }
    state = units.drop(
        state, "teacher", "meta", "sensitivity", "recycled", "agreement", "scratch_top1"
    )
    return Outcome(state, [row], images=len(task.test.label_B))


_STUDENT_PARTS = ("sensitivity", "meta", "distill", "finetune")  # all that the teacher's end costs


def _accuracy(stages: list[dict[str, Tensor]], task: Task) -> dict[str, Json]:
    with torch.no_grad():
        logits_BC = apply_chain(stages, task.test.x_BD)
    return {f"top{k}": metrics.accuracy_top_k(logits_BC, task.test.label_B, k) for k in (1, 5)}


def _spent(state: State, part: str, trained: Fit) -> Outcome:
    return _add_flops(state, part, trained.flops, images=trained.images)


def _add_flops(state: State, part: str, flops: int, *, images: int) -> Outcome:
    spent = _flops(state)
    state = units.put(state, meta={"flops": {**spent, part: spent.get(part, 0) + flops}})
    return Outcome(state, images=images, flops=flops)


def _flops(state: State) -> Mapping[str, int]:
    spent = state.meta["flops"]
    assert isinstance(spent, dict)
    return {part: int(str(flops)) for part, flops in spent.items()}
