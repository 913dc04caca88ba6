"""The networks that experts are cut from and made of."""

from gose.models.stage import Params, apply_chain, apply_stage, init_stage, num_macs, tap_stages

__all__ = ["Params", "apply_chain", "apply_stage", "init_stage", "num_macs", "tap_stages"]
