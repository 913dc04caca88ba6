"""transformers models on these kernels: an experts implementation, and swaps in whole models."""

from gose_kernels.huggingface.experts import register

__all__ = ["register"]
