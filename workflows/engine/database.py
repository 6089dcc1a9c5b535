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

Tenants have turns: of all messages that are due, the next one is the oldest of the tenant that
comes, by name, after the one that had the last turn. So however much one tenant has to do, it costs
another one a message's time for each of its own. Of what is done at one time, a tenant has three
quarters at most (`shares`).

A call of a tool that has no place yet is leased too, and is handled when it has one: it waits
here, and nowhere else, and nobody looks whether it may begin until a place is free. What else
there is to do is done in a moment, in places of its own beside the calls.

A message whose execution is gone is dropped: its run has ended, and was forgotten.

A database may be opened for some runs alone: the messages of all others are then leased at once,
for nobody, and the next one that is opened ends these leases with all that it finds.

The file gives back what it needed for a large run (`auto_vacuum`, in portions).

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
from stabilize.recovery import RecoveryResult, WorkflowRecovery
from stabilize.resilience.bulkheads import TaskBulkheadManager
from stabilize.resilience.circuits import WorkflowCircuitFactory
from stabilize.resilience.config import BulkheadConfig, HandlerConfig, ResilienceConfig
from stabilize.tasks.interface import Task
from stabilize.tasks.registry import TaskRegistry

from workflows.engine.shares import Places, Shares
from workflows.engine.spots import END, Execution, Spot
from workflows.engine.stages import Stage

FILE: Final = "engine.db"
LEASE: Final = timedelta(days=365_000)
_KIND: Final = "step"  # what stabilize calls our one kind of task
_TABLE: Final = "queue_messages"
_EVER_S: Final = 100 * 365 * 86400.0
_EVER_HOURS: Final = _EVER_S / 3600
_FILTERED: Final = 500  # messages
# Threads for what calls no tool, so that it need not wait for those that do. The interpreter does
# one thing at a time: with more, only who has little to do would wait longer for each of it.
_BESIDE: Final = 8
_LEASED: Final = 100  # messages looked at together for calls of tools
_LOOK_MS: Final = 3  # between two looks of the processor, which finds all places beside taken
# After the last message the file is looked at often for so long, and then seldom: what is
# pushed by another thread is seen at once, and what is due later, soon enough.
_BUSY_S: Final = 0.5
_IDLE_LOOK_S: Final = 0.05
_IDLE_S: Final = 0.02
_AGAIN: Final = timedelta(seconds=1)  # after an error of stabilize's own
_JUMP_S: Final = 1.0  # by which the wall clock left the monotonic one: more than slewing does
_REPAIR_S: Final = 300.0  # between two looks for runs that stand still
_FORGET_S: Final = 3600.0  # between two removals of what was processed long ago
_PAGE: Final = 500  # executions looked at together
_FORGOTTEN: Final = 2000  # stages forgotten before others have their turn
_FORM: Final = 1  # of the file: another one is made anew
_SPARE: Final = 2000  # pages of 4 KiB that may stay free in the file
_GIVEN: Final = 1000  # pages given back at once
_LAST: Final = "\U0010ffff"  # after the name of each tenant

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@final
class Database:
    """What comes next in each run. Safe for threads, except `close`."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        concurrency: int,
        at: Callable[[str], None],
        only: frozenset[str] | None = None,
    ) -> None:
        """`task` does the steps, `concurrency` calls of tools at a time. `at` is told of places
        where tests kill the process. With `only` these runs go on, and what there is of others
        stays as it is."""
        _configure()
        self._only = only
        folder.mkdir(exist_ok=True)
        _remove_if_unfit(folder / FILE)
        _make(folder / FILE)
        url = _url(folder)
        self._store = SqliteWorkflowStore(url, create_tables=True)
        self._shares = Shares(concurrency)
        self._beginning = threading.Lock()
        self._queue = _Queue(url, at, self._shares, Places(_BESIDE))
        self._queue._create_table()
        self._queue.release_all()
        if only is not None:
            self._queue.hold_all_but(only)
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
                # It looks at all runs. Of some alone, what stands still goes on when it is next
                # carried out.
                recovery_interval_seconds=_REPAIR_S if only is None else 0.0,
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

    def start(self, beat: Callable[[], None] = _nothing) -> None:
        """Go on with what was begun before, and with what is begun from now on; `beat` is called
        now and then."""
        recovery = _Recovery(self._store, self._queue, beat)
        for run in self._restriction():
            recovery.recover_pending_workflows(run)
        self._processor.start()

    def rest(self) -> bool:
        """Take no more messages; whether none is at work any more."""
        self._processor.request_stop()
        return not self._processor.active_count

    def begin(
        self,
        execution: Execution,
        tenant: str,
        stages: list[Stage],
        check: Callable[[], None] = _nothing,
    ) -> None:
        """Begin an execution, unless it has begun.

        `check` raises where its run has ended, and what it raises is raised: nothing begins
        after `forget_run`, which is called later than that.
        """
        if self.has(execution):
            return
        made = [_made(stage) for stage in stages]
        workflow = Workflow.create(application=execution.run, name=execution.name, stages=made)
        workflow.id = execution.identifier
        workflow.origin = tenant
        with self._beginning:
            check()
            self._orchestrator.start(workflow)

    def has(self, execution: Execution) -> bool:
        """Whether it has begun, and was not forgotten."""
        return bool(self._store.exists(execution.identifier))

    def runs(self) -> set[str]:
        """The runs that have an execution here, which may have ended since: of those that it is
        for."""
        connection = self._store._get_connection()
        rows = connection.execute("SELECT DISTINCT application FROM pipeline_executions")
        found = {str(run) for (run,) in rows}
        return found if self._only is None else found & self._only

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
            for run in self._restriction()
            for identifier in self._store.completed_workflow_ids(ever_ms, _PAGE, run)
        ]

    def _restriction(self) -> list[str] | list[None]:
        """What stabilize is asked for, one after the other: None means all runs."""
        return [None] if self._only is None else sorted(self._only)

    def forget(self, execution: Execution) -> None:
        """Drop an execution, wherever it is: what of it is at work finds nothing when it ends."""
        self._queue.purge_workflow(execution.identifier)
        self._store.delete(execution.identifier)

    def forget_run(self, run: str, beat: Callable[[], None] = _nothing) -> None:
        """Drop all executions of a run; `beat` is called now and then."""
        for _ in self.forgetting(run):
            beat()

    def forgetting(self, run: str) -> Iterator[None]:
        """Drop all executions of a run, a portion at each step: for who has others to look after
        meanwhile."""
        with self._beginning:
            pass  # what was about to begin is there now, and what comes next finds the run ended
        for page in self._pages(run):  # nothing more is done for them
            self._queue.purge(page)
            yield
        stages = 0
        for page in self._pages(run):
            for identifier, has in self._stages_of(page):
                self._store.delete(identifier)
                stages += has
                if stages >= _FORGOTTEN:
                    stages = 0
                    yield
            self._queue.purge(page)  # what those that were at work have sent meanwhile
            yield
        while self._give_back():
            yield

    def _stages_of(self, page: list[str]) -> list[tuple[str, int]]:
        """How many stages each of these executions has."""
        connection = self._store._get_connection()
        return connection.execute(
            "SELECT id, (SELECT count(*) FROM stage_executions WHERE execution_id = one.id) "  # noqa: S608
            f"FROM pipeline_executions one WHERE id IN ({_marks(page)})",
            page,
        ).fetchall()

    def _give_back(self) -> bool:
        """Give a portion of what is free in the file back to the disk, where it is much; whether
        there was."""
        connection = self._store._get_connection()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free <= _SPARE:
            return False
        # Each of its rows is a page that is given back.
        connection.execute(f"PRAGMA incremental_vacuum({min(_GIVEN, free - _SPARE)})").fetchall()
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        (left,) = connection.execute("PRAGMA freelist_count").fetchone()
        return bool(left < free)  # else others need it as fast

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
    """stabilize's queue, which is asked for messages 300 times a second: it looks into the
    file only where there was one lately, or has been no look for a while.

    Messages are given out to the tenants in turns. Each is the tenant's whose execution it names,
    whoever has put it into the table.
    """

    def __init__(
        self,
        url: str,
        at: Callable[[str], None],
        shares: Shares,
        beside: Places,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(url, _TABLE, lock_duration=LEASE, max_attempts=1_000_000_000)
        self._at = at
        self._shares = shares
        self._beside = beside
        self._served = ""  # the tenant that had the last turn
        self._wall = wall
        self._moved_s = time.monotonic()
        self._moved = threading.Event()
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
            self._moved.wait(_IDLE_S)  # the processor itself would ask all the time
            self._moved.clear()
            return None
        self._looked_s = now_s
        while self._unreturned:
            self._return(self._unreturned[0])
            del self._unreturned[0]
        return self._next()

    def _move(self) -> None:
        """Something is to be done, or was: the file is looked at often from now on."""
        self._moved_s = time.monotonic()
        self._moved.set()

    def _create_table(self) -> None:
        super()._create_table()
        connection = self._get_connection()
        columns = connection.execute(f"PRAGMA table_info({_TABLE})").fetchall()
        if "tenant" not in {column["name"] for column in columns}:
            connection.execute(f"ALTER TABLE {_TABLE} ADD COLUMN tenant TEXT NOT NULL DEFAULT '?'")
        # stabilize puts messages into the table in many places.
        connection.execute(
            f"CREATE TRIGGER IF NOT EXISTS whose AFTER INSERT ON {_TABLE} BEGIN "  # noqa: S608
            f"UPDATE {_TABLE} SET tenant = coalesce((SELECT origin FROM pipeline_executions "
            f"WHERE id = {_told('NEW', 'execution_id')}), '?') WHERE id = NEW.id; END"
        )
        # What is leased, or due later, costs a look nothing, however much it is.
        connection.execute(
            f"CREATE INDEX IF NOT EXISTS due ON {_TABLE} (deliver_at) WHERE locked_until IS NULL"
        )
        connection.execute(
            f"CREATE INDEX IF NOT EXISTS turns ON {_TABLE} (tenant, deliver_at) "
            "WHERE locked_until IS NULL"
        )
        connection.commit()

    def _next(self) -> Message | None:
        """A call that has a place now, or else what is due and needs none."""
        for _ in range(_LEASED):
            if (message := self._placed()) is not None:
                return message
            number = self._due()
            if number is None:
                return None
            row = self._leased(number)
            if row is None:
                continue
            self._move()
            if row["message_type"] == RunTask.__name__ and row["caller"]:
                self._shares.wait(row["caller"], number)
                continue
            self._beside.take(row["tenant"], number)
            try:
                with self._returned(number):
                    message = self._message(row)
            finally:
                if message is None:
                    self._beside.leave(number)
            if message is not None:
                return message
        return self._placed()

    def _due(self) -> int | None:
        """The message that is due for longest of the tenant whose turn it is: the first one, after
        the one that had its turn last, that has any and may have a place."""
        if not self._beside.has_room():
            return None
        now = datetime.now(UTC).isoformat()
        connection = self._get_connection()
        # All dates here are written by `isoformat` in UTC: their texts sort as they do.
        if not connection.execute(
            f"SELECT 1 FROM {_TABLE} INDEXED BY due "  # noqa: S608
            "WHERE locked_until IS NULL AND deliver_at <= ? LIMIT 1",
            (now,),
        ).fetchone():
            return None
        for after, last in ((self._served, _LAST), ("", self._served)):
            while row := connection.execute(
                f"SELECT id, tenant, deliver_at FROM {_TABLE} INDEXED BY turns "  # noqa: S608
                "WHERE locked_until IS NULL AND tenant > ? AND tenant <= ? "
                "ORDER BY tenant, deliver_at LIMIT 1",
                (after, last),
            ).fetchone():
                after = row["tenant"]
                if row["deliver_at"] <= now and self._beside.may_take(after):
                    self._served = after
                    return int(row["id"])
        return None

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
                self._move()
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

    def _leased(self, number: int) -> sqlite3.Row | None:
        """Lease a message: nobody but this thread leases any. None where nothing is to be done
        for it."""
        connection = self._get_connection()
        row: sqlite3.Row | None = connection.execute(
            "SELECT message.id, message_type, payload, attempts + 1 AS attempts, tenant, "  # noqa: S608
            f"{_told('message', 'execution_id')} AS named, execution.id AS found, "
            f"json_extract(stage.context, '$.tenant') AS caller FROM {_TABLE} message "
            "LEFT JOIN pipeline_executions execution "
            f"ON execution.id = {_told('message', 'execution_id')} "
            f"LEFT JOIN stage_executions stage ON stage.id = {_told('message', 'stage_id')} "
            "WHERE message.id = ?",
            (number,),
        ).fetchone()
        if row is None:
            return None
        with connection:  # what a full disk refuses is undone
            if row["named"] and row["found"] is None:
                connection.execute(f"DELETE FROM {_TABLE} WHERE id = ?", (number,))  # noqa: S608
                return None
            leased = connection.execute(
                f"UPDATE {_TABLE} SET locked_until = ?, attempts = attempts + 1, "  # noqa: S608
                "version = version + 1 WHERE id = ?",
                ((datetime.now(UTC) + self.lock_duration).isoformat(), number),
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
        self._move()

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
            number = row_id(message.message_id)
            self._shares.leave(number)
            self._beside.leave(number)
        self._move()

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

    def hold_all_but(self, runs: frozenset[str]) -> None:
        """Lease the messages of all other runs, for nobody, until the next `release_all`."""
        connection = self._get_connection()
        connection.execute(
            f"UPDATE {_TABLE} SET locked_until = ? "  # noqa: S608
            f"WHERE coalesce({_told(_TABLE, 'execution_id')}, '') NOT IN "
            "(SELECT id FROM pipeline_executions "
            "WHERE application IN (SELECT value FROM json_each(?)))",
            ((datetime.now(UTC) + self.lock_duration).isoformat(), json.dumps(sorted(runs))),
        )
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


@final
class _Recovery(WorkflowRecovery):
    """stabilize's look for what stands still, with a beat for each execution."""

    def __init__(
        self, store: SqliteWorkflowStore, queue: SqliteQueue, beat: Callable[[], None]
    ) -> None:
        super().__init__(store, queue, max_recovery_age_hours=_EVER_HOURS)
        self._beat = beat

    def _recover_workflow(self, workflow: Workflow) -> RecoveryResult:
        self._beat()
        return super()._recover_workflow(workflow)


def _told(message: str, what: str) -> str:
    """What the payload of a message says, where it can be read: as in stabilize's indexes."""
    payload = f"{message}.payload"
    return f"CASE WHEN json_valid({payload}) THEN json_extract({payload}, '$.{what}') END"


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


def _make(path: Path) -> None:
    """Make the file where there is none; one whose pages can be given back is made so before
    there is anything in it."""
    if path.exists():
        return
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute(f"PRAGMA user_version = {_FORM}")
    finally:
        connection.close()


def _remove_if_unfit(path: Path) -> None:
    """Remove a file that is damaged, or of an earlier release."""
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(path)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (form,) = connection.execute("PRAGMA user_version").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        answer, form = str(error), _FORM
    if answer != "ok":
        _log.error("%s is damaged and is made anew: %s", path, answer)
        remove(path.parent)
    elif form != _FORM:
        _log.warning("%s is of another release and is made anew", path)
        remove(path.parent)
