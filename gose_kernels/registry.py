"""Ops with several implementations, and the pure choice between them.

An op is registered once: schema, backends side by side (fastest first, the plain-torch reference
last), fake, autograd. `torch.ops.gose.<name>` and `gose_kernels.<name>` are the same op; the latter
enters the chosen backend directly when nothing (autograd, autocast, a dispatch mode, a tensor
subclass, torch.compile) needs torch's dispatcher. A library call costs about 3 us a trip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _any_requires_grad,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from gose_kernels.backends import BACKENDS, Backend, tensors_of

_LIBRARY = torch.library.Library("gose", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


class Cost(NamedTuple):
    """Declared work of one call: rows of work, bytes read plus written once, 2 * multiply-adds."""

    tokens: int
    bytes: int
    flops: int


class Observer(Protocol):
    """What `profiling.record` installs: it runs every call and keeps what it saw."""

    def call(
        self, op: Op, backend: Backend, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any: ...


# Tensors that hold nothing but data.
_PLAIN = (Tensor, Parameter)

# Filled and emptied by the context manager profiling.record() only.
observers: list[Observer] = []

OPS: dict[str, Op] = {}


def _needs_dispatcher(args: Sequence[object], casts: bool) -> bool:
    """Whether autograd, autocast, a mode, a transform, a tensor subclass or a tensor without data
    needs more than the backend."""
    if _len_torch_dispatch_stack() or _len_torch_function_stack():
        return True
    if maybe_current_level() is not None:
        return True
    grad = is_grad_enabled()
    for t in tensors_of(args):
        if (grad and t.requires_grad) or t.is_meta or type(t) not in _PLAIN:
            return True
        if casts and torch.is_autocast_enabled(t.device.type):
            return True
    return False


class _Direct(NamedTuple):
    """What every call of one signature runs, straight away."""

    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]  # of the arguments that were given
    tail: tuple[Any, ...]  # defaults of the positional ones that were not
    options: dict[str, Any]  # defaults of the options, unless the backend has its own


class Op:
    """A named op: call it, ask what would run (`pick`) and why others would not (`reasons`)."""

    def __init__(
        self,
        schema: str,
        backends: tuple[Backend, ...],
        cost: Callable[..., Cost] | None,
        example: Callable[[torch.device, torch.dtype], tuple[Any, ...]] | None,
        autocast: tuple[str, ...],
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.schema = schema
        self.backends = backends
        self.cost = cost
        self.example = example
        _LIBRARY.define(schema)
        self.overload = getattr(torch.ops.gose, self.name).default
        arguments = self.overload._schema.arguments
        self._positional = [a for a in arguments if not a.kwarg_only]
        self._options = {
            a.name: a.default_value for a in arguments if a.kwarg_only and a.name != "backend"
        }
        self.tensors_of = [
            (at, a.name, str(a.type) != "Tensor")
            for at, a in enumerate(self._positional)
            if str(a.type) in ("Tensor", "Optional[Tensor]")
        ]
        self._required = [a.name for a in arguments if a.kwarg_only and not a.has_default_value()]
        self._casts = bool(autocast)
        self._again = next((b.again for b in backends if b.again is not None), None)
        self._direct: dict[tuple[Any, ...], _Direct | None] = {}
        self._apply: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(b.name for b in self.backends)}>"

    def _bind(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], str | None]:
        """(positional args, keyword-only options, backend) with defaults, in schema order."""
        options = dict(options)
        backend = options.pop("backend", None)
        if len(args) > len(self._positional):
            raise TypeError(
                f"{self.name}: takes {len(self._positional)} positional arguments, got {len(args)}"
            )
        positional = list(args)
        for a in self._positional[len(args) :]:
            if a.name in options:
                positional.append(options.pop(a.name))
            elif a.has_default_value():
                positional.append(a.default_value)
            else:
                raise TypeError(f"{self.name}: argument {a.name!r} is missing")
        for at, name, optional in self.tensors_of:
            if not (isinstance(positional[at], Tensor) or (optional and positional[at] is None)):
                kind = type(positional[at]).__name__
                raise TypeError(f"{self.name}: argument {name!r} must be a tensor, got {kind}")
        if missing := [name for name in self._required if name not in options]:
            raise TypeError(f"{self.name}: option {missing[0]!r} is missing")
        if unknown := [name for name in options if name not in self._options]:
            raise TypeError(
                f"{self.name}: no argument named {unknown[0]!r}; the schema is {self.schema}"
            )
        return tuple(positional), {**self._options, **options}, backend

    def reasons(self, *args: Any, **options: Any) -> dict[str, str | None]:
        """Backend name -> why it cannot run this call (None: it can), fastest first."""
        bound, bound_options, _ = self._bind(args, options)
        written = {b.name: b.why_not(*bound, **bound_options) for b in self.backends}
        missing = {name: self._not_written(name) for name in BACKENDS if name not in written}
        return {**missing, **written}

    def _not_written(self, backend: str) -> str:
        return f"{self.name} has no {backend} kernel"

    def cost_of(self, *args: Any, **options: Any) -> Cost:
        """Declared work of a call; zeros for an op that declares none."""
        bound, bound_options, _ = self._bind(args, options)
        return self.cost(*bound, **bound_options) if self.cost is not None else Cost(0, 0, 0)

    def pick(self, *args: Any, backend: str | None = None, **options: Any) -> Backend:
        """First backend that can run the bound call; a named one runs or raises its reason."""
        refused = []
        for b in self.backends:
            if backend in (None, b.name):
                if (reason := b.why_not(*args, **options)) is None:
                    return b
                refused.append(f"  {b.name}: {reason}")
        if not refused:
            if backend not in BACKENDS:
                known = ", ".join(self.reasons(*args, **options))
                raise ValueError(f"{self.name}: no backend named {backend!r}; there are: {known}")
            refused.append(f"  {backend}: {self._not_written(backend)}")
        raise ValueError(
            f"{self.name}: backend {backend!r} cannot run this call\n" + "\n".join(refused)
        )

    def run(self, *args: Any, **options: Any) -> Any:
        """The call below autograd, autocast and torch's dispatcher."""
        if self._again is not None and (output := self._again(args, options)) is not None:
            return output
        watched = observers or forward_ad._current_level >= 0 or _is_any_autocast_enabled()
        if not watched and (direct := self._find_direct(args, options)):
            return direct.run(args, options)
        bound, bound_options, backend = self._bind(args, options)
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors_of(bound)
        ):
            raise RuntimeError(f"{self.name}: has no forward-mode gradient")  # torch would drop it
        picked = self.pick(*bound, backend=backend, **bound_options)
        if torch._C._is_any_autocast_enabled():
            # The op's own casts are done; what a reference calls inside must not cast again.
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return self._observed(picked, bound, bound_options)
        return self._observed(picked, bound, bound_options)

    def _observed(self, picked: Backend, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if observers:
            return observers[-1].call(self, picked, args, options)
        return picked.run(*args, **options)

    def _find_direct(self, args: tuple[Any, ...], options: dict[str, Any]) -> _Direct | None:
        """What runs this call if its signature alone decides that: the dtypes and devices of the
        tensors, the types of other arguments, the names of the options. Found once for each."""
        signature: list[Any] = [*options]
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                signature += (a.dtype, a.device)
            else:
                signature.append(kind)
        key = tuple(signature)
        try:
            return self._direct[key]
        except KeyError:
            return self._direct.setdefault(key, self._decide(args, options))

    def _decide(self, args: tuple[Any, ...], options: dict[str, Any]) -> _Direct | None:
        tensors = list(tensors_of(args))
        plain = all(type(t) in _PLAIN and not t.is_meta for t in tensors)
        lists = any(isinstance(a, (list, tuple)) for a in args)
        if not plain or lists or not options.keys() <= self._options.keys():
            return None
        bound, bound_options, _ = self._bind(args, options)
        for b in self.backends:
            if not b.by_dtype:
                if b.never is not None and b.never(*bound) is not None:
                    continue
                return None
            if b.why_not(*bound, **bound_options) is None:
                tail = bound[len(args) :]
                if b.given is not None:
                    return _Direct(b.given, tail, {})
                run = self._with_defaults(b.run, tail)
                return _Direct(run, tail, {**self._options, "backend": None})
        return None

    def _with_defaults(
        self, run: Callable[..., Any], tail: tuple[Any, ...]
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        return lambda args, options: run(*args, *tail, **{**self._options, **options})

    def __call__(self, *args: Any, **options: Any) -> Any:
        if is_dynamo_compiling():
            return self.overload(*args, **options)
        if options and options.get("backend", "") is None:
            del options["backend"]
        if self._again is not None and (output := self._again(args, options)) is not None:
            return output
        if not (
            observers
            or _len_torch_dispatch_stack()
            or _len_torch_function_stack()
            or maybe_current_level() is not None
            or forward_ad._current_level >= 0
            or _is_any_autocast_enabled()
        ):
            trains = is_grad_enabled() and _any_requires_grad(*args)
            if direct := self._find_direct(args, options):
                if not trains:
                    return direct.run(args, options)
                if self._apply is not None:
                    return self._apply(*args, direct, options)
        if _needs_dispatcher([*args, *options.values()], self._casts):
            return self.overload(*args, **options)
        return self.run(*args, **options)


def _register_autocast(op: Op, names: tuple[str, ...]) -> None:
    """Cast the named floating-point arguments to autocast's dtype, leave the others alone."""
    names_at = [a.name in names for a in op._positional]

    def install(device: str) -> None:
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
        keys = torch._C.DispatchKeySet(key)

        def cast(value: Any) -> Any:
            # float64 is what gradient checks run in; like torch's own ops autocast leaves it alone.
            castable = (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dtype != torch.float64
                and value.device.type == device
            )
            return value.to(torch.get_autocast_dtype(device)) if castable else value

        @op.overload.py_impl(key)  # type: ignore[untyped-decorator]
        def with_casts(*args: Any, **options: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                chosen = [cast(a) if named else a for a, named in zip(args, names_at, strict=False)]
                options = {k: cast(v) if k in names else v for k, v in options.items()}
                return op.overload(*chosen, **options)

        _LIBRARY.impl(
            op.name,
            lambda _keys, *args, **options: with_casts(*args, **options),
            f"Autocast{device.upper()}",
            with_keyset=True,
        )

    for device in ("cpu", "cuda"):
        install(device)


def _register_training(op: Op, graph: Callable[..., Any]) -> None:
    """Autograd runs `graph` in the place of an op that saves nothing for a backward."""

    def autograd(keys: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return graph(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            below = keys & torch._C._after_autograd_keyset
            return op.overload.redispatch(below, *args, **options)

    _LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)


def _direct_function(
    op: Op, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes of the two, without the dispatcher. It takes the
    positional arguments that were given, then a _Direct and the options."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *given, direct, options = args
            output = direct.run(given, options)
            if setup_context is not None:
                setup_context(ctx, (*given, *direct.tail), {**direct.options, **options}, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            grad = backward(ctx, *grads)
            return (*(grad if isinstance(grad, tuple) else (grad,)), None, None)

    # Function.apply itself looks for functorch first, as the caller did: 2 us.
    apply: Callable[..., Any] = super(torch.autograd.Function, Direct).apply
    return apply


def register(
    schema: str,
    *backends: Backend,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    training: Callable[..., Any] | None = None,
    cost: Callable[..., Cost] | None = None,
    example: Callable[[torch.device, torch.dtype], tuple[Any, ...]] | None = None,
    autocast: tuple[str, ...] = (),
) -> Op:
    """The op `torch.ops.gose.<name>` with its backends, fastest first.

    schema         ends in `*, ..., str? backend=None`; tensor arguments are positional
    fake           shapes and dtypes of the outputs, called with the schema's arguments
    setup_context, backward   in the form of torch.library.register_autograd; without them a
                   gradient through the op raises. The options of an op that packs may come
                   without their defaults
    training       instead of a backward: run in the op's place, on the op's arguments, where one of
                   them requires a gradient; the same outputs from differentiable ops
    cost           Cost of a call, from its bound arguments
    example        small valid positional inputs on a device, in a dtype, for `explain` and benches
    autocast       names of the floating-point arguments that autocast casts
    """
    op = Op(schema, backends, cost, example, autocast)
    if op.name in OPS:
        raise ValueError(f"register: op {op.name!r} exists already")
    qualified = f"gose::{op.name}"
    _LIBRARY.impl(op.name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if training is not None:
        _register_training(op, training)
    elif not op.overload._schema.is_mutable:
        torch.library.register_autograd(
            qualified, backward or _no_gradient(op), setup_context=setup_context, lib=_LIBRARY
        )
        if backward is not None:
            op._apply = _direct_function(op, setup_context, backward)
    if autocast:
        _register_autocast(op, autocast)
    OPS[op.name] = op
    return op


def _no_gradient(op: Op) -> Callable[..., None]:
    """A backward that raises: without it torch would drop that part of the gradient in silence."""
    once = op.name.removesuffix("_backward")
    text = "has no gradient; call it on detached tensors"
    if once != op.name:
        text = f"{once} can be differentiated once, not twice"

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{op.name}: {text}")

    return backward


class Row(NamedTuple):
    """One line of `explain`: a backend, whether it is the one chosen, why it cannot run, and which
    of its kernels would."""

    backend: str
    chosen: bool
    reason: str | None
    path: str | None


def explain(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Row]:
    """What would run op `name` on example inputs of a device and dtype, fastest first.

    Devices that are not here are imitated by fake tensors: nothing is allocated on them.
    Raises ValueError for an unknown op or an op without example inputs.
    """
    if name not in OPS:
        raise ValueError(f"explain: no op named {name!r}; ops: {', '.join(sorted(OPS))}")
    op = OPS[name]
    if op.example is None:
        raise ValueError(f"explain: op {name!r} has no example inputs")
    with torch._subclasses.FakeTensorMode():
        args = op.example(torch.device(device), dtype)
        reasons = op.reasons(*args)
    chosen = next((b for b, reason in reasons.items() if reason is None), None)
    paths = {b.name: b.path for b in op.backends if b.path is not None and reasons[b.name] is None}
    return [
        Row(b, b == chosen, reason, paths[b](dtype) if b in paths else None)
        for b, reason in reasons.items()
    ]
