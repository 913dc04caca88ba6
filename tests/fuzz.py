"""Broken packets and lying codes without end: refused by name, or decoded to the right numbers.

    python -m tests.fuzz --count 1000000 --seed 0
    python -m tests.instrumented sanitizers python -m tests.fuzz --count 1000000

Input I of seed N is the same in every run; the one that fails is printed with the line that repeats
it. Three of four are packets for gose.compress.unpack: mutated bytes, or mutated tensors, fields
and header under a right checksum; the others are codes for gk.dequantize and gk.dequantize_add_,
whose bits must be the reference's, and matrices for gk.low_rank.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import gose_kernels as gk
from gose.compress import PacketError, Section, Spec, add_, decode, pack, unpack

SPECS = {
    name: Spec(name, (Section("matrices", 300, True), Section("biases", 6, False)))
    for name in ("none", *gk.FORMATS)
}
SENT = {
    name: pack(
        spec, {"matrices": torch.linspace(-1, 1, 300), "biases": torch.ones(6)}, site=3, round_=5
    ).packet
    for name, spec in SPECS.items()
}


def header_of(packet: bytes) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(packet[8 : 8 + int.from_bytes(packet[:8], "little")])
    return parsed


def with_header(packet: bytes, header: bytes) -> bytes:
    """The packet with another header of the same length, filled with blanks or cut."""
    length = int.from_bytes(packet[:8], "little")
    return packet[:8] + header[:length].ljust(length) + packet[8 + length :]


def forged(packet: bytes, spec: Spec, tensors: Mapping[str, Tensor], /, **changed: str) -> bytes:
    """The packet with other tensors or fields and a right checksum."""
    every = safetensors.torch.load(packet) | dict(tensors)
    fields = json.loads(header_of(packet)["__metadata__"]["gose"]) | changed
    fields.pop("crc32")
    check = zlib.crc32(json.dumps(fields).encode())
    for name in spec.layout():
        check = zlib.crc32(every[name].numpy().tobytes(), check)
    fields["crc32"] = f"{check:08x}"
    return safetensors.torch.save(every, metadata={"gose": json.dumps(fields)})


def mutated(source: random.Random, packet: bytes) -> bytes:
    """Bits flipped, bytes overwritten, parts moved; mostly of the right length."""
    data = bytearray(packet)
    for _ in range(source.randint(1, 4)):
        if len(data) < 16:
            break
        at, kind = source.randrange(len(data)), source.randrange(6)
        if kind == 0:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[at : at + 4] = source.randbytes(min(4, len(data) - at))
        elif kind == 2:
            other = source.randrange(len(data))
            data[at : at + 16], data[other : other + 16] = (
                data[other : other + 16],
                data[at : at + 16],
            )
            del data[len(packet) :]
        elif kind == 3:
            digit = data.find(b"0123456789"[source.randrange(10)], at)
            if digit >= 0:
                data[digit] = source.choice(b"0123456789-")
        elif kind == 4:
            data[8 + source.randrange(min(len(data) - 8, 200))] = source.choice(b'{}[]",:0 \\')
        else:
            data[at:] = data[at:][: source.randint(0, 40) or None]
    return bytes(data)


def _any_bits(source: random.Random, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers of any bits: NaN, infinite, subnormal, negative zero."""
    data = bytearray(source.randbytes(count * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _numbers(source: random.Random, count: int, dtype: torch.dtype) -> Tensor:
    """Mostly sound numbers, not negative, one perhaps of any bits."""
    bits = torch.frombuffer(bytearray(source.randbytes(2 * count) or b"\0\0"), dtype=torch.int16)
    found = (bits[:count].double().abs() / 2**15).to(dtype)
    if count and source.random() < 0.5:
        found[source.randrange(count)] = _any_bits(source, 1, dtype)[0]
    return found


def _check_sections(found: Mapping[str, Any], spec: Spec, dense: Mapping[str, Tensor]) -> None:
    """What was accepted is finite, has the layout of the specification and adds up."""
    assert set(found) == {section.name for section in spec.sections}
    for section in spec.sections:
        vector = decode(found[section.name])
        assert vector.dtype == torch.float32 and vector.shape == (section.numel,)
        assert bool(vector.isfinite().all())
        if not spec.is_coded(section):
            assert vector.numpy().tobytes() == dense[section.name].numpy().tobytes()
        total = torch.ones(section.numel)
        add_(total, found[section.name], 0.5)
        torch.testing.assert_close(total, 1 + 0.5 * vector, rtol=1e-6, atol=1e-6)


def _unpack(packet: bytes, spec: Spec) -> str:
    try:
        found = unpack(packet, spec, site=3, round_=5)
    except PacketError:
        return "packets refused"
    _check_sections(found, spec, safetensors.torch.load(packet))
    return "packets accepted"


def raw_packet(source: random.Random) -> str:
    name = source.choice(list(SENT))
    return _unpack(mutated(source, SENT[name]), SPECS[name])


def sealed_packet(source: random.Random) -> str:
    """Wrong in what the checksum covers, or only in how the header says it."""
    name = source.choice(list(SENT))
    spec, sent = SPECS[name], SENT[name]
    tensors = {
        tensor: _numbers(source, count, dtype)
        if dtype != torch.uint8
        else _any_bits(source, count, dtype)
        for tensor, (dtype, count) in spec.layout().items()
        if source.random() < 0.6
    }
    changed = {}
    if source.random() < 0.3:
        field = source.choice(("version", "format", "site", "round", "spec", "other"))
        changed[field] = source.choice(("", "1", "0000000003", "int8_b64_f16", "\u00e9" * 5))
    packet = forged(sent, spec, tensors, **changed)
    if source.random() < 0.2:
        header = header_of(packet)
        part = source.choice(list(header))
        header[part] = source.choice(([], {}, None, 7, {"gose": 1}, {"gose": "[[1]]"}, {**header}))
        packet = with_header(packet, json.dumps(header, separators=(",", ":")).encode())
    return _unpack(packet, spec)


def _outcome(call: Callable[[], Any]) -> Any:
    """The result, or the words of a refusal."""
    try:
        return call()
    except ValueError as error:
        return str(error)


def _agree(call: Callable[[str], Any], what: str) -> str:
    """Every backend of the CPU gives the same bits, or refuses in the same words."""
    ours, reference = (_outcome(lambda b=b: call(b)) for b in ("cpu", "torch"))
    if isinstance(ours, str) or isinstance(reference, str):
        assert isinstance(ours, str) and ours == reference, f"{ours!r}, not {reference!r}"
        return f"{what} refused"
    assert ours.numpy().tobytes() == reference.numpy().tobytes(), f"{what}: other bits"
    return f"{what} accepted"


def _frozen(source: random.Random, numel: int) -> Tensor | None:
    """A mask, perhaps of the wrong size or dtype."""
    if source.random() < 0.5:
        return None
    count = numel if source.random() < 0.9 else source.randint(0, 400)
    share = source.choice((0, 30, 128, 250, 256))
    mask = torch.tensor([byte < share for byte in source.randbytes(count)], dtype=torch.bool)
    return mask if source.random() < 0.97 else mask.float()


def code(source: random.Random) -> str:
    """Codes and scales for the native decoders, as long as they should be or not."""
    format_ = source.choice(list(gk.FORMATS))
    form, numel = gk.FORMATS[format_], source.choice((0, 1, 63, 64, 65, source.randint(0, 5000)))
    frozen_P = _frozen(source, numel)
    live = numel if frozen_P is None else int((~frozen_P.bool()).sum())
    wrong = source.choice((0,) * 20 + (1, -1, 300))
    code_bytes = max(0, form.code_bytes(live) + wrong * (source.random() < 0.5))
    num_scales = max(0, form.num_scales(live) + wrong * (source.random() < 0.5))
    dtype = form.scale_dtype if source.random() < 0.98 else torch.float64
    draw = _numbers if source.random() < 0.9 else _any_bits
    bits, scale = _any_bits(source, code_bytes, torch.uint8), draw(source, num_scales, dtype)
    if source.random() < 0.2:  # every second byte of a larger vector
        bits = torch.stack([bits, bits ^ 255], dim=1)[:, 0]
    told = numel if source.random() < 0.98 else source.choice((-1, 2**40, 2**62, numel + 1))
    if source.random() < 0.5:
        return _agree(
            lambda backend: gk.dequantize(
                bits, scale, told, frozen_P, format=format_, backend=backend
            ),
            "codes",
        )
    start, weight = _numbers(source, numel, torch.float32), source.uniform(-2, 2)

    def add(backend: str) -> Tensor:
        total = start.clone()
        gk.dequantize_add_(
            total, bits, scale, frozen_P, format=format_, weight=weight, backend=backend
        )
        return total

    return _agree(add, "codes to add")


def matrix(source: random.Random) -> str:
    """Matrices and factors for low_rank: sizes, ranks and bits that may be wrong."""
    M, N = source.randint(1, 40), source.randint(1, 40)
    R = source.randint(0, 8)
    draw = _numbers if source.random() < 0.8 else _any_bits
    x_MN = draw(source, M * N, torch.float32).view(M, N)
    q_NR = _numbers(source, N * R, torch.float32).view(N, R).nan_to_num(0, 1, -1)
    residual = draw(source, M * N, torch.float32).view(M, N) if source.random() < 0.5 else None
    if source.random() < 0.05:
        q_NR = q_NR[: source.randint(0, N)]

    def factors(backend: str) -> Any:
        return gk.low_rank(x_MN, q_NR, residual, backend=backend)

    ours, reference = (_outcome(lambda b=b: factors(b)) for b in ("cpu", "torch"))
    if isinstance(ours, str) or isinstance(reference, str):
        assert isinstance(ours, str) and ours == reference, f"{ours!r}, not {reference!r}"
        return "matrices refused"
    y_MN = x_MN.double() if residual is None else x_MN.double() + residual.double()
    # Beyond float32's range on the way: not finite; the kernel, which sums in float64, may be.
    if float(y_MN.abs().amax() * (1 + q_NR.abs().amax())) * M * N > 1e36:
        for one, same in zip(ours, reference, strict=True):
            assert bool(one.isfinite().all()) or not bool(same.isfinite().all())
        return "matrices accepted"
    p_MR, new_q_NR, left_MN = (t.double() for t in ours)
    eye = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(p_MR.mT @ p_MR, eye, rtol=0, atol=1e-5)
    size = float(y_MN.abs().amax()) * M + 1e-30
    assert float((new_q_NR - y_MN.mT @ p_MR).abs().amax()) <= 1e-5 * size
    if residual is not None:
        wanted = y_MN - p_MR @ new_q_NR.mT
        assert float((left_MN - wanted).abs().amax()) <= 1e-5 * size
    return "matrices accepted"


_KINDS = (raw_packet, raw_packet, sealed_packet, sealed_packet, sealed_packet, code, code, matrix)


def run_input(seed: int, index: int) -> str:
    """What became of one input; AssertionError if it was not refused and came out wrong."""
    source = random.Random(seed << 40 | index)
    return source.choice(_KINDS)(source)


def fuzz(count: int, seed: int, first: int = 0, state: Path | None = None) -> Counter[str]:
    """How many inputs were accepted and refused, by kind. state: a file that names the next one."""
    found: Counter[str] = Counter()
    for index in range(first, first + count):
        if state is not None and index % 256 == 0:
            state.write_text(json.dumps({"next": index}))
        try:
            found[run_input(seed, index)] += 1
        except Exception as error:
            error.add_note(f"python -m tests.fuzz --seed {seed} --first {index} --count 1")
            raise
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = fuzz(given.count, given.seed, given.first, given.state)
    print(f"seed {given.seed}, inputs {given.first} to {given.first + given.count - 1}:")
    for what, times in sorted(found.items()):
        print(f"{times:9} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
