"""The structs of csrc/params.h as ctypes, read from the header itself."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import gose_kernels as gk

ROOT = Path(gk.__file__).parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int32: 4}
_SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
}


@cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """Struct name -> ctypes structure, of every struct in the header."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "params.h").read_text())
    text = re.sub(r"\s*=\s*[^,;]+(?=[,;])", "", text)  # initializers
    enums = re.findall(r"enum class (\w+) : int32_t", text)
    kinds: dict[str, Any] = {**_SCALARS, **dict.fromkeys(enums, ctypes.c_int32)}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, flags=re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for kind, members in re.findall(r"(?:const )?(\w+(?:\s*\*)?)\s*([^;]+);", body):
            for member in members.split(","):
                bare = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", member)
                assert bare is not None, f"{name}: {member}"
                c = ctypes.c_void_p if "*" in kind or bare[1] else kinds[kind]
                fields.append((bare[2], c * int(bare[3]) if bare[3] else c))
        kinds[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return {n: k for n, k in kinds.items() if n not in _SCALARS and n not in enums}


def fill(name: str, **values: Any) -> ctypes.Structure:
    """A struct; tensors give their address, dtypes their number."""
    made = structs()[name]()
    known = {f[0] for f in made._fields_}
    assert set(values) <= known, f"{name} has no {set(values) - known}"
    for key, value in values.items():
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif isinstance(value, torch.dtype):
            value = DTYPES[value]
        elif isinstance(value, list):
            value = type(getattr(made, key))(*value)
        setattr(made, key, value)
    return made


def extent(t: Tensor, name: str) -> tuple[int, int, str]:
    """(address, bytes, name) of a tensor from its first to its last element."""
    if t.numel() == 0:
        return t.data_ptr(), 0, name
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size(), name


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A new tensor of bytes 0x7F: no sentinel of ours, and far from any result."""
    size = torch.empty((), dtype=dtype).element_size()
    count = int(torch.Size(shape).numel())
    raw = torch.full((count * size,), 0x7F, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


class Options(dict[str, Any]):
    """The options of a call, last among its arguments."""


def split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(arguments, options) of a call."""
    if args and isinstance(args[-1], Options):
        return args[:-1], args[-1]
    return args, {}


class Call(Protocol):
    """tests.gpu.cuda_host.OnPtx and OnEmulator: runs a launcher of csrc/cuda."""

    def __call__(
        self, op: str, struct: str, tensors: Mapping[str, Tensor], **values: Any
    ) -> None: ...
