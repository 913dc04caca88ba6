"""Tensor kernels for mixtures of experts: one op per name, a reference and fast backends each.

`gk.<op>(...)` runs the first backend that can; `backend=` names one, which runs or raises its
reason. `gk.OPS` maps names to ops, `gk.explain(name)` tells what would run and why others cannot.
"""

from gose_kernels import (
    huggingface,
    masks,
    memory,
    native,
    optim,
    packing,
    philox,
    profiling,
    quantized,
)
from gose_kernels.backends import Backend
from gose_kernels.gpu_plan import Plan, gpu_plan
from gose_kernels.living import Adapter, LivingExperts, LoraExperts, read_peft, upcycle
from gose_kernels.moe import MoE, RouteStats
from gose_kernels.ops import accumulate as _accumulate  # noqa: F401 - registers its ops
from gose_kernels.ops.combine import combine
from gose_kernels.ops.dispatch import dispatch
from gose_kernels.ops.distill_loss import distill_loss
from gose_kernels.ops.entropy import entropy
from gose_kernels.ops.expert_mlp import expert_mlp
from gose_kernels.ops.expert_mlp_packed import expert_mlp_packed
from gose_kernels.ops.grouped_gemm import grouped_gemm
from gose_kernels.ops.low_rank import low_rank
from gose_kernels.ops.masked_square_sum import masked_square_sum
from gose_kernels.ops.masked_update import masked_adam_, masked_lion_, masked_sgd_
from gose_kernels.ops.moe import moe
from gose_kernels.ops.quantize import (
    FORMATS,
    Format,
    dequantize,
    dequantize_add_,
    quantize,
)
from gose_kernels.ops.route import route
from gose_kernels.ops.route_call import LOSSES
from gose_kernels.ops.squared_grad import squared_grad
from gose_kernels.packing import (
    forget_packed,
    pack_experts,
    packed_bytes,
    quantize_experts,
    unpack_experts,
)
from gose_kernels.registry import OPS, Cost, Op, explain
from gose_kernels.tuning import tune

__all__ = [
    "FORMATS",
    "LOSSES",
    "OPS",
    "Adapter",
    "Backend",
    "Cost",
    "Format",
    "LivingExperts",
    "LoraExperts",
    "MoE",
    "Op",
    "Plan",
    "RouteStats",
    "combine",
    "dequantize",
    "dequantize_add_",
    "dispatch",
    "distill_loss",
    "entropy",
    "expert_mlp",
    "expert_mlp_packed",
    "explain",
    "forget_packed",
    "gpu_plan",
    "grouped_gemm",
    "huggingface",
    "low_rank",
    "masked_adam_",
    "masked_lion_",
    "masked_sgd_",
    "masked_square_sum",
    "masks",
    "memory",
    "moe",
    "native",
    "optim",
    "pack_experts",
    "packed_bytes",
    "packing",
    "philox",
    "profiling",
    "quantize",
    "quantize_experts",
    "quantized",
    "read_peft",
    "route",
    "squared_grad",
    "tune",
    "unpack_experts",
    "upcycle",
]
