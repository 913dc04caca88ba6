"""Tiny models under transformers' own ModelTesterMixin; copied beside it and run from there.

GOSE_EXPERTS=gose puts our implementation in the place of the default one, grouped_mm.
"""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from . import test_modeling_common as common
from .test_configuration_common import ConfigTester

if os.environ["GOSE_EXPERTS"] == "gose":
    import gose_kernels as gk

    gk.huggingface.register()
    ExpertsInterface.register("grouped_mm", ALL_EXPERTS_FUNCTIONS["gose"])

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
}


class _Tester:
    """What the mixin asks of a family's tester."""

    batch_size, seq_length, encoder_seq_length, key_length = 3, 7, 7, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    is_training = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_config(self) -> Any:
        config_class = getattr(transformers, f"{self.name}Config")
        return config_class(**{**SIZES, **FAMILIES[self.name]})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], 96) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _case(name: str) -> type[unittest.TestCase]:
    def set_up(self: Any) -> None:
        self.model_tester = _Tester(name)
        config_class = getattr(transformers, f"{name}Config")
        self.config_tester = ConfigTester(
            self, config_class=config_class, has_text_modality=True, hidden_size=32
        )

    classes = tuple(getattr(transformers, f"{name}{part}") for part in ("Model", "ForCausalLM"))
    body = {"all_model_classes": classes, "pipeline_model_mapping": {}, "setUp": set_up}
    # The generation tests are no part of the source distribution.
    body["test_generation_tester_mixin_inheritance"] = lambda self: None
    return type(f"Test{name}", (common.ModelTesterMixin, unittest.TestCase), body)


for _name in FAMILIES:
    globals()[f"Test{_name}"] = _case(_name)
