"""What every arithmetic instruction computes, on arrays of one element per thread.

Values enter and leave as arrays of the instruction's type; bfloat16 is held as float32. Rounding is
IEEE; a fused multiply-add of float32 goes through float64, where the product is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

NUMPY = {
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"{k}{8 * n}": np.dtype(f"u{n}") for k in "ub" for n in (1, 2, 4, 8)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "tf32": np.dtype("f4"),
}
FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2"}


def float_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_of_float(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN becomes the GPU's NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# ---- integers --------------------------------------------------------------------------------


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype({1: "i2", 2: "i4", 4: "i8"}[x.itemsize].replace("i", x.dtype.kind))


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.itemsize < 8:
        return (_wide(a) * _wide(b) >> _wide(a).dtype.type(8 * a.itemsize)).astype(a.dtype)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    ua, ub = a.view(np.uint64), np.asarray(b).view(np.uint64)
    low = (ua & mask) * (ub & mask)
    middle = (ua >> half) * (ub & mask) + (low >> half)
    other = (ua & mask) * (ub >> half) + (middle & mask)
    high = (ua >> half) * (ub >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, 0) - np.where(b < 0, ua, 0)
    return high.view(a.dtype)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; all ones where b = 0, as GPUs give."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        unsigned = f"u{a.itemsize}"  # the magnitude of the smallest number fits it alone
        quotient = (np.abs(a).view(unsigned) // np.abs(safe).view(unsigned)).view(a.dtype)
        quotient = np.where((a < 0) != (safe < 0), -quotient, quotient)
    else:
        quotient = a // safe
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - divide(a, b) * b)


def shift(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    bits = 8 * a.itemsize
    amount = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    moved = a << amount if left else a >> amount
    if a.dtype.kind == "i" and not left:
        return moved
    return np.where(by >= bits, a.dtype.type(0), moved)


def funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    n = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    if left:
        return ((both << n) >> np.uint64(32)).astype(np.uint32)
    return (both >> n).astype(np.uint32)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        out |= np.where(pick & np.uint32(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: a field of bits, sign-extended for signed types."""
    bits = 8 * a.itemsize
    start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
    top = np.minimum(start + length, bits)
    kept = np.maximum(top.astype(np.int64) - start, 0).astype(np.uint32)
    unsigned = a.view(f"u{a.itemsize}")
    up = shift(unsigned, (bits - np.minimum(top, bits)).astype(np.uint32), left=True)
    down = shift(up.view(a.dtype), (bits - kept).astype(np.uint32), left=False)
    return np.where(kept == 0, a.dtype.type(0), down)


def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    one = a.dtype.type(1)
    mask = shift(one + a * 0, length & np.uint32(0xFF), left=True) - one
    mask = np.where((length & np.uint32(0xFF)) == 0, a.dtype.type(0), mask)
    mask = shift(mask, start & np.uint32(0xFF), left=True)
    return (b & ~mask) | (shift(a, start & np.uint32(0xFF), left=True) & mask)


def count_ones(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(np.uint32)


def reverse_bits(a: np.ndarray) -> np.ndarray:
    rows = np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(rows[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)


def highest_bit(a: np.ndarray) -> np.ndarray:
    """Index of the highest set bit (of the highest one unlike the sign), all ones without one."""
    value = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    value = value.astype(np.uint64)
    found = np.full(a.shape, 0xFFFFFFFF, np.uint32)
    for i in range(8 * a.itemsize):
        found = np.where(value >> np.uint64(i) & np.uint64(1), np.uint32(i), found)
    return found


def leading_zeros(a: np.ndarray) -> np.ndarray:
    return (np.uint32(8 * a.itemsize - 1) - highest_bit(a)).astype(np.uint32)


# ---- floats ----------------------------------------------------------------------------------


def _minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def _maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def _exactly(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Computed in float64, rounded once to the type of the first operand."""

    def through(*args: np.ndarray) -> np.ndarray:
        return f(*(np.asarray(a, np.float64) for a in args)).astype(args[0].dtype)

    return through


def directed(f: Callable[..., np.ndarray], mode: str) -> Callable[..., np.ndarray]:
    """The operation rounded down (rm), up (rp) or to zero (rz) instead of to nearest: from its
    float64 value, which is exact for products and for most sums of float32."""

    def toward(*args: np.ndarray) -> np.ndarray:
        exact = f(*(np.asarray(a, np.float64) for a in args))
        near = exact.astype(args[0].dtype)
        down = {"rm": near > exact, "rp": near < exact, "rz": np.abs(near) > np.abs(exact)}[mode]
        to = {"rm": -np.inf, "rp": np.inf, "rz": 0.0}[mode]
        return np.where(down, np.nextafter(near, near.dtype.type(to)), near)

    return toward


FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _exactly(lambda a, b, c: a * b + c),
    "mad": _exactly(lambda a, b, c: a * b + c),
    "min": _minimum,
    "max": _maximum,
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rcp": _exactly(lambda a: 1 / a),
    "rsqrt": _exactly(lambda a: 1 / np.sqrt(a)),
    "ex2": _exactly(np.exp2),
    "lg2": _exactly(np.log2),
    "sin": _exactly(np.sin),
    "cos": _exactly(np.cos),
    "tanh": _exactly(np.tanh),
    "copysign": lambda a, b: np.copysign(b, a),
}
INTEGER: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "div": divide,
    "rem": remainder,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "popc": count_ones,
    "clz": leading_zeros,
    "brev": reverse_bits,
    "bfind": highest_bit,
    "sad": lambda a, b, c: c + np.where(a < b, b - a, a - b).astype(c.dtype),
}
EXACT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
}
FLOPS = {"add": 1, "sub": 1, "mul": 1, "fma": 2, "mad": 2}

COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def convert(x: np.ndarray, source: str, target: str, words: tuple[str, ...]) -> np.ndarray:
    """cvt between single values; `words` are the modifiers of the opcode."""
    to = NUMPY[target]
    if source == "bf16":
        x, source = float_of_bfloat16(x), "f32"
    from_float, to_float = source in FLOATS, target in FLOATS or target == "tf32"
    if from_float and "ftz" in words and source == "f32":
        x = flush(x)
    if from_float and not to_float:
        whole = _rounded(x.astype(np.float64), words)
        span = np.iinfo(to)
        # 2**63 - 1 is no float64: the clip is done on the value, the cast on what fits.
        big, small = whole >= float(span.max), whole <= float(span.min)
        out = np.where(big | small | np.isnan(whole), 0, whole).astype(to)
        return np.where(big, span.max, np.where(small, span.min, out)).astype(to)
    if not from_float and not to_float:
        if "sat" in words:
            span = np.iinfo(to)
            low = 0 if x.dtype.kind == "u" else max(int(span.min), int(np.iinfo(x.dtype).min))
            x = np.clip(x, low, min(int(span.max), int(np.iinfo(x.dtype).max)))
        return x.astype(to)
    if "sat" in words:
        x = np.clip(np.where(np.isnan(x), 0, x), 0, 1).astype(x.dtype)
    if from_float and to_float and source == target:
        return _rounded(x, words).astype(to)
    if target == "bf16":
        return bfloat16_of_float(x.astype(np.float32))
    if target == "tf32":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    if "rz" in words and from_float and to.itemsize < x.itemsize:
        near = x.astype(to)
        return np.where(np.abs(near) > np.abs(x), np.nextafter(near, to.type(0)), near)
    return x.astype(to)


def _rounded(x: np.ndarray, words: tuple[str, ...]) -> np.ndarray:
    if "rni" in words:
        return np.rint(x)
    if "rmi" in words:
        return np.floor(x)
    if "rpi" in words:
        return np.ceil(x)
    return np.trunc(x) if "rzi" in words else x


def pairs(f: Callable[..., np.ndarray], kind: str) -> Callable[..., np.ndarray]:
    """The operation on both halves of packed registers; bfloat16 rounds once from float64."""

    def packed(*args: np.ndarray) -> np.ndarray:
        out = np.zeros(args[0].shape, np.uint32)
        for half in (0, 16):
            parts = [((a >> np.uint32(half)) & np.uint32(0xFFFF)).astype(np.uint16) for a in args]
            out |= single(f, kind)(*parts).astype(np.uint32) << np.uint32(half)
        return out

    return packed


def single(f: Callable[..., np.ndarray], kind: str) -> Callable[..., np.ndarray]:
    """The operation on bits of 16-bit floats."""

    def on_bits(*args: np.ndarray) -> np.ndarray:
        if kind.startswith("bf16"):
            wide = [float_of_bfloat16(a) for a in args]
            return bfloat16_of_float(np.asarray(f(*wide), np.float32))
        wide = [a.view(np.float16).astype(np.float32) for a in args]
        return np.asarray(f(*wide)).astype(np.float16).view(np.uint16)

    return on_bits
