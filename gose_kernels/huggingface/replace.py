"""replace_moe_layers: what of a model runs on these kernels afterwards, what not and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from gose_kernels.huggingface.experts import FLAGS, NAME, register
from gose_kernels.huggingface.forms import form_of
from gose_kernels.huggingface.layouts import Layout, layout_of, own_layer, write_back
from gose_kernels.huggingface.packed import PackedExperts, finite, why_not_packed
from gose_kernels.huggingface.routers import swap_router, unswap_router
from gose_kernels.quantized import check_weights

AdaptiveK: TypeAlias = float | Sequence[float]


def adaptive_options(adaptive_k: AdaptiveK | None) -> dict[str, Any]:
    """Options of `route` for one router's `adaptive_k`; ValueError for what is none."""
    if adaptive_k is None:
        return {}
    if isinstance(adaptive_k, int | float):
        if not 0 < adaptive_k <= 1:
            raise ValueError(
                f"replace_moe_layers: adaptive_k must be a mass in (0, 1] or ascending entropies, "
                f"got {adaptive_k}"
            )
        return {"adaptive": "mass", "mass": float(adaptive_k)}
    return {"adaptive": "bands", "bands": [float(band) for band in adaptive_k]}


class Row(NamedTuple):
    """One module: its name in the model, its class, whether it was swapped, how or why not."""

    name: str
    kind: str
    swapped: bool
    how: str


class Replaced:
    """The table of a replacement (`rows`, or print it) and the way back (`restore()`)."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._undo: list[Callable[[], None]] = []

    def __str__(self) -> str:
        widths = [max(map(len, column), default=0) for column in self._texts()]
        return "\n".join(
            f"{r.name:{widths[0]}}  {r.kind:{widths[1]}}  "
            f"{'swapped' if r.swapped else 'not swapped'}: {r.how}"
            for r in self.rows
        )

    def _texts(self) -> tuple[list[str], list[str]]:
        return [row.name for row in self.rows], [row.kind for row in self.rows]

    def restore(self) -> None:
        """The model as it was: the same modules, parameters and implementation; weights that have
        changed since keep their new values. A second call changes nothing."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()  # after it: one that was refused is tried again

    def _add(self, name: str, module: nn.Module, swapped: bool, how: str) -> None:
        self.rows.append(Row(name, type(module).__name__, swapped, how))


def _is_experts(module: nn.Module) -> bool:
    """An experts module of transformers: the decorator has set its flags."""
    return all(hasattr(module, flag) for flag in (*FLAGS, "_is_expert_parallel", "down_proj"))


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(_parent(model, name), name.rpartition(".")[2], module)


def replace_moe_layers(
    model: nn.Module,
    *,
    router: Mapping[str, Any] | None = None,
    adaptive_k: AdaptiveK | Mapping[str, AdaptiveK] | None = None,
    early_exit: float | None = None,
    entropy_E: Tensor | Mapping[str, Tensor] | None = None,
    keep: Literal["both", "packed"] = "both",
    weights: Literal["int8", "int4"] | None = None,
) -> Replaced:
    """The MoE layers of a model put on these kernels, in place: the table and the way back.

    Experts modules of transformers get the implementation "gose". Own layers of a known layout
    (`layouts`) are replaced by `MoE` after both gave the same numbers on random tokens; their
    parameters are copied, so make the optimizer afterwards.

    router     None leaves routers alone. {} runs them on `route` with their own numbers; options
               of `route` change them: {"adaptive": "mass", "mass": 0.8}, {"policy": "egs"}, ...
    adaptive_k fewer experts for tokens that the router is sure of, one value for all routers or one
               per name: a number m keeps the fewest of a token's top_k experts whose
               probabilities sum to m; ascending numbers b_1, b_2, ... keep 1 + how many of them
               the router's entropy (in [0, 1]) is above
    early_exit without gradients experts run in waves, every token's best first, and a token leaves
               when its other experts could add no more than this share of its output (`waves`)
    entropy_E  for policy egs: the experts' entropies, one [E] for all routers or one per name
    keep       "packed" leaves only the packed copy of the experts' weights, for inference:
               half the memory, no gradient; layers are packed expert by expert
    weights    "int8" or "int4": as "packed", with quantized weights (`quantize_experts`); restore()
               then gives the weights as they were rounded
    ValueError for a model without MoE layers, unknown arguments, and weights to quantize that are
    not finite; RuntimeError without transformers.
    """
    if keep not in ("both", "packed"):
        raise ValueError(f"replace_moe_layers: keep must be 'both' or 'packed', got {keep!r}")
    if weights is not None:
        check_weights("replace_moe_layers", weights)
    packs = keep == "packed" or weights is not None
    if early_exit is not None and (packs or not 0 <= early_exit < float("inf")):
        raise ValueError(
            "replace_moe_layers: early_exit must be a share of at least 0, and keep 'both' without "
            f"weights, got {early_exit}, {keep!r} and {weights!r}"
        )
    done = Replaced()
    try:
        _experts(model, done)
        if router is not None or adaptive_k is not None:
            _routers(model, done, router or {}, adaptive_k, entropy_E)
        if early_exit is not None:
            _waves(model, done, early_exit)
        if packs:
            _pack(model, done, weights)
        _own(model, done)
    except BaseException:
        done.restore()
        raise
    if not done.rows:
        raise ValueError(
            f"replace_moe_layers: {type(model).__name__} has no MoE layers: neither experts "
            f"modules of transformers nor a known layout (list of experts, FastMoE, ScatterMoE, "
            f"MegaBlocks)"
        )
    return done


def _experts(model: nn.Module, done: Replaced) -> None:
    modules = {n: m for n, m in model.named_modules() if _is_experts(m)}
    if not modules:
        return
    register()
    from transformers import PreTrainedModel

    roots: list[Any] = []
    for _, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(module in r.modules() for r in roots):
            roots.append(module)
    for root in roots:
        before = root.get_experts_implementation()
        root.set_experts_implementation(NAME)
        done._undo.append(functools.partial(root.set_experts_implementation, before))
    for name, module in modules.items():
        if module.config._experts_implementation != NAME:
            done._add(name, module, False, "it stands in no model of transformers")
        elif (form := form_of(module)) is None or module.has_post_expert_norm:
            done._add(name, module, True, "grouped_gemm around its own activation or norm")
        else:
            done._add(name, module, True, f"expert_mlp, {form.activation}")


def _waves(model: nn.Module, done: Replaced, early_exit: float) -> None:
    for at, row in enumerate(done.rows):
        module = model.get_submodule(row.name)
        if not _is_experts(module):
            continue
        if row.swapped and form_of(module) is not None and not module.has_post_expert_norm:
            vars(module)["_gose_early_exit"] = early_exit
            done._undo.append(functools.partial(vars(module).pop, "_gose_early_exit"))
            done.rows[at] = row._replace(how=f"{row.how}; in waves, early_exit={early_exit}")
        else:
            done.rows[at] = row._replace(how=f"{row.how}; not in waves")


def _is_router(module: nn.Module) -> bool:
    named = any(word in type(module).__name__ for word in ("Router", "Gate"))
    return hasattr(module, "top_k") or (named and len(list(module.parameters())) > 0)


def routers_of(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(name, router, experts) of every router that stands beside an experts module."""
    found: dict[str, tuple[str, nn.Module, nn.Module]] = {}
    for path, experts in list(model.named_modules()):
        home = path.rpartition(".")[0]
        if not _is_experts(experts):
            continue
        for child, module in model.get_submodule(home).named_children():
            name = f"{home}.{child}".lstrip(".")
            if not _is_experts(module) and _is_router(module):
                found.setdefault(name, (name, module, experts))
    return list(found.values())


def _routers(
    model: nn.Module,
    done: Replaced,
    options: Mapping[str, Any],
    adaptive_k: AdaptiveK | Mapping[str, AdaptiveK] | None,
    entropy_E: Tensor | Mapping[str, Tensor] | None,
) -> None:
    if adaptive_k is not None and {"adaptive", "mass", "bands"} & set(options):
        raise ValueError("replace_moe_layers: adaptive_k and router both say what adaptive is")
    found_all = [(name, router) for name, router, _ in routers_of(model)]
    if isinstance(adaptive_k, Mapping) and (unknown := set(adaptive_k) - {n for n, _ in found_all}):
        raise ValueError(
            f"replace_moe_layers: adaptive_k names {min(unknown)!r}, which is no router; routers: "
            f"{', '.join(n for n, _ in found_all)}"
        )
    for name, module in found_all:
        given = entropy_E.get(name) if isinstance(entropy_E, Mapping) else entropy_E
        own = adaptive_k.get(name) if isinstance(adaptive_k, Mapping) else adaptive_k
        found = swap_router(module, {**options, **adaptive_options(own)}, given)
        if isinstance(found, str):
            done._add(name, module, False, found)
            continue
        done._undo.append(functools.partial(unswap_router, module))
        chosen = ", ".join(f"{key}={value}" for key, value in found.options.items())
        done._add(name, module, True, f"route, {chosen}")


def _pack(model: nn.Module, done: Replaced, weights: str | None) -> None:
    modules = [(n, m) for n, m in model.named_modules() if _is_experts(m)]
    modules = [(n, m) for n, m in modules if not isinstance(m, PackedExperts)]
    for name, module in modules if weights is not None else ():  # before any is rounded
        if why_not_packed(module) is None and not finite(module):
            raise ValueError(
                f"replace_moe_layers: weights of {name} must be finite to be {weights}"
            )
    for name, module in modules:
        at = next(i for i, row in enumerate(done.rows) if row.name == name)
        if (reason := why_not_packed(module)) is not None:
            done.rows[at] = done.rows[at]._replace(how=f"{done.rows[at].how}; not packed: {reason}")
            continue
        form = form_of(module)
        assert form is not None
        packed = PackedExperts(module, form, weights)
        _put(model, name, packed)
        done._undo.append(functools.partial(_unpack, model, name, packed))
        size = f"{packed.packed_EB.nbytes / 2**20:.1f} MiB"
        how = "packed" if weights is None else f"packed as {weights}"
        done.rows[at] = done.rows[at]._replace(how=f"{done.rows[at].how}; {how}, {size}")


def _unpack(model: nn.Module, name: str, packed: PackedExperts) -> None:
    _put(model, name, packed.unpack())


def _own(model: nn.Module, done: Replaced) -> None:
    found: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{f}.") for f in found) or (layout := layout_of(module)) is None:
            continue
        found.append(name)
        swap = own_layer(module, layout)
        if isinstance(swap, str) or name == "":
            reason = swap if isinstance(swap, str) else "the whole model is the layer: use gk.MoE"
            done._add(name, module, False, reason)
            continue
        replacement, how = swap
        replacement.train(module.training)
        _put(model, name, replacement)
        done._undo.append(functools.partial(_back, model, name, module, replacement, layout))
        done._add(name, module, True, how)


def _back(
    model: nn.Module, name: str, old: nn.Module, replacement: nn.Module, layout: Layout
) -> None:
    write_back(replacement, layout)
    _put(model, name, old)
