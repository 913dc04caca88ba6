"""LivingExperts: the experts of a running layer by name, changed one at a time.

An expert lives in a slot of the layer's stacked weights and keeps it; `capacity` slots exist, so
that experts come and go while shapes, parameters and a compiled graph stay as they are. Every
change writes the rows of the experts that it names and no other's, in the weights and in the packed
copies that the CPU kernels keep, and moves the optimizer's state along.

Calls of the layer and changes take turns: a call sees all of a change or nothing of it. A call
through torch.compile has to stand in `with living.reading():`, and so does what must see several
calls alike. Between a forward and its backward nothing may be changed: torch then refuses the
backward.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gose_kernels.living.following import carry, freeze_rows
from gose_kernels.living.layer import LivingLayer
from gose_kernels.living.names import Names
from gose_kernels.optim import MaskedOptimizer

Column: TypeAlias = Literal["copy", "mean", "zero"]
State: TypeAlias = Literal["carried", "dropped", "cloned"]

_Change = TypeVar("_Change", bound=Callable[..., Any])


def _alone(change: _Change) -> _Change:
    """One change at a time, its checks included."""

    @functools.wraps(change)
    def one(self: LivingExperts, *args: Any, **named: Any) -> Any:
        with self._changes:
            return change(self, *args, **named)

    return cast(_Change, one)


class LivingExperts:
    """Stable names for the experts of one layer, and what can be done to them.

    layer      gk.MoE, or a model's block after `huggingface.replace_moe_layers(model, router={})`,
               its experts kept as they are or packed or quantized only
    capacity   slots for experts; None: as many as there are experts
    names      of the experts that are there, in order; None: expert0, expert1, ...
    optimizer  one whose state follows: gk.optim.Masked*, or one of torch.optim, of which state of
               the parameter's shape follows and step counts, which experts share there, stay

    The layer gets two buffers: router.live_E (False: routing never chooses the slot) and
    experts.frozen_E. Names are 1 to 128 of A-Z a-z 0-9 . _ -; that of a removed expert is not used
    again. ValueError for what does not fit, before anything changes.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        capacity: int | None = None,
        names: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._at = LivingLayer(layer)
        self._optimizer = optimizer
        self._changes = threading.RLock()
        self._names = Names()
        try:
            self._names.fill(self._at.num_slots, names)
            if capacity is not None and capacity != self.capacity:
                self.reserve(capacity)
        except ValueError:
            self._at.release()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order of their slots."""
        return self._names.present

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of experts that are gone, in the order in which they went."""
        return tuple(self._names.removed)

    @property
    def awake(self) -> tuple[str, ...]:
        """The experts that routing may choose."""
        return tuple(n for n in self.names if bool(self._at.live_E[self.slot(n)]))

    @property
    def frozen(self) -> tuple[str, ...]:
        """The experts whose weights are frozen."""
        return tuple(n for n in self.names if bool(self._at.frozen_E[self.slot(n)]))

    @property
    def capacity(self) -> int:
        """Slots, free ones included."""
        return len(self._names.slots)

    def reading(self) -> AbstractContextManager[None]:
        """A context in which nothing changes: changes of other threads wait for its end."""
        return self._at.turns.reading()

    def slot(self, name: str) -> int:
        """Where an expert lives: its id in `expert_TK`. ValueError for a name that is not there."""
        return self._names.slot("slot", name)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Copies of an expert's own weights and biases by parameter name; of quantized experts what
        they were rounded to."""
        return self._at.weights_of(self._rows("weights", name))

    def column(self, name: str) -> dict[str, Tensor]:
        """Copies of what the router holds of an expert, by parameter or buffer name."""
        slot = self._names.slot("column", name)
        return {n: t.detach()[slot].clone() for n, t in self._at.of_router().items()}

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The layer's parameters that have a row per slot: the experts' and the router's."""
        held: list[Tensor] = [*self._at.of_experts().values(), *self._at.of_router().values()]
        return tuple(p for p in held if isinstance(p, nn.Parameter))

    # -- changes ---------------------------------------------------------------------------------

    @_alone
    def reserve(self, capacity: int) -> None:
        """Slots for `capacity` experts. Shapes change: a compiled graph is compiled anew."""
        if capacity < self.capacity:
            raise ValueError(
                f"LivingExperts.reserve: capacity must be at least the {self.capacity} slots that "
                f"there are, got {capacity}; settle() gives free slots back"
            )
        routing: Any = vars(self._at.router).get("_gose_routing")
        layer: Any = self._at.layer
        options = layer.options if routing is None else routing.options
        if options.get("num_groups", 1) > 1:
            raise ValueError(
                "LivingExperts.reserve: the router chooses among groups of neighbouring experts, "
                "which more slots would shift"
            )
        self._relay([*range(self.capacity), *[-1] * (capacity - self.capacity)])

    @_alone
    def add(
        self,
        name: str,
        *,
        like: str | None = None,
        weights: Mapping[str, Tensor] | None = None,
        router: Column = "mean",
        state: State = "dropped",
    ) -> int:
        """The slot of a new expert, by default a copy of `like`.

        weights  its own instead, as `weights()` gives them
        router   "copy": the column of `like`; "mean": the mean of all experts awake; "zero": zeros,
                 and the expert sleeps: its probability is exactly 0 and the layer's output keeps
                 its bits until `wake`
        state    of the optimizer: "dropped" (none yet) or "cloned" (that of `like`)
        """
        who = "add"
        self._names.check_new(f"LivingExperts.{who}", name)
        self._check_option(who, "state", state, ("dropped", "cloned"))
        rows = self._rows_of(who, like, weights)
        column = self._column_of(who, router, like)
        source = (
            None if state == "dropped" else self._names.slot(who, self._need(who, "like", like))
        )
        slot = self._names.free(who)
        with self._changing(who, {slot: source}):
            self._write(slot, rows, column)
            self._at.live_E[slot] = router != "zero"
            self._names.slots[slot] = name
        return slot

    @_alone
    def remove(self, name: str) -> None:
        """The expert gone: its weights, column and optimizer state are zeros, its slot is free."""
        slot = self._names.slot("remove", name)
        self._check_others_awake("remove", [name])
        with self._changing("remove", {slot: None}):
            self._clear(slot)

    @_alone
    def replace(
        self,
        name: str,
        *,
        like: str | None = None,
        weights: Mapping[str, Tensor] | None = None,
        state: State = "dropped",
    ) -> None:
        """Other weights in an expert, its column as it was: those of `like`, or `weights`.

        state: "carried" (its own stays), "dropped", or "cloned" from `like`.
        """
        self._check_option("replace", "state", state, ("carried", "dropped", "cloned"))
        slot = self._names.slot("replace", name)
        rows = self._rows_of("replace", like, weights)
        source: int | None = slot if state == "carried" else None
        if state == "cloned":
            source = self._names.slot("replace", self._need("replace", "like", like))
        with self._changing("replace", {slot: source}, of_router=False):
            self._write(slot, rows, {})

    @_alone
    def split(
        self,
        name: str,
        into: tuple[str, str],
        *,
        noise: float = 0.01,
        generator: torch.Generator | None = None,
        state: State = "carried",
    ) -> None:
        """Two experts with the weights of one, which is gone, side by side in the router's space.

        Their columns are c + n and c - n: n is normal, `noise` times the rms of c. The routing
        weights of a token that takes both are those of two experts, not halves of one.
        state: "carried" (the first keeps it), "cloned" (both) or "dropped" (none).
        """
        who = "split"
        self._check_option(who, "state", state, ("carried", "cloned", "dropped"))
        slot = self._names.slot(who, name)
        if len(set(into)) != 2:
            raise ValueError(f"LivingExperts.split: into must be two different names, got {into}")
        for child in into:
            self._names.check_new(f"LivingExperts.{who}", child)
        other = self._names.free(who)
        rows, column = self._rows(who, name), self.column(name)
        apart: dict[str, Tensor] = {}
        for key, c in column.items():
            scale = noise * c.float().square().mean().sqrt()
            drawn = torch.randn(c.shape, generator=generator, device="cpu").to(c.device)
            apart[key] = (scale * drawn).to(c.dtype)
        source = {slot: None if state == "dropped" else slot}
        source[other] = slot if state == "cloned" else None
        awake, frozen = bool(self._at.live_E[slot]), bool(self._at.frozen_E[slot])
        column_frozen = name in self._names.frozen_columns
        with self._changing(who, source):
            self._write(slot, {}, {key: column[key] + apart[key] for key in column})
            self._write(other, rows, {key: column[key] - apart[key] for key in column})
            self._names.forget(slot)
            for child, at in zip(into, (slot, other), strict=True):
                self._names.slots[at] = child
                self._at.live_E[at], self._at.frozen_E[at] = awake, frozen
                if column_frozen:
                    self._names.frozen_columns.add(child)

    @_alone
    def merge(
        self,
        names: Sequence[str],
        into: str,
        *,
        shares: Sequence[float] | None = None,
        state: State = "dropped",
    ) -> None:
        """One expert in the place of several, which are gone: the mean of weights and columns.

        shares   how much each counts, divided by their sum; None: all alike
        state    "dropped" or "carried" (that of the first)
        """
        who = "merge"
        self._check_option(who, "state", state, ("dropped", "carried"))
        slots = [self._names.slot(who, name) for name in names]
        if len(slots) < 2 or len(set(slots)) != len(slots):
            raise ValueError(
                f"LivingExperts.merge: names must be two or more different experts, got {names}"
            )
        self._names.check_new(f"LivingExperts.{who}", into)
        share = [1.0] * len(slots) if shares is None else [float(s) for s in shares]
        if len(share) != len(slots) or min(share) < 0 or not 0 < sum(share) < float("inf"):
            raise ValueError(
                f"LivingExperts.merge: shares must be {len(slots)} numbers of at least 0, "
                f"not all 0, got {shares}"
            )
        share_N = torch.tensor(share, dtype=torch.float64) / sum(share)

        def mean(of: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
            found = [of(name) for name in names]
            return {
                key: sum(
                    (float(s) * f[key].double() for s, f in zip(share_N, found, strict=True)),
                    torch.zeros((), dtype=torch.float64, device=found[0][key].device),
                ).to(found[0][key].dtype)
                for key in found[0]
            }

        rows, column = self._at.rows_of(mean(self.weights)), mean(self.column)
        first, *rest = slots
        awake = any(bool(self._at.live_E[s]) for s in slots)
        source: dict[int, int | None] = dict.fromkeys(slots)
        if state == "carried":
            source[first] = first
        with self._changing(who, source):
            for slot in rest:
                self._clear(slot)
            self._names.forget(first)
            self._write(first, rows, column)
            self._names.slots[first] = into
            self._at.live_E[first] = awake
            self._at.frozen_E[first] = False

    @_alone
    def sleep(self, name: str) -> None:
        """An expert that routing does not choose until `wake`: probability 0; it keeps its bits."""
        slot = self._names.slot("sleep", name)
        self._check_others_awake("sleep", [name])
        with self._changing("sleep"):
            self._at.live_E[slot] = False

    @_alone
    def wake(self, name: str, *, like: str | None = None, router: Column | None = None) -> None:
        """Routing may choose the expert, by the column it has or one made as in `add`."""
        slot = self._names.slot("wake", name)
        if router == "zero":
            raise ValueError("LivingExperts.wake: router must be None, copy or mean, got 'zero'")
        column = {} if router is None else self._column_of("wake", router, like)
        with self._changing("wake", {slot: None} if column else {}, of_experts=False):
            self._write(slot, {}, column)
            self._at.live_E[slot] = True

    @_alone
    def freeze(self, name: str, *, router: bool = False) -> None:
        """An expert whose weights, and with router=True its column, keep their bits in training.

        Gradients of the weights are 0 at once. Momentum and weight decay need a gk.optim.Masked*
        as `optimizer`; another one is refused.
        """
        slot = self._names.slot("freeze", name)
        self._check_masked("freeze")
        with self._changing("freeze"):
            self._at.frozen_E[slot] = True
            (self._names.frozen_columns.add if router else self._names.frozen_columns.discard)(name)

    @_alone
    def unfreeze(self, name: str) -> None:
        """The expert and its column train again."""
        slot = self._names.slot("unfreeze", name)
        with self._changing("unfreeze"):
            self._at.frozen_E[slot] = False
            self._names.frozen_columns.discard(name)

    @_alone
    def settle(self) -> None:
        """The layer an ordinary one again, of its experts in the order of their slots; ends this.

        ValueError while one of them sleeps: an ordinary layer would choose it.
        """
        asleep = [name for name in self.names if name not in self.awake]
        if asleep:
            raise ValueError(
                f"LivingExperts.settle: {', '.join(asleep)} sleep; wake or remove them first"
            )
        self._relay([slot for slot, name in enumerate(self._names.slots) if name is not None])
        self._names.slots = []
        self._at.release()

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the layer's state_dict does not say, as JSON values."""
        return self._names.state_dict(self.frozen)

    @_alone
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Names of a layer of equal capacity, after its own state_dict was loaded.

        ValueError, which changes nothing, where the two do not fit.
        """
        awake, frozen = self._at.live_E.tolist(), self._at.frozen_E.tolist()
        names = Names.of("LivingExperts.load_state_dict", state, awake, frozen)
        with self._changing("load_state_dict"):
            self._names = names

    # -- checks ----------------------------------------------------------------------------------

    def _check_option(self, who: str, option: str, got: str, wanted: tuple[str, ...]) -> None:
        if got not in wanted:
            raise ValueError(
                f"LivingExperts.{who}: {option} must be {' or '.join(wanted)}, got {got!r}"
            )

    def _need(self, who: str, argument: str, got: str | None) -> str:
        if got is None:
            raise ValueError(f"LivingExperts.{who}: {argument} must name an expert, got None")
        return got

    def _check_others_awake(self, who: str, names: Sequence[str]) -> None:
        if not set(self.awake) - set(names):
            raise ValueError(f"LivingExperts.{who}: {names[0]!r} is the last expert awake")

    def _check_masked(self, who: str) -> None:
        if self._optimizer is not None and not isinstance(self._optimizer, MaskedOptimizer):
            raise ValueError(
                f"LivingExperts.{who}: optimizer must be one of gk.optim.Masked*, got "
                f"{type(self._optimizer).__name__}, whose momentum and decay move frozen weights"
            )

    def _rows(self, who: str, name: str) -> dict[str, Tensor]:
        slot = self._names.slot(who, name)
        return {n: t.detach()[slot].clone() for n, t in self._at.of_experts().items()}

    def _rows_of(
        self, who: str, like: str | None, weights: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if weights is None:
            return self._rows(who, self._need(who, "like, or weights,", like))
        if like is not None:
            self._names.slot(who, like)
        shapes = self._at.shapes()
        if set(weights) != set(shapes):
            raise ValueError(
                f"LivingExperts.{who}: weights must be {sorted(shapes)}, got {sorted(weights)}"
            )
        for name, shape in shapes.items():
            if weights[name].shape != shape:
                raise ValueError(
                    f"LivingExperts.{who}: weights[{name!r}] must have shape {shape}, "
                    f"got {tuple(weights[name].shape)}"
                )
        return self._at.rows_of(weights)

    def _column_of(self, who: str, router: str, like: str | None) -> dict[str, Tensor]:
        self._check_option(who, "router", router, ("copy", "mean", "zero"))
        if router == "copy":
            return self.column(self._need(who, "like", like))
        live_E = self._at.live_E
        return {
            name: torch.zeros_like(t[0])
            if router == "zero"
            else t.detach()[live_E].double().mean(dim=0).to(t.dtype)
            for name, t in self._at.of_router().items()
        }

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def _changing(
        self,
        who: str,
        source: Mapping[int, int | None] | None = None,
        *,
        of_experts: bool = True,
        of_router: bool = True,
    ) -> Iterator[None]:
        """Inside, slots of `source` may be written; their optimizer state comes from the slots it
        names afterwards, None: it is dropped."""
        source = source or {}
        slots = source if of_experts else {}
        with self._at.turns.writing(f"LivingExperts.{who}"), torch.no_grad():
            with self._at.changing(*slots):
                yield
            moved = [source.get(e, e) for e in range(self.capacity)]
            rows = [-1 if e is None else e for e in moved]
            held: list[Tensor] = []
            held += self._at.of_experts().values() if of_experts else ()
            held += self._at.of_router().values() if of_router else ()
            for p in held if source else ():
                if isinstance(p, nn.Parameter):
                    carry(self._optimizer, p, p.detach(), rows)
                    if p.grad is not None:
                        p.grad[list(source)] = 0
            self._mask()

    def _write(self, slot: int, rows: Mapping[str, Tensor], column: Mapping[str, Tensor]) -> None:
        for stacked, values in ((self._at.of_experts(), rows), (self._at.of_router(), column)):
            for name, value in values.items():
                stacked[name][slot].copy_(value)

    def _clear(self, slot: int) -> None:
        for tensor in (*self._at.of_experts().values(), *self._at.of_router().values()):
            tensor[slot].zero_()
        self._at.live_E[slot] = False
        self._at.frozen_E[slot] = False
        self._names.forget(slot)

    def _relay(self, source: list[int]) -> None:
        """Slot i of the layer and of the optimizer's state is what slot source[i] was."""
        with self._at.turns.writing("LivingExperts"), torch.no_grad():
            for p, values in self._at.resize(source).items():
                carry(self._optimizer, p, values, source)
                if p.data_ptr() != values.data_ptr():
                    p.data, p.grad = values, None
            self._names.slots = [self._names.slots[of] if of >= 0 else None for of in source]
            self._mask()

    def _mask(self) -> None:
        """The optimizer's masks: frozen experts, and slots that routing does not choose."""
        if not isinstance(self._optimizer, MaskedOptimizer):
            return
        still_E, frozen_E = ~self._at.live_E, self._at.frozen_E
        columns_E = torch.tensor([n in self._names.frozen_columns for n in self._names.slots])
        columns_E = columns_E.to(still_E.device)
        for p in self._at.of_experts().values():
            freeze_rows(self._optimizer, p, frozen_E | still_E)
        for p in self._at.of_router().values():
            freeze_rows(self._optimizer, p, columns_E | still_E)
