"""Calls like earlier ones skip what does not change; every change that torch counts is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import gose_kernels as gk
from gose_kernels import packing, repeats
from tests import cases
from tests.checks import backends_of

pytestmark = [
    pytest.mark.parametrize("op", ["expert_mlp", "moe"]),
    pytest.mark.parametrize("backend", backends_of("moe", "cpu")),
]

# Where the weights stand among the arguments.
WEIGHTS = {"expert_mlp": (3, 4), "moe": (1, 2, 4)}


def _arguments(op: str) -> list[Any]:
    """D = F, so that other layouts of the same memory are weights too."""
    if op == "moe":
        return list(cases.MoeCase(T=5, E=4, D=8, F=8, options={"activation": "silu"}).build()[0])
    case = cases.ExpertMlpCase("silu", 5, 2, 4, 8, 8)
    return list(case.build()[0])


def _outputs(op: str, args: list[Any], backend: str | None = None) -> list[Tensor]:
    with torch.no_grad():
        out = gk.OPS[op](*args, activation="silu", backend=backend)
    return [out] if isinstance(out, Tensor) else list(out)


def _repeats(op: str, args: list[Any]) -> bool:
    again = gk.OPS[op]._again
    assert again is not None
    with torch.no_grad():
        return again(tuple(args), {"activation": "silu"}) is not None


def _assert_right(op: str, args: list[Any]) -> None:
    for got, want in zip(_outputs(op, args), _outputs(op, args, "torch"), strict=True):
        torch.testing.assert_close(got, want)


def _set_data(w: Parameter, data: Tensor) -> None:
    w.data = data


def _set_data_twice(w: Parameter) -> None:
    """The second one may lie where the weights lay before."""
    w.data = w.data * 0.5
    w.data = w.data * 0.5


CHANGES: dict[str, Callable[[Parameter], object]] = {
    "in place": lambda w: w.mul_(-1.5),
    "data": lambda w: _set_data(w, w.data * 0.5),
    "data twice": _set_data_twice,
    "layout": lambda w: _set_data(w, w.data.mT if w.dim() == 3 else w.data.flip(0)),
    "grown version": lambda w: torch.nn.init.normal_(w),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen(op: str, backend: str, change: str) -> None:
    for at in WEIGHTS[op]:
        args = _arguments(op)
        for i in WEIGHTS[op]:
            args[i] = Parameter(args[i])
        _assert_right(op, args)
        assert _repeats(op, args)
        before = _outputs(op, args)[0]
        with torch.no_grad():
            CHANGES[change](args[at])
        assert not _repeats(op, args)
        _assert_right(op, args)
        assert not torch.equal(before, _outputs(op, args)[0])
        assert _repeats(op, args)


@pytest.mark.parametrize("options", [{}, {"backend": None}], ids=str)
def test_a_repeated_call_learns_nothing(
    op: str, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether no backend is named by silence or by None."""
    args, learnt = _arguments(op), []
    _outputs(op, args)
    learn = repeats.learn
    monkeypatch.setattr(repeats, "learn", lambda *given: learnt.append(learn(*given)))
    with torch.no_grad():
        gk.OPS[op](*args, activation="silu", **options)
    assert not learnt
    with torch.no_grad():
        gk.OPS[op](*args, activation="relu", **options)
    assert len(learnt) == 1


def test_other_tensors_are_free(op: str, backend: str) -> None:
    args = _arguments(op)
    _assert_right(op, args)
    args[0] = torch.randn(11, 16)[:, ::2]
    if op == "expert_mlp":
        args[1], args[2] = torch.rand(11, 2), torch.randint(0, 5, (11, 2))
    assert _repeats(op, args)
    _assert_right(op, args)


def test_other_calls_of_the_same_weights(op: str, backend: str) -> None:
    """Another dtype of x or another option is another call, refused or run by what fits it."""
    args = _arguments(op)
    _assert_right(op, args)
    with torch.no_grad(), pytest.raises(ValueError, match="expert_mlp: w_up_EHD must be"):
        gk.OPS[op](args[0].bfloat16(), *args[1:], activation="silu")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"x_TD must be of width|w_router_ED must"),
    ):
        gk.OPS[op](args[0][:, :7], *args[1:], activation="silu")
    with torch.no_grad():
        relu = gk.OPS[op](*args, activation="relu")
    out = relu if isinstance(relu, Tensor) else relu[0]
    assert not torch.equal(out, _outputs(op, args)[0])


def test_calls_go_with_their_weights(op: str, backend: str) -> None:
    packing.forget_packed()
    args = [a.clone() if isinstance(a, Tensor) else a for a in _arguments(op)]
    _outputs(op, args)
    assert repeats.kept() == 1
    assert packing.packed_bytes() > 0
    for i in WEIGHTS[op]:
        args[i] = None
    assert repeats.kept() == 0
    assert packing.packed_bytes() == 0


def test_calls_go_with_views_of_their_weights(op: str, backend: str) -> None:
    """Another tensor may get the id of one that is gone."""
    packing.forget_packed()
    args = _arguments(op)
    _outputs(op, [a.detach() if isinstance(a, Tensor) else a for a in args])
    assert repeats.kept() == 0
    assert packing.packed_bytes() > 0


def test_forgotten_copies_are_made_again(op: str, backend: str) -> None:
    args = _arguments(op)
    _outputs(op, args)
    args[WEIGHTS[op][0]].numpy()[:] *= -2  # torch does not count this
    assert _repeats(op, args)
    gk.forget_packed()
    assert not _repeats(op, args)
    _assert_right(op, args)


def test_weights_of_inference_mode_repeat(op: str, backend: str) -> None:
    args = _arguments(op)
    with torch.inference_mode():
        for i in WEIGHTS[op]:
            args[i] = args[i].clone()
        _outputs(op, args)
        assert _repeats(op, args)
        _assert_right(op, args)


def test_gradients_are_not_skipped(op: str, backend: str) -> None:
    args = _arguments(op)
    _outputs(op, args)
    args[0].requires_grad_()
    out = gk.OPS[op](*args, activation="silu")
    out = out if isinstance(out, Tensor) else out[0]
    assert out.requires_grad


def test_no_more_calls_are_kept_than_allowed(
    op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_MOST_CALLS", 3)
    packing.forget_packed()
    args = _arguments(op)
    for alpha in range(5):
        with torch.no_grad():
            gk.OPS[op](*args, activation="silu", alpha=float(alpha))
    assert repeats.kept() <= 3
