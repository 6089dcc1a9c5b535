"""A patient target: a request that was put off or not answered is made again, a few times.

For what is small and comes after something large or long, which else would all have to be
done again: the proof of a copy that was sent, the end of a multipart upload, the steps of a
shipment. Everything may be asked twice without harm but for two, whose callers know: a
condition may be unmet because the first request did arrive, and so may an upload be gone.

It holds a thread while it waits, so it does not wait for long: who comes in vain has patience
of another kind, see `patience`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Final, TypeVar, final

from replicator.bandwidth import SendingStopped
from replicator.patience import again_in_s
from replicator.targets import (
    Body,
    Incoming,
    ObjectStat,
    Part,
    Target,
    TargetBusy,
    TargetUnreachable,
    Traits,
    Unfinished,
)

T = TypeVar("T")

_LONGEST_S: Final = 5.0  # after this nothing is asked again: a server that hangs is not tried


@final
class Patient:
    """A `Target` that asks another one. Raises what that raised at last, and SendingStopped.

    `answers` counts what was answered with success: it changes, however many threads ask.
    """

    def __init__(self, target: Target, stop: threading.Event | None = None) -> None:
        """`stop` ends all waiting."""
        self._target = target
        self._stop = stop or threading.Event()
        self.answers = 0

    @property
    def name(self) -> str:
        return self._target.name

    @property
    def place(self) -> str:
        return self._target.place

    def again(self, call: Callable[[], T]) -> T:
        """What `call` returns, which asks the target; called again where that failed."""
        began_s = time.monotonic()
        for tried in count():
            try:
                answer = call()
            except (TargetUnreachable, TargetBusy) as error:
                pause_s = again_in_s(error, tried)
                if pause_s is None or time.monotonic() - began_s > _LONGEST_S:
                    raise
                if self._stop.wait(pause_s):
                    raise SendingStopped from error
            else:
                self.answers += 1
                return answer
        raise AssertionError  # it never comes here

    def put(
        self,
        key: str,
        body: Body,
        size_bytes: int,
        *,
        md5: bytes | None = None,
        sha256: bytes | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        start = body.tell()

        def put() -> str:
            body.seek(start)
            return self._target.put(
                key,
                body,
                size_bytes,
                md5=md5,
                sha256=sha256,
                if_match=if_match,
                if_absent=if_absent,
            )

        return self.again(put)

    @contextmanager
    def get(
        self, key: str, *, first_byte: int = 0, last_byte: int | None = None
    ) -> Iterator[Incoming]:
        """Only the opening is patient: what breaks off while it is read breaks off."""
        with ExitStack() as stack:
            yield self.again(
                lambda: stack.enter_context(
                    self._target.get(key, first_byte=first_byte, last_byte=last_byte)
                )
            )

    def stat(self, key: str) -> ObjectStat:
        return self.again(lambda: self._target.stat(key))

    def delete(self, key: str) -> None:
        self.again(lambda: self._target.delete(key))

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        """A listing that breaks off goes on after what it brought."""
        listed = self._target.list(prefix, after=after)
        last = after
        begun = iter(listed)

        def advance() -> ObjectStat | None:
            nonlocal begun
            try:
                return next(begun, None)
            except (TargetUnreachable, TargetBusy):
                begun = self._target.list(prefix, after=last)
                raise

        while (stat := self.again(advance)) is not None:
            last = stat.key
            yield stat

    def begin(self, key: str) -> str:
        """An upload whose answer was lost is abandoned, and found by `removing`."""
        return self.again(lambda: self._target.begin(key))

    def put_part(
        self, key: str, upload_id: str, number: int, body: Body, size_bytes: int, md5: bytes | None
    ) -> str:
        start = body.tell()

        def put() -> str:
            body.seek(start)
            return self._target.put_part(key, upload_id, number, body, size_bytes, md5)

        return self.again(put)

    def parts(self, key: str, upload_id: str) -> Sequence[Part]:
        return self.again(lambda: self._target.parts(key, upload_id))

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> str:
        return self.again(lambda: self._target.complete(key, upload_id, etags))

    def abort(self, key: str, upload_id: str) -> None:
        self.again(lambda: self._target.abort(key, upload_id))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        return self._target.unfinished(prefix)

    def traits(self, key: str) -> Traits:
        return self._target.traits(key)

    def close(self) -> None:
        self._target.close()
