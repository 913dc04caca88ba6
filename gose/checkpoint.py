"""Checkpoints that a kill at any moment cannot spoil: safetensors plus a JSON manifest, no pickle.

    step-00000012.safetensors   the tensors
    step-00000012.json          the manifest, written last: it alone makes the checkpoint exist
        {"manifest":{"version":1,"step":12,"file":{"name":..,"bytes":..,"sha256":..},
                     "tensors":{name:{"dtype":"float32","shape":[2,3]}},"meta":{..},"extra":{..}},
         "sha256":"<of the text of the manifest object>"}\\n

Every file is written under a temporary name in the same folder, fsynced, renamed over its final
name, and the folder is fsynced. The manifest has one valid spelling, so any changed, missing or
added byte is seen. Nothing read is believed: regular files only, sizes before contents, then
digests, then names, dtypes and shapes. Order of tensors and of JSON keys survives, because sums
over a dict depend on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import safetensors.torch
import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Failpoint: TypeAlias = Callable[[str], None]

MAX_MANIFEST_BYTES = 64 << 20
MAX_TENSOR_BYTES = 64 << 30
MAX_TENSORS = 100_000
_MANIFEST_NAME = re.compile(r"step-(\d{8})\.json")
_ANY_NAME = re.compile(r"\.?step-(\d{8})\.(?:json|safetensors)(\.tmp)?")
_TENSOR_NAME = re.compile(r"(?!/)(?!.*\.\.)[A-Za-z0-9._/:=+-]{1,256}")


class CheckpointError(ValueError):
    """What lies on the disk is not the checkpoint that was written."""


class State(NamedTuple):
    """What a run carries from one unit to the next: tensors, and JSON values beside them."""

    tensors: dict[str, Tensor]
    meta: dict[str, Json]


class Checkpoint(NamedTuple):
    """A checkpoint that verified: units done, the state after them, what the caller added."""

    step: int
    state: State
    extra: dict[str, Json]


class Latest(NamedTuple):
    """The newest checkpoint that verifies, and file name -> reason for each newer one refused."""

    checkpoint: Checkpoint | None
    refused: dict[str, str]


class _File(BaseModel, frozen=True, extra="forbid", strict=True):
    name: str
    bytes: NonNegativeInt
    sha256: str


class _Spec(BaseModel, frozen=True, extra="forbid", strict=True):
    dtype: str
    shape: list[NonNegativeInt]


class _Manifest(BaseModel, frozen=True, extra="forbid", strict=True):
    version: Literal[1]
    step: NonNegativeInt
    file: _File
    tensors: Annotated[dict[str, _Spec], Field(max_length=MAX_TENSORS)]
    meta: dict[str, Any]
    extra: dict[str, Any]


def save(
    directory: Path,
    state: State,
    *,
    step: int,
    extra: Mapping[str, Json] | None = None,
    keep: int = 2,
    failpoint: Failpoint = lambda _moment: None,
) -> Path:
    """Path of the manifest of a durable checkpoint; only the newest `keep` stay.

    step: units done, in [0, 10**8). Checkpoints of later steps are removed: their run was rewound.
    failpoint gets the name of each moment at which a kill is interesting; tests kill there.
    Raises ValueError, before writing, for a tensor or value that would not come back as it is.
    """
    if not 0 <= step < 10**8:
        raise ValueError(f"checkpoint.save: step must be in [0, 10**8), got {step}")
    if keep < 1:
        raise ValueError(f"checkpoint.save: keep must be at least 1, got {keep}")
    payload = _tensor_bytes(state.tensors)
    file = _File(
        name=f"step-{step:08d}.safetensors",
        bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )
    manifest = {
        "version": 1,
        "step": step,
        "file": file.model_dump(),
        "tensors": {name: _spec(t).model_dump() for name, t in state.tensors.items()},
        "meta": state.meta,
        "extra": dict(extra or {}),
    }
    sealed = _seal(json_line(manifest, "checkpoint.save", sort_keys=False).encode())
    directory.mkdir(parents=True, exist_ok=True)
    failpoint("nothing written")
    write_file(directory / file.name, payload, failpoint)
    path = directory / f"step-{step:08d}.json"
    write_file(path, sealed, failpoint)
    failpoint("committed")
    _prune(directory, step, keep)
    return path


def load(path: Path, *, finite: bool = False) -> Checkpoint:
    """The verified checkpoint of the manifest at `path`; tensors on the CPU, bit-equal.

    finite: NaN and infinities are refused too. Raises CheckpointError naming file and fault.
    """
    name = path.name
    if (match := _MANIFEST_NAME.fullmatch(name)) is None:
        raise CheckpointError(f"{name}: not a manifest; wanted a name like step-00000012.json")
    manifest = _parse(_unseal(read_file(path, limit=MAX_MANIFEST_BYTES), name), name)
    file = manifest.file
    if manifest.step != int(match[1]) or file.name != f"step-{match[1]}.safetensors":
        raise CheckpointError(f"{name}: written for step {manifest.step} and file {file.name!r}")
    payload = read_file(path.with_name(file.name), limit=MAX_TENSOR_BYTES, wanted=file.bytes)
    if hashlib.sha256(payload).hexdigest() != file.sha256:
        raise CheckpointError(f"{file.name}: sha256 differs from the manifest's")
    try:
        found = safetensors.torch.load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file.name}: not safetensors: {error}") from None
    _check_tensors(found, manifest.tensors, where=file.name, finite=finite)
    # A copy, so that tensors start where torch's allocator puts them: the last bit of a matrix
    # product may depend on alignment, and a resumed run has to repeat it.
    tensors = {tensor_name: found[tensor_name].clone() for tensor_name in manifest.tensors}
    return Checkpoint(manifest.step, State(tensors, manifest.meta), manifest.extra)


def latest(
    directory: Path,
    *,
    finite: bool = False,
    accept: Callable[[Checkpoint], None] = lambda _checkpoint: None,
) -> Latest:
    """The newest checkpoint in `directory` that verifies, and why each newer one does not.

    accept raises CheckpointError for one that does not fit what lies around it.
    """
    refused: dict[str, str] = {}
    for path in _manifests(directory):
        try:
            checkpoint = load(path, finite=finite)
            accept(checkpoint)
        except CheckpointError as error:
            refused[path.name] = str(error)
        else:
            return Latest(checkpoint, refused)
    return Latest(None, refused)


def write_file(path: Path, content: bytes, failpoint: Failpoint = lambda _moment: None) -> None:
    """Replace `path` durably, so that a crash leaves the old content or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        failpoint(f"{path.suffix} half written")
        file.write(content[len(content) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    failpoint(f"{path.suffix} written")
    temporary.replace(path)
    failpoint(f"{path.suffix} renamed")
    _sync_directory(path.parent)


def read_file(path: Path, *, limit: int, wanted: int | None = None) -> bytes:
    """Content of a regular file of at most `limit` bytes (exactly `wanted`, if given).

    Raises CheckpointError for anything else, links and pipes included, before reading it.
    """
    try:
        # O_NONBLOCK: opening a pipe somebody put here must not wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name}: not a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{path.name}: {status.st_size} bytes; the limit is {limit}")
        if wanted is not None and status.st_size != wanted:
            raise CheckpointError(f"{path.name}: {status.st_size} bytes; wanted {wanted}")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(status.st_size + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(content) != status.st_size:
        raise CheckpointError(f"{path.name}: changed while it was read")
    return content


def json_line(value: object, where: str, *, sort_keys: bool = True) -> str:
    """One line of JSON without spaces that reads back as `value`, floats to the last bit.

    Raises ValueError naming `where` for NaN, infinities, tuples, other keys than strings, and
    whatever else JSON would change.
    """
    if (problem := _not_json(value)) is not None:
        raise ValueError(f"{where}: {problem}")
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)


def _not_json(value: object, at: str = "") -> str | None:
    """What in `value` JSON cannot carry, or None."""
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            return f"keys must be strings, got {odd!r} in {at or 'the top level'}"
        problems = (_not_json(inner, f"{at}.{key}".lstrip(".")) for key, inner in value.items())
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(value, list):
        problems = (_not_json(inner, f"{at}[{index}]") for index, inner in enumerate(value))
        return next((problem for problem in problems if problem is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{at} is {value}; write None where a number is not defined"
    if value is None or isinstance(value, bool | int | float | str):
        return None
    return f"{at} must be None, bool, int, float, str, list or dict, got {type(value).__name__}"


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    for name in tensors:
        if _TENSOR_NAME.fullmatch(name) is None:
            raise ValueError(
                f"checkpoint.save: tensor name {name!r}: wanted 1 to 256 of A-Z a-z 0-9 . _ / : = "
                "+ -, no leading / and no .."
            )
    # Each tensor is copied: safetensors refuses views of one storage.
    copies = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    try:
        return safetensors.torch.save(copies)
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint.save: a tensor that safetensors cannot hold: {error}"
        ) from None


def _spec(tensor: Tensor) -> _Spec:
    return _Spec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape))


def _check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, _Spec], *, where: str, finite: bool
) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing")
    if surplus := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{where}: tensor {surplus[0]!r} is not in the manifest")
    for name, tensor in found.items():
        spec = _spec(tensor)
        if spec != wanted[name]:
            raise CheckpointError(
                f"{where}: tensor {name!r} must be {wanted[name].dtype} {wanted[name].shape}, "
                f"got {spec.dtype} {spec.shape}"
            )
        if finite and tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinities")


_HEAD, _MIDDLE, _TAIL = b'{"manifest":', b',"sha256":"', b'"}\n'


def _seal(body: bytes) -> bytes:
    return _HEAD + body + _MIDDLE + hashlib.sha256(body).hexdigest().encode() + _TAIL


def _unseal(content: bytes, name: str) -> bytes:
    body = content[len(_HEAD) : -(len(_MIDDLE) + 64 + len(_TAIL))]
    if content != _seal(body):
        raise CheckpointError(f"{name}: incomplete or altered")
    return body


def _parse(body: bytes, name: str) -> _Manifest:
    try:
        return _Manifest.model_validate(json.loads(body))
    except (ValidationError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name}: not a manifest of version 1: {reason}") from None


def _manifests(directory: Path) -> list[Path]:
    """Manifests of `directory`, newest step first."""
    if not directory.is_dir():
        return []
    names = (path for path in directory.iterdir() if _MANIFEST_NAME.fullmatch(path.name))
    return sorted(names, reverse=True)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove rewound, old and half-written files; manifests first, so none loses its tensors."""
    steps = (int(path.stem.removeprefix("step-")) for path in _manifests(directory))
    kept = set(sorted((s for s in steps if s <= step), reverse=True)[:keep])
    stale = []
    for path in directory.iterdir():
        match = _ANY_NAME.fullmatch(path.name)
        if match and (int(match[1]) not in kept or match[2]):
            stale.append(path)
    for path in sorted(stale, key=lambda path: path.suffix != ".json"):
        path.unlink()
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
