"""Experts that come, go and change while their layer runs, and where cheap ones come from."""

from gose_kernels.living.experts import LivingExperts
from gose_kernels.living.lora import Adapter, LoraExperts, read_peft
from gose_kernels.living.upcycle import upcycle

__all__ = ["Adapter", "LivingExperts", "LoraExperts", "read_peft", "upcycle"]
