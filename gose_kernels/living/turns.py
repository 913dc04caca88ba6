"""Turns: many readers at a time or one writer alone, so that no reader sees half a change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Readers enter any number of times in one thread; a waiting writer goes before new readers,
    and the readers that waited for it go before the next one.

    A copy or an unpickled one is a new one: nobody reads it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depth = threading.local()
        self._readers = self._readers_waiting = 0
        self._first = 0  # readers that go before the next writer
        self._writers_waiting = 0
        self._writing = False

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, no writer is at work."""
        depth = getattr(self._depth, "value", 0)
        if depth == 0:
            with self._changed:
                self._readers_waiting += 1
                try:
                    self._changed.wait_for(self._may_read)
                    self._first = max(0, self._first - 1)
                    self._readers += 1
                finally:
                    self._readers_waiting -= 1
                    self._first = min(self._first, self._readers_waiting)
        self._depth.value = depth + 1
        try:
            yield
        finally:
            self._depth.value = depth
            if depth == 0:
                with self._changed:
                    self._readers -= 1
                    self._changed.notify_all()

    def _may_read(self) -> bool:
        return not self._writing and (self._first > 0 or not self._writers_waiting)

    @contextmanager
    def writing(self, who: str) -> Iterator[None]:
        """Inside, nobody else reads or writes. RuntimeError in a thread that reads: it would wait
        for itself."""
        if getattr(self._depth, "value", 0):
            raise RuntimeError(f"{who}: this thread is inside reading(); leave it first")
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._writing or self._readers or self._first))
                self._writing = True
            finally:
                self._writers_waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._first = self._readers_waiting
                self._changed.notify_all()
