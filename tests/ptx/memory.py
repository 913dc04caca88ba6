"""Global buffers and shared memory with shadows: who wrote and who read every byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from tests.ptx.faults import Counts, KernelError

WARP = 32
SECTOR = 32
BANKS = 32
_ATOMIC, _MANY = -1, -2  # owners besides block ids + 1


def _distinct(keys: np.ndarray) -> np.ndarray:
    """True at the first of equal keys in every row, after sorting rows; `keys` is sorted here."""
    keys.sort(axis=1)
    first = np.ones(keys.shape, bool)
    first[:, 1:] = keys[:, 1:] != keys[:, :-1]
    return first


class Buffer:
    """One span of real memory that a kernel may touch."""

    def __init__(self, address: int, size: int, name: str) -> None:
        self.begin, self.end, self.name = address, address + size, name
        # Views of wider words begin on a 16-byte boundary; what lies before `begin` is never used.
        self.origin = address & ~15
        self.span = (self.end - self.origin + 15) & ~15
        whole = (ctypes.c_uint8 * self.span).from_address(self.origin)
        self._views = {
            n: np.frombuffer(whole, np.dtype(f"u{n}"), self.span // n) for n in (1, 2, 4, 8)
        }
        self.writer = np.zeros(self.span, np.int32)
        self.reader = np.zeros(self.span, np.int32)
        self.written = False  # since the last launch, by anyone

    def view(self, size: int) -> np.ndarray:
        return self._views[size]


class Global:
    """Every buffer of a launch. An access outside faults; so does a byte that one block writes and
    another one reads or writes: the result would depend on the order of blocks. Atomics may meet
    atomics."""

    def __init__(self, spans: Iterable[tuple[int, int, str]]) -> None:
        self.buffers = [Buffer(*s) for s in sorted(spans) if s[1] > 0]
        for a, b in zip(self.buffers, self.buffers[1:], strict=False):
            assert a.end <= b.begin, f"buffers {a.name} and {b.name} overlap"
        self._begins = np.array([b.begin for b in self.buffers], np.uint64)
        self._sectors: set[int] = set()

    def parts(
        self, address: np.ndarray, size: int, what: str
    ) -> list[tuple[Buffer, np.ndarray | slice]]:
        """(buffer, lanes) of the accesses, all of them inside."""
        if (address % np.uint64(size)).any():
            bad = int(address[address % np.uint64(size) != 0][0])
            raise KernelError("misaligned", f"{what} of {size} bytes at {bad:#x}")
        low, high = int(address.min()), int(address.max())
        which = int(np.searchsorted(self._begins, low, "right")) - 1
        if which >= 0 and high + size <= self.buffers[which].end:
            return [(self.buffers[which], slice(None))]
        owner = np.searchsorted(self._begins, address, "right").astype(np.int64) - 1
        found = []
        for at in np.unique(owner):
            lanes = np.flatnonzero(owner == at)
            if at < 0 or int(address[lanes].max()) + size > self.buffers[at].end:
                where = int(address[lanes].max() if at >= 0 else address[lanes].min())
                near = min(self.buffers, key=lambda b: abs(b.begin - where), default=None)
                raise KernelError(
                    "out of bounds",
                    f"{what} of {size} bytes at {where:#x}, outside of every buffer"
                    + (f"; {near.name} is [{near.begin:#x}, {near.end:#x})" if near else ""),
                )
            found.append((self.buffers[at], lanes))
        return found

    def read(
        self, address: np.ndarray, size: int, count: int, block: np.ndarray, what: str
    ) -> np.ndarray:
        """Words [lane, count] of `size` bytes; `block` is the block of every lane, plus one."""
        out = np.empty((len(address), count), np.dtype(f"u{size}"))
        whole = size * count
        for buffer, lanes in self.parts(address, whole, what):
            at = (address[lanes] - np.uint64(buffer.origin)).astype(np.int64) // whole
            out[lanes] = buffer.view(size)[: buffer.span // whole * count].reshape(-1, count)[at]
            self._note_read(buffer, at, whole, block[lanes], what)
        return out

    def _note_read(
        self, buffer: Buffer, at: np.ndarray, whole: int, block: np.ndarray, what: str
    ) -> None:
        if buffer.written:
            writer = buffer.writer.reshape(-1, whole)[at]
            other = (writer != 0) & (writer != block[:, None])
            if other.any():
                offset = at[other.any(axis=1)][0] * whole
                self._conflict(buffer, offset, f"{what} reads what another")
        shadow = buffer.reader.reshape(-1, whole)
        known = shadow[at]
        shadow[at] = np.where((known == 0) | (known == block[:, None]), block[:, None], _MANY)
        collided = shadow[at, 0] != block
        if collided.any():
            shadow[at[collided]] = _MANY

    def _conflict(self, buffer: Buffer, offset: int, verb: str) -> None:
        offset = int(offset) - (buffer.begin - buffer.origin)
        raise KernelError(
            "block order", f"{verb} block wrote or reads, byte {offset} of {buffer.name}"
        )

    def write(self, address: np.ndarray, words: np.ndarray, block: np.ndarray, what: str) -> None:
        size, count = words.dtype.itemsize, words.shape[1]
        whole = size * count
        for buffer, lanes in self.parts(address, whole, what):
            at = (address[lanes] - np.uint64(buffer.origin)).astype(np.int64) // whole
            self._note_write(buffer, at, whole, block[lanes], what)
            rows = buffer.view(size)[: buffer.span // whole * count].reshape(-1, count)
            rows[at] = words[lanes]
            if (rows[at] != words[lanes]).any():
                raise KernelError("race", f"{what}: lanes write different values to one address")

    def _note_write(
        self, buffer: Buffer, at: np.ndarray, whole: int, block: np.ndarray, what: str
    ) -> None:
        for shadow in (buffer.writer, buffer.reader):
            known = shadow.reshape(-1, whole)[at]
            other = (known != 0) & (known != block[:, None])
            if other.any():
                self._conflict(
                    buffer, at[other.any(axis=1)][0] * whole, f"{what} writes what another"
                )
        buffer.written = True
        writer = buffer.writer.reshape(-1, whole)
        writer[at] = block[:, None]
        if (writer[at, 0] != block).any():
            self._conflict(buffer, at[0] * whole, f"{what} writes what another")

    def atomic_view(self, address: np.ndarray, size: int, what: str) -> list[tuple]:
        """(words, index of every lane, lanes) for read-modify-write by the caller."""
        found = []
        for buffer, lanes in self.parts(address, size, what):
            at = (address[lanes] - np.uint64(buffer.origin)).astype(np.int64) // size
            for shadow in (buffer.writer, buffer.reader):
                known = shadow.reshape(-1, size)[at]
                if ((known != 0) & (known != _ATOMIC)).any():
                    self._conflict(buffer, at[0] * size, f"{what} meets what a plain access of a")
                shadow.reshape(-1, size)[at] = _ATOMIC
            buffer.written = True
            found.append((buffer.view(size), at, lanes))
        return found

    def finish(self, counts: Counts) -> None:
        """Adds the distinct bytes of this launch and forgets who did what."""
        for b in self.buffers:
            counts.read_bytes += int(np.count_nonzero(b.reader))
            counts.written_bytes += int(np.count_nonzero(b.writer))
            b.reader[:] = 0
            b.writer[:] = 0
            b.written = False
        counts.block_sectors += len(self._sectors)
        self._sectors.clear()

    def count(
        self, counts: Counts, lanes: np.ndarray, address: np.ndarray, size: int, block: np.ndarray
    ) -> None:
        """Sectors and distinct bytes of the requests of all warps."""
        padded = np.zeros((int(lanes[-1]) // WARP + 1) * WARP, np.uint64)
        padded[lanes] = address
        rows = padded.reshape(-1, WARP)
        sectors = rows // np.uint64(SECTOR)
        counts.sectors += int(np.count_nonzero(_distinct(sectors) & (sectors != 0)))
        counts.requested_bytes += size * int(np.count_nonzero(_distinct(rows) & (rows != 0)))
        keys = (block.astype(np.int64) << 48) | (address // np.uint64(SECTOR)).astype(np.int64)
        self._sectors.update(np.unique(keys).tolist())


class Shared:
    """Shared memory of the blocks of a launch that run together.

    Between two barriers of a block no byte may be written by one thread and touched by another one;
    within a warp a bar.warp.sync separates too. Reading what nobody wrote faults, and so does
    touching what an asynchronous copy has not yet brought.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size = max(16, (size + 15) // 16 * 16)
        total = blocks * self.size
        self.bytes = np.full(total, 0xFF, np.uint8)
        self.limit, self.threads = size, threads
        self.written = np.zeros(total, bool)
        self.flying, self.flown = np.zeros(total, bool), False  # now, ever
        # 0 = nobody since the last barrier, t + 1 = thread t, -(w + 1) = warp w before a warp sync
        self.writer = np.zeros(total, np.int32)
        # the same, and -(w + 1) - _UNSYNCED = several threads of warp w, _EVERYONE = several warps
        self.reader = np.zeros(total, np.int32)

    def _index(self, address: np.ndarray, whole: int, slot: np.ndarray, what: str) -> np.ndarray:
        if (address % np.uint64(whole)).any():
            bad = int(address[address % np.uint64(whole) != 0][0])
            raise KernelError("misaligned", f"{what} of {whole} bytes at shared {bad}")
        if int(address.max()) + whole > self.limit:
            raise KernelError(
                "out of bounds",
                f"{what} of {whole} bytes at shared {int(address.max())} of {self.limit}",
            )
        return (address.astype(np.int64) + slot * self.size) // whole

    def _check_flying(self, at: np.ndarray, whole: int, what: str) -> None:
        if self.flown and self.flying.reshape(-1, whole)[at].any():
            raise KernelError(
                "asynchronous copy", f"{what} touches bytes of a copy that was not waited for"
            )

    def read(
        self,
        address: np.ndarray,
        size: int,
        count: int,
        slot: np.ndarray,
        thread: np.ndarray,
        what: str,
    ) -> np.ndarray:
        """Words [lane, count]; `slot` is the block's place here, `thread` that in the block."""
        whole = size * count
        at = self._index(address, whole, slot, what)
        self._check_flying(at, whole, what)
        if not self.written.reshape(-1, whole)[at].all():
            raise KernelError("unwritten shared memory", f"{what} reads what no thread wrote")
        self._note_read(at, whole, thread, what)
        return self.bytes.view(f"u{size}").reshape(-1, count)[at]

    def _note_read(self, at: np.ndarray, whole: int, thread: np.ndarray, what: str) -> None:
        me, warp = thread[:, None] + 1, -(thread[:, None] // WARP + 1)
        writer = self.writer.reshape(-1, whole)[at]
        if ((writer != 0) & (writer != me) & (writer != warp)).any():
            raise KernelError(
                "race", f"{what} reads what another thread wrote without a barrier between"
            )
        shadow = self.reader.reshape(-1, whole)
        known = shadow[at]
        # Reads before a warp sync are ordered for this warp; `me` keeps all others away as well.
        shadow[at] = np.where((known == 0) | (known == warp), me, known)
        known = shadow[at]  # now with the readers of this very instruction
        if (alone := (known == me).all(axis=1)).all():
            return
        known, me, warp, at = known[~alone], me[~alone], warp[~alone], at[~alone]
        its_warp = np.where(known > 0, -((known - 1) // WARP + 1), known)
        its_warp = np.where(its_warp <= -_UNSYNCED, its_warp + _UNSYNCED, its_warp)
        mixed = np.where(its_warp == warp, warp - _UNSYNCED, _EVERYONE)
        shadow[at] = np.where(known == me, me, mixed)
        again = shadow[at]  # lanes of several warps at one address: the last one has won
        shadow[at] = np.where((again != mixed) & (known != me), _EVERYONE, again)

    def _check_write(self, at: np.ndarray, whole: int, thread: np.ndarray, what: str) -> None:
        me, warp = thread[:, None] + 1, -(thread[:, None] // WARP + 1)
        for shadow, verb in ((self.writer, "wrote"), (self.reader, "reads")):
            known = shadow.reshape(-1, whole)[at]
            if ((known != 0) & (known != me) & (known != warp)).any():
                raise KernelError(
                    "race", f"{what} writes what another thread {verb} without a barrier between"
                )

    def write(
        self,
        address: np.ndarray,
        words: np.ndarray,
        slot: np.ndarray,
        thread: np.ndarray,
        what: str,
    ) -> None:
        size, count = words.dtype.itemsize, words.shape[1]
        whole = size * count
        at = self._index(address, whole, slot, what)
        self._check_flying(at, whole, what)
        self._check_write(at, whole, thread, what)
        self.store(at, words, thread, what)

    def store(self, at: np.ndarray, words: np.ndarray, thread: np.ndarray, what: str) -> None:
        size, count = words.dtype.itemsize, words.shape[1]
        rows = self.bytes.view(f"u{size}").reshape(-1, count)
        rows[at] = words
        if (rows[at] != words).any():
            raise KernelError(
                "race", f"{what}: threads write different values to one shared address"
            )
        whole = size * count
        self.written.reshape(-1, whole)[at] = True
        self.writer.reshape(-1, whole)[at] = thread[:, None] + 1

    def begin_copy(
        self, address: np.ndarray, whole: int, slot: np.ndarray, thread: np.ndarray, what: str
    ) -> np.ndarray:
        """Index of every copy's target, from now on in flight."""
        at = self._index(address, whole, slot, what)
        self._check_flying(at, whole, what)
        self._check_write(at, whole, thread, what)
        self.flying.reshape(-1, whole)[at] = True
        self.flown = True
        return at

    def land(self, at: np.ndarray, words: np.ndarray, thread: np.ndarray) -> None:
        whole = words.dtype.itemsize * words.shape[1]
        self.flying.reshape(-1, whole)[at] = False
        self.store(at, words, thread, "an asynchronous copy")

    def atomic_view(
        self, address: np.ndarray, size: int, slot: np.ndarray, thread: np.ndarray, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(words, index of every lane). Atomics meet atomics; a plain access needs a barrier."""
        at = self._index(address, size, slot, what)
        self._check_flying(at, size, what)
        if not self.written.reshape(-1, size)[at].all():
            raise KernelError("unwritten shared memory", f"{what} adds to what no thread wrote")
        me = thread[:, None] + 1
        for shadow in (self.writer, self.reader):
            known = shadow.reshape(-1, size)[at]
            if ((known != 0) & (known != me) & (known != _ATOMICS)).any():
                raise KernelError("race", f"{what} meets a plain access without a barrier between")
            shadow.reshape(-1, size)[at] = _ATOMICS
        return self.bytes.view(f"u{size}"), at

    def barrier(self, slots: np.ndarray) -> None:
        for shadow in (self.writer, self.reader):
            shadow.reshape(-1, self.size)[slots] = 0

    def warp_barrier(self, slot: int, warp: int) -> None:
        """What threads of the warp did is ordered for its threads, and for no one else."""
        span = slice(slot * self.size, (slot + 1) * self.size)
        for shadow in (self.writer[span], self.reader[span]):
            mine = (shadow > 0) & ((shadow - 1) // WARP == warp)
            shadow[mine | (shadow == -(warp + 1) - _UNSYNCED)] = -(warp + 1)

    @staticmethod
    def count(counts: Counts, lanes: np.ndarray, address: np.ndarray, whole: int) -> None:
        """Phases and bank conflicts of the requests of all warps."""
        words = max(1, whole // 4)
        per_phase = WARP // words
        padded = np.full((int(lanes[-1]) // WARP + 1) * WARP, -1, np.int64)
        padded[lanes] = address.astype(np.int64) // 4
        counts.shared_requests += int(np.count_nonzero((padded.reshape(-1, WARP) >= 0).any(axis=1)))
        rows = padded.reshape(-1, per_phase)
        rows = rows[(rows >= 0).any(axis=1)]
        wide = np.where(rows[:, :, None] >= 0, rows[:, :, None] + np.arange(words), -1)
        wide = wide.reshape(len(rows), -1)
        first = _distinct(wide) & (wide >= 0)
        key = np.arange(len(rows))[:, None] * BANKS + wide % BANKS
        per_bank = np.bincount(key[first], minlength=len(rows) * BANKS).reshape(-1, BANKS)
        counts.shared_phases += len(rows)
        counts.bank_conflicts += int((per_bank.max(axis=1) - 1).sum())


_UNSYNCED = 1 << 20
_EVERYONE = -(1 << 24)
_ATOMICS = -(1 << 25)
