"""Instructions of whole warps: shuffles, votes, reductions, matrix loads, tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.arithmetic import NUMPY
from tests.ptx.memory import WARP, Shared
from tests.ptx.parse import Instruction, Kernel

Run = Callable[[Any], None]


EVERYONE = 0xFFFFFFFF


def _bits(flags: np.ndarray) -> np.ndarray:
    """Flags of lanes as one uint32 per warp."""
    packed: np.ndarray = np.packbits(flags, bitorder="little").view(np.uint32)
    return packed


def check_members(m: Any, named: Any) -> None:
    """Every active lane names itself, and all living lanes that it names are active with it."""
    if np.ndim(named) == 0 and named == EVERYONE and m.whole_warps:
        return
    named = np.broadcast_to(named, m.size)[m.lanes]
    here = np.repeat(_bits(m.mask), WARP)[m.lanes]
    alive = np.repeat(_bits(m.alive), WARP)[m.lanes]
    lane = m.lane[m.lanes].astype(np.uint32)
    if ((named & alive & ~here) != 0).any():
        raise m.fault("divergent warp", "the mask names lanes that are not here")
    if (((named >> lane) & np.uint32(1)) == 0).any():
        raise m.fault("divergent warp", "a lane is not in its own mask")


def shuffle(i: Instruction, kernel: Kernel, value: Any) -> Run:
    mode, kind = i.opcode[2], i.opcode[-1]
    out = i.operands[0]
    dst = out.parts[0].name if out.kind == "pair" else out.name
    flag = out.parts[1].name if out.kind == "pair" else ""
    source, b, c, members = (
        value(o, t, kernel)
        for o, t in zip(i.operands[1:], (kind, "u32", "u32", "u32"), strict=True)
    )

    def sources(lane: np.ndarray, bval: Any, cval: Any) -> tuple[np.ndarray, np.ndarray]:
        """(lane of the warp that each one reads, whether that is within its segment)."""
        clamp, segment = cval & 31, cval >> 8 & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        if mode == "up":
            j, inside = lane - bval, lane - bval >= high
        elif mode == "down":
            j, inside = lane + bval, lane + bval <= high
        elif mode == "bfly":
            j, inside = lane ^ bval, (lane ^ bval) <= high
        else:
            j = low | (bval & ~segment)
            inside = j <= high
        return np.where(inside, j, lane), inside

    fixed = None
    if i.operands[2].kind == i.operands[3].kind == "number":
        fixed = sources(np.arange(WARP), int(i.operands[2].bits) & 31, int(i.operands[3].bits))

    def run(m: Any) -> None:
        check_members(m, members(m))
        x = np.broadcast_to(source(m), m.size)
        if fixed is not None and m.whole_warps:
            j, inside = fixed
            m.put(dst, x.reshape(-1, WARP)[:, j].reshape(-1))
            if flag:
                m.put(flag, np.tile(inside, m.size // WARP))
            return
        lane = m.lane.astype(np.int64)
        bval = np.broadcast_to(b(m), m.size).astype(np.int64) & 31
        j, inside = sources(lane, bval, np.broadcast_to(c(m), m.size).astype(np.int64))
        base = np.arange(m.size) - lane
        if not m.mask[(base + j)[m.lanes]].all():
            raise m.fault("divergent warp", "a shuffle reads from a lane that is not here")
        m.put(dst, x[base + j])
        if flag:
            m.put(flag, inside)

    return run


def _warps(m: Any, flags: np.ndarray) -> np.ndarray:
    return np.repeat(_bits(flags & m.mask), WARP)


def vote(i: Instruction, kernel: Kernel, value: Any) -> Run:
    mode, dst = i.opcode[2], i.operands[0].name
    p, members = value(i.operands[1], "pred", kernel), value(i.operands[2], "u32", kernel)

    def run(m: Any) -> None:
        named = members(m)
        check_members(m, named)
        yes = _warps(m, np.broadcast_to(p(m), m.size)) & named
        here = np.repeat(_bits(m.mask), WARP) & named
        result = {
            "ballot": lambda: yes,
            "any": lambda: yes != 0,
            "all": lambda: yes == here,
            "uni": lambda: (yes == here) | (yes == 0),
        }[mode]()
        m.put(dst, result)

    return run


def match(i: Instruction, kernel: Kernel, value: Any) -> Run:
    assert i.opcode[1] == "any", i.text
    dst = i.operands[0].name
    x, members = value(i.operands[1], i.opcode[-1], kernel), value(i.operands[2], "u32", kernel)

    def run(m: Any) -> None:
        named = members(m)
        check_members(m, named)
        rows = np.broadcast_to(x(m), m.size).reshape(-1, WARP)
        same = (rows[:, :, None] == rows[:, None, :]) & m.mask.reshape(-1, 1, WARP)
        bits = (same.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=2)
        m.put(dst, bits.astype(np.uint32).reshape(-1) & named)

    return run


def redux(i: Instruction, kernel: Kernel, value: Any) -> Run:
    name, kind, dst = i.opcode[2], i.opcode[-1], i.operands[0].name
    x, members = value(i.operands[1], kind, kernel), value(i.operands[2], "u32", kernel)
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]

    def run(m: Any) -> None:
        check_members(m, members(m))
        rows = np.broadcast_to(x(m), m.size).reshape(-1, WARP)
        mask = m.mask.reshape(-1, WARP)
        dtype = NUMPY[kind]
        span = np.iinfo(dtype)
        neutral = {"add": 0, "min": span.max, "max": span.min, "and": -1, "or": 0, "xor": 0}[name]
        fill = np.array(neutral).astype(dtype)
        total = function.reduce(np.where(mask, rows, fill), axis=1, dtype=dtype)
        m.put(dst, np.repeat(total, WARP))

    return run


def active(i: Instruction, kernel: Kernel, value: Any) -> Run:
    dst = i.operands[0].name
    return lambda m: m.put(dst, np.repeat(_bits(m.mask), WARP))


# ---- matrices --------------------------------------------------------------------------------


def _whole_warps(m: Any) -> np.ndarray:
    """Lanes as [warp, 32]; every warp that is here must be whole."""
    rows = m.mask.reshape(-1, WARP)
    if (rows.any(axis=1) != rows.all(axis=1)).any():
        raise m.fault("divergent warp", "a matrix instruction needs the whole warp")
    lanes: np.ndarray = m.lanes.reshape(-1, WARP)
    return lanes


def ldmatrix(i: Instruction, kernel: Kernel, address: Any) -> Run:
    count = next(int(w[1]) for w in i.opcode if w in ("x1", "x2", "x4"))
    transposed = "trans" in i.opcode
    out = i.operands[0]
    names = [p.name for p in out.parts] if out.kind == "vector" else [out.name]
    where = address(i.operands[1], kernel)

    def run(m: Any) -> None:
        lanes = _whole_warps(m)
        rows = where(m).reshape(-1, WARP)[:, : 8 * count]
        used = lanes[:, : 8 * count].reshape(-1)
        if m.counting:
            Shared.count(m.counts, used, rows.reshape(-1), 16)
        words = m.shared.read(rows.reshape(-1), 4, 4, m.slot[used], m.thread[used], i.text)
        halves = words.view(np.uint16).reshape(len(lanes), count, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        pairs = np.ascontiguousarray(halves).view(np.uint32).reshape(len(lanes), count, WARP)
        for at, name in enumerate(names):
            m.put_lanes(name, np.ascontiguousarray(pairs[:, at]).reshape(-1))

    return run


def _elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """[..., registers] of uint32 as float64 [..., registers, elements of a register]."""
    raw = np.ascontiguousarray(bits)[..., None]
    if kind == "bf16":
        return arithmetic.float_of_bfloat16(raw.view(np.uint16)).astype(np.float64)
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    dtype = {"f16": "f2", "s8": "i1", "u8": "u1"}[kind]
    return raw.view(dtype).astype(np.float64)


def mma(i: Instruction, kernel: Kernel, value: Any) -> Run:
    """mma.sync of 16-bit floats, tf32 and 8-bit integers with fragments as the PTX manual lays them
    out: lane = 4 * group + t holds row `group`, and `p` neighbours from column t * p on."""
    shape = next(w for w in i.opcode if w[0] == "m" and w[1:3] == "16")
    M, N, K = (int(n) for n in shape[1:].replace("n", " ").replace("k", " ").split())
    to, kind = i.opcode[-4], i.opcode[-3]
    if to not in ("f32", "s32"):
        raise NotImplementedError(i.text)
    d, a, b, c = (o.parts for o in i.operands[:4])
    read_a, read_b = ([value(o, "b32", kernel) for o in part] for part in (a, b))
    read_c = [value(o, to, kernel) for o in c]
    lane = np.arange(WARP)
    group, t = lane // 4, lane % 4

    def gather(m: Any, lanes: np.ndarray, read: list[Any], rows: int) -> np.ndarray:
        bits = np.stack([np.broadcast_to(r(m), m.size)[lanes] for r in read], axis=-1)
        values = _elements(bits, kind)  # [warps, lane, register, element]
        p, per_column = values.shape[-1], rows // 8
        out = np.zeros((len(lanes), rows, K))
        for register in range(len(read)):
            at_row = group + 8 * (register % per_column)
            for element in range(p):
                column = t * p + element + 4 * p * (register // per_column)
                out[:, at_row, column] = values[:, :, register, element]
        return out

    def run(m: Any) -> None:
        lanes = _whole_warps(m)
        product = gather(m, lanes, read_a, M) @ gather(m, lanes, read_b, N).swapaxes(1, 2)
        for register, (target, r) in enumerate(zip(d, read_c, strict=True)):
            row, column = group + 8 * (register // 2), t * 2 + register % 2
            old = np.broadcast_to(r(m), m.size)[lanes]
            new = (product[:, row, column] + old).astype(old.dtype)
            m.put_lanes(target.name, new.reshape(-1))
        m.counts.mma += len(lanes)
        m.counts.mma_flops += 2 * M * N * K * len(lanes)

    return run
