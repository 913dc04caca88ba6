"""A language model in a folder of transformers, and text for it: what `calibrate` and `inspect`
look into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gose import shrink

_BATCH = 4


def load(folder: Path) -> Any:
    """The causal language model in a folder, for inference; safetensors only, no code of its own.
    Quantized weights (`shrink`) come in the dtype they had.

    ValueError for a folder without config.json or safetensors, RuntimeError without transformers.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: it has no config.json (wanted: a folder)")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no *.safetensors: weights of other formats are not read")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise RuntimeError(
            f"language.load: needs transformers >= 5.23 ({error}); pip install 'gose[hf]'"
        ) from error
    if (folder / shrink.MANIFEST).exists():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            kind: Any = type(auto.from_config(config))
        return kind.from_pretrained(
            None, config=config, state_dict=dict(shrink.read(folder))
        ).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def windows(folder: Path, model: Any, text: Path, *, length: int, most: int) -> Tensor:
    """[B, length] int64: the first B <= `most` whole windows of a text in the model's tokens: those
    of the folder's tokenizer, or bytes where it has none and the vocabulary is one of bytes.

    ValueError for a text that fills no window, or tokens that the model does not know.
    """
    if length < 2 or most < 1:
        raise ValueError(
            f"language.windows: length must be at least 2 and windows at least 1, "
            f"got {length} and {most}"
        )
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
        ids_N = torch.tensor(ids, dtype=torch.int64)
    elif vocabulary == 256:
        ids_N = torch.frombuffer(bytearray(text.read_bytes() or b"\0"), dtype=torch.uint8).long()
    else:
        raise ValueError(
            f"{folder} has no tokenizer, and its vocabulary of {vocabulary} is not one of bytes"
        )
    count = min(most, len(ids_N) // length)
    if count == 0:
        raise ValueError(f"{text} has {len(ids_N)} tokens: less than one window of {length}")
    if int(ids_N.max()) >= vocabulary:
        raise ValueError(f"{text}: a token is not in the model's vocabulary of {vocabulary}")
    return ids_N[: count * length].view(count, length)


@torch.inference_mode()
def perplexity(model: Any, ids_BT: Tensor) -> float:
    """exp of the mean negative log likelihood of every token but each window's first."""
    total = 0.0
    for part_BT in ids_BT.split(_BATCH):
        logits_BTC = model(input_ids=part_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(
            torch.nn.functional.cross_entropy(
                logits_BTC.double(), part_BT[:, 1:].flatten(), reduction="sum"
            )
        )
    return math.exp(total / (ids_BT.numel() - len(ids_BT)))
