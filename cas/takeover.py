"""Takeover: a file has one writer at a time, who lets go when a later one asks.

The writer holds an exclusive flock. A client whose connection died without a word leaves
a writer behind that waits for bytes until it runs out of patience, and its successor must
not wait that long. So who wants the file takes a shared record lock on its first byte,
which says nothing but "I want it", and each process looks ten times a second whether its
own writers are wanted; one that is gets `interrupt()` called on what it reads from.

Both locks belong to the open file, not to the process: they work between threads and
between processes alike, and a kill releases them. Nothing is left on the disk.
"""

from __future__ import annotations

import fcntl
import logging
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, final, runtime_checkable

from cas.errors import PartialBusy

_log = logging.getLogger(__name__)

# Looking costs one system call, about a µs, for each writer of this process.
_LOOK_EVERY_S = 0.1
_TRY_EVERY_S = 0.02
# Longer than any writer needs that reads: it looks, syncs a slice and lets go. One that is
# storing a whole file may need more, and the successor is told to come again.
PATIENCE_S = 10.0

_FLOCK = "@hhqqi0q"  # struct flock of 64-bit Linux: type, whence, start, length, pid


@runtime_checkable
class Interruptible(Protocol):
    """A source whose pending read another thread can end."""

    def interrupt(self) -> None: ...


@final
class Writer:
    """A writer that reads from `source` while it holds `fd`; `wanted` once another asked."""

    __slots__ = ("_looking", "fd", "source", "wanted")

    def __init__(self, fd: int, source: object) -> None:
        self.fd = fd
        self.source = source
        self.wanted = False
        self._looking = True

    def look(self) -> None:
        """Stop reading if somebody wants the file. Its own failure it suffers alone."""
        if not self._looking:
            return
        try:
            if _is_wanted(self.fd):
                self._looking, self.wanted = False, True
                if isinstance(self.source, Interruptible):
                    self.source.interrupt()
        except Exception:  # noqa: BLE001  # other writers are looked after by this thread too
            # Once: it would fail as often as it is looked at. Who wants the file waits
            # until this writer ends, or is told to come again.
            self._looking = False
            _log.exception("a writer of a resumable upload could not be interrupted")


@final
class Takeovers:
    """The writers of this process. Safe for threads; its own runs only while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writers: set[Writer] = set()
        self._watching = False

    @contextmanager
    def reading(self, fd: int, source: object) -> Iterator[Writer]:
        """While the caller, who holds `fd`, reads from `source`: let others stop it."""
        writer = Writer(fd, source)
        with self._changed:
            self._writers.add(writer)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="takeovers", daemon=True).start()
        try:
            yield writer
        finally:
            with self._changed:  # on return the source is nobody's but the caller's
                self._writers.remove(writer)
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            try:
                while self._writers:
                    for writer in self._writers:
                        writer.look()
                    self._changed.wait(_LOOK_EVERY_S)
            finally:
                self._watching = False  # the next writer starts another


def take(fd: int, patience_s: float) -> None:
    """Lock the open file `fd` until it is closed, asking a present writer to let go.

    Raises PartialBusy when it does not within `patience_s` seconds.
    """
    if _locked(fd):
        return
    _want(fd, fcntl.F_RDLCK)
    try:
        deadline_s = time.monotonic() + patience_s
        while not _locked(fd):
            if time.monotonic() >= deadline_s:
                raise PartialBusy
            time.sleep(_TRY_EVERY_S)
    finally:
        _want(fd, fcntl.F_UNLCK)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _want(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, 0, 0, 1, 0))


def _is_wanted(fd: int) -> bool:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 1, 0)
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, found)[0]
    return kind != fcntl.F_UNLCK
