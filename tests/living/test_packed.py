"""LivingExperts on experts that are kept packed only, against twins that have their weights."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.huggingface import packed
from tests.living.test_blocks import _blocks, _logits, _model

FORMATS = [None, "int8", "int4"]


def _x(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def _out(block: Any, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        out = block(_x(dtype))
    return out[0] if isinstance(out, tuple) else out


def _pair(name: str, dtype: torch.dtype, weights: Any = None) -> tuple[Any, Any, Any]:
    """(block, its LivingExperts, the table): the first block of a model, packed only."""
    model = _model(name, 4).to(dtype)
    done = gk.huggingface.replace_moe_layers(model, router={}, keep="packed", weights=weights)
    block: Any = _blocks(model)[0]
    return block, gk.LivingExperts(block, capacity=7), done


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])  # with biases, transposed, interleaved
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_changes_equal_those_of_a_layer_with_its_weights(
    name: str, dtype: torch.dtype
) -> None:
    block, living, _ = _pair(name, dtype)
    whole = _model(name, 4).to(dtype)
    gk.huggingface.replace_moe_layers(whole, router={})
    other = _blocks(whole)[0]
    twins = (living, gk.LivingExperts(other, capacity=7))
    draw = random.Random(5)
    for step in range(120):
        names = living.names
        one, two = draw.choice(names), draw.choice(names)
        fits = ["freeze", "unfreeze", "replace", "weights", "sleep", "wake"]
        fits += ["add", "add", "split"] if len(names) < 7 else []
        fits += ["remove", "merge"] if len(names) > 2 and one != two else []
        what, new = draw.choice(fits), f"new{step}"
        if what in ("remove", "sleep", "merge") and set(living.awake) <= {one, two}:
            continue
        router = draw.choice(["copy", "mean", "zero"])
        shifted = {k: w * 0.5 for k, w in living.weights(two).items()}
        given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "add": ((new,), {"like": one, "router": router}),
            "merge": (([one, two], new), {"shares": [3, 1]}),
            "replace": ((one,), {"like": two}),
            "split": ((one, (new, f"{new}b")), {}),
            "weights": ((one,), {"weights": shifted}),
        }
        args, named = given.get(what, ((one,), {}))
        for twin in twins:
            if what == "split":
                named["generator"] = torch.Generator().manual_seed(step)
            getattr(twin, "replace" if what == "weights" else what)(*args, **named)
        assert twins[0].state_dict() == twins[1].state_dict()
        for present in living.names:
            for key, wanted in twins[1].weights(present).items():
                assert torch.equal(living.weights(present)[key], wanted), (what, present, key)
        assert torch.equal(_out(block, dtype), _out(other, dtype)), what


@pytest.mark.parametrize("weights", FORMATS)
def test_a_change_writes_the_rows_of_its_experts_and_packs_no_other(
    weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, living, _ = _pair("Qwen3Moe", torch.bfloat16, weights)
    kept = block.experts.packed_EB
    packs: list[int] = []
    for name in ("pack_experts", "quantize_experts"):
        made = getattr(packed, name)

        def counted(w_up: Tensor, *args: Any, made: Any = made, **options: Any) -> Tensor:
            packs.append(len(w_up))
            return made(w_up, *args, **options)

        monkeypatch.setattr(packed, name, counted)
    seed = torch.Generator().manual_seed(0)
    drawn = {k: torch.randn(w.shape, generator=seed) for k, w in living.weights("expert0").items()}
    for change, slots, packed_rows in (
        (lambda: living.add("a", weights=drawn), [4], 1),
        (lambda: living.add("b", like="expert1"), [5], 0),
        (lambda: living.freeze("expert0"), [], 0),
        (lambda: living.replace("expert2", like="a"), [2], 0),
        (lambda: living.sleep("expert3"), [], 0),
        (lambda: living.remove("expert1"), [1], 0),
        (lambda: living.split("expert0", ("c", "d")), [1], 0),
        (lambda: living.merge(["c", "a"], "e"), [0, 4], 1),
    ):
        before = kept.clone()
        change()
        assert block.experts.packed_EB is kept and packs == [1] * packed_rows
        others = [e for e in range(7) if e not in slots]
        assert torch.equal(kept[others], before[others])
        assert all(not torch.equal(kept[e], before[e]) for e in slots)
        packs.clear()
    made = gk.pack_experts if weights is None else gk.quantize_experts
    options = {} if weights is None else {"weights": weights}
    living.add("again", weights=drawn)
    row = made(
        *(drawn[k][None].bfloat16() for k in ("gate_up_proj", "down_proj")),
        **options,  # type: ignore[arg-type]
    )
    assert torch.equal(kept[living.slot("again")], row[0])


@pytest.mark.parametrize("weights", FORMATS)
def test_a_packed_layer_settles_saves_and_comes_back(weights: Any) -> None:
    model = _model("GptOss", 4)
    done = gk.huggingface.replace_moe_layers(model, router={}, keep="packed", weights=weights)
    living = [gk.LivingExperts(block, capacity=6) for block in _blocks(model)]
    for experts in living:
        experts.add("new", like="expert2", router="copy")
        experts.remove("expert1")
        experts.add("other", like="expert0", router="mean")
        experts.add("last", like="new", router="copy")
    want, saved = _logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"restore: .* call its settle\(\) first"):
        done.restore()
    assert torch.equal(_logits(model), want)
    for experts in living:
        experts.replace("expert0", like="expert3")
        experts.replace("last", like="expert3")
    assert not torch.equal(_logits(model), want)
    model.load_state_dict(saved)
    torch.testing.assert_close(_logits(model), want, rtol=1e-3, atol=1e-3)
    for experts in living:
        experts.settle()
    settled = _logits(model)
    torch.testing.assert_close(settled, want, rtol=1e-3, atol=1e-3)
    done.restore()
    assert {len(block.experts.gate_up_proj) for block in _blocks(model)} == {6}
    torch.testing.assert_close(_logits(model), settled, rtol=1e-3, atol=1e-3)


def test_weights_that_cannot_be_quantized_change_nothing() -> None:
    block, living, _ = _pair("Qwen3Moe", torch.float32, "int8")
    before, saved = block.experts.packed_EB.clone(), living.state_dict()
    bad = {k: w / 0 for k, w in living.weights("expert0").items()}
    for call in (
        lambda: living.add("a", weights=bad),
        lambda: living.replace("expert1", weights=bad),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            call()
    with pytest.raises(ValueError, match=r"weights\['gate_up_proj'\] must have shape \(32, 32\)"):
        living.add("a", weights={**bad, "gate_up_proj": bad["gate_up_proj"][1:]})
    assert torch.equal(block.experts.packed_EB, before) and living.state_dict() == saved
