"""The machine itself: instructions against Python's integers and float64, the same matrix products
as NumPy."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.faults import KernelError
from tests.ptx.small import aligned, run

_INTS = np.array(
    [
        0,
        1,
        2,
        3,
        7,
        31,
        32,
        33,
        0x7FFFFFFF,
        0x80000000,
        0x80000001,
        0xFFFFFFFF,
        0xDEADBEEF,
        12345678,
        0xFFFF0000,
        0x0000FFFF,
        1000,
        5,
        0xAAAAAAAA,
        0x55555555,
        0x01020304,
        64,
        100,
        0xFF,
        0x100,
        0x8000,
        0x7FFF,
        0xC0000000,
        9,
        10,
        11,
        12,
    ],
    np.uint32,
)
_M = 0xFFFFFFFF


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


_INTEGER = {
    "add.s32 %r3, %r1, %r2;": lambda a, b: a + b,
    "sub.u32 %r3, %r1, %r2;": lambda a, b: a - b,
    "mul.lo.s32 %r3, %r1, %r2;": lambda a, b: a * b,
    "mul.hi.u32 %r3, %r1, %r2;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r3, %r1, %r2;": lambda a, b: _signed(a) * _signed(b) >> 32,
    "mad.lo.u32 %r3, %r1, %r2, 7;": lambda a, b: a * b + 7,
    "mul.wide.s32 %d5, %r1, %r2; shr.u64 %d6, %d5, 32; cvt.u32.u64 %r3, %d6;": lambda a, b: (
        _signed(a) * _signed(b) >> 32
    ),
    "cvt.u64.u32 %d5, %r1; shl.b64 %d6, %d5, 31; or.b64 %d5, %d5, %d6; cvt.s64.s32 %d6, %r2;"
    "mul.hi.u64 %d7, %d5, %d6; cvt.u32.u64 %r3, %d7;": lambda a, b: (
        (a | a << 31) * (_signed(b) & (2**64 - 1)) >> 64
    ),
    "and.b32 %r3, %r1, %r2;": lambda a, b: a & b,
    "not.b32 %r3, %r1;": lambda a, b: ~a,
    "xor.b32 %r3, %r1, %r2;": lambda a, b: a ^ b,
    "shl.b32 %r3, %r1, %r2;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r3, %r1, %r2;": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 %r3, %r1, %r2;": lambda a, b: _signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r3, %r1, %r2, 9;": lambda a, b: (b << 32 | a) << 9 >> 32,
    "shf.r.wrap.b32 %r3, %r1, %r2, 9;": lambda a, b: (b << 32 | a) >> 9,
    "min.s32 %r3, %r1, %r2;": lambda a, b: min(_signed(a), _signed(b)),
    "max.u32 %r3, %r1, %r2;": lambda a, b: max(a, b),
    "abs.s32 %r3, %r1;": lambda a, b: abs(_signed(a)),
    "neg.s32 %r3, %r1;": lambda a, b: -a,
    "popc.b32 %r3, %r1;": lambda a, b: bin(a).count("1"),
    "clz.b32 %r3, %r1;": lambda a, b: 32 - a.bit_length(),
    "bfind.u32 %r3, %r1;": lambda a, b: a.bit_length() - 1,
    "bfind.shiftamt.u32 %r3, %r1;": lambda a, b: 32 - a.bit_length() if a else -1,
    "brev.b32 %r3, %r1;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "bfe.u32 %r3, %r1, 5, 11;": lambda a, b: a >> 5 & 0x7FF,
    "bfe.s32 %r3, %r1, 8, 8;": lambda a, b: (a >> 8 & 0xFF) - (256 if a >> 15 & 1 else 0),
    "bfi.b32 %r3, %r1, %r2, 4, 8;": lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4,
    "prmt.b32 %r3, %r1, %r2, 0x7531;": lambda a, b: sum(
        ((b << 32 | a) >> 8 * s & 0xFF) << 8 * i for i, s in enumerate((1, 3, 5, 7))
    ),
    "lop3.b32 %r3, %r1, %r2, 0xF0F0F0F0, 0xE8;": lambda a, b: (
        (a & b) | (a & 0xF0F0F0F0) | (b & 0xF0F0F0F0)
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1;": lambda a, b: (
        1 if _signed(a) < _signed(b) else 2
    ),
    "setp.hs.u32 %p1|%p2, %r1, %r2; selp.u32 %r3, %r1, 4, %p2;": lambda a, b: a if a < b else 4,
    "setp.ne.s32 %p1, %r1, 3; setp.gt.and.u32 %p2, %r2, 9, %p1; selp.b32 %r3, 1, 0, %p2;": (
        lambda a, b: int(b > 9 and a != 3)
    ),
    "cvt.s32.s8 %r3, %r1;": lambda a, b: (a & 0xFF) - (256 if a & 0x80 else 0),
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r3, %h1;": lambda a, b: a & 0xFFFF,
    "cvt.sat.u8.s32 %h1, %r1; cvt.u32.u8 %r3, %h1;": lambda a, b: min(max(_signed(a), 0), 255),
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r3, {%h2, %h1};": lambda a, b: a >> 16 | a << 16,
    "@%p0 mov.u32 %r3, 1; @!%p0 mov.u32 %r3, %r2;": lambda a, b: 1 if a < 100 else b,
}


@pytest.mark.parametrize("code", _INTEGER)
def test_integer_instructions(code: str) -> None:
    """Every pair of hostile words, 32 partners one after the other."""
    a, b, out = (aligned(32, "u4") for _ in range(3))
    a[:] = _INTS
    for turn in range(0, 32, 3):
        b[:] = np.roll(_INTS, turn)
        run(
            "ld.global.u32 %r1, [%d10]; ld.global.u32 %r2, [%d11]; setp.lo.u32 %p0, %r1, 100;"
            f"add.u64 %d12, %d2, %d9; {code} st.global.u32 [%d12], %r3;",
            *(a, b, out),
        )
        wanted = [_INTEGER[code](int(x), int(y)) & _M for x, y in zip(a, b, strict=True)]
        assert out.tolist() == wanted


@pytest.mark.parametrize("signed", [False, True])
def test_division(signed: bool) -> None:
    a, b, out = aligned(32, "u4"), aligned(32, "u4"), aligned(64, "u4")
    a[:], b[:] = _INTS, np.roll(_INTS, 5) | 1
    kind = "s32" if signed else "u32"
    run(
        f"ld.global.u32 %r1, [%d10]; ld.global.u32 %r2, [%d11]; div.{kind} %r3, %r1, %r2;"
        f"rem.{kind} %r4, %r1, %r2; mul.wide.u32 %d12, %r0, 8; add.u64 %d12, %d2, %d12;"
        "st.global.v2.u32 [%d12], {%r3, %r4};",
        *(a, b, out),
    )
    for x, y, (q, r) in zip(a.tolist(), b.tolist(), out.reshape(-1, 2).tolist(), strict=True):
        x, y = (_signed(x), _signed(y)) if signed else (x, y)
        quotient = _truncated(x, y)
        assert (q, r) == (quotient & _M, (x - quotient * y) & _M)


_F32 = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.5,
        math.inf,
        -math.inf,
        math.nan,
        1e-40,
        3.4e38,
        1 / 3,
        2.5,
        -2.5,
        0.5,
        88.0,
        *(
            1e10,
            -3e9,
            255.5,
            256.5,
            1e-3,
            -7.25,
            100.0,
            126.0,
            -126.0,
            5e-39,
            65504.0,
            65520.0,
            1e-8,
        ),
        *(3.0, 6.0, 9.0, 0.1, 0.7),
    ],
    np.float32,
)


def _f32(x: float) -> float:
    return float(np.float32(x))


def _nearest_bf16(x: float) -> int:
    """By search over the neighbours, ties to even."""
    if math.isnan(x):
        return 0x7FFF
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    low = bits >> 16
    candidates = [c for c in (low, low + 1) if c <= 0xFFFF]
    values = [struct.unpack("<f", struct.pack("<I", c << 16))[0] for c in candidates]
    if math.isinf(x):
        return int(low)
    distance = [abs(v - x) if not math.isinf(v) else abs(2.0**128 - abs(x)) for v in values]
    return int(min(zip(distance, [c & 1 for c in candidates], candidates, strict=True))[2])


_FLOAT = {
    "add.f32 %f3, %f1, %f2;": lambda a, b: a + b,
    "mul.rn.f32 %f3, %f1, %f2;": lambda a, b: a * b,
    "fma.rn.f32 %f3, %f1, %f2, %f1;": lambda a, b: a * b + a,
    "sub.ftz.f32 %f3, %f1, %f2;": lambda a, b: (
        (0.0 if abs(a) < 1e-38 else a) - (0.0 if abs(b) < 1e-38 else b)
    ),
    "div.rn.f32 %f3, %f1, 0f40400000;": lambda a, b: a / 3,
    "max.f32 %f3, %f1, %f2;": lambda a, b: b if a != a else a if b != b else max(a, b),
    "min.NaN.f32 %f3, %f1, %f2;": lambda a, b: math.nan if a != a or b != b else min(a, b),
    # 1.5 * 2^23 + 1: what is added to round to an integer, here down.
    "cvt.sat.f32.f32 %f4, %f1; fma.rm.f32 %f3, %f4, 0f437C0000, 0f4B400001;": lambda a, b: (
        12582913.0 + math.floor(252 * (min(max(a, 0.0), 1.0) if a == a else 0.0))
    ),
    "neg.f32 %f3, %f1;": lambda a, b: -a,
    "abs.f32 %f3, %f1;": lambda a, b: abs(a),
    "ex2.approx.f32 %f3, %f1;": lambda a, b: 2.0**a if not a > 200 else math.inf,
    "setp.gtu.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, 0fBF800000, %p1;": lambda a, b: (
        a if not a <= b else -1.0
    ),
    "setp.neu.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, 0f00000000, %p1;": lambda a, b: (
        a if a != b else 0.0
    ),
    "cvt.rni.f32.f32 %f3, %f1;": lambda a, b: float(np.rint(a)),
    "cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f3, %h1;": lambda a, b: float(
        np.float32(a).astype(np.float16)
    ),
    "cvt.rzi.s32.f32 %r3, %f1; cvt.rn.f32.s32 %f3, %r3;": lambda a, b: float(
        0 if a != a else np.float32(min(max(np.trunc(a), -(2**31)), 2**31 - 1))
    ),
}


@pytest.mark.parametrize("code", _FLOAT)
def test_float_instructions(code: str) -> None:
    a, b, out = (aligned(32, "f4") for _ in range(3))
    a[:] = _F32
    for turn in range(0, 32, 5):
        b[:] = np.roll(_F32, turn)
        run(
            "ld.global.f32 %f1, [%d10]; ld.global.f32 %f2, [%d11];"
            f"add.u64 %d12, %d2, %d9; {code} st.global.f32 [%d12], %f3;",
            *(a, b, out),
        )
        with np.errstate(all="ignore"):
            pairs = zip(a, b, strict=True)
            wanted = [_f32(_FLOAT[code](float(x), float(y))) for x, y in pairs]
        np.testing.assert_array_equal(out, np.array(wanted, np.float32))


def test_bfloat16_conversions() -> None:
    a, b, out = aligned(32, "f4"), aligned(32, "f4"), aligned(64, "u4")
    a[:] = _F32
    b[:] = (np.arange(32, dtype=np.uint32) * 0x4001 + 0x3F808000).view(np.float32)
    run(
        "ld.global.f32 %f1, [%d10]; ld.global.f32 %f2, [%d11]; mul.wide.u32 %d12, %r0, 8;"
        "cvt.rn.bf16.f32 %h1, %f1; cvt.rn.bf16x2.f32 %r3, %f1, %f2; cvt.u32.u16 %r4, %h1;"
        "add.u64 %d12, %d2, %d12; st.global.v2.b32 [%d12], {%r3, %r4};",
        *(a, b, out),
    )
    for x, y, (both, one) in zip(a.tolist(), b.tolist(), out.reshape(-1, 2).tolist(), strict=True):
        high, low = _nearest_bf16(x), _nearest_bf16(y)
        assert (both, one) == (high << 16 | low, high)


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 5, 0x1F, lambda i: i ^ 5),
        ("down", 3, 0x1F, lambda i: i + 3 if i + 3 < 32 else i),
        ("up", 4, 0, lambda i: i - 4 if i >= 4 else i),
        ("idx", 9, 0x1F, lambda i: 9),
        ("down", 2, 0x181F, lambda i: i + 2 if i % 8 + 2 < 8 else i),
        ("bfly", 8, 0x1F, lambda i: i ^ 8),
    ],
)
def test_shuffles(mode: str, b: int, c: int, source) -> None:  # type: ignore[no-untyped-def]
    out = aligned(32, "u4")
    run(
        f"mul.lo.u32 %r1, %r0, 11; shfl.sync.{mode}.b32 %r2, %r1, {b}, {c}, -1;"
        "st.global.u32 [%d10], %r2;",
        out,
    )
    assert out.tolist() == [11 * source(i) for i in range(32)]


def test_votes_and_reductions() -> None:
    out = aligned(128, "u4")
    run(
        "and.b32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 1; vote.sync.ballot.b32 %r2, %p1, -1;"
        "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2; redux.sync.add.s32 %r4, %r0, -1;"
        "match.any.sync.b32 %r5, %r1, -1; mul.wide.u32 %d12, %r0, 16; add.u64 %d12, %d0, %d12;"
        "st.global.v4.u32 [%d12], {%r2, %r3, %r4, %r5};",
        out,
    )
    every_fourth = 0x11111111
    wanted = [[every_fourth << 1, 1, 496, every_fourth << i % 4] for i in range(32)]
    assert out.reshape(-1, 4).tolist() == wanted


@pytest.mark.parametrize(
    ("kind", "shape", "registers"),
    [("bf16", "m16n8k16", (4, 2)), ("f16", "m16n8k16", (4, 2)), ("tf32", "m16n8k8", (4, 2))],
)
def test_tensor_core(kind: str, shape: str, registers: tuple[int, int]) -> None:
    """A product of small integers, exact in every type: fragments as the PTX manual draws them."""
    K, per = int(shape.split("k")[1]), 1 if kind == "tf32" else 2
    random = np.random.default_rng(0)
    A, B = random.integers(-8, 9, (16, K)), random.integers(-8, 9, (K, 8))

    def bits(values: list[int]) -> int:
        if kind == "tf32":
            return int(np.float32(values[0]).view(np.uint32))
        if kind == "f16":
            return int(np.array(values, np.float16).view(np.uint32)[0])
        return int(
            sum(int(np.float32(v).view(np.uint32)) >> 16 << 16 * i for i, v in enumerate(values))
        )

    a, b, out = aligned(128, "u4"), aligned(64, "u4"), aligned(128, "f4")
    for lane in range(32):
        group, t = divmod(lane, 4)
        for r in range(4):
            row, column = group + 8 * (r % 2), t * per + 4 * per * (r // 2)
            a[4 * lane + r] = bits([int(A[row, column + i]) for i in range(per)])
        for r in range(2):
            row = t * per + 4 * per * r
            b[2 * lane + r] = bits([int(B[row + i, group]) for i in range(per)])
    counts = run(
        "mul.wide.u32 %d12, %r0, 16; add.u64 %d13, %d0, %d12; add.u64 %d14, %d2, %d12;"
        "mul.wide.u32 %d12, %r0, 8; add.u64 %d15, %d1, %d12; mov.f32 %f1, 0f3F800000;"
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d13]; ld.global.v2.b32 {%r5, %r6}, [%d15];"
        f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
        " {%f2, %f3, %f4, %f5}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f1, %f1, %f1};"
        "st.global.v4.f32 [%d14], {%f2, %f3, %f4, %f5};",
        *(a, b, out),
    )
    D = np.zeros((16, 8))
    for lane in range(32):
        group, t = divmod(lane, 4)
        for r in range(4):
            D[group + 8 * (r // 2), 2 * t + r % 2] = out[4 * lane + r]
    np.testing.assert_array_equal(D, A @ B + 1)
    assert (counts.mma, counts.mma_flops) == (1, 2 * 16 * 8 * K)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Four 8 x 8 matrices of their own element numbers."""
    out = aligned(128, "u4")
    trans = ".trans" if transposed else ""
    run(
        "mov.u32 %r9, s; shl.b32 %r8, %r0, 4; add.u32 %r9, %r9, %r8; mul.lo.u32 %r1, %r0, 0x80008;"
        "add.u32 %r1, %r1, 0x10000; add.u32 %r2, %r1, 0x20002; add.u32 %r3, %r1, 0x40004;"
        "add.u32 %r4, %r1, 0x60006; st.shared.v4.b32 [%r9], {%r1, %r2, %r3, %r4}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];"
        "mul.wide.u32 %d12, %r0, 16; add.u64 %d12, %d0, %d12;"
        "st.global.v4.u32 [%d12], {%r1, %r2, %r3, %r4};",
        out,
        shared=".shared .align 16 .b8 s[512];",
    )
    for lane in range(32):
        for matrix in range(4):
            row, column = lane // 4, 2 * (lane % 4)
            spots = [(row, column), (row, column + 1)]
            if transposed:
                spots = [(column, row), (column + 1, row)]
            low, high = (64 * matrix + 8 * r + c for r, c in spots)
            assert out[4 * lane + matrix] == high << 16 | low


def test_divergent_branches_meet_again() -> None:
    """Collatz: every thread loops its own number of times, then the warp shuffles."""
    out = aligned(64, "u4")
    run(
        "add.u32 %r1, %r0, 1; mov.u32 %r2, 0; LOOP: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;"
        "and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN; mad.lo.u32 %r1, %r1, 3, 1;"
        "bra.uni NEXT; EVEN: shr.u32 %r1, %r1, 1; NEXT: add.u32 %r2, %r2, 1; bra.uni LOOP;"
        "DONE: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; mul.wide.u32 %d12, %r0, 8;"
        "add.u64 %d12, %d0, %d12; st.global.v2.u32 [%d12], {%r2, %r4};",
        out,
    )

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.reshape(-1, 2).tolist() == [[steps(i + 1), steps((i ^ 1) + 1)] for i in range(32)]


def test_atomics_of_all_threads() -> None:
    """Sums of integers in any order, and old values that are all different."""
    total, out = aligned(1, "u4"), aligned(160, "u4")
    for order in machine.ORDERS:
        total[:] = 0
        run(
            "mov.u32 %r5, %ctaid.x; mad.lo.u32 %r6, %r5, 40, %r0;"
            "atom.global.add.u32 %r1, [%d0], 3;"
            "mul.wide.u32 %d12, %r6, 4; add.u64 %d12, %d1, %d12; st.global.u32 [%d12], %r1;",
            *(total, out),
            threads=40,
            blocks=4,
            order=order,
        )
        assert total[0] == 3 * 160
        assert sorted(out.tolist()) == list(range(0, 480, 3))
        assert (out[0] < out[120]) == (order != "reverse") or order == "random"


def test_parameters_by_address() -> None:
    """Every thread reads an 8-byte parameter of its own: alone, and through a generic address."""
    out, other = aligned(4, "u8"), aligned(1, "u8")
    body = (
        "mov.b64 %d12, p0; cvta.param.u64 %d13, %d12; mul.wide.u32 %d9, %r0, 8;"
        "and.b64 %d9, %d9, 8; add.u64 %d14, %d12, %d9; add.u64 %d15, %d13, %d9;"
        "ld.param.u64 %d16, [%d14]; ld.u64 %d17, [%d15]; sub.u64 %d18, %d16, %d17;"
        "add.u64 %d18, %d18, %d16; mul.wide.u32 %d9, %r0, 8; add.u64 %d10, %d0, %d9;"
        "st.global.u64 [%d10], %d18;"
    )
    run(body, out, other, threads=4)
    assert out.tolist() == [out.ctypes.data, other.ctypes.data] * 2
    with pytest.raises(KernelError, match="out of bounds"):
        run("mov.b64 %d12, p0; ld.param.u64 %d16, [%d12+16];", out, other)
