"""The gunicorn worker: gthread, but no client can hold a working slot or the main loop.

Stock gthread gives a connection to a thread before its head is complete, so eight
half-sent heads freeze eight threads; and it closes lingering connections on the main loop,
two seconds each. Here the main loop collects heads without blocking and hands a connection
over when one is whole; it drains closing connections the same way. What a request waits
for its client is waited outside the `threads` slots (`gateway.pool`), for the body
(`gateway.body`) and for the answer (`gateway.sending`), and both have an end.

    accepted -> [head awaited] -> thread: request, answer -> [kept alive] -> [head awaited] …
                                                          -> [lingering] -> closed
                                            -> [parked] -> thread: answer -> …
    in [] : on the poller, no thread, with a deadline

A request that waits for an event is parked (`gateway.parking`): its connection is watched only
for the client's leaving, and takes none of the places of those that are served.

Connections are limited, too (`gateway.peers`): one peer has its share of them, and where all
are taken, the oldest that awaits a head makes room for a new one. Of a burst each worker
takes its part, because one that is ahead of the others lets them come first.

This leans on gunicorn's insides, so the version is pinned exactly, and `prove_body_path`
tries the socket path on a real parser before the first request.
"""

from __future__ import annotations

import errno
import gc
import math
import signal
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from functools import partial
from selectors import EVENT_READ
from typing import Any, Final, final

from gunicorn import http
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from gateway import logs
from gateway.body import BodyTruncated, RequestBody, prove_body_path
from gateway.connection import Connection
from gateway.parking import CAN_PARK, PARKED, RESUMED, Lot, Parked
from gateway.peers import Peers
from gateway.pool import STACK_BYTES, Pool
from gateway.refused import HEAD_TOO_LARGE, INTERNAL, Refusal, check_head, refusal_of
from gateway.room import Room
from gateway.sending import Answer

HEAD_TIMEOUT_S: Final = 15.0  # from the first wait to the end of the head
HEAD_BYTES_MAX: Final = 64 * 1024
# After the answer, what the client is still sending is thrown away for a while: closing
# over unread bytes sends a reset, which can destroy the answer before it is read.
LINGER_S: Final = 5.0
LINGER_BYTES_MAX: Final = 256 * 1024 * 1024
# What a client may send while its request is parked, and be waited for still: further requests.
EARLY_BYTES_MAX: Final = 8 * 1024

# What a worker that was replaced (SIGHUP) waits for uploads and downloads that go on. One
# that is told to stop has gunicorn's graceful_timeout for them.
RELOAD_TIMEOUT_S: Final = 3600.0

# How long a worker that is so many connections ahead leaves the next one to the others.
_YIELD_S: Final = 0.001
_AHEAD_MAX: Final = 2
# After so long, what was left to the others was taken by them.
_YIELDED_S: Final = 0.05
# No descriptors or memory for a connection: they do not come back within a turn of the loop.
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_EXHAUSTED_REST_S: Final = 1.0

_HEAD_END: Final = b"\r\n\r\n"
_RECEIVE_BYTES: Final = 64 * 1024


@final
class Worker(ThreadWorker):  # type: ignore[misc]
    """One process of the gateway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lingering: deque[Connection] = deque()
        self.parked: Lot[Connection] = Lot()  # not among `nr_conns`
        self.direct_bodies = False
        self._room = Room()
        self._peers: Peers = self.app.peers
        self._rests_until = 0.0  # of time.monotonic: nothing is accepted before
        self._yielded = False
        self._stop_timeout_s: float = self.cfg.graceful_timeout
        self._ends_at = math.inf  # once it is told to stop
        self._scratch = bytearray(_RECEIVE_BYTES)

    def init_process(self) -> None:
        threading.stack_size(STACK_BYTES)
        reason = prove_body_path(self.cfg)
        self.direct_bodies = reason is None
        if reason:
            self.log.warning("uploads take the slow path: %s", reason)
        self._share = self.app.share
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        gc.freeze()  # what the app consists of needs no collecting, again and again

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGHUP, self.handle_replaced)
        signal.siginterrupt(signal.SIGHUP, False)

    def handle_replaced(self, sig: int, frame: Any) -> None:
        """SIGHUP: others have taken over, and what goes on here has time to end."""
        if self.alive:
            self.cfg.set("graceful_timeout", int(RELOAD_TIMEOUT_S))
            super().handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM, also to a worker that was replaced before."""
        self._end_soon()
        super().handle_exit(sig, frame)

    def get_thread_pool(self) -> Pool:
        return Pool(self.cfg.threads)

    # --- in a thread

    def handle_request(self, req: Any, conn: Connection) -> bool:
        """Answer one request, or park it; True when the connection may be used for another.

        Raises OSError, and StopIteration when the answer broke off in its middle.
        """
        check_head(req)
        req.body = RequestBody(
            req, conn.parser.unreader, direct=self.direct_bodies, room=self._room
        )
        return self._respond(req, conn)

    def _respond(self, req: Any, conn: Connection) -> bool:
        """Ask the app, for the first time or once more after the request was parked."""
        resumed, conn.parked = conn.parked, None
        environ: dict[str, Any] = {}
        answer: Answer | None = None
        try:
            if resumed is None:
                self.cfg.pre_request(self, req)
            began = datetime.now()  # noqa: DTZ005  gunicorn's access log takes the difference
            answer, environ = http.wsgi.create(
                req,
                conn.sock,
                conn.client,
                conn.server,
                self.cfg,
                response_class=Answer,
                response_args=(conn.outlet(),),
            )
            environ["wsgi.multithread"] = True
            environ[CAN_PARK] = True
            if resumed is not None:
                environ[RESUMED] = resumed
            if not self.alive or len(self.keepalived_conns) >= self.max_keepalived:
                answer.force_close()
            if not self._answer(environ, answer):
                conn.parked = environ.pop(PARKED)
                logs.put_aside(environ)
                return False
            self.log.access(answer, req, environ, datetime.now() - began)  # noqa: DTZ005
            return not answer.should_close()
        except TimeoutError:
            # The reader stalled; to gunicorn this is a client gone early.
            raise http.errors.NoMoreData from None
        except OSError:
            raise
        except Exception:
            if answer is None or not answer.headers_sent:
                raise
            self.log.exception("an answer broke off in its middle")
            raise StopIteration from None
        finally:
            if conn.parked is None:  # counted and logged once, when it is answered
                for parked in (environ.get(PARKED), resumed):
                    if parked is not None:
                        parked.leave()
                self.cfg.post_request(self, req, environ, answer)

    def handle_error(self, _req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Refuse what is no request; gunicorn would repeat parts of it, and as HTML."""
        refusal = refusal_of(exc)
        if refusal is INTERNAL:
            self.log.error("a request failed outside the app", exc_info=exc)
            with suppress(OSError):
                client.send(refusal.whole(), socket.MSG_DONTWAIT)
        else:
            self._refuse(refusal, client, addr)

    def _refuse(self, refusal: Refusal, sock: socket.socket, address: Any) -> None:
        self.app.refused(_host_of(address), refusal.code, refusal.status)
        with suppress(OSError):
            sock.send(refusal.whole(), socket.MSG_DONTWAIT)

    def _answer(self, environ: dict[str, Any], answer: Answer) -> bool:
        """False where the app has no answer yet, but something to wait for."""
        try:
            body = self.wsgi(environ, answer.start_response)
        finally:
            environ["wsgi.input"].let_go()  # of what was read of it, the app has no more need
        try:
            if PARKED in environ:
                return False
            # The head of the answer is not sent yet, so it can still say "close".
            environ["wsgi.input"].settle()
            if isinstance(body, environ["wsgi.file_wrapper"]):
                answer.write_file(body)
            else:
                for piece in body:
                    answer.write(piece)
            answer.close()
            return True
        finally:
            if hasattr(body, "close"):
                body.close()

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        if not (keepalive and conn.parser.mesg.body.ended):
            try:
                return bool(super()._keepalive_after(conn, keepalive))
            except (BodyTruncated, OSError) as error:
                # The answer was sent, and nobody is there for another one.
                self.log.debug("a client left: %s", error)
                return False
        # Nothing to drain. gunicorn would look all the same, with four system calls now and
        # before the next request, at each of which another thread takes the interpreter.
        conn.parser.mesg = None
        return True

    def _serve(self, conn: Connection) -> None:
        keep = False
        try:
            keep = bool(self.handle(conn))
        except BaseException:
            self.log.exception("a connection is given up")
        if conn.parked is None:
            self.method_queue.defer(self.finish_request, conn, keep)
        else:
            self.method_queue.defer(self._park, conn)

    def _serve_parked(self, conn: Connection) -> None:
        """As gunicorn's `handle`, for a request that is read already."""
        keep = False
        req = conn.parser.mesg
        try:
            conn.sock.setblocking(True)
            keep = self._keepalive_after(conn, self._respond(req, conn))
        except (http.errors.NoMoreData, StopIteration, OSError) as error:
            self.log.debug("a client left: %s", error)
        except Exception as error:  # noqa: BLE001  whatever it is, the client is told
            self.handle_error(req, conn.sock, conn.client, error)
        self.method_queue.defer(self.finish_request, conn, keep)

    # --- on the main loop

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled and time.monotonic() >= self._rests_until)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        self._share.tell(self._held(), accepts=self.alive and self._may_accept())
        now = time.monotonic()
        if now < self._rests_until:
            timeout = min(timeout, self._rests_until - now)
        timeout = max(0.0, min(timeout, self.parked.next_end_s() - now))
        super().wait_for_and_dispatch_events(timeout)
        if not self.alive:
            self._end_in_time()

    def accept(self, listener: socket.socket) -> None:
        if self._leaves_it_to_others():
            return
        try:
            sock, address = listener.accept()
        except OSError as error:
            self._on_not_accepted(error)
            return
        whose = self._peers.whose(address)
        if self._peers.full(whose) and not self._drop_waiting(whose):
            self._share.turned_away()
            sock.close()
            return
        try:
            conn = Connection(
                self.cfg,
                sock,
                address,
                listener.getsockname(),
                self.tpool,
                self.app.bytes_per_s_min,
                partial(self._peers.leave, whose),
            )
        except OSError as error:
            sock.close()
            self._on_not_accepted(error)
            return
        conn.whose = whose
        self._peers.enter(whose)
        self.nr_conns += 1
        self._make_room()
        self._await_head(conn)
        self._on_head(conn, sock)  # most often the head has come with the connection

    def _leaves_it_to_others(self) -> bool:
        """Whether a worker with fewer connections should take this one: it has a moment, in
        which this one goes on with those it has."""
        now = time.monotonic()
        declined = self._yielded and now < self._rests_until + _YIELDED_S
        self._yielded = False
        if declined or self._held() <= self._share.least_of_others() + _AHEAD_MAX:
            return False
        self._yielded = True
        self._rest(_YIELD_S)
        return True

    def _on_not_accepted(self, error: OSError) -> None:
        """Nothing one connection meets may end the loop that serves all the others."""
        if error.errno in (errno.EAGAIN, errno.ECONNABORTED):
            return
        self.log.warning("a connection was not accepted: %s", error)
        if error.errno in _EXHAUSTED:
            self._drop_waiting()
            self._rest(_EXHAUSTED_REST_S)

    def _rest(self, seconds: float) -> None:
        """Accept nothing for so long; gunicorn's loop takes it up again."""
        self._rests_until = time.monotonic() + seconds
        self.set_accept_enabled(False)

    def _held(self) -> int:
        return int(self.nr_conns) + len(self.parked)

    def _may_accept(self) -> bool:
        return bool(self.nr_conns < self.worker_connections)

    def _make_room(self) -> None:
        """Where all connections are taken, those that only wait make way."""
        while not self._may_accept() and self._drop_waiting():
            pass

    def _drop_waiting(self, whose: str | None = None) -> bool:
        """Close the oldest connection, or that of one peer, which is kept alive, or else
        awaits a head. False where there is none."""
        for waiting in (self.keepalived_conns, self.pending_conns):
            for conn in waiting:
                if whose is None or conn.whose == whose:
                    waiting.remove(conn)
                    self._share.turned_away()
                    self._drop(conn)
                    return True
        return False

    def _end_soon(self) -> None:
        if self._ends_at == math.inf:
            self._ends_at = time.monotonic() + self._stop_timeout_s

    def _end_in_time(self) -> None:
        """A replaced worker waits for an hour, but not when all shall stop."""
        if not self.is_parent_alive():
            self._end_soon()
        if time.monotonic() >= self._ends_at:
            self.nr_conns = 0  # which ends gunicorn's loop

    def on_client_socket_readable(self, conn: Connection, sock: socket.socket) -> None:
        if conn.closed:  # in this turn of the loop, by `_drop_waiting`
            return
        self.poller.unregister(sock)
        self.keepalived_conns.remove(conn)
        self._await_head(conn)
        self._on_head(conn, sock)

    def enqueue_req(self, conn: Connection) -> None:
        self.tpool.submit(partial(self._serve, conn))

    def finish_request(self, conn: Connection, keep: bool) -> None:
        if not keep:
            self._linger(conn)
            return
        conn.head += conn.parser.unreader.take_buffered()
        if _HEAD_END in conn.head:  # pipelined: it will not make the socket readable again
            self._dispatch(conn)
        elif conn.head:
            self._await_head(conn)
        else:
            self._keep(conn)
        self._make_room()

    def murder_pending(self) -> None:
        super().murder_pending()
        now = time.monotonic()
        while self.lingering and self.lingering[0].timeout <= now:
            self._drop(self.lingering.popleft())
        for conn in self.parked.over(now):
            self._resume(conn, conn.parked)

    def _cap_keepalive(self, deadline: float) -> None:
        """A stopping worker waits for those that have begun, not for those that might; who is
        parked is told that nothing came, and asks another one."""
        super()._cap_keepalive(deadline)
        for conn in self.parked:
            self._resume(conn, conn.parked)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def _await_head(self, conn: Connection) -> None:
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + HEAD_TIMEOUT_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self._on_head, conn))

    def _on_head(self, conn: Connection, sock: socket.socket) -> None:
        if conn.closed:  # in this turn of the loop, by `_drop_waiting`
            return
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            searched = max(0, len(conn.head) - len(_HEAD_END) + 1)
            conn.head += data
            if conn.head.find(_HEAD_END, searched) < 0 and len(conn.head) <= HEAD_BYTES_MAX:
                return
        self.pending_conns.remove(conn)
        self.poller.unregister(sock)
        if not data:
            self._drop(conn)
        elif _HEAD_END in conn.head:
            self._dispatch(conn)
        else:
            self._refuse(HEAD_TOO_LARGE, sock, conn.client)
            self._linger(conn)

    def _dispatch(self, conn: Connection) -> None:
        conn.parser.unreader.unread(bytes(conn.head))
        conn.head.clear()
        self.enqueue_req(conn)

    def _keep(self, conn: Connection) -> None:
        conn.sock.setblocking(False)
        conn.set_timeout()
        if not self.alive:
            conn.timeout = min(conn.timeout, time.monotonic() + STOP_KEEPALIVE_LINGER)
        self.keepalived_conns.append(conn)
        callback = partial(self.on_client_socket_readable, conn)
        self.poller.register(conn.sock, EVENT_READ, callback)

    def _park(self, conn: Connection) -> None:
        parked = conn.parked
        assert parked is not None
        conn.sock.setblocking(False)
        conn.early_bytes = 0
        self.nr_conns -= 1
        self.parked.add(conn, parked.ends_at_s)
        self.poller.register(conn.sock, EVENT_READ, partial(self._on_parked, conn))
        # The bell may ring in any thread, or have rung while nobody heard it.
        parked.when_rung(partial(self.method_queue.defer, self._resume, conn, parked))
        if not self.alive:
            self._resume(conn, parked)

    def _on_parked(self, conn: Connection, sock: socket.socket) -> None:
        if conn not in self.parked:  # in this turn of the loop, by its bell
            return
        try:
            data = sock.recv(EARLY_BYTES_MAX + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            assert conn.parked is not None
            conn.parked.gone = True
            self._resume(conn, conn.parked)
            return
        # Its next request, which has time. It is taken off the socket, for behind it nobody
        # would notice that the client goes: its place would stay taken.
        unreader = conn.parser.unreader
        unreader.unread(unreader.take_buffered() + data)  # which puts it before all others
        conn.early_bytes += len(data)
        if conn.early_bytes > EARLY_BYTES_MAX:
            self._resume(conn, conn.parked)

    def _resume(self, conn: Connection, parked: Parked | None) -> None:
        """Have a parked request answered; nothing where that has begun, as with a bell that
        rings late: the connection may wait for something else by now."""
        if conn.parked is not parked or not self.parked.remove(conn):
            return
        with suppress(KeyError):
            self.poller.unregister(conn.sock)
        self.nr_conns += 1
        self.tpool.submit(partial(self._serve_parked, conn))

    def _linger(self, conn: Connection) -> None:
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        conn.timeout = time.monotonic() + LINGER_S
        self.lingering.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self._on_lingering, conn))

    def _on_lingering(self, conn: Connection, sock: socket.socket) -> None:
        try:
            count = sock.recv_into(self._scratch)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        conn.lingered_bytes += count
        if count == 0 or conn.lingered_bytes > LINGER_BYTES_MAX:
            self.lingering.remove(conn)
            self._drop(conn)

    def _drop(self, conn: Connection) -> None:
        """Close at once."""
        with suppress(KeyError, ValueError, OSError):  # not on the poller, or closed already
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()


def _host_of(address: Any) -> str:
    """As accept(2) tells it; "-" for a Unix socket, which names nobody."""
    return str(address[0]) if isinstance(address, tuple) and address else "-"
