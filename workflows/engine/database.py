"""Database: stabilize on one SQLite file, which says what comes next.

It holds nothing that cannot be made anew from the catalog. So it need not be synced at each
commit (SQLite's WAL keeps it whole, and a power cut takes its last commits, which are made
again), and where it is not readable any more it is removed.

Each message of stabilize's queue is leased to who works on it, for LEASE: for ever. A short
lease with a heartbeat would tell others when its holder is gone; here the lock of the ROOT
does that (`cas.alone`), at once and by no clock. While one runner holds it there is nobody to take
a lease over, and the next one, after a kill too, begins with ending all that it finds. A short
one would end by itself where the process or the machine is suspended, or the wall clock steps
on, and what is at work would be begun a second time beside itself.

A call of a tool that has no place yet (`shares`) is leased too, and is handled when it has
one: it waits here, and nowhere else, and nobody looks whether it may begin until a place is
free. What else there is to do is done in a moment, beside the calls.

stabilize dates messages by the wall clock. Where that steps back, what is queued would be due
only when the old time has come again: that is seen, and mended (`mend_times`).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, final

from stabilize.hitl import send_signal
from stabilize.models.stage import StageExecution
from stabilize.models.status import WorkflowStatus
from stabilize.models.task import TaskExecution
from stabilize.models.workflow import Workflow
from stabilize.orchestrator import Orchestrator
from stabilize.persistence.connection import get_connection_manager
from stabilize.persistence.sqlite import SqliteWorkflowStore
from stabilize.queue.decode import MessageDecodeError, decode_message
from stabilize.queue.dedup import get_deduplicator
from stabilize.queue.message_ids import delivery_key, row_id
from stabilize.queue.messages import Message, RunTask
from stabilize.queue.processor import QueueProcessor, QueueProcessorConfig
from stabilize.queue.sqlite import SqliteQueue
from stabilize.recovery import recover_on_startup
from stabilize.resilience.bulkheads import TaskBulkheadManager
from stabilize.resilience.circuits import WorkflowCircuitFactory
from stabilize.resilience.config import BulkheadConfig, HandlerConfig, ResilienceConfig
from stabilize.tasks.interface import Task
from stabilize.tasks.registry import TaskRegistry

from workflows.engine.shares import Shares
from workflows.engine.spots import END, Execution, Spot
from workflows.engine.stages import Stage

FILE: Final = "engine.db"
LEASE: Final = timedelta(days=365_000)
_KIND: Final = "step"  # what stabilize calls our one kind of task
_TABLE: Final = "queue_messages"
_EVER_S: Final = 100 * 365 * 86400.0
_EVER_HOURS: Final = _EVER_S / 3600
_FILTERED: Final = 500  # messages
_BESIDE: Final = 4  # threads for what calls no tool, so that it need not wait for those that do
_LEASED: Final = 100  # messages looked at together for calls of tools
_LOOK_MS: Final = 10  # between two looks of the processor for a message
# After the last message the file is looked at often for so long, and then seldom: what is
# pushed by another thread is seen at once, and what is due later, soon enough.
_BUSY_S: Final = 0.5
_IDLE_LOOK_S: Final = 0.05
_AGAIN: Final = timedelta(seconds=1)  # after an error of stabilize's own
_JUMP_S: Final = 1.0  # by which the wall clock left the monotonic one: more than slewing does
_REPAIR_S: Final = 300.0  # between two looks for runs that stand still
_FORGET_S: Final = 3600.0  # between two removals of what was processed long ago
_PAGE: Final = 500  # executions forgotten at once

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@final
class Database:
    """What comes next in each run. Safe for threads, except `close`."""

    def __init__(
        self, folder: Path, task: Task, concurrency: int, at: Callable[[str], None]
    ) -> None:
        """`task` does the steps, `concurrency` calls of tools at a time. `at` is told of places
        where tests kill the process."""
        _configure()
        folder.mkdir(exist_ok=True)
        _remove_if_damaged(folder / FILE)
        url = _url(folder)
        self._store = SqliteWorkflowStore(url, create_tables=True)
        self._shares = Shares(concurrency)
        self._queue = _Queue(url, at, self._shares)
        self._queue._create_table()
        self._queue.release_all()
        self._queue.mend_times()
        tasks = TaskRegistry()
        tasks.register(_KIND, task)
        # What was processed is looked up in the file. The filter before that is of no use to
        # us, and at its usual size it costs more than all else: its bits are counted each time.
        get_deduplicator(expected_items=_FILTERED)
        threads = concurrency + _BESIDE
        limits = ResilienceConfig(bulkheads=((_KIND, BulkheadConfig(threads, threads, _EVER_S)),))
        self._bulkheads = TaskBulkheadManager(limits)
        self._processor = QueueProcessor(
            self._queue,
            QueueProcessorConfig(
                poll_frequency_ms=_LOOK_MS,
                max_workers=threads,
                retry_delay=_AGAIN,
                enable_lock_heartbeat=False,
                recovery_interval_seconds=_REPAIR_S,
                recovery_max_age_hours=_EVER_HOURS,
                retention_sweep_interval_seconds=_FORGET_S,
            ),
            store=self._store,
            handler_config=HandlerConfig(
                poll_frequency_ms=_LOOK_MS,
                max_workers=threads,
                handler_retry_delay_seconds=_AGAIN.total_seconds(),
                default_task_timeout_seconds=_EVER_S,
                # Two branches that end at once change the same stage: the loser tries again.
                concurrency_max_retries=20,
                concurrency_min_delay_ms=5,
            ),
            task_registry=tasks,
            bulkhead_manager=self._bulkheads,
            circuit_factory=WorkflowCircuitFactory(limits),
        )
        self._orchestrator = Orchestrator(self._queue, self._store)

    def start(self) -> None:
        """Go on with what was begun before, and with what is begun from now on."""
        recover_on_startup(self._store, self._queue, max_age_hours=_EVER_HOURS)
        self._processor.start()

    def begin(self, execution: Execution, stages: list[Stage]) -> None:
        """Begin an execution, unless it has begun."""
        if self.has(execution):
            return
        made = [_made(stage) for stage in stages]
        workflow = Workflow.create(application=execution.run, name=execution.name, stages=made)
        workflow.id = execution.identifier
        self._orchestrator.start(workflow)

    def has(self, execution: Execution) -> bool:
        """Whether it has begun, and was not forgotten."""
        return bool(self._store.exists(execution.identifier))

    def runs(self) -> set[str]:
        """The runs that have an execution here, which may have ended since."""
        connection = self._store._get_connection()
        rows = connection.execute("SELECT DISTINCT application FROM pipeline_executions")
        return {str(run) for (run,) in rows}

    def ring(self, execution: Execution, spot: Spot) -> None:
        """Have a stage look again: at once where it sleeps, else when it next wants to.

        One that has not begun looks by itself when it does, and finds what this is rung for. A
        ring at that moment would be worse than none: stabilize may then not begin it.
        """
        connection = self._store._get_connection()
        row = connection.execute(
            "SELECT status FROM stage_executions WHERE id = ?", (spot.stage_id,)
        ).fetchone()
        if row is None or row[0] == WorkflowStatus.NOT_STARTED.name:
            return
        send_signal(self._queue, execution.identifier, spot.stage_id, "ring")

    def ended(self) -> list[Execution]:
        """The executions that have ended, and were not forgotten; some of them."""
        ever_ms = int((time.time() + _EVER_S) * 1000)  # whatever the clock said then
        return [
            Execution.parse(self._store.retrieve_execution_summary(identifier).name)
            for identifier in self._store.completed_workflow_ids(ever_ms, _PAGE)
        ]

    def forget(self, execution: Execution) -> None:
        """Drop an execution, wherever it is: what of it is at work finds nothing when it ends."""
        self._queue.purge_workflow(execution.identifier)
        self._store.delete(execution.identifier)

    def forget_run(self, run: str, beat: Callable[[], None] = _nothing) -> None:
        """Drop all executions of a run; `beat` is called now and then."""
        for page in self._pages(run):
            self._queue.purge(page)
            for identifier in page:
                beat()
                self._store.delete(identifier)

    def _pages(self, run: str) -> Iterator[list[str]]:
        """The identifiers of a run's executions: those of a large one are many, and each may be
        forgotten before the next page is looked for."""
        connection, after = self._store._get_connection(), ""
        while True:
            rows = connection.execute(
                "SELECT id FROM pipeline_executions WHERE application = ? AND id > ? "
                "ORDER BY id LIMIT ?",
                (run, after, _PAGE),
            ).fetchall()
            if not rows:
                return
            page = [str(identifier) for (identifier,) in rows]
            yield page
            after = page[-1]

    def waiting(self) -> dict[str, int]:
        """How many calls of tools of each tenant wait for a place."""
        return self._shares.waiting()

    def sleeping(self, run: str) -> Iterator[Spot]:
        """The spots of a run that sleep."""
        connection = self._store._get_connection()
        for page in self._pages(run):
            rows = connection.execute(
                "SELECT context FROM stage_executions WHERE status = ? AND execution_id IN "  # noqa: S608
                f"({_marks(page)})",
                (WorkflowStatus.SUSPENDED.name, *page),
            ).fetchall()
            for (context,) in rows:
                yield Spot.of(json.loads(context))

    def close(self, timeout_s: float) -> int:
        """Take no more messages, and wait for those at work; returns how many still are."""
        left: int = self._processor.stop(wait=True, timeout=timeout_s)
        self._bulkheads.shutdown(wait=left == 0)
        self._store.close()
        return left


@final
class _Queue(SqliteQueue):
    """stabilize's queue, which is asked for messages 100 times a second: it looks into the
    file only where there was one lately, or has been no look for a while.

    All messages are given out by when they are due, and the calls of tools as `shares` says.
    """

    def __init__(
        self,
        url: str,
        at: Callable[[str], None],
        shares: Shares,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(url, _TABLE, lock_duration=LEASE, max_attempts=1_000_000_000)
        self._at = at
        self._shares = shares
        self._wall = wall
        self._moved_s = time.monotonic()
        self._looked_s = 0.0
        self._ahead_s = wall() - self._moved_s
        self._unreturned: list[int] = []  # messages whose lease would never end

    def poll_one(self) -> Message | None:
        now_s = time.monotonic()
        ahead_s = self._wall() - now_s
        if abs(ahead_s - self._ahead_s) > _JUMP_S:
            self.mend_times()
            self._ahead_s = ahead_s
        if now_s - self._moved_s > _BUSY_S and now_s - self._looked_s < _IDLE_LOOK_S:
            return None
        self._looked_s = now_s
        while self._unreturned:
            self._return(self._unreturned[0])
            del self._unreturned[0]
        return self._next()

    def _create_table(self) -> None:
        super()._create_table()
        connection = self._get_connection()
        # What is leased, or due later, costs a look nothing, however much it is.
        connection.execute(
            f"CREATE INDEX IF NOT EXISTS due ON {_TABLE} (deliver_at) WHERE locked_until IS NULL"
        )
        connection.commit()

    def _next(self) -> Message | None:
        """A call that has a place now, or else what is due and needs none."""
        for _ in range(_LEASED):
            if (message := self._placed()) is not None:
                return message
            row = self._leased()
            if row is None:
                return None
            self._moved_s = time.monotonic()
            if row["message_type"] != RunTask.__name__ or not row["tenant"]:
                with self._returned(row["id"]):
                    return self._message(row)
            self._shares.wait(row["tenant"], row["id"])
        return self._placed()

    def _placed(self) -> Message | None:
        """A call that has been given a place."""
        while (number := self._shares.next()) is not None:
            message = None
            try:
                with self._returned(number):
                    connection = self._get_connection()
                    row = connection.execute(
                        f"SELECT id, message_type, payload, attempts FROM {_TABLE} WHERE id = ?",  # noqa: S608
                        (number,),
                    ).fetchone()
                    message = None if row is None else self._message(row)
            finally:
                if message is None:
                    self._shares.leave(number)  # its run was forgotten meanwhile, or see above
            if message is not None:
                self._moved_s = time.monotonic()
                return message
        return None

    @contextmanager
    def _returned(self, number: int) -> Iterator[None]:
        """A leased message that cannot be read, or put away, is looked at again soon."""
        try:
            yield
        except Exception:
            self._unreturned.append(number)
            self._get_connection().rollback()
            raise

    def _return(self, number: int) -> None:
        """End the lease of a message that nobody works on: it is due again soon."""
        due = datetime.fromtimestamp(self._wall(), UTC) + _AGAIN
        connection = self._get_connection()
        with connection:
            connection.execute(
                f"UPDATE {_TABLE} SET deliver_at = ?, locked_until = NULL WHERE id = ?",  # noqa: S608
                (due.isoformat(), number),
            )
        self._pending.pop(number, None)

    def _leased(self) -> sqlite3.Row | None:
        """Lease the message that is due for longest: nobody but this thread leases any."""
        connection = self._get_connection()
        now = datetime.now(UTC)
        # All dates here are written by `isoformat` in UTC: their texts sort as they do.
        row: sqlite3.Row | None = connection.execute(
            "SELECT message.id, message_type, payload, attempts + 1 AS attempts, "  # noqa: S608
            "json_extract(stage.context, '$.tenant') AS tenant "
            f"FROM {_TABLE} message INDEXED BY due "
            "LEFT JOIN stage_executions stage ON stage.id = json_extract(payload, '$.stage_id') "
            "WHERE locked_until IS NULL AND deliver_at <= ? ORDER BY deliver_at LIMIT 1",
            (now.isoformat(),),
        ).fetchone()
        if row is None:
            return None
        with connection:  # what a full disk refuses is undone
            leased = connection.execute(
                f"UPDATE {_TABLE} SET locked_until = ?, attempts = attempts + 1, "  # noqa: S608
                "version = version + 1 WHERE id = ?",
                ((now + self.lock_duration).isoformat(), row["id"]),
            )
        return row if leased.rowcount else None

    def _message(self, row: sqlite3.Row) -> Message | None:
        try:
            message = decode_message(row["message_type"], row["payload"])
        except MessageDecodeError as error:
            self.move_to_dlq(row["id"], error=str(error))
            return None
        message.message_id = delivery_key(_TABLE, row["id"])
        message.attempts = row["attempts"]
        self._pending[row["id"]] = {"message": message, "type": row["message_type"]}
        return message

    def push(
        self, message: Message, delay: timedelta | None = None, connection: Any | None = None
    ) -> None:
        super().push(message, delay, connection)
        self._moved_s = time.monotonic()

    def ack(self, message: Message) -> None:
        if isinstance(message, RunTask):
            self._at("stored")
        super().ack(message)
        self._left(message)

    def reschedule(self, message: Message, delay: timedelta) -> None:
        self._left(message)  # before it may be leased again
        try:
            super().reschedule(message, delay)
        except Exception:
            if message.message_id:
                self._unreturned.append(row_id(message.message_id))
            raise

    def _left(self, message: Message) -> None:
        """It is handled: what waits for its place is looked for at once."""
        if message.message_id:
            self._shares.leave(row_id(message.message_id))
        self._moved_s = time.monotonic()

    def purge(self, executions: list[str]) -> None:
        """Drop what is queued for these: one look through all that is, not one for each."""
        connection = self._get_connection()
        with connection:
            for table in (_TABLE, f"{_TABLE}_dlq"):
                connection.execute(
                    f"DELETE FROM {table} WHERE CASE WHEN json_valid(payload) THEN "  # noqa: S608
                    f"json_extract(payload, '$.execution_id') END IN ({_marks(executions)})",
                    executions,
                )

    def release_all(self) -> None:
        """End all leases: they are those of a runner that is no more."""
        connection = self._get_connection()
        connection.execute(f"UPDATE {_TABLE} SET locked_until = NULL")  # noqa: S608
        connection.commit()

    def mend_times(self) -> None:
        """Have each message due no later from now than by the whole of its own delay: the wall
        clock may have been put back since it was queued."""
        now = datetime.fromtimestamp(self._wall(), UTC)
        connection = self._get_connection()
        rows = connection.execute(
            f"SELECT message.id, message_type, deliver_at, stage.context FROM {_TABLE} message "  # noqa: S608
            "LEFT JOIN stage_executions stage ON stage.id = json_extract(payload, '$.stage_id') "
            "WHERE deliver_at > ?",
            (now.isoformat(),),
        ).fetchall()
        for number, kind, due, context in rows:
            delay = _AGAIN
            if kind == RunTask.__name__ and context is not None:
                delay = max(delay, timedelta(seconds=json.loads(context).get("after_s", 0.0)))
            latest = now + delay
            if datetime.fromisoformat(due) > latest:
                connection.execute(
                    f"UPDATE {_TABLE} SET deliver_at = ? WHERE id = ?",  # noqa: S608
                    (latest.isoformat(), number),
                )
        connection.commit()


def _marks(values: list[str]) -> str:
    return ",".join("?" for _ in values)


def _made(stage: Stage) -> StageExecution:
    spot = stage.spot
    name = spot.task or END
    task = TaskExecution(name=name, implementing_class=_KIND, stage_start=True, stage_end=True)
    return StageExecution(
        id=spot.stage_id,
        ref_id=spot.stage_id,
        type=_KIND,
        name=name,
        context={**spot.context, "tenant": stage.tenant} if stage.tenant else spot.context,
        requisite_stage_ref_ids=set(stage.before),
        tasks=[task],
    )


_configured = threading.Lock()


def _configure() -> None:
    """stabilize takes these from the environment, once a process."""
    with _configured:
        os.environ.setdefault("STABILIZE_SQLITE_JOURNAL_MODE", "WAL")
        os.environ.setdefault("STABILIZE_SQLITE_SYNCHRONOUS", "NORMAL")
        # Its remarks speak of its own inside: what went wrong for a run is said by the run.
        logging.getLogger("stabilize").setLevel(logging.CRITICAL)
        logging.getLogger("bulkman").setLevel(logging.CRITICAL)


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / FILE}"


def remove(folder: Path) -> None:
    """Remove the file, which nobody has open but this thread."""
    get_connection_manager().close_sqlite_connection(_url(folder))
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
        (folder / name).unlink(missing_ok=True)


def _remove_if_damaged(path: Path) -> None:
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(path)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        answer = str(error)
    if answer != "ok":
        _log.error("%s is damaged and is made anew: %s", path, answer)
        remove(path.parent)
