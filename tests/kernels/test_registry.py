"""The registry: choice, refusals, binding, and the roads that must not skip torch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gose_kernels as gk
from gose_kernels.backends import Backend, reference
from gose_kernels.registry import Cost, register


def _double_reference(x_P: Tensor, *, scale: float = 1.0) -> Tensor:
    return x_P * 2 * scale


def _refused(reason: str) -> Backend:
    def run(*_args: object, **_options: object) -> Tensor:
        raise AssertionError("a refused backend must not run")

    return Backend("picky", run, lambda *_args, **_options: reason)


doubled = register(
    "test_double(Tensor x_P, *, float scale=1.0, str? backend=None) -> Tensor",
    _refused("it is Sunday"),
    reference(_double_reference),
    fake=lambda x_P, scale=1.0, backend=None: torch.empty_like(x_P),
    setup_context=lambda ctx, inputs, keyword_only_inputs, output: ctx.__setattr__(
        "scale", keyword_only_inputs["scale"]
    ),
    backward=lambda ctx, grad: grad * 2 * ctx.scale,
    cost=lambda x_P, scale: Cost(x_P.shape[0], 2 * x_P.nbytes, 2 * x_P.numel()),
    example=lambda device, dtype: (torch.ones(3, device=device, dtype=dtype),),
    autocast=("x_P",),
)


def _triple(x_P: Tensor, add: float = 0.0, *, scale: float = 1.0) -> Tensor:
    return x_P * 3 * scale + add


# Its backends are chosen by dtype alone, so a signature seen once goes straight to one of them.
tripled = register(
    "test_triple(Tensor x_P, float add=0.0, *, float scale=1.0, str? backend=None) -> Tensor",
    Backend(
        "single",
        lambda *args, **options: _triple(*args, **options) + 100,
        lambda x_P, add, **_: None if x_P.dtype == torch.float32 else "takes float32",
        by_dtype=True,
    ),
    reference(_triple),
    fake=lambda x_P, add=0.0, scale=1.0, backend=None: torch.empty_like(x_P),
    setup_context=lambda ctx, inputs, keyword_only_inputs, output: ctx.__setattr__(
        "slope", 3 * keyword_only_inputs["scale"] + 0 * inputs[1]
    ),
    backward=lambda ctx, grad: (grad * ctx.slope, None),
    cost=lambda x_P, add, scale: Cost(x_P.shape[0], 2 * x_P.nbytes, 2 * x_P.numel()),
    example=lambda device, dtype: (torch.ones(3, device=device, dtype=dtype),),
)


def test_what_is_remembered_of_a_signature_serves_no_other() -> None:
    one_P = torch.ones(3)
    for _ in range(2):
        assert tripled(one_P).tolist() == [103.0] * 3
        assert tripled(one_P, 2.0).tolist() == [105.0] * 3
        assert tripled(one_P, scale=2.0).tolist() == [106.0] * 3
        assert tripled(one_P, add=1.0).tolist() == [104.0] * 3
        assert tripled(one_P.double()).tolist() == [3.0] * 3
        assert tripled(one_P, backend="torch").tolist() == [3.0] * 3
        assert tripled(one_P.to("meta")).is_meta
        with pytest.raises(TypeError, match="argument 'x_P' must be a tensor, got list"):
            tripled([1.0])
        with gk.profiling.record() as counts:
            tripled(one_P)
        assert counts.table["test_triple", "single"].calls == 1
        with torch._subclasses.FakeTensorMode():
            assert tripled(torch.empty(3, device="cuda")).device.type == "cuda"
        with torch.autograd.forward_ad.dual_level():
            dual_P = torch.autograd.forward_ad.make_dual(one_P, one_P)
            with pytest.raises(RuntimeError, match="has no forward-mode gradient"):
                tripled(dual_P)


def test_a_remembered_call_has_the_gradient_of_a_dispatched_one() -> None:
    for call in (tripled, tripled, torch.ops.gose.test_triple):
        x_P = torch.ones(3, requires_grad=True)
        for out, slope in ((call(x_P), 3.0), (call(x_P, 1.0), 3.0), (call(x_P, scale=2.0), 6.0)):
            (grad,) = torch.autograd.grad(out.sum(), x_P)
            assert grad.tolist() == [slope] * 3
        with torch.no_grad():
            assert not call(x_P).requires_grad


def test_first_able_backend_runs() -> None:
    assert torch.equal(doubled(torch.ones(3), scale=2.0), torch.full((3,), 4.0))
    assert doubled.pick(torch.ones(3), scale=1.0).name == "torch"
    reasons = doubled.reasons(torch.ones(3))
    assert {name: reasons[name] for name in ("picky", "torch")} == {
        "picky": "it is Sunday",
        "torch": None,
    }


def test_named_backend_runs_or_raises_its_reason() -> None:
    with pytest.raises(ValueError, match=r"test_double: backend 'picky' cannot run this call\n"):
        doubled(torch.ones(3), backend="picky")
    with pytest.raises(ValueError, match="picky: it is Sunday"):
        doubled(torch.ones(3), backend="picky")
    with pytest.raises(
        ValueError, match=r"no backend named 'gpu'; there are: cuda, .*picky, torch"
    ):
        doubled(torch.ones(3), backend="gpu")
    with pytest.raises(ValueError, match="cuda: test_double has no cuda kernel"):
        doubled(torch.ones(3), backend="cuda")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {}, "argument 'x_P' is missing"),
        ((torch.ones(1), 2.0), {}, "takes 1 positional arguments, got 2"),
        (([1.0],), {}, "argument 'x_P' must be a tensor, got list"),
        ((None,), {}, "argument 'x_P' must be a tensor, got NoneType"),
        ((torch.ones(1),), {"scael": 2.0}, "no argument named 'scael'"),
    ],
)
def test_wrong_calls_name_the_argument(
    args: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        doubled(*args, **options)


def test_gradient_flows_through_the_dispatcher() -> None:
    x_P = torch.ones(3, requires_grad=True)
    doubled(x_P, scale=3.0).sum().backward()
    assert torch.equal(x_P.grad, torch.full((3,), 6.0))  # type: ignore[arg-type]
    with torch.no_grad():
        assert not doubled(x_P).requires_grad


def test_backend_reaches_the_implementation_under_autograd() -> None:
    with pytest.raises(ValueError, match="it is Sunday"):
        doubled(torch.ones(3, requires_grad=True), backend="picky")


def test_autocast_casts_the_named_arguments_and_spares_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert doubled(torch.ones(3)).dtype == torch.bfloat16
        assert doubled(torch.ones(3, dtype=torch.float64)).dtype == torch.float64
        x_P = torch.ones(3, requires_grad=True)
        doubled(x_P).sum().backward()
    assert x_P.grad is not None
    assert x_P.grad.dtype == torch.float32
    assert torch.equal(x_P.grad, torch.full((3,), 2.0))


def test_modes_transforms_and_compile_see_the_op() -> None:
    with gk.profiling.flop_counter() as mode:
        doubled(torch.ones(5))
        torch.mm(torch.ones(2, 3), torch.ones(3, 4))
    assert mode.get_total_flops() == 10 + 2 * 2 * 3 * 4
    with torch._subclasses.FakeTensorMode():
        assert doubled(torch.empty(7, device="cuda")).device.type == "cuda"
    compiled = torch.compile(lambda x: doubled(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    # torch.library gives such ops no functorch rule: an error, never a silently constant result.
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: doubled(x).sum())(torch.ones(3))


@pytest.mark.parametrize("name", ["combine", "entropy", "route"])
def test_a_second_derivative_raises_where_there_is_none(name: str) -> None:
    op = gk.OPS[name]
    inputs = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in op.example(torch.device("cpu"), torch.float32)  # type: ignore[misc]
    ]
    out = op(*inputs)
    (grad,) = torch.autograd.grad(
        (out[0] if name == "route" else out).square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match=f"{name} can be differentiated once, not twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["quantize", "dequantize", "low_rank"])
def test_a_gradient_through_an_op_without_one_raises(name: str) -> None:
    op = gk.OPS[name]
    assert op.example is not None
    inputs = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in op.example(torch.device("cpu"), torch.float32)
    ]
    out = op(*inputs)
    floats = [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()]
    with pytest.raises(RuntimeError, match=f"{name}: has no gradient"):
        sum(t.sum() for t in floats).backward()  # type: ignore[union-attr]


def test_a_forward_mode_tangent_raises_and_is_not_dropped() -> None:
    x_P = torch.ones(3)
    with torch.autograd.forward_ad.dual_level():
        dual_P = torch.autograd.forward_ad.make_dual(x_P, x_P)
        for call in (doubled, torch.ops.gose.test_double):
            with pytest.raises(RuntimeError, match="test_double: has no forward-mode gradient"):
                call(dual_P)
        assert torch.equal(doubled(x_P), 2 * x_P)


@pytest.mark.parametrize("name", sorted(set(gk.OPS) - {"test_double"}))
def test_meta_tensors_give_meta_tensors(name: str) -> None:
    op = gk.OPS[name]
    assert op.example is not None
    out = op(*op.example(torch.device("meta"), torch.float32))
    outputs = out if isinstance(out, tuple) else () if out is None else (out,)
    assert all(t.is_meta for t in outputs)


@pytest.mark.parametrize("name", sorted(set(gk.OPS) - {"test_double"}))
def test_every_op_passes_opcheck_on_its_example(name: str) -> None:
    op = gk.OPS[name]
    assert op.example is not None
    torch.library.opcheck(op.overload, op.example(torch.device("cpu"), torch.float32))


def test_tensors_on_two_devices_are_refused_by_every_backend() -> None:
    grad_BM, logits_BMC = torch.ones(2, 3), torch.ones(2, 3, 8, device="meta")
    with pytest.raises(ValueError, match="torch: takes tensors on one device, got them on cpu and"):
        gk.OPS["entropy_backward"].pick(grad_BM, logits_BMC)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.gose.test_double.default, (torch.ones(3, requires_grad=True),), {"scale": 2.0}
    )


def test_an_op_is_registered_once() -> None:
    with pytest.raises(RuntimeError, match="test_double"):
        register(
            "test_double(Tensor x_P, *, str? backend=None) -> Tensor",
            reference(_double_reference),
            fake=lambda x_P, backend=None: x_P,
        )


def test_explain_tells_what_runs_and_why_not() -> None:
    rows = gk.explain("test_double")
    assert [tuple(r) for r in rows[-2:]] == [
        ("picky", False, "it is Sunday", None),
        ("torch", True, None, None),
    ]
    assert rows[0] == ("cuda", False, "test_double has no cuda kernel", None)
    with pytest.raises(ValueError, match="explain: no op named 'combin'; ops: "):
        gk.explain("combin")


def test_explain_names_the_kernel_within() -> None:
    if gk.native.why_not() is not None:
        pytest.skip(str(gk.native.why_not()))
    rows = {r.backend: r for r in gk.explain("expert_mlp", dtype=torch.float32)}
    level = gk.native.cpu_level()
    wanted = {"avx512_bf16": "avx512", "amx": "avx512"}.get(str(level), level)
    assert str(rows["cpu"].path).startswith(f"{wanted} multiply-add; packed weights")
    assert rows["torch"].path is None


def test_explain_imitates_a_device_that_is_not_here() -> None:
    reasons = {r.backend: r.reason for r in gk.explain("combine", device="cuda")}
    assert reasons["cpu"] == "takes tensors on cpu, got one on cuda"
    if not torch.cuda.is_available():
        assert reasons["cuda"] is not None
        assert reasons["triton"] is not None


@pytest.mark.parametrize("name", sorted(gk.OPS))
def test_every_op_of_the_library_explains_itself_and_ends_in_the_reference(name: str) -> None:
    op = gk.OPS[name]
    assert op.backends[-1].name == "torch"
    assert op.cost is not None
    rows = gk.explain(name)
    assert sum(r.chosen for r in rows) == 1


@pytest.mark.parametrize("name", sorted(gk.OPS))
def test_declared_cost_of_the_example_is_positive(name: str) -> None:
    op = gk.OPS[name]
    assert op.example is not None
    cost = op.cost_of(*op.example(torch.device("cpu"), torch.float32))
    assert cost.tokens > 0
    assert cost.bytes > 0
    assert cost.flops >= 0


def test_a_backend_elsewhere_that_looks_at_values_slows_no_call():
    """route's CUDA kernel has limits; on the CPU a signature still goes straight to its backend."""
    score_TE = torch.ones(4, 8)
    assert gk.OPS["route"]._find_direct((score_TE, 2), {}) is not None
    assert gk.OPS["route"]._find_direct((score_TE.to("meta"), 2), {}) is None
