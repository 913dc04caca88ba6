"""Instructions as closures: decoded once, executed on every group of threads that reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx import arithmetic, warp
from tests.ptx.arithmetic import NUMPY
from tests.ptx.memory import Shared
from tests.ptx.parse import SIZES, Instruction, Kernel, Operand

# Where generic addresses of shared, local and parameter memory begin; real addresses lie far below.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57, 3 << 56
_SPACES = ("global", "shared", "shared::cta", "local", "param", "const")

Run = Callable[[Any], None]


@dataclass
class Step:
    """run: what it does to a group of threads. control: "" | branch | exit | barrier."""

    opcode: str
    run: Run
    guard: str | None = None
    guard_negated: bool = False
    control: str = ""
    target: int = -1
    flops: int = 0


@dataclass
class Copy:
    """Asynchronous copies that one instruction began: one per lane."""

    lanes: np.ndarray
    at: np.ndarray
    words: np.ndarray
    group: np.ndarray
    flying: np.ndarray


def fit(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values as the bits of a register: sign-extended if signed, truncated if wider."""
    if dtype.kind == "b":
        return values.astype(bool)
    if values.dtype.itemsize == dtype.itemsize:
        return values.view(dtype) if values.ndim else values.reshape(1).view(dtype)[0]
    if values.dtype.kind == "i":
        return values.astype(f"i{dtype.itemsize}").view(dtype)
    if values.dtype.kind == "b":
        return values.astype(dtype)
    bits = values if values.dtype.kind == "u" else values.view(f"u{values.dtype.itemsize}")
    return bits.astype(dtype)


def _value(operand: Operand, kind: str, kernel: Kernel) -> Callable[[Any], Any]:
    """Reads an operand as a type."""
    dtype = NUMPY[kind]
    if operand.kind == "register":
        name, negated = operand.name, operand.negated
        if negated:
            return lambda m: ~m.get(name, dtype)
        return lambda m: m.get(name, dtype)
    if operand.kind == "number":
        if isinstance(operand.bits, float):
            constant = dtype.type(operand.bits)
        else:
            size = dtype.itemsize
            raw = (operand.bits & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            constant = np.frombuffer(raw, dtype)[0]
        return lambda m: constant
    assert operand.kind == "symbol", operand
    name = operand.name
    if name in kernel.shared:
        address = dtype.type(kernel.shared[name])
        return lambda m: address
    if name in kernel.local:
        address = dtype.type(kernel.local[name])
        return lambda m: address
    if name in kernel.params:
        place = dtype.type(kernel.params[name])
        return lambda m: place
    if name == "WARP_SZ":
        return lambda m: dtype.type(32)
    if name.startswith("%"):
        return lambda m: m.special[name].astype(dtype)
    raise NotImplementedError(f"operand {name!r}")


def step(instruction: Instruction, kernel: Kernel) -> Step:
    """Raises NotImplementedError for an instruction that the machine does not know."""
    words = instruction.opcode
    made = Step(".".join(words[:1]), lambda m: None, instruction.guard, instruction.guard_negated)
    if words[0] in ("bra", "ret", "exit", "trap"):
        made.control = "branch" if words[0] == "bra" else "exit"
        if words[0] == "bra":
            made.target = kernel.labels[instruction.operands[-1].name]
        elif words[0] == "trap":
            raise_ = "a trap was reached"

            def trap(m: Any) -> None:
                raise m.fault("trap", raise_)

            made.control, made.run = "", trap
        return made
    if words[0] in ("bar", "barrier") and "warp" not in words:
        if words[1:2] == ("cta",):
            words = (words[0], *words[2:])
        assert words[1] == "sync" and instruction.operands[0].bits == 0, instruction.text
        made.control = "barrier"
        return made
    builder = _BUILDERS.get(words[0]) or (_alu if words[0] in _KNOWN else None)
    if builder is None:
        raise NotImplementedError(f"{kernel.name}: {instruction.text}")
    made.run = builder(instruction, kernel)
    kind = words[-1]
    if kind in arithmetic.FLOATS and words[0] in arithmetic.FLOPS:
        made.flops = arithmetic.FLOPS[words[0]] * (2 if kind.endswith("x2") else 1)
    if words[0] in ("ld", "st", "atom", "red"):
        space = next((w for w in words if w in _SPACES), "generic")
        made.opcode = f"{words[0]}.{space.removesuffix('::cta')}"
    elif words[0] in ("mma", "cp", "shfl", "ldmatrix"):
        made.opcode = {"cp": "cp.async"}.get(words[0], words[0])
    return made


# ---- arithmetic ------------------------------------------------------------------------------

_KNOWN = {
    *arithmetic.FLOAT,
    *arithmetic.INTEGER,
    "shl",
    "shr",
    "mul",
    "mad",
    "lop3",
    "shf",
    "prmt",
} | {"bfe", "bfi", "mul24"}


def _alu(i: Instruction, kernel: Kernel) -> Run:
    words, kind = i.opcode, i.opcode[-1]
    name, dst = words[0], i.operands[0].name
    if name in ("shl", "shr"):
        a, by = _value(i.operands[1], kind, kernel), _value(i.operands[2], "u32", kernel)
        return lambda m: m.put(dst, arithmetic.shift(a(m), by(m), name == "shl"))
    if name == "lop3":
        read = [_value(o, kind, kernel) for o in i.operands[1:4]]
        table = int(i.operands[4].bits)
        return lambda m: m.put(dst, arithmetic.logic(*(r(m) for r in read), table))
    if name == "shf":
        read = [_value(o, "u32", kernel) for o in i.operands[1:]]
        left, wrap = words[1] == "l", words[2] == "wrap"
        return lambda m: m.put(dst, arithmetic.funnel(*(r(m) for r in read), left, wrap))
    if name in ("bfe", "bfi", "prmt"):
        read = [
            _value(o, kind if at < (2 if name == "bfi" else 1) else "u32", kernel)
            for at, o in enumerate(i.operands[1:])
        ]
        field = {
            "bfe": arithmetic.extract,
            "bfi": arithmetic.insert,
            "prmt": arithmetic.permute_bytes,
        }[name]
        return lambda m: m.put(dst, field(*(r(m) for r in read)))
    if kind not in arithmetic.FLOATS and name in ("mul", "mad", "mul24"):
        return _multiply(i, kernel)
    read = [_value(o, kind, kernel) for o in i.operands[1:]]
    if kind not in arithmetic.FLOATS:
        function = arithmetic.INTEGER[name]
        if name == "bfind" and "shiftamt" in words:  # how far to shift the bit to the top
            position = function
            top = np.uint32(8 * NUMPY[kind].itemsize - 1)
            function = lambda a: np.where(position(a) > top, position(a), top - position(a))  # noqa: E731
        return lambda m: m.put(dst, function(*(r(m) for r in read)))
    function = arithmetic.FLOAT[name]
    for mode in ("rm", "rp", "rz"):
        if mode in words:
            function = arithmetic.directed(arithmetic.EXACT[name], mode)
    if "NaN" in words:
        function = np.minimum if name == "min" else np.maximum
    if kind in ("f16x2", "bf16x2"):
        function = arithmetic.pairs(function, kind)
    elif kind == "f16" or kind == "bf16":
        function = arithmetic.single(function, kind)
        read = [_value(o, "b16", kernel) for o in i.operands[1:]]
    if "ftz" in words and kind == "f32":
        exact = function
        function = lambda *args: arithmetic.flush(exact(*(arithmetic.flush(a) for a in args)))  # noqa: E731
    if "sat" in words:
        inside = function
        function = lambda *args: np.clip(np.nan_to_num(inside(*args), nan=0.0), 0, 1)  # noqa: E731
    final = function
    return lambda m: m.put(dst, final(*(r(m) for r in read)))


def _multiply(i: Instruction, kernel: Kernel) -> Run:
    name, how, kind = i.opcode[0], i.opcode[1], i.opcode[-1]
    dst = i.operands[0].name
    a, b = (_value(o, kind, kernel) for o in i.operands[1:3])
    wide = f"{kind[0]}{2 * SIZES[kind] * 8}" if how == "wide" else kind
    to = NUMPY[wide]

    def product(m: Any) -> Any:
        if how == "hi":
            x, y = np.broadcast_arrays(a(m), b(m))
            return arithmetic.multiply_high(np.ascontiguousarray(x), np.ascontiguousarray(y))
        return np.multiply(a(m).astype(to), b(m).astype(to))

    if name != "mad":
        return lambda m: m.put(dst, product(m))
    c = _value(i.operands[3], wide, kernel)
    return lambda m: m.put(dst, product(m) + c(m))


def _setp(i: Instruction, kernel: Kernel) -> Run:
    compare, kind = i.opcode[1], i.opcode[-1]
    combine = next((w for w in i.opcode[2:-1] if w in ("and", "or", "xor")), None)
    out = i.operands[0]
    targets = [p.name for p in out.parts] if out.kind == "pair" else [out.name]
    a, b = (_value(o, kind, kernel) for o in i.operands[1:3])
    extra = _value(i.operands[3], "pred", kernel) if combine else None
    holds = arithmetic.COMPARE[compare]
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    is_bf16 = kind == "bf16"

    def run(m: Any) -> None:
        x, y = a(m), b(m)
        if is_bf16:
            x, y = arithmetic.float_of_bfloat16(x), arithmetic.float_of_bfloat16(y)
        value = holds(x, y)
        for target, v in zip(targets, (value, ~value), strict=False):
            if target:
                m.put(target, join[combine](v, extra(m)) if combine and extra else v)

    return run


def _selp(i: Instruction, kernel: Kernel) -> Run:
    a, b = (_value(o, i.opcode[-1], kernel) for o in i.operands[1:3])
    p, dst = _value(i.operands[3], "pred", kernel), i.operands[0].name
    return lambda m: m.put(dst, np.where(p(m), a(m), b(m)))


def _set(i: Instruction, kernel: Kernel) -> Run:
    kind, target = i.opcode[-1], i.opcode[-2]
    a, b = (_value(o, kind, kernel) for o in i.operands[1:3])
    holds, dst = arithmetic.COMPARE[i.opcode[1]], i.operands[0].name
    yes = np.float32(1) if target == "f32" else np.uint32(0xFFFFFFFF)
    return lambda m: m.put(dst, np.where(holds(a(m), b(m)), yes, yes.dtype.type(0)))


def _mov(i: Instruction, kernel: Kernel) -> Run:
    out, source = i.operands
    kind = i.opcode[-1]
    if source.kind == "vector":
        size = SIZES[kind] // len(source.parts)
        parts = [_value(p, f"b{8 * size}", kernel) for p in source.parts]
        dtype = NUMPY[kind]

        def joined(m: Any) -> None:
            total: Any = dtype.type(0)
            for at, part in enumerate(parts):
                total = total | (part(m).astype(dtype) << dtype.type(8 * size * at))
            m.put(out.name, total)

        return joined
    if out.kind == "vector":
        size = SIZES[kind] // len(out.parts)
        read, dtype = _value(source, kind, kernel), np.dtype(f"u{size}")

        def split(m: Any) -> None:
            x = read(m)
            for at, part in enumerate(out.parts):
                if part.kind != "sink":
                    m.put(part.name, (x >> x.dtype.type(8 * size * at)).astype(dtype))

        return split
    read = _value(source, kind, kernel)
    return lambda m: m.put(out.name, read(m))


def _cvt(i: Instruction, kernel: Kernel) -> Run:
    words, dst = i.opcode, i.operands[0].name
    target, source = words[-2], words[-1]
    if target in ("bf16x2", "f16x2"):
        high, low = (_value(o, source, kernel) for o in i.operands[1:3])
        half = target.removesuffix("x2")

        def packed(m: Any) -> None:
            both = [arithmetic.convert(r(m), source, half, words) for r in (high, low)]
            h, lo = (fit(np.asarray(b), np.dtype("u2")).astype(np.uint32) for b in both)
            m.put(dst, (h << np.uint32(16)) | lo)

        return packed
    read = _value(i.operands[1], source, kernel)
    return lambda m: m.put(dst, arithmetic.convert(np.asarray(read(m)), source, target, words))


def _cvta(i: Instruction, kernel: Kernel) -> Run:
    words, kind, dst = i.opcode, i.opcode[-1], i.operands[0].name
    read = _value(i.operands[1], kind, kernel)
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    window = windows.get(words[-2], 0)
    move = np.uint64(window)
    if "to" in words:
        return lambda m: m.put(dst, read(m) - move)
    return lambda m: m.put(dst, read(m) + move)


# ---- memory ----------------------------------------------------------------------------------


def _address(operand: Operand, kernel: Kernel) -> Callable[[Any], np.ndarray]:
    """Addresses of the active lanes."""
    offset = np.uint64(operand.offset & ((1 << 64) - 1))
    if operand.name in kernel.shared or operand.name in kernel.local:
        table = kernel.shared if operand.name in kernel.shared else kernel.local
        fixed = np.uint64(table[operand.name]) + offset
        return lambda m: np.full(m.group.count, fixed, np.uint64)
    name = operand.name
    if kernel.registers[name].itemsize == 4:
        short, narrow = np.uint32(operand.offset & 0xFFFFFFFF), np.dtype("u4")
        return lambda m: (m.pick(m.get(name, narrow)) + short).astype(np.uint64)
    wide = np.dtype("u8")
    return lambda m: m.pick(m.get(name, wide)) + offset


def _space(words: tuple[str, ...]) -> str:
    found = next((w for w in words if w in _SPACES), "generic")
    return found.removesuffix("::cta")


def _resolve(m: Any, space: str, address: np.ndarray) -> tuple[str, np.ndarray]:
    if space != "generic":
        return space, address
    windows = address >> np.uint64(56)
    if (windows != windows[0]).any():
        raise m.fault("unsupported", "one generic access to several spaces")
    found = {0: "global", 1: "shared", 2: "local", 3: "param"}[int(windows[0])]
    return found, address & np.uint64(SHARED_WINDOW - 1)


def _vector(words: tuple[str, ...]) -> int:
    return next((int(w[1]) for w in words if w in ("v2", "v4", "v8")), 1)


def _ld(i: Instruction, kernel: Kernel) -> Run:
    words, kind = i.opcode, i.opcode[-1]
    size, count, space = SIZES[kind], _vector(words), _space(words)
    dtype = NUMPY[kind]
    out = i.operands[0]
    names = [p.name for p in out.parts] if out.kind == "vector" else [out.name]
    if space == "param" and i.operands[1].name in kernel.params:
        base = kernel.params[i.operands[1].name] + i.operands[1].offset

        def parameter(m: Any) -> None:
            for at, name in enumerate(names):
                raw = m.params[base + at * size : base + (at + 1) * size]
                m.put(name, raw.view(dtype)[0])

        return parameter
    where = _address(i.operands[1], kernel)

    def load(m: Any) -> None:
        actual, address = _resolve(m, space, where(m))
        words_ = _read(m, actual, address, size, count, i.text)
        for at, name in enumerate(names):
            if name:
                m.put_lanes(name, words_[:, at].view(dtype))

    return load


def _read(m: Any, space: str, address: np.ndarray, size: int, count: int, what: str) -> np.ndarray:
    if space == "shared":
        if m.counting:
            Shared.count(m.counts, m.lanes, address, size * count)
        slot, thread = m.pick(m.slot), m.pick(m.thread)
        found: np.ndarray = m.shared.read(address, size, count, slot, thread, what)
        return found
    if space == "local":
        at = address.astype(np.int64)[:, None] + np.arange(size * count)
        return m.local[m.lanes[:, None], at].view(f"u{size}")
    if space == "param":
        at = address.astype(np.int64)[:, None] + np.arange(size * count)
        if (at < 0).any() or (at >= len(m.params)).any():
            raise m.fault("out of bounds", f"{what} reads past the parameters")
        return m.params[at].view(f"u{size}")
    block = m.pick(m.block)
    if m.counting:
        m.memory.count(m.counts, m.lanes, address, size * count, block)
    return m.memory.read(address, size, count, block, what)  # type: ignore[no-any-return]


def _st(i: Instruction, kernel: Kernel) -> Run:
    words, kind = i.opcode, i.opcode[-1]
    size, count, space = SIZES[kind], _vector(words), _space(words)
    where, source = _address(i.operands[0], kernel), i.operands[1]
    parts = source.parts if source.kind == "vector" else (source,)
    bits = f"b{8 * size}"
    read = [_value(p, bits, kernel) for p in parts]

    def store(m: Any) -> None:
        actual, address = _resolve(m, space, where(m))
        values = np.empty((m.group.count, count), np.dtype(f"u{size}"))
        for at, r in enumerate(read):
            x = r(m)
            values[:, at] = m.pick(x) if np.ndim(x) else x
        if actual == "shared":
            if m.counting:
                Shared.count(m.counts, m.lanes, address, size * count)
            m.shared.write(address, values, m.pick(m.slot), m.pick(m.thread), i.text)
        elif actual == "local":
            at = address.astype(np.int64)[:, None] + np.arange(size * count)
            m.local[m.lanes[:, None], at] = values.view(np.uint8)
        else:
            block = m.pick(m.block)
            if m.counting:
                m.memory.count(m.counts, m.lanes, address, size * count, block)
            m.memory.write(address, values, block, i.text)

    return store


_UPDATES: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
}


def _atomic(i: Instruction, kernel: Kernel) -> Run:
    words, kind = i.opcode, i.opcode[-1]
    space, size, dtype = _space(words), SIZES[kind], NUMPY[kind]
    operands = i.operands if words[0] == "atom" else (Operand("sink"), *i.operands)
    where = _address(operands[1], kernel)
    read = [_value(o, kind, kernel) for o in operands[2:]]
    name = next(w for w in words[1:] if w in (*_UPDATES, "cas"))

    def update(old: np.ndarray, args: list[np.ndarray]) -> np.ndarray:
        if name == "cas":
            return np.where(old == args[0], args[1], old)
        found: np.ndarray = np.asarray(_UPDATES[name](old, args[0])).astype(dtype)
        return found

    def atomic(m: Any) -> None:
        actual, address = _resolve(m, space, where(m))
        args = [np.broadcast_to(r(m), m.size)[m.lanes] for r in read]
        if actual == "shared":
            slot, thread = m.pick(m.slot), m.pick(m.thread)
            spots = [(*m.shared.atomic_view(address, size, slot, thread, i.text), slice(None))]
        else:
            spots = m.memory.atomic_view(address, size, i.text)
        old = np.empty(len(m.lanes), dtype)
        for raw, at, lanes in spots:
            cells, before = raw.view(dtype), np.empty(len(at), dtype)
            mine = [a[lanes] for a in args]
            left = np.arange(len(at))[:: -1 if m.backwards else 1]
            while len(left):  # one lane of every address at a time, in order
                _, first = np.unique(at[left], return_index=True)
                now = left[first]
                before[now] = cells[at[now]]
                cells[at[now]] = update(before[now], [a[now] for a in mine])
                left = np.delete(left, first)
            old[lanes] = before
        if operands[0].kind == "register":
            m.put_lanes(operands[0].name, old)

    return atomic


def _cp(i: Instruction, kernel: Kernel) -> Run:
    words = i.opcode
    assert words[1] == "async", i.text
    if words[2] == "commit_group":

        def commit(m: Any) -> None:
            m.committed[m.lanes] += 1

        return commit
    if words[2] in ("wait_group", "wait_all"):
        left = int(i.operands[0].bits) if words[2] == "wait_group" else None
        return lambda m: _land(m, left)
    if words[2] == "mbarrier" or "bulk" in words:
        raise NotImplementedError(i.text)
    target, source = _address(i.operands[0], kernel), _address(i.operands[1], kernel)
    size = int(i.operands[2].bits)
    given = _value(i.operands[3], "u32", kernel) if len(i.operands) > 3 else None

    def copy(m: Any) -> None:
        block, slot, thread = m.pick(m.block), m.pick(m.slot), m.pick(m.thread)
        words_ = np.zeros((len(m.lanes), size // 4), np.uint32)
        wanted = np.full(len(m.lanes), size)
        if given is not None:
            wanted = np.broadcast_to(given(m), m.size)[m.lanes]
        if not np.isin(wanted, (0, size)).all():
            raise m.fault("unsupported", "an asynchronous copy of a part of its size")
        some = np.flatnonzero(wanted)
        if len(some):
            address = source(m)[some]
            if m.counting:
                m.memory.count(m.counts, m.lanes[some], address, size, block[some])
            words_[some] = m.memory.read(address, 4, size // 4, block[some], i.text)
        at = m.shared.begin_copy(target(m), size, slot, thread, i.text)
        if m.counting:
            Shared.count(m.counts, m.lanes, target(m), size)
        group = m.committed[m.lanes].copy()
        m.copies.append(Copy(m.lanes, at, words_, group, np.ones(len(m.lanes), bool)))

    return copy


def _land(m: Any, left: int | None) -> None:
    """Completes the copies of the active lanes' groups but the last `left`; None: all."""
    for copy in m.copies:
        ready = copy.flying & m.mask[copy.lanes]
        if left is not None:
            ready &= copy.group < m.committed[copy.lanes] - left
        if ready.any():
            m.shared.land(copy.at[ready], copy.words[ready], m.thread[copy.lanes[ready]])
            copy.flying &= ~ready
    m.copies = [c for c in m.copies if c.flying.any()]


def _nothing(i: Instruction, kernel: Kernel) -> Run:
    """Hints, and fences: memory here is sequentially consistent."""
    return lambda m: None


def _bar_warp(i: Instruction, kernel: Kernel) -> Run:
    mask = _value(i.operands[0], "u32", kernel)

    def run(m: Any) -> None:
        warp.check_members(m, mask(m))
        for first in np.unique(m.lanes // 32) * 32:
            m.shared.warp_barrier(int(m.slot[first]), int(m.thread[first]) // 32)

    return run


_BUILDERS: dict[str, Callable[[Instruction, Kernel], Run]] = {
    "setp": _setp,
    "selp": _selp,
    "set": _set,
    "mov": _mov,
    "cvt": _cvt,
    "cvta": _cvta,
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "atom": _atomic,
    "red": _atomic,
    "cp": _cp,
    "bar": _bar_warp,
    "barrier": _bar_warp,
    "shfl": lambda i, k: warp.shuffle(i, k, _value),
    "vote": lambda i, k: warp.vote(i, k, _value),
    "match": lambda i, k: warp.match(i, k, _value),
    "redux": lambda i, k: warp.redux(i, k, _value),
    "activemask": lambda i, k: warp.active(i, k, _value),
    "mma": lambda i, k: warp.mma(i, k, _value),
    "ldmatrix": lambda i, k: warp.ldmatrix(i, k, _address),
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "nanosleep"), _nothing),
    **dict.fromkeys(("griddepcontrol", "discard", "applypriority", "createpolicy"), _nothing),
}
