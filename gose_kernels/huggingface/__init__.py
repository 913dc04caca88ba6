"""transformers models on these kernels: an experts implementation, and swaps in whole models."""

from gose_kernels.huggingface.experts import register
from gose_kernels.huggingface.replace import Replaced, Row, replace_moe_layers
from gose_kernels.huggingface.watch import RouterWatch, watch_routers

__all__ = ["Replaced", "RouterWatch", "Row", "register", "replace_moe_layers", "watch_routers"]
