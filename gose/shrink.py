"""Small checkpoints: the expert weights of a folder of transformers as integers and scales.

    *.safetensors    the files of the model, one for one. A quantized tensor NAME is two: NAME.code
                     uint8 and NAME.scale float16, the outputs of `gk.quantize` of its values in
                     row-major order; every other tensor is as it was
    quantized.json   written after them. One line:
        {"manifest":{"version":1,"format":"int8_b64_f16",
                     "files":{"model.safetensors":{"bytes":..,"sha256":..}},
                     "tensors":{NAME:{"dtype":"BF16","shape":[..],"error":..}}},
         "sha256":"<of the text of the manifest object>"}
    other files      config, tokenizer: copied last, so that what was stopped is no model

Quantized are floating matrices with `experts` in their name. A tensor is read, quantized and
written in pieces of 2^16 elements: no tensor is in memory as a whole. `error` is the relative L2
error of the tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import gose_kernels as gk
from gose import checkpoint

FORMATS = {"int8": "int8_b64_f16", "int4": "int4_b64_f16"}
MANIFEST = "quantized.json"
_MOST_HEADER = 100 << 20
_PIECE = 1 << 16  # elements: a multiple of the blocks of every format
_COPIED = (".json", ".txt", ".model", ".jinja")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Planned(NamedTuple):
    """One tensor of a model, read from a header: its file, and bytes before and after."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    quantized: bool
    bytes_before: int
    bytes_after: int


class Entry(NamedTuple):
    """What was made of one quantized tensor."""

    name: str
    error: float


def plan(folder: Path, weights: str) -> list[Planned]:
    """What `quantize` would do, from the headers of the files alone.

    ValueError, naming file and fault, for a folder that is no model of safetensors, for headers
    that do not fit their file, names that are taken twice, and a model without expert weights.
    """
    if weights not in FORMATS:
        raise ValueError(f"quantize: weights must be int8 or int4, got {weights!r}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: it has no config.json (wanted: a folder)")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is quantized already: it has a {MANIFEST}")
    form = gk.FORMATS[FORMATS[weights]]
    rows: list[Planned] = []
    for path in sorted(folder.glob("*.safetensors")):
        for name, spec in _header(path).items():
            shape = tuple(spec["shape"])
            size = spec["data_offsets"][1] - spec["data_offsets"][0]
            count = 1
            for length in shape:
                count *= length
            is_matrix = len(shape) >= 2 and spec["dtype"] in _DTYPES
            chosen = is_matrix and "experts" in name.split(".") and count > 0
            after = form.code_bytes(count) + 2 * form.num_scales(count) if chosen else size
            rows.append(Planned(name, path.name, spec["dtype"], shape, chosen, size, after))
    names = [row.name for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{folder}: tensor {min(twice)} stands in two files")
    if not any(row.quantized for row in rows):
        raise ValueError(f"{folder}: no floating matrix has `experts` in its name")
    return rows


def quantize(
    folder: Path, out: Path, weights: str, *, tell: Callable[[Entry], None] = lambda _entry: None
) -> list[Entry]:
    """The errors of all quantized tensors of a model written to `out`, a new or empty folder.

    ValueError for what `plan` refuses, an `out` with files in it, and weights that are not finite.
    """
    rows = plan(folder, weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"quantize: {out} must be a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    files: dict[str, Any] = {}
    for name in dict.fromkeys(row.file for row in rows):
        own = [row for row in rows if row.file == name]
        made = _write(folder / name, out / name, own, FORMATS[weights], entries, tell)
        files[name] = {"bytes": made[0], "sha256": made[1]}
    errors = dict(entries)
    tensors = {
        row.name: {"dtype": row.dtype, "shape": list(row.shape), "error": errors[row.name]}
        for row in rows
        if row.quantized
    }
    manifest = {"version": 1, "format": FORMATS[weights], "files": files, "tensors": tensors}
    body = checkpoint.json_line(manifest, "quantize", sort_keys=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    checkpoint.write_file(out / MANIFEST, f'{{"manifest":{body},"sha256":"{digest}"}}\n'.encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in _COPIED and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, out / path.name)
    return entries


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a quantized model by name, dequantized to the dtype it had.

    ValueError naming the file and the fault before the first tensor, unless the manifest and all
    files are what was written.
    """
    manifest = _manifest(folder)
    format_name, tensors = manifest["format"], manifest["tensors"]
    if manifest["version"] != 1 or format_name not in FORMATS.values():
        raise ValueError(f"{MANIFEST}: version 1 with a known format is wanted")
    for file, wanted in manifest["files"].items():
        path = folder / file
        if Path(file).name != file or path.is_symlink() or not path.is_file():
            raise ValueError(f"{MANIFEST}: {file} is not a file of {folder}")
        if path.stat().st_size != wanted["bytes"]:
            raise ValueError(f"{file}: {path.stat().st_size} bytes; wanted {wanted['bytes']}")
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != wanted["sha256"]:
                raise ValueError(f"{file}: sha256 differs from the manifest's")
    return _tensors(folder, list(manifest["files"]), tensors, format_name)


def _tensors(
    folder: Path, files: list[str], tensors: dict[str, Any], format_name: str
) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                whole = name.removesuffix(".code")
                if name.removesuffix(".scale") in tensors:
                    continue
                if whole not in tensors:
                    yield name, opened.get_tensor(name)
                    continue
                shape, dtype = tensors[whole]["shape"], _DTYPES[tensors[whole]["dtype"]]
                code, scale = opened.get_tensor(name), opened.get_tensor(f"{whole}.scale")
                count = int(torch.tensor(shape).prod())
                values = gk.dequantize(code, scale, count, format=format_name)
                yield whole, values.view(shape).to(dtype)


def _manifest(folder: Path) -> dict[str, Any]:
    content = checkpoint.read_file(folder / MANIFEST, limit=_MOST_HEADER)
    try:
        document = json.loads(content)
        manifest: dict[str, Any] = document["manifest"]
        body = checkpoint.json_line(manifest, MANIFEST, sort_keys=False)
        digest = hashlib.sha256(body.encode()).hexdigest()
        whole = f'{{"manifest":{body},"sha256":"{digest}"}}\n'.encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST}: no manifest: {error}") from None
    if whole != content:
        raise ValueError(f"{MANIFEST}: its sha256 or its spelling is not that of its content")
    return manifest


def _header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file: name -> dtype, shape, data_offsets, start in the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise ValueError(f"{path.name}: not safetensors: a header of {length} bytes")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [spec["data_offsets"][1] for spec in header.values()]
            for spec in header.values():
                spec["start"] = 8 + length + spec["data_offsets"][0]
            sound = all(isinstance(spec["shape"], list) for spec in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path.name}: not safetensors: {error}") from None
    if not sound or max(ends, default=0) != size - 8 - length:
        raise ValueError(f"{path.name}: its header does not fit its {size} bytes")
    return header


def _write(
    source: Path,
    target: Path,
    rows: list[Planned],
    format_name: str,
    entries: list[Entry],
    tell: Callable[[Entry], None],
) -> tuple[int, str]:
    """Bytes and digest of one file, written tensor by tensor under a temporary name."""
    form = gk.FORMATS[format_name]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0

    def place(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal offset
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    for row in rows:
        if not row.quantized:
            place(row.name, row.dtype, list(row.shape), row.bytes_before)
            continue
        count = int(torch.tensor(row.shape).prod())
        code, scales = form.code_bytes(count), form.num_scales(count)
        place(f"{row.name}.code", "U8", [code], code)
        place(f"{row.name}.scale", "F16", [scales], 2 * scales)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with safe_open(source, framework="pt"):  # its checks alone: a map of a file stays in memory
            pass
        specs = _header(source)
        with source.open("rb") as opened, temporary.open("wb") as file:

            def put(content: bytes) -> None:
                file.write(content)
                digest.update(content)

            put(len(text).to_bytes(8, "little") + text)
            for row in rows:
                opened.seek(specs[row.name]["start"])
                if not row.quantized:
                    for size in _sizes(row.bytes_before):
                        put(opened.read(size))
                    continue
                try:
                    entries.append(Entry(row.name, _put_quantized(row, opened, format_name, put)))
                except ValueError as error:
                    raise ValueError(f"{source.name}: {row.name}: {error}") from None
                tell(entries[-1])
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(target)
    except SafetensorError as error:
        raise ValueError(f"{source.name}: not safetensors: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return size, digest.hexdigest()


def _put_quantized(
    row: Planned, opened: BufferedReader, format_name: str, put: Callable[[bytes], None]
) -> float:
    """The error of a tensor that is read from here in the file, and put as codes, then scales."""
    dtype, form = _DTYPES[row.dtype], gk.FORMATS[format_name]
    count = row.bytes_before // dtype.itemsize
    scale_L = torch.empty(form.num_scales(count), dtype=torch.float16)
    piece = bytearray(_PIECE * dtype.itemsize)
    off = norm = 0.0
    done = 0
    for size in _sizes(count):
        opened.readinto(memoryview(piece)[: size * dtype.itemsize])
        values = torch.frombuffer(piece, dtype=dtype, count=size)
        code, scale, _ = gk.quantize(values, format=format_name)
        put(_bytes(code))
        scale_L[done : done + len(scale)] = scale
        done += len(scale)
        whole = values.float()
        norm += _norm(whole) ** 2
        off += _norm(whole.sub_(gk.dequantize(code, scale, size, format=format_name))) ** 2
    put(_bytes(scale_L))
    return math.sqrt(off / norm) if norm > 0 else 0.0


def _sizes(count: int) -> Iterator[int]:
    """`count` in pieces."""
    for start in range(0, count, _PIECE):
        yield min(_PIECE, count - start)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
