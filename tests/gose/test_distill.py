from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from gose import distill, preserve
from gose.config import DistillConfig, TeacherConfig
from gose.data import Examples
from gose.models import apply_chain, apply_stage
from gose.plasticity import task_weights

_CONFIG = DistillConfig(
    width=6, hidden=(5, 6, 7), meta_hidden=8, sensitivity_images=50, epochs=2, batch_size=20
)
_TEACHER = TeacherConfig(width=10, hidden=12, num_blocks=2)


def _data(num: int = 60) -> Examples:
    generator = torch.Generator().manual_seed(4)
    return Examples(torch.rand(num, 16, generator=generator), torch.arange(num) % 4)


def _models():
    generator = torch.Generator().manual_seed(1)
    teacher = distill.init_teacher(_TEACHER, num_inputs=16, num_classes=4, generator=generator)
    meta = distill.init_meta(teacher, 8, generator=generator)
    scores = preserve.fisher(teacher, _data().x_BD, generator=generator)
    return teacher, meta, scores


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_hybrid_of_the_metas_own_stage_is_the_meta_model_exactly(stage):
    _, meta, _ = _models()
    x = _data().x_BD
    prefix = distill.cached(meta[:stage], x)
    hybrid = distill.cached([meta[stage], *meta[stage + 1 :]], prefix.output_BD)
    assert torch.equal(hybrid.output_BD, apply_chain(meta, x))
    assert distill.agreement(stage, meta[stage], meta, meta, x) == 1.0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_distill_loss_is_its_formula_and_its_gradient_passes_the_frozen_suffix(stage):
    teacher, meta, scores = _models()
    train, index = _data(), torch.tensor([3, 1, 40])
    config = _CONFIG.model_copy(update={"tau": 2.0, "task_weight": 0.25, "uncertainty_span": 0.6})
    start = distill.start_stage(
        stage, teacher, scores, config, generator=torch.Generator().manual_seed(0)
    )
    suffix = meta[stage + 1 :]
    inputs = distill.cached(meta[:stage], train.x_BD).output_BD
    wanted = distill.cached([teacher[stage], *suffix], inputs).output_BD
    module = {k: v.clone().requires_grad_() for k, v in start.params.items()}
    loss = distill.distill_loss(config, inputs, train.label_B, wanted, suffix)([module], index)
    student = apply_chain([module, *suffix], inputs[index])
    kl_B = kl_div(
        (student / 2).log_softmax(-1), (wanted[index] / 2).softmax(-1), reduction="none"
    ).sum(-1)
    ce_B = cross_entropy(student, train.label_B[index], reduction="none")
    a_B = task_weights(wanted, task_weight=0.25, span=0.6)[index]
    assert a_B.std() > 0.001, "weights differ between images"
    truth = (a_B * ce_B + (1 - a_B) * 4 * kl_B).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(loss, list(module.values()), retain_graph=True)
    truths = torch.autograd.grad(truth, list(module.values()))
    for got, by_hand in zip(grads, truths, strict=True):
        torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-6)
    assert all(not t.requires_grad and t.grad is None for p in suffix for t in p.values())


def test_recycled_stages_hold_the_teachers_most_sensitive_units():
    teacher, _, scores = _models()
    recipe = distill.most_sensitive_units(teacher, scores, _CONFIG)
    by_hand = torch.zeros(10)
    for stage in scores:
        for name, score in stage.items():
            if name == "embed.weight" or name.endswith("down.weight"):
                by_hand += score.sum(1)
            elif name.endswith("weight"):
                by_hand += score.sum(0)
    assert recipe.width_D.tolist() == sorted(by_hand.topk(6).indices.tolist())
    up, down = scores[1]["1.up.weight"].sum(1), scores[1]["1.down.weight"].sum(0)
    assert recipe.hidden[1].tolist() == sorted((up + down).topk(6).indices.tolist())
    cut = distill.recycled_stage(teacher[1], 1, recipe)
    whole = teacher[1]["1.up.weight"]
    for row, f in enumerate(recipe.hidden[1].tolist()):
        for column, d in enumerate(recipe.width_D.tolist()):
            assert cut["0.up.weight"][row, column] == whole[f, d]


def test_stitches_of_a_recycled_stage_pick_and_place_the_teachers_units():
    teacher, _, scores = _models()
    start = distill.start_stage(1, teacher, scores, _CONFIG, generator=torch.Generator())
    D = distill.most_sensitive_units(teacher, scores, _CONFIG).width_D
    z = torch.randn(5, 10)
    assert torch.equal(z @ start.params["pre.weight"].T, z[:, D])
    y = torch.randn(5, 6)
    placed = y @ start.params["post.weight"].T
    assert torch.equal(placed[:, D], y)
    assert int((placed != 0).any(0).sum()) == 6


@pytest.mark.parametrize("start_from", ["recycled", "random"])
def test_distilling_keeps_critical_parameters_and_brings_the_hybrids_together(start_from):
    teacher, meta, scores = _models()
    config = _CONFIG.model_copy(
        update={"start": start_from, "frozen_fraction": 0.3, "epochs": 30, "lr": 0.01}
    )
    config = config.model_copy(update={"task_weight": 0.0, "uncertainty_span": 0.0})
    train = _data()
    start = distill.start_stage(
        1, teacher, scores, config, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(0)
    learned = distill.distill_stage(1, start, teacher, meta, train, config, generator=generator)
    for name, mask in start.frozen.items():
        assert int(mask.sum()) == int(0.3 * mask.numel())
        assert torch.equal(learned.stages[0][name][mask], start.params[name][mask])
        assert (learned.stages[0][name][~mask] != start.params[name][~mask]).any()
    assert (len(start.frozen) > 0) == (start_from == "recycled")

    z = distill.cached(meta[:1], train.x_BD).output_BD
    wanted = distill.cached([teacher[1], *meta[2:]], z).output_BD

    def distance(module):
        student = distill.cached([module, *meta[2:]], z).output_BD
        return float(kl_div(student.log_softmax(-1), wanted.softmax(-1), reduction="batchmean"))

    assert distance(learned.stages[0]) < 0.3 * distance(start.params)


def test_assembling_multiplies_stitches_and_keeps_the_function():
    teacher, _, scores = _models()
    config = _CONFIG.model_copy(update={"start": "random"})
    generator = torch.Generator().manual_seed(0)
    stages = []
    for stage in range(3):
        params = distill.start_stage(stage, teacher, scores, config, generator=generator).params
        stages.append({name: (t + 0.1).double() for name, t in params.items()})
    x = _data().x_BD.double()
    student = distill.assemble(stages)
    torch.testing.assert_close(apply_chain(student, x), apply_chain(stages, x))
    assert [p["pre.weight"].shape for p in student[1:]] == [(6, 6), (6, 6)]
    assert not any(name.startswith("post") for p in student for name in p)
    assert "post.weight" in stages[0], "the modules are left as they were"


def test_meta_loss_is_relative_error_inside_and_kl_at_the_end():
    teacher, meta, _ = _models()
    x, index = _data().x_BD, torch.arange(7)
    wanted = distill.cached(teacher[:1], x).output_BD
    inside = distill.meta_loss(x, wanted, is_last=False)(meta[:1], index)
    error = (apply_stage(meta[0], x[index]) - wanted[index]).square().mean() / wanted.var()
    torch.testing.assert_close(inside, error)
    z = distill.cached(teacher[:2], x).output_BD
    logits = distill.cached(teacher[2:], z).output_BD
    last = distill.meta_loss(z, logits, is_last=True)(meta[2:], index)
    kl = kl_div(
        apply_stage(meta[2], z[index]).log_softmax(-1),
        logits[index].softmax(-1),
        reduction="batchmean",
    )
    torch.testing.assert_close(last, kl, rtol=1e-4, atol=1e-6)


def test_a_student_wider_than_its_teacher_is_refused():
    teacher, _, scores = _models()
    config = _CONFIG.model_copy(update={"width": 11})
    with pytest.raises(ValueError, match="at most the teacher's 10 units, got 11"):
        distill.most_sensitive_units(teacher, scores, config)
