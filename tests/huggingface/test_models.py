"""Whole models of every family, eager against gose: training, generation, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gose_kernels as gk
from tests.huggingface.compare import relative_error
from tests.huggingface.families import Family, families, tiny_model

ALL = pytest.mark.parametrize("family", families(), ids=str)

gk.huggingface.register()


def _model(family: Family, implementation: str = "eager") -> Any:
    """Experts that matter: their weights, small at first, are drawn at unit scale."""
    model = tiny_model(family, experts_implementation=implementation)
    seed = torch.Generator().manual_seed(1)
    for module in model.modules():
        if type(module) is family.experts:
            for p in module.parameters(recurse=False):
                scale = max(p.shape[1:]) ** -0.5
                p.data = torch.randn(p.shape, generator=seed) * (scale if p.dim() == 3 else 0.1)
    return model


def _inputs(model: Any, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    seed = torch.Generator().manual_seed(2)
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":  # its tokens come as embeddings
        width = model.config.hidden_size
        return {"inputs_embeds": torch.randn(batch, length, width, generator=seed)}
    return {"input_ids": torch.randint(3, 90, (batch, length), generator=seed)}


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The output that stands for the model: logits, or hidden states without a head."""
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs["logits" if "logits" in outputs else "last_hidden_state"]


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own loss, the auxiliary one of the routers with it where there is one."""
    if hasattr(model, "lm_head"):
        options = (
            {"output_router_logits": True} if "output_router_logits" in vars(model.config) else {}
        )
        return model(**inputs, labels=inputs["input_ids"], **options).loss
    hidden = model(**inputs).last_hidden_state
    seed = torch.Generator().manual_seed(3)
    return (hidden * torch.randn(hidden.shape, generator=seed)).mean()


@ALL
@pytest.mark.matrix(keep=12)
def test_logits_loss_and_gradients_equal_eager_and_back_again(family: Family) -> None:
    model = _model(family)
    inputs = _inputs(model)
    with torch.random.fork_rng():
        first = _logits(model, inputs)
        results = []
        for name in ("eager", "gose"):
            model.set_experts_implementation(name)
            model.zero_grad()
            torch.manual_seed(0)  # some models draw inside
            loss = _loss(model, inputs)
            loss.backward()
            gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
            results.append((_logits(model, inputs), loss.detach(), gradients))
    (logits, loss, gradients), (our_logits, our_loss, ours) = results
    assert relative_error(our_logits, logits) < 1e-5
    assert relative_error(our_loss, loss) < 1e-5
    assert ours.keys() == gradients.keys()
    largest = max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        # A gradient that is rounding alone (a bias before a softmax) has no relative error.
        error = (ours[name] - gradient).norm()
        assert error <= 5e-5 * gradient.norm() + 1e-7 * largest, f"{name}: {error}"
    experts = [n for n, m in model.named_modules() if type(m) is family.experts]
    assert any(gradients[f"{n}.down_proj"].norm() > 0 for n in experts)
    assert not torch.equal(our_logits, logits)  # the kernels ran
    model.set_experts_implementation("eager")
    torch.testing.assert_close(_logits(model, inputs), first, rtol=0, atol=0)


def _low(model: Any) -> Any:
    """The model in bfloat16, but for what it wants in float32, as loading does it."""
    model = model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        if any(part in name for part in model._keep_in_fp32_modules_strict or ()):
            p.data = p.data.float()
    return model


class _SameChoice:
    """Pre-hook of experts modules: the choices of the first run, in every later one."""

    def __init__(self) -> None:
        self.choices: list[tuple[Tensor, ...]] = []
        self.replay: list[tuple[Tensor, ...]] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.replay:
            self.choices.append(args[1:])
            return args
        index, weight = self.replay.pop(0)
        return args[0], index, weight


@ALL
@pytest.mark.matrix(keep=8)
def test_bfloat16_logits_are_as_near_to_the_truth_as_eager(family: Family) -> None:
    """Teacher-forced, choices of experts too: a choice that rounding turns is not an error."""
    model = _low(_model(family))
    same = _SameChoice()
    for module in model.modules():
        if type(module) is family.experts:
            module.register_forward_pre_hook(same)
    inputs = {n: t.bfloat16() if t.is_floating_point() else t for n, t in _inputs(model).items()}
    eager = _logits(model, inputs).float()
    same.replay = [(i, w) for i, w in same.choices]
    model.set_experts_implementation("gose")
    ours = _logits(model, inputs).float()
    same.replay = [(i, w.float()) for i, w in same.choices]
    model.float().set_experts_implementation("eager")
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    truth = _logits(model, inputs)
    assert not same.replay
    assert relative_error(ours, truth) <= 1.2 * relative_error(eager, truth) + 2.6e-3


@ALL
@pytest.mark.matrix(keep=8)
def test_greedy_tokens_equal_eager_where_eager_is_sure(family: Family) -> None:
    model = _model(family)
    if not hasattr(model, "lm_head") or not model.can_generate():
        return  # no tokens to choose
    inputs = _inputs(model)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    eager = model.generate(**inputs, **options, output_logits=True)
    model.set_experts_implementation("gose")
    ours = model.generate(**inputs, **options).sequences
    sure = torch.ones(len(ours), dtype=torch.bool)
    for step, logits in enumerate(eager.logits):
        top = logits.float().topk(2).values
        sure &= top[:, 0] - top[:, 1] > 1e-4
        at = inputs["input_ids"].shape[1] + step
        if at < min(ours.shape[1], eager.sequences.shape[1]):
            assert torch.equal(ours[sure, at], eager.sequences[sure, at]), f"token {step}"
    assert sure.any()


@ALL
@pytest.mark.matrix(keep=6)
def test_save_and_load_round_trip(family: Family, tmp_path: Path) -> None:
    model = _model(family, "gose")
    inputs = _inputs(model)
    want = _logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="gose").eval()
    assert loaded.config._experts_implementation == "gose"
    torch.testing.assert_close(_logits(loaded, inputs), want, rtol=0, atol=0)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config._experts_implementation != "gose"  # a checkpoint names no implementation
