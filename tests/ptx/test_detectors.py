"""What the machine counts, exactly, and one small kernel that trips each of its detectors."""

from __future__ import annotations

import pytest

from tests.ptx import machine
from tests.ptx.faults import KernelError
from tests.ptx.small import aligned, run

# ---- counts ----------------------------------------------------------------------------------


def test_counts_of_global_memory() -> None:
    """A warp reads 128 neighbouring bytes, every second word, one word."""
    x, out = aligned(64, "f4"), aligned(32, "f4")
    counts = run("ld.global.f32 %f1, [%d10]; st.global.f32 [%d11], %f1;", x, out)
    assert (counts.sectors, counts.requested_bytes, counts.bytes) == (8, 256, 256)
    assert counts.sector_efficiency == 1
    counts = run(
        "mul.wide.u32 %d12, %r0, 8; add.u64 %d12, %d0, %d12; ld.global.f32 %f1, [%d12];", x, out
    )
    assert (counts.sectors, counts.read_bytes, counts.sector_efficiency) == (8, 128, 0.5)
    counts = run("ld.global.f32 %f1, [%d0]; ld.global.f32 %f2, [%d0];", x, out)
    assert (counts.sectors, counts.block_sectors, counts.requested_bytes) == (2, 1, 8)
    assert counts.read_bytes == 4


def test_counts_of_arithmetic() -> None:
    """Active threads count, and warps with one."""
    out = aligned(64, "f4")
    counts = run(
        "mov.f32 %f1, 0f3F800000; setp.lt.u32 %p1, %r0, 5; @%p1 add.f32 %f1, %f1, %f1;"
        "fma.rn.f32 %f2, %f1, %f1, %f1; st.global.f32 [%d10], %f2;",
        out,
        threads=64,
    )
    assert counts.flops == 5 + 2 * 64
    assert counts.opcodes["add"] == 2 * 2 + 1  # addresses of both warps, floats of one
    assert counts.opcodes["fma"] == 2


@pytest.mark.parametrize(
    ("stride", "kind", "conflicts"),
    [
        (4, "b32", 0),
        (8, "b32", 1),
        (128, "b32", 31),
        (0, "b32", 0),
        (16, "v4.b32", 0),
        (32, "v4.b32", 4),
        (132, "b32", 0),
    ],
)
def test_bank_conflicts(stride: int, kind: str, conflicts: int) -> None:
    registers = "{%r1, %r2, %r3, %r4}" if kind.startswith("v4") else "%r1"
    counts = run(
        f"mov.u32 %r9, s; mul.lo.u32 %r8, %r0, {stride}; add.u32 %r9, %r9, %r8; mov.u32 %r1, 0;"
        f"mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; st.shared.{kind} [%r9], {registers};",
        shared=".shared .align 16 .b8 s[8192];",
    )
    assert counts.bank_conflicts == conflicts
    assert counts.shared_phases == (4 if kind.startswith("v4") else 1)


# ---- detectors -------------------------------------------------------------------------------

_S = ".shared .align 16 .b8 s[512];"
_WORD = "mov.u32 %r9, s; shl.b32 %r8, %r0, 2; add.u32 %r9, %r9, %r8;"  # the thread's own word
_OTHER = "xor.b32 %r7, %r9, 128;"  # that of a thread of the other warp: s is 512-byte aligned here
_COPY = "cp.async.ca.shared.global [%r9], [%d10], 4; cp.async.commit_group;"

_FAULTS = {
    "out of bounds: one past": (
        "ld.global.u32 %r1, [%d10+4];",
        "out of bounds",
    ),
    "out of bounds: before": ("ld.global.u32 %r1, [%d10+-4];", "out of bounds"),
    "out of bounds: store": ("st.global.u32 [%d10+65536], %r0;", "out of bounds"),
    "out of bounds: shared": (
        f"{_WORD} st.shared.u32 [%r9+384], %r0;",
        "out of bounds",
    ),
    "misaligned": ("ld.global.v2.u32 {%r1, %r2}, [%d10];", "misaligned"),
    "unwritten shared memory": (f"{_WORD} ld.shared.u32 %r1, [%r9];", "unwritten shared memory"),
    "unwritten by one thread": (
        f"{_WORD} {_OTHER} setp.ne.u32 %p1, %r0, 3; @%p1 st.shared.u32 [%r9], %r0; bar.sync 0;"
        "ld.shared.u32 %r1, [%r7];",
        "unwritten shared memory",
    ),
    "race: read after write": (
        f"{_WORD} {_OTHER} st.shared.u32 [%r9], %r0; bar.sync 0; st.shared.u32 [%r9], %r0;"
        "ld.shared.u32 %r1, [%r7];",
        "race",
    ),
    "race: write after read": (
        f"{_WORD} {_OTHER} st.shared.u32 [%r9], %r0; bar.sync 0; ld.shared.u32 %r1, [%r7];"
        "st.shared.u32 [%r9], %r1;",
        "race",
    ),
    "race: write after write": (
        f"{_WORD} {_OTHER} st.shared.u32 [%r9], %r0; st.shared.u32 [%r7], %r0;",
        "race",
    ),
    "race: one store of two warps": (
        "mov.u32 %r9, s; st.shared.u32 [%r9], %r0;",
        "race",
    ),
    "race: within a warp": (
        f"{_WORD} xor.b32 %r7, %r9, 4; st.shared.u32 [%r9], %r0; ld.shared.u32 %r1, [%r7];",
        "race",
    ),
    "race: read by a whole warp, written by one": (
        "mov.u32 %r9, s; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r9], %r0; bar.sync 0;"
        "ld.shared.u32 %r1, [%r9]; @%p1 st.shared.u32 [%r9], 7;",
        "race",
    ),
    "race: global store": (
        "mov.u32 %r5, %ctaid.x; mul.wide.u32 %d12, %r5, 4; add.u64 %d12, %d0, %d12;"
        "st.global.u32 [%d12], %r0;",
        "race",
    ),
    "race: atomic and plain": (
        f"{_WORD} st.shared.u32 [%r9], %r0; bar.sync 0; mov.u32 %r6, s; ld.shared.u32 %r1, [%r9];"
        "atom.shared.add.u32 %r2, [%r6], 1;",
        "race",
    ),
    "copy: no wait": (
        f"{_WORD} {_COPY} bar.sync 0; ld.shared.u32 %r1, [%r9];",
        "asynchronous copy",
    ),
    "copy: a wait too few": (
        f"{_WORD} {_COPY} cp.async.ca.shared.global [%r9+256], [%d10], 4; cp.async.commit_group;"
        "cp.async.wait_group 1; bar.sync 0; ld.shared.u32 %r1, [%r9+256];",
        "asynchronous copy",
    ),
    "copy: not committed": (
        f"{_WORD} cp.async.ca.shared.global [%r9], [%d10], 4; cp.async.wait_group 0;"
        "ld.shared.u32 %r1, [%r9];",
        "asynchronous copy",
    ),
    "copy: no barrier after the wait": (
        f"{_WORD} {_OTHER} {_COPY} cp.async.wait_group 0; ld.shared.u32 %r1, [%r7];",
        "race",
    ),
    "copy: over what is still read": (
        f"{_WORD} {_OTHER} st.shared.u32 [%r9], %r0; bar.sync 0; ld.shared.u32 %r1, [%r7]; {_COPY}",
        "race",
    ),
    "divergent barrier: two places": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B:",
        "divergent barrier",
    ),
    "divergent barrier: some threads left": (
        "setp.lt.u32 %p1, %r0, 40; @%p1 ret; bar.sync 0;",
        "divergent barrier",
    ),
    "divergent warp: absent lanes": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra A; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; A:",
        "divergent warp",
    ),
    "divergent warp: not in the mask": (
        "shfl.sync.idx.b32 %r1, %r0, 0, 31, 1;",
        "divergent warp",
    ),
    "endless": ("LOOP: bra.uni LOOP;", "endless"),
    "unwritten register": ("st.global.u32 [%d10], %r20;", "unwritten register"),
    "trap": ("trap;", "trap"),
}


@pytest.mark.parametrize("name", _FAULTS)
def test_detector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty kernel faults as what it is, in every order and however few blocks run at once."""
    code, kind = _FAULTS[name]
    monkeypatch.setattr(machine, "_MAX_STEPS", 1000)
    x = aligned(64, "u4")
    for order in machine.ORDERS:
        for lanes in (1, 8192):
            with pytest.raises(KernelError) as caught:
                run(code, x, threads=64, blocks=3, shared=_S, order=order, lanes=lanes)
            assert caught.value.kind == kind, str(caught.value)


_SOUND = {
    "barrier between": (
        f"{_WORD} {_OTHER} st.shared.u32 [%r9], %r0; bar.sync 0; ld.shared.u32 %r1, [%r7];"
    ),
    "warp barrier within a warp": (
        f"{_WORD} xor.b32 %r7, %r9, 4; st.shared.u32 [%r9], %r0; bar.warp.sync -1;"
        "ld.shared.u32 %r1, [%r7]; bar.warp.sync -1; st.shared.u32 [%r9], %r0;"
    ),
    "own word again": (
        f"{_WORD} st.shared.u32 [%r9], %r0; ld.shared.u32 %r1, [%r9]; st.shared.u32 [%r9], %r1;"
    ),
    "the same value from all": "mov.u32 %r9, s; st.shared.u32 [%r9], 7;",
    "copy, wait, barrier": (
        f"{_WORD} {_OTHER} {_COPY} cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r1, [%r7];"
    ),
    "older of two groups": (
        f"{_WORD} {_COPY} cp.async.ca.shared.global [%r9+256], [%d10], 4; cp.async.commit_group;"
        "cp.async.wait_group 1; ld.shared.u32 %r1, [%r9]; cp.async.wait_all;"
        "ld.shared.u32 %r2, [%r9+256];"
    ),
    "copy of nothing from nowhere": (
        f"{_WORD} mov.u64 %d12, 8; cp.async.ca.shared.global [%r9], [%d12], 4, 0;"
        "cp.async.wait_all; ld.shared.u32 %r1, [%r9];"
    ),
    "shuffle of those that are here": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; A:"
    ),
}


@pytest.mark.parametrize("name", _SOUND)
def test_no_false_alarm(name: str) -> None:
    x = aligned(64, "u4")
    counted = [
        run(_SOUND[name], x, threads=64, blocks=3, shared=_S, order=order).instructions
        for order in machine.ORDERS
    ]
    assert set(counted) == {counted[0]}
    assert counted[0] >= 3 * 2  # blocks, warps


_BLOCK = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %d12, %r5, 4; add.u64 %d12, %d0, %d12;"
_BLOCK_ORDER = {
    "read of another block's word": (
        f"{_BLOCK} st.global.u32 [%d12], 1; setp.gt.u32 %p1, %r5, 0;"
        "@%p1 ld.global.u32 %r1, [%d12+-4];"
    ),
    "write of another block's word": "st.global.u32 [%d0], 1;",
    "write of what another block reads": (
        f"{_BLOCK} ld.global.u32 %r1, [%d0]; st.global.u32 [%d12], 1;"
    ),
    "one byte of a word": (
        f"{_BLOCK} shr.u64 %d13, %d9, 0; mov.u32 %r6, %ctaid.x; cvt.u64.u32 %d13, %r6;"
        "add.u64 %d13, %d0, %d13; st.global.u8 [%d13], 1; st.global.u32 [%d12], 1;"
    ),
    "atomic and plain": (f"{_BLOCK} red.global.add.u32 [%d0], 1; ld.global.u32 %r1, [%d12];"),
}


@pytest.mark.parametrize("name", _BLOCK_ORDER)
def test_dependence_on_block_order(name: str) -> None:
    x = aligned(64, "u4")
    for order in machine.ORDERS:
        for lanes in (1, 8192):
            with pytest.raises(KernelError) as caught:
                run(_BLOCK_ORDER[name], x, threads=1, blocks=4, order=order, lanes=lanes)
            assert caught.value.kind == "block order", str(caught.value)


def test_unknown_instructions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="wgmma"):
        run("wgmma.fence.sync.aligned;")


def test_a_thread_writes_what_its_warp_read_before_a_warp_sync() -> None:
    """All read the first word; synced, the first thread reads it again and writes it."""
    body = (
        "shl.b32 %r1, %r0, 2; mov.u32 %r2, words; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %r0;"
        "bar.sync 0; ld.shared.u32 %r4, [%r2]; {sync} ld.shared.u32 %r5, [%r3];"
        "add.u32 %r6, %r5, 7; st.shared.u32 [%r3], %r6; bar.warp.sync -1;"
        "ld.shared.u32 %r7, [%r2]; st.global.u32 [%d10], %r7;"
    )
    shared, out = ".shared .align 4 .b8 words[128];", aligned(32, "u4")
    run(body.format(sync="bar.warp.sync -1;"), out, shared=shared)
    assert out.tolist() == [7] * 32
    with pytest.raises(KernelError, match="race"):
        run(body.format(sync=""), out, shared=shared)
