"""transformers models on these kernels: an experts implementation, and swaps in whole models."""

from gose_kernels.huggingface.experts import register
from gose_kernels.huggingface.replace import Replaced, Row, replace_moe_layers

__all__ = ["Replaced", "Row", "register", "replace_moe_layers"]
