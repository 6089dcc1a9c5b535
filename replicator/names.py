"""Resolving names without waiting for them: the system's resolver, in threads of its own.

The system's resolver cannot be interrupted, and may take half a minute for a name whose
servers are silent. So each question has a daemon thread, which is left behind when nobody
waits for it any more, and which no stopping process waits for. Their number is bounded, and
that of one tenant too: whoever's names nobody answers for must not take all the places.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Final, final

from replicator.destinations import UnknownName

# At a time, those that nobody waits for any more included.
QUESTIONS_MAX: Final = 64
TENANT_QUESTIONS_MAX: Final = 8

# For which tenant a task asks. httpcore, which asks, has no word for it.
asking_for: Final[ContextVar[str]] = ContextVar("asking_for", default="")

# As socket.getaddrinfo, for stream sockets: host, port → addresses as text.
Ask = Callable[[str, int], Sequence[str]]


def ask_system(host: str, port: int) -> list[str]:
    """The addresses of a name, in the system's order, without repetition.

    Reads addresses in all the forms that the system knows, such as 0x7f.1 for 127.0.0.1.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class TooManyQuestions(Exception):
    """No place to look a name up now. Says nothing about the name, which was not asked for."""


@final
class Names:
    """Asks `ask` in threads. For one event loop."""

    def __init__(self, ask: Ask = ask_system) -> None:
        self._ask = ask
        self._lock = threading.Lock()  # a question ends in its own thread
        self._questions: Counter[str] = Counter()  # by tenant; without zeros

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of `host`; raises UnknownName, TooManyQuestions. Cancelling it leaves
        nothing behind that anybody waits for."""
        tenant_id = asking_for.get()
        with self._lock:
            if (
                self._questions.total() >= QUESTIONS_MAX
                or self._questions[tenant_id] >= TENANT_QUESTIONS_MAX
            ):
                raise TooManyQuestions
            self._questions[tenant_id] += 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()
        arguments = (loop, answer, tenant_id, host, port)
        threading.Thread(target=self._look_up, args=arguments, name="names", daemon=True).start()
        return await answer

    def _look_up(
        self,
        loop: asyncio.AbstractEventLoop,
        answer: asyncio.Future[Sequence[str]],
        tenant_id: str,
        host: str,
        port: int,
    ) -> None:
        found: Sequence[str] | UnknownName
        try:
            found = self._ask(host, port)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no name can be so"
            found = UnknownName(host, reason or str(error))
        finally:
            with self._lock:
                self._questions -= Counter((tenant_id,))
        try:
            loop.call_soon_threadsafe(_settle, answer, found)
        except RuntimeError:
            pass  # the loop has ended meanwhile, and nobody waits


def _settle(answer: asyncio.Future[Sequence[str]], found: Sequence[str] | UnknownName) -> None:
    if answer.done():
        return  # cancelled: its time was over
    if isinstance(found, UnknownName):
        answer.set_exception(found)
    else:
        answer.set_result(found)
