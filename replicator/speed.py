"""Speed: how many rows and bytes a second were done lately, for `replicate status`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, final

import msgspec

_WINDOW_S: Final = 60.0
_PIECE_S: Final = 1.0  # what happens within one is kept as one


@final
class _Piece(msgspec.Struct):
    began_s: float
    rows: int
    size_bytes: int


@final
class Speed:
    """The mean of the last minute, or of the time since the first row when that is shorter."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._pieces: deque[_Piece] = deque()
        self._began_s: float | None = None

    def add(self, rows: int, size_bytes: int) -> None:
        """So much is done."""
        now_s = self._now_s()
        if self._began_s is None:
            self._began_s = now_s
        if not self._pieces or now_s - self._pieces[-1].began_s >= _PIECE_S:
            self._pieces.append(_Piece(now_s, 0, 0))
        self._pieces[-1].rows += rows
        self._pieces[-1].size_bytes += size_bytes
        self._forget(now_s)

    def a_second(self) -> tuple[float, float]:
        """Rows and bytes."""
        now_s = self._now_s()
        self._forget(now_s)
        if self._began_s is None:
            return 0.0, 0.0
        over_s = max(_PIECE_S, min(_WINDOW_S, now_s - self._began_s))
        rows = sum(piece.rows for piece in self._pieces)
        return rows / over_s, sum(piece.size_bytes for piece in self._pieces) / over_s

    def _forget(self, now_s: float) -> None:
        while self._pieces and now_s - self._pieces[0].began_s > _WINDOW_S:
            self._pieces.popleft()
