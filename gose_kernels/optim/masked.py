"""What the masked optimizers share: masks, state of live rows, the loop, checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from gose_kernels import masks, shards
from gose_kernels.masks import Frozen, Importance
from gose_kernels.ops.masked_update import masked_adam_
from gose_kernels.optim.clip import clip_scale, live_norm, mask_lists
from gose_kernels.registry import Op

# Rows and blocks of fewer elements have state even where frozen: their row map would outweigh it.
_MIN_UNIT = 16


class Masking(TypedDict, total=False):
    """Options that the three optimizers share."""

    frozen: Mapping[Parameter, Tensor | Importance] | None
    freeze_state: Literal["paused", "dropped"]
    max_grad_norm: float | None
    bfloat16: Literal["master", "stochastic"]
    seed: int
    backend: str | None


class _Lists(NamedTuple):
    """Parameters that one call of an op updates."""

    params: list[Parameter]
    fresh: bool  # whether this is their first step


class MaskedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose op leaves frozen elements alone."""

    _op: ClassVar[Op]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], masking: Masking) -> None:
        name = type(self).__name__
        if unknown := set(masking) - set(Masking.__annotations__):
            raise TypeError(f"{name}: no option named {min(unknown)!r}")
        self.freeze_state = masking.get("freeze_state", "paused")
        self.max_grad_norm = masking.get("max_grad_norm")
        self.bfloat16 = masking.get("bfloat16", "master")
        self.seed = masking.get("seed", 0)
        self.backend = masking.get("backend")
        self._frozen: dict[Tensor, Frozen] = {}
        if self.freeze_state not in ("paused", "dropped"):
            raise ValueError(
                f"{name}: freeze_state must be paused or dropped, got {self.freeze_state!r}"
            )
        if self.bfloat16 not in ("master", "stochastic"):
            raise ValueError(
                f"{name}: bfloat16 must be master or stochastic, got {self.bfloat16!r}"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm must be positive, got {self.max_grad_norm}")
        for option in ("lr", "weight_decay", "eps", "momentum"):
            if option in defaults and not defaults[option] >= 0:
                raise ValueError(f"{name}: {option} must be at least 0, got {defaults[option]}")
        for index, beta in enumerate(defaults.get("betas", ())):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: betas[{index}] must be in [0, 1), got {beta}")
        if self.bfloat16 == "stochastic":
            defaults = {**defaults, "draw": 0}  # steps made, which the draws depend on
        super().__init__(params, defaults)
        # GradScaler leaves its scale in self.grad_scale: unscaling is part of the step.
        self._step_supports_amp_scaling = True
        for param, mask in (masking.get("frozen") or {}).items():
            self.set_frozen(param, mask)

    def __getstate__(self) -> dict[str, Any]:
        own = ("freeze_state", "max_grad_norm", "bfloat16", "seed", "backend", "_frozen")
        kept = {name: getattr(self, name) for name in (*own, "_step_supports_amp_scaling")}
        return {**super().__getstate__(), **kept}

    @property
    def frozen(self) -> Mapping[Tensor, Tensor]:
        """The masks in force: parameter -> bool tensor, one value per run of elements.

        Its sizes divide the parameter's; of a DTensor it is a DTensor.
        """
        return MappingProxyType({p: shards.like(p, f.as_bool()) for p, f in self._frozen.items()})

    @torch.no_grad()
    def set_frozen(self, param: Tensor, mask: Tensor | Importance | None) -> None:
        """From the next step on, exactly the elements of `param` with True in `mask` are frozen.

        mask: as in `frozen` of the constructor, bool masks copied; None releases all. An element
        frozen later keeps its moments and step count for its release ("paused"), or loses them at
        once ("dropped"). Released elements count their own steps, so bias correction is right for
        each of them.
        """
        where = f"{type(self).__name__}.set_frozen: mask"
        if not any(param is p for p in self._params()):
            raise ValueError(
                f"{type(self).__name__}.set_frozen: the parameter is not in this optimizer"
            )
        if mask is None:
            mask = torch.zeros((), dtype=torch.bool)
        if isinstance(mask, Importance) and self.freeze_state == "dropped":
            raise ValueError(
                f"{where} may be an Importance with freeze_state='paused' only: "
                "what it freezes changes at any time"
            )
        shape = shards.local(param).shape
        now = masks.frozen(where, shards.cut(where, param, mask), shape).to(param.device)
        if self.state.get(param):
            now = self._carry(param, now)
        self._frozen[param] = now

    def has(self, param: Tensor) -> bool:
        """Whether this optimizer updates `param`."""
        return any(param is p for p in self._params())

    @torch.no_grad()
    def rearrange(self, param: Tensor, values: Tensor, source: Sequence[int]) -> None:
        """`param` takes `values`, whose rows keep the state that its rows had.

        values   [len(source), ...] in param's dtype, on its device: only the first size may differ
        source   for each row of values the row of param whose moments, step count, gradient and
                 mask it gets, -1: none of them. float32 copies stay where they round to the values.
        ValueError for a parameter that is not in this optimizer, a DTensor, an Importance, or
        values that do not fit.
        """
        where = f"{type(self).__name__}.rearrange"
        if not self.has(param) or shards.layout(param) or self._is_scored(param):
            raise ValueError(f"{where}: param must be in this optimizer, no DTensor, no Importance")
        fits = values.shape == (len(source), *param.shape[1:]) and values.dtype == param.dtype
        if not fits or param.dim() == 0 or not all(-1 <= row < len(param) for row in source):
            raise ValueError(
                f"{where}: values must be {param.dtype} [{len(source)}, ...] and source rows of "
                f"{tuple(param.shape)}, got {values.dtype} of shape {tuple(values.shape)}"
            )
        row = torch.tensor(source, device=param.device)

        def moved(rows: Tensor, fresh: Tensor | float = 0) -> Tensor:
            new = row.view(-1, *[1] * (rows.dim() - 1)) < 0
            return torch.where(new, fresh, rows[row.clamp_min(0)]).to(rows.dtype)

        before = self._frozen.get(param) or masks.free(param)
        per_row = (len(param), *[1] * (param.dim() - 1))
        common = masks.common_shape(before.shape, per_row, param.shape)
        mask = moved(before.spread(common))
        state = self.state.get(param, {})
        if state:
            had = moved(self._expand(param).view(len(param), -1))
            if "step" in state:
                count = state["step"]
                if count.shape != before.shape:
                    count = torch.where(before.as_bool(), 0, count)
                state["step"] = moved(masks.spread(count, common))
            for name in self._elementwise(state):
                state[name] = moved(state[name])
            if "master" in state:
                wide, narrow = state["master"], values.to(state["master"].dtype)
                state["master"] = torch.where(wide.to(values.dtype) == values, wide, narrow)
        grad = None if param.grad is None else moved(param.grad)
        if param.data_ptr() != values.data_ptr() or param.shape != values.shape:
            param.grad, param.data = None, values
        param.grad = grad
        now = masks.frozen(where, mask, param.shape)
        if state:
            wanted = ~now.as_bool()
            if self.freeze_state == "paused":
                wanted |= had.reshape(wanted.numel(), -1).any(dim=1).view(wanted.shape)
            self._compact(param, now, wanted)
        self._frozen[param] = now

    def _carry(self, param: Tensor, now: Frozen) -> Frozen:
        """State moved to the mask `now`; returns that mask in the shape its counts need."""
        state, p = self.state[param], shards.local(param)
        before = self._frozen.get(param) or masks.free(p)
        common = masks.common_shape(before.shape, now.shape, p.shape)
        was, will = before.spread(common), now.spread(common)
        dropped = will & ~was if self.freeze_state == "dropped" else None
        if "step" in state:
            now = self._carry_counts(param, before, now, was, will, dropped)
        had = self._expand(param)
        if dropped is not None:
            for name in self._elementwise(state):
                moment = shards.local(state[name])
                fresh = p.to(moment.dtype) if name == "master" else 0
                moment.copy_(torch.where(masks.spread(dropped, p.shape), fresh, moment))
        wanted = ~now.as_bool()
        if dropped is None:
            wanted |= had.view(wanted.numel(), -1).any(dim=1).view(wanted.shape)
        self._compact(param, now, wanted)
        return now

    def _carry_counts(
        self,
        param: Tensor,
        before: Frozen,
        now: Frozen,
        was: Tensor,
        will: Tensor,
        dropped: Tensor | None,
    ) -> Frozen:
        """Step counts moved to the mask `now`; was, will, dropped: in the shape of both masks."""
        state = self.state[param]
        count = shards.local(state["step"])
        scores = now.mask.dtype == torch.float32
        # One count serves the live elements still, if no frozen one has another count than 0.
        differs = was & ~will if dropped is not None else was ^ will
        if count.dim() == 0 and not scores and not bool(differs.any()):
            return now
        if count.shape != before.shape:  # one count and a mask from the first step on
            count = torch.where(before.as_bool(), 0, count)
        count = masks.spread(count, was.shape)
        if dropped is not None:
            count = torch.where(dropped, 0, count)
        if was.shape != torch.Size(now.shape):
            if scores:
                raise ValueError(
                    f"{type(self).__name__}.set_frozen: an Importance must have scores as fine as "
                    f"the mask before it, {tuple(was.shape)}, got {now.shape}"
                )
            now = masks.frozen("", will, shards.local(param).shape)
        state["step"] = shards.like(param, count.clone())
        return now

    @staticmethod
    def _elementwise(state: dict[str, Any]) -> list[str]:
        """Names of the state tensors with a value per element of the parameter."""
        return [n for n, t in state.items() if n not in ("step", "row") and t is not None]

    def _expand(self, param: Tensor) -> Tensor:
        """State in the parameter's shape; returns which elements had some, as a flat tensor."""
        state, p = self.state[param], shards.local(param)
        if "row" not in state:
            return torch.ones((), dtype=torch.bool, device=p.device).expand(p.numel())
        row: Tensor = state.pop("row")
        had = row >= 0
        for name in self._elementwise(state):
            dense = p.to(state[name].dtype, copy=True) if name == "master" else None
            dense = state[name].new_zeros(p.shape) if dense is None else dense
            dense.view(len(row), -1)[had] = state[name]
            state[name] = dense
        return had.unsqueeze(1).expand(-1, p.numel() // max(1, len(row))).reshape(-1)

    def _compact(self, param: Tensor, frozen: Frozen, wanted: Tensor) -> None:
        """State of the wanted units of a mask alone, where that saves memory."""
        state = self.state[param]
        names = self._elementwise(state)
        row = self._row(param, frozen, wanted)
        if row is None or not names:
            return
        for name in names:
            state[name] = state[name].view(len(row), -1)[row >= 0]
        state["row"] = row

    def _row(self, param: Tensor, frozen: Frozen, wanted: Tensor) -> Tensor | None:
        """The row map of the wanted units; None where all are wanted or state must stay dense."""
        inner = param.numel() // max(1, wanted.numel())
        dense = inner < _MIN_UNIT or frozen.mask.dtype != torch.bool or shards.layout(param)
        if dense or bool(wanted.all()):
            return None
        units = wanted.reshape(-1)
        return torch.where(units, units.cumsum(0) - 1, -1).to(torch.int32)

    def _params(self) -> list[Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the moments, in the order of the op."""

    @abstractmethod
    def _options(self, group: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """Options of the op; fresh: at the first step of its parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the live elements of parameters with a gradient; the closure's loss.

        Unscaling (by a GradScaler), clipping and the update are one pass over the tensors.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return loss
        grad_scale = None if loss_scale is None else loss_scale.double().reciprocal().reshape(())
        if self.max_grad_norm is not None:
            norm = live_norm(self._params(), self._frozen, 2.0)
            unscaled = norm if grad_scale is None else norm * grad_scale.to(norm.device)
            clip = clip_scale(unscaled, self.max_grad_norm)
            grad_scale = clip if grad_scale is None else clip * grad_scale.to(clip.device)
        for group in self.param_groups:
            alike: dict[Any, _Lists] = {}
            for p in group["params"]:
                if p.grad is not None:
                    fresh = not self.state.get(p)
                    key = (p.device, p.dtype, fresh)
                    alike.setdefault(key, _Lists([], fresh)).params.append(p)
            for lists in alike.values():
                self._step_alike(group, lists, grad_scale)
            if "draw" in group:
                group["draw"] += 1
        return loss

    def _step_alike(self, group: dict[str, Any], lists: _Lists, grad_scale: Tensor | None) -> None:
        """The step of one group's parameters of one device and dtype."""
        params, device = lists.params, lists.params[0].device
        half = params[0].dtype == torch.bfloat16
        drawn = half and self.bfloat16 == "stochastic"
        for p in params:
            if cast(Tensor, p.grad).is_sparse:
                raise ValueError(
                    f"{type(self).__name__}: a gradient is sparse; pass grad.to_dense()"
                )
            self._add_state(group, p, with_master=half and not drawn)
        states = [self.state[p] for p in params]
        empty = torch.zeros(0, dtype=torch.int32, device=device)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(())
        else:
            lr = torch.full((), lr, dtype=torch.float64, device=device)
        frozen, threshold = mask_lists([self._frozen.get(p) for p in params], device)
        options = self._options(group, lists.fresh)
        if drawn:
            index = {p: n for n, p in enumerate(self._params())}
            options["seed"] = [self.seed + index[p] for p in params]
            options["start"] = [shards.first_element(p) for p in params]
            options["draw"] = group["draw"]
        self._op(
            [shards.local(p) for p in params],
            [shards.local_grad(p) for p in params],
            [shards.local(s[name]) for name in self._moments(group) for s in states],
            [shards.local(s["step"]) for s in states if "step" in s],
            [shards.local(s["master"]) for s in states] if half and not drawn else [],
            frozen,
            [s.get("row", empty) for s in states] if any("row" in s for s in states) else [],
            lr,
            None if grad_scale is None else grad_scale.to(device),
            threshold=threshold,
            **options,
            backend=self.backend,
        )

    def _add_state(self, group: dict[str, Any], p: Parameter, with_master: bool) -> None:
        """State that the step needs and p has not got: none for units that are frozen."""
        names = (*self._moments(group), *(("master",) if with_master else ()))
        missing = [name for name in names if self.state.get(p, {}).get(name) is None]
        if not missing:
            return
        state = self.state[p]
        frozen = self._frozen.get(p)
        if frozen is not None and not self._elementwise(state):
            row = self._row(p, frozen, ~frozen.as_bool())
            if row is not None:
                state["row"] = row
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        for name in missing:
            if (row := state.get("row")) is None:
                like = p.detach()
                state[name] = (
                    like.to(wide, copy=True)
                    if name == "master"
                    else torch.zeros_like(like, dtype=wide, memory_format=torch.preserve_format)
                )
                continue
            units = p.detach().reshape(len(row), -1)
            state[name] = (
                units[row >= 0].to(wide)
                if name == "master"
                else units.new_zeros(int((row >= 0).sum()), units.shape[1], dtype=wide)
            )
        if self._op is masked_adam_ and "step" not in state:
            by_score = frozen is not None and frozen.mask.dtype == torch.float32
            shape = frozen.shape if frozen is not None and by_score else ()
            count = torch.zeros(shape, dtype=torch.float32, device=p.device)
            state["step"] = shards.like(p, count) if by_score else count

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's, with every mask as "frozen" in its parameter's state, and
        "row" where the state of frozen rows or blocks is left out."""
        packed = super().state_dict()
        found = self.frozen
        for index, param in enumerate(self._params()):
            if param in found:
                entry = packed["state"].get(index, {})
                packed["state"][index] = {**entry, "frozen": found[param].clone()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of an optimizer with the same masks (torch.optim's own: with nothing frozen).

        A mask that differs from the one in force raises ValueError and changes nothing.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = self._params()
        entries = dict(state_dict["state"])
        found: dict[Tensor, Frozen] = {}
        if len(saved) == len(params):  # otherwise torch refuses below
            for index, (key, param) in enumerate(zip(saved, params, strict=True)):
                entry = dict(entries.pop(key, {}))
                mask = entry.pop("frozen", None)
                frozen = self._same_mask(index, param, mask)
                if mask is not None and not self._is_scored(param):
                    found[param] = frozen
                if entry:
                    entries[key] = entry
        super().load_state_dict({**state_dict, "state": entries})
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        for key, param in zip(saved, params, strict=True):
            if key in entries:  # torch has cast all to the parameter's dtype
                self.state[param] = self._restored(param, entries[key])
        self._frozen.update(found)  # the same elements, in the shape of the loaded step counts

    def _is_scored(self, param: Tensor) -> bool:
        return param in self._frozen and self._frozen[param].mask.dtype == torch.float32

    @staticmethod
    def _restored(param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        dtypes = {"step": torch.float32, "row": torch.int32}
        return {
            name: None
            if value is None
            else torch.as_tensor(value).to(param.device, dtypes.get(name, wide))
            for name, value in entry.items()
        }

    def _same_mask(self, index: int, param: Tensor, saved: Tensor | None) -> Frozen:
        """The saved mask; ValueError unless it freezes what is frozen here."""
        where = f"{type(self).__name__}.load_state_dict: parameter {index}"
        p = shards.local(param)
        mask = torch.zeros((), dtype=torch.bool) if saved is None else saved.to(torch.bool)
        own = shards.cut(where, param, mask.to(param.device))
        theirs = masks.frozen(f"{where}: its frozen mask", own, p.shape)
        ours = self._frozen.get(param) or masks.free(p)
        differing = int((theirs.spread(p.shape) ^ ours.spread(p.shape)).sum())
        if differing:
            raise ValueError(
                f"{where}: {differing} of {param.numel()} elements are frozen in the checkpoint or "
                "here, but not in both; call set_frozen with the checkpoint's mask before loading"
            )
        return theirs
