"""Every experts class of the installed transformers, and a tiny model with random weights of each.

Found by code: modelling files that declare `@use_experts_implementation`, and in them the classes
whose forward the decorator wrapped. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

# Sizes by the name a config may have for them; what a family lacks is left out.
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "moe_hidden_size": 32,
    "expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 1,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_router_logits": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


class Family(NamedTuple):
    """One experts class: where it is defined, its name, its flags, its own (eager) forward."""

    name: str
    module: str
    experts: type[nn.Module]
    flags: dict[str, bool]
    eager: Any

    def __str__(self) -> str:
        return self.name


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))


def _wrapped(value: object, module: str) -> bool:
    if not (isinstance(value, type) and value.__module__ == module):
        return False
    code = getattr(getattr(value, "forward", None), "__code__", None)
    return code is not None and {"experts_interface", "original_forward"} <= set(code.co_freevars)


def modelling_files() -> list[Path]:
    root = Path(transformers.__file__).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return [f for f in files if "@use_experts_implementation" in f.read_text(encoding="utf-8")]


@functools.cache
def families() -> list[Family]:
    found = []
    for file in modelling_files():
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        for value in vars(importlib.import_module(module)).values():
            if _wrapped(value, module):
                init = _closure(value.__init__)
                flags = {k: v for k, v in init.items() if isinstance(v, bool)}
                eager = _closure(value.forward)["original_forward"]
                found.append(Family(value.__name__, module, value, flags, eager))
    return found


_MIXED = ["linear_attention", "full_attention"]
_SPARSE = ["sparse"] * 4

# What a family needs beyond the sizes to be small and to have experts.
_EXTRA: dict[str, dict[str, Any]] = {
    "BailingHybridExperts": {"layer_group_size": 2},
    "DeepseekOcr2TextExperts": {"mlp_layer_types": _SPARSE},
    "Dots3NoteExperts": {
        "layer_types": ["indexed_attention"] * 4,
        "head_dim": 16,
        "shared_experts_intermediate_size": 24,
        "per_layer_config": {},
    },
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "Gemma4TextExperts": {"enable_moe_block": True, "hidden_size_per_layer_input": 8},
    "Glm4vMoeTextExperts": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        }
    },
    "Glm5NextTextExperts": {
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "GraniteMoeHybridExperts": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "JambaExperts": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "KimiLinearExperts": {
        "layer_types": _MIXED * 2,
        "mlp_layer_types": _SPARSE,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "Lfm2MoeExperts": {"layer_types": ["conv", "full_attention"] * 2},
    "MiMoV2FlashExperts": {"num_key_value_heads": 2},
    "Mistral4Experts": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 24},
    "Qwen4ExpTextExperts": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "hc_lowrank": 8,
    },
    "ZayaExperts": {"num_experts_per_tok": 1},
}

_TOO_LARGE = 20_000_000  # parameters: the class wants sizes that the table does not know


def _model_classes(family: Family) -> list[type[Any]]:
    """Classes of the file that can be a whole model, the one with a language head first."""
    heads = ("ForCausalLM", "TextModel", "Model")
    found = [
        value
        for value in vars(importlib.import_module(family.module)).values()
        if isinstance(value, type)
        and issubclass(value, transformers.PreTrainedModel)
        and value.__module__ == family.module
        and isinstance(value.config_class, type)
        and value.__name__.endswith(heads)
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(
        found, key=lambda c: next(i for i, h in enumerate(heads) if c.__name__.endswith(h))
    )


def tiny_config(family: Family, model_class: type[Any]) -> Any:
    known = model_class.config_class().to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return model_class.config_class(**{**sizes, **_EXTRA.get(family.name, {})})


def tiny_model(family: Family, seed: int = 0, **options: Any) -> Any:
    """A model in eval mode with random weights that has experts of this family.

    RuntimeError with every class's reason if none can be built.
    """
    reasons = []
    for model_class in _model_classes(family):
        name = model_class.__name__
        try:
            config = tiny_config(family, model_class)
            with torch.device("meta"):
                shell = model_class(config)
            if not any(type(m) is family.experts for m in shell.modules()):
                reasons.append(f"{name} has no such experts")
                continue
            if (size := sum(p.numel() for p in shell.parameters())) > _TOO_LARGE:
                reasons.append(f"{name} has {size} parameters")
                continue
            torch.manual_seed(seed)
            return model_class._from_config(config, **options).eval()
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    raise RuntimeError(f"{family.name}: {'; '.join(reasons)}")
