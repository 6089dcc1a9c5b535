"""The runner: the one process of a ROOT that carries its workflows out.

One may also be for some runs alone, from a command line with settings of its own: it touches
no others, and makes way for one that is for all.

It takes up the open runs of the catalog, and is rung at each commit: a new run is begun, and
a step whose wait has been given its event (by whatever process) is rung for. Whatever of this
is missed by a crash is found again when the next runner starts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TypeVar, final

from cas.alone import Alone, is_held
from cas.catalog import Snapshot, pages
from cas.errors import BlobcaskError, NotFound, RunEnded
from cas.events import subscription_id
from cas.records import ENDED, FAILED, WAITING, Run, Subscription
from cas.restored import waits_for_acceptance
from cas.runner import FOR_ALL, PLACE
from cas.store import Store
from workflows.definitions import EARLY, FOREACH
from workflows.engine.beating import Beating
from workflows.engine.database import FILE, Database, remove
from workflows.engine.outcomes import ENDING, TROUBLE
from workflows.engine.plan import Plan
from workflows.engine.spots import END, FORK, TIMER, Execution, Spot, outside, parsed_step
from workflows.engine.steps import Steps
from workflows.engine.verdicts import OVER, is_loop_over
from workflows.run_view import RunView
from workflows.tools.registry import Registry, barred, default_registry
from workflows.views import Workflows

T = TypeVar("T")

FOLDER: Final = "workflows"
_PLACE_POLL_S: Final = 0.2
_ACCEPTED_POLL_S: Final = 1.0
# Between two looks at all runs: for one that was cancelled, and for one that was missed. As
# many times longer than the last one took, where there are very many.
_ROUND_S: Final = 2.0
_ROUND_TIMES: Final = 20.0
_QUIET_S: Final = 60.0  # between two where nothing was committed: for what stands still
_COALESCE_S: Final = 0.02  # many commits at once are looked at once
_NEW: Final = 100  # open runs looked at together, from the youngest on, at each commit
_LATER_S: Final = 30.0  # until a run is looked at again that could not be forgotten
_LETTING_S: Final = 0.2  # of each look, for runs that have ended
_STOP_S: Final = 5.0

_log = logging.getLogger(__name__)


def _nothing(place: str) -> None:
    pass


@final
class Runner:
    """Runs the workflows of one open store. One thread calls `run`; others may call `stop`."""

    def __init__(
        self,
        store: Store,
        workflows: Workflows,
        *,
        registry: Registry | None = None,
        only: Collection[str] | None = None,
        say: Callable[[str], None] = _nothing,
        at: Callable[[str], None] = _nothing,
    ) -> None:
        """With `only` it carries out these runs, which are there already, and no others.

        `say` gets remarks for people; `at` is told of places where tests kill the process:
        begun, called, subscribed, claimed, suspending, stored, signalling, finishing, finished.
        """
        self._store = store
        self._workflows = workflows
        # Those of them that have not ended; None: it is for all.
        self._only = None if only is None else frozenset(only)
        self._say = say
        # Steps at work still when `run` gave up waiting for them, however it ended: they begin
        # again with the next runner, so the process may end at once.
        self.left = 0
        self._steps = Steps(store, workflows, registry or default_registry(), at, self._end)
        self._beating = Beating(
            store, self._steps.at_work, late=self._steps.late, barred=barred(store.settings)
        )
        self._at = at
        self._known: set[str] = set()  # runs that were taken up
        # Runs that ended, which the database drops in portions: a large one takes seconds, in which
        # others begin and are rung for.
        self._leaving: dict[str, Iterator[None]] = {}
        self._unleft: list[tuple[float, str]] = []  # could not be forgotten; and when they are due
        self._ended: list[Execution] = []  # were forgotten, and are to be looked at
        self._rung: list[Subscription] = []
        # What was rung for and could not be answered: nobody rings for it again. With when it
        # is tried again; one run's trouble delays nobody else.
        self._unanswered: list[tuple[float, Subscription]] = []
        self._moved = True  # something was committed
        self._stopping = False
        self._why: BaseException | None = None  # it must end
        self._changed = threading.Condition()

    def run(self) -> None:
        """Run until `stop`, waiting first while another process has the place. One that is for
        some runs alone returns, too, as soon as one is there that is for all.

        Raises CatalogFailed, CatalogClosed when the store must be opened anew: at once, since
        what is at work can record nothing any more.
        """
        with ExitStack() as held:
            if not self._take_all(held) or not self._accepted():
                return
            database = self._opened()
            patience_s = 0.0
            try:
                self._serve(database)
                if self._why is None:
                    patience_s = _STOP_S
            finally:
                self.left = database.close(patience_s)
            if self._why is not None:
                raise self._why

    def stop(self) -> None:
        """Have `run` return; from any thread, also before it is called."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _end(self, why: BaseException) -> None:
        with self._changed:
            self._why = self._why or why
        self.stop()

    # --- before

    def _take_all(self, held: ExitStack) -> bool:
        """Take the places that it needs, until `held` ends; False when told to stop, or where it
        makes way."""
        # First the one that tells those that are for some runs alone to make way.
        for name in (FOR_ALL, PLACE) if self._only is None else (PLACE,):
            place = Alone(self._store.root / name)
            held.callback(place.close)
            if not self._take(place):
                return False
        return True

    def _take(self, place: Alone) -> bool:
        told = False
        while not self._makes_way():
            if place.take():
                return not self._stopping
            if not told:
                self._say(self._why_it_waits(place.holder()))
                told = True
            if self._pause(_PLACE_POLL_S):
                return False
        return False

    def _why_it_waits(self, pid: str) -> str:
        if self._only is None:
            return f"Waiting: another runner (PID {pid}) runs here."
        return (
            f"Waiting: another command (PID {pid}) carries out its own runs here first; "
            "`blobcask workflow serve` would carry out all at once."
        )

    def _makes_way(self) -> bool:
        """Whether it is for some runs alone, and one that is for all is there, or comes."""
        return self._only is not None and is_held(self._store.root / FOR_ALL)

    def _accepted(self) -> bool:
        """Wait while a restored store waits for somebody's look; False when told to stop."""
        told = False
        while not self._stopping and not self._makes_way():
            with self._store.catalog.read() as snapshot:
                waits = waits_for_acceptance(snapshot)
            self._beat(waits=bool(waits))
            if not waits:
                return True
            if not told:
                self._say(f"No workflow runs: {waits}.")
                told = True
            self._pause(_ACCEPTED_POLL_S)
        return False

    # --- the work

    def _opened(self) -> Database:
        """The database, going on with what it holds; a new one where that cannot be read."""
        folder = self._store.root / FOLDER
        try:
            return self._started(folder)
        except BlobcaskError:
            raise  # of the catalog, or of a run: a new file would not help
        except Exception:  # noqa: BLE001  all of it can be made anew
            _log.exception("%s cannot be used, and is made anew", folder / FILE)
            remove(folder)
            return self._started(folder)

    def _started(self, folder: Path) -> Database:
        concurrency = self._store.settings.workflows.concurrency
        self._beat()  # a large file is looked through
        database = Database(folder, self._steps, concurrency, self._at, self._only)
        self._beat()
        self._steps.attach(database)
        try:
            found = self._open()
            for run_id in sorted(database.runs()):
                if run_id not in found or not self._woken(database, run_id):
                    database.forget_run(run_id, self._beat)  # it ended while no runner ran
            database.start(self._beat)
        except BaseException:
            database.close(0.0)
            raise
        return database

    def _serve(self, database: Database) -> None:
        found = self._open()
        for run_id in sorted(found):
            if self._stopping:
                return
            self._begin(run_id)
        watcher = self._workflows.watcher
        unwatch = [watcher.watch_all(self._ring), watcher.watch_commits(self._commit)]
        self._say(f"Running the workflows of {self._store.root}; open: {len(found)}.")
        try:
            self._look_until_stopped(database)
        finally:
            for forget in unwatch:
                forget()

    def _look_until_stopped(self, database: Database) -> None:
        next_s = quiet_s = 0.0
        since = True  # something was committed since the last round
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._moved or bool(self._rung), self._patience_s()
                )
                if self._stopping:
                    return
                if self._makes_way():
                    break
                rung, self._rung = self._rung, []
                moved, self._moved = self._moved, False
            self._beat()
            try:
                self._answer_all(rung)
                since = since or moved
                if moved:
                    self._take_up()
                self._let_go(database)
                began_s = time.monotonic()
                if began_s >= next_s:
                    if since or self._ended or began_s >= quiet_s:
                        self._round(database)
                        quiet_s = began_s + _QUIET_S
                    since = False
                    took_s = time.monotonic() - began_s
                    next_s = began_s + max(_ROUND_S, took_s * _ROUND_TIMES)
            except ENDING:
                raise
            except Exception:  # noqa: BLE001  it goes on with the next look
                _log.exception("the runner looks again in %g s", _ROUND_S)
                self._beating.failed()
                self._pause(_ROUND_S)
            else:
                self._beating.looked()
            if moved:
                self._pause(_COALESCE_S)
        # What is at work ends first: whoever comes next would begin it a second time beside it.
        while not database.rest() and not self._pause(_PLACE_POLL_S):
            self._beat()

    def _patience_s(self) -> float:
        """How long until the next look where nothing happens."""
        if self._leaving:
            return 0.0
        later = (due_s for due_s, _ in (*self._unanswered, *self._unleft))
        due_s = min(later, default=math.inf)
        return min(_ROUND_S, max(0.0, due_s - time.monotonic()))

    def _answer_all(self, rung: list[Subscription]) -> None:
        """Answer those, and what is tried again by now."""
        now_s = time.monotonic()
        due = [wait for due_s, wait in self._unanswered if due_s <= now_s]
        self._unanswered = [later for later in self._unanswered if later[0] > now_s]
        for wait in rung + due:
            if not self._guarded(wait.workflow_run_id, self._answer, wait):
                self._unanswered.append((time.monotonic() + _ROUND_S, wait))

    def _beat(self, *, waits: bool = False) -> None:
        only = None if self._only is None else len(self._only)
        self._beating.beat(len(self._known), only=only, waits=waits)

    def _is_mine(self, run_id: str) -> bool:
        return self._only is None or run_id in self._only

    def _open(self) -> set[str]:
        with self._store.catalog.read() as snapshot:
            return self._open_in(snapshot)

    def _open_in(self, snapshot: Snapshot) -> set[str]:
        """The runs that have not ended, of all tenants, or of those that it is for: its work."""
        if self._only is not None:
            self._only = frozenset(run for run in self._only if not _is_over(snapshot, run))
            return set(self._only)
        # Identifiers only: there may be very many.
        return {run.run_id for page in pages(snapshot, Run, "open", ("open",)) for run in page}

    def _guarded(self, run_id: str, act: Callable[[T], None], what: T) -> bool:
        """Do something for one run; False where it has to be tried again.

        One run's trouble is not the others'.
        """
        self._beat()
        try:
            act(what)
        except (RunEnded, NotFound):
            return True
        except ENDING:
            raise
        except Exception:  # noqa: BLE001
            _log.exception("run %s is looked at again later", run_id)
            return False
        return True

    def _plan(self, run: Run) -> Plan:
        """Its plan. Where none can be made, nothing can come of the run: it fails, and this
        raises RunEnded."""
        try:
            return self._steps.plan_of(run)
        except (*ENDING, *TROUBLE):
            raise
        except Exception as error:  # noqa: BLE001
            _log.exception("run %s fails: no plan can be made of it", run.run_id)
            self._steps.log_of(run.run_id).end(FAILED, f"no plan can be made of it: {error}")
            raise RunEnded(FAILED) from None

    def _begin(self, run_id: str) -> None:
        self._guarded(run_id, self._take_over, run_id)

    def _take_over(self, run_id: str) -> None:
        run = self._steps.log_of(run_id).start()
        self._plan(run)
        self._steps.begin(run)
        self._known.add(run_id)

    def _take_up(self) -> None:
        """Begin the runs that are new."""
        found: list[str] = []
        before: tuple[str, ...] = ()
        with self._store.catalog.read() as snapshot:
            # From the youngest on, as far as there are new ones.
            while page := snapshot.range(
                Run, "open", ("open",), before=before, limit=_NEW, reverse=True
            ):
                new = [
                    run.run_id
                    for run in page
                    if run.run_id not in self._known and self._is_mine(run.run_id)
                ]
                found += new
                if not new:
                    break
                before = (page[-1].run_id,)
        for run_id in reversed(found):
            self._begin(run_id)

    def _round(self, database: Database) -> None:
        """Let go of runs that have ended; begin what was missed, or stands still."""
        with self._store.catalog.read() as snapshot:
            found = self._open_in(snapshot)
            gone = [run_id for run_id in self._known - found if _is_over(snapshot, run_id)]
        for run_id in gone:
            self._known.discard(run_id)
            self._leaving[run_id] = database.forgetting(run_id)
        for run_id in sorted(found - self._known):
            self._begin(run_id)
        for execution in database.ended():
            self._beat()
            database.forget(execution)
            self._ended.append(execution)
        self._ended = [
            execution
            for execution in self._ended
            if execution.run in found and not self._guarded(execution.run, self._go_on, execution)
        ]

    def _go_on(self, ended: Execution) -> None:
        """An execution ended, and its run goes on in the catalog: it began a moment ago, or
        waits for others, or stands still."""
        if not ended.level:
            self._take_over(ended.run)
            return
        log = self._steps.log_of(ended.run)
        view = log.read()
        plan = self._plan(view.run)
        item = Spot(ended.run, ended.level, ended.iteration, END)
        if is_loop_over(plan, log, item):
            return
        step = view.step(ended.level, ended.iteration)
        if step is None or step.status not in OVER:
            self._steps.ring(plan, Spot(ended.run, ended.level, outside(ended.iteration)))

    def _let_go(self, database: Database) -> None:
        """Of runs that have ended: drop some of what comes next. Their waits ended with them."""
        now_s = time.monotonic()
        for due_s, run_id in self._unleft:
            if due_s <= now_s:
                self._leaving[run_id] = database.forgetting(run_id)  # from the beginning
        self._unleft = [later for later in self._unleft if later[0] > now_s]
        while self._leaving and time.monotonic() < now_s + _LETTING_S:
            self._beat()
            run_id, portions = next(iter(self._leaving.items()))
            try:
                next(portions)
            except StopIteration:
                del self._leaving[run_id]
                self._steps.forget(run_id)
            except ENDING:
                raise
            except Exception:  # noqa: BLE001  one run's trouble is not the others'
                _log.exception("run %s is forgotten in %g s", run_id, _LATER_S)
                del self._leaving[run_id]
                self._unleft.append((time.monotonic() + _LATER_S, run_id))

    def _woken(self, database: Database, run_id: str) -> bool:
        """Wake an open run; False where it has ended by now."""
        self._beat()
        try:
            self._wake(database, run_id)
        except (RunEnded, NotFound):
            return False
        except ENDING:
            raise
        except (BlobcaskError, OSError):
            _log.exception("run %s is looked at again later", run_id)
        return True

    def _wake(self, database: Database, run_id: str) -> None:
        """Ring for steps that sleep with nobody to ring for them: who should have, may have been
        killed, or the file is older than the catalog, as after a power cut. A ring too many
        does no harm."""
        view = self._steps.log_of(run_id).read()
        plan = self._plan(view.run)
        for spot in database.sleeping(run_id):
            self._beat()
            task = plan.tasks.get(spot.task)
            if spot.role == END or task is None:
                continue
            for_others = task.trigger_rule in EARLY or task.operator == FOREACH or spot.role == FORK
            if not for_others and view.step(spot.task, spot.iteration) is None:
                # It sleeps in a step that has not begun: nobody would ever ring there.
                self._steps.anew(view.run)
                return
            if for_others or not self._is_watched(view, spot):
                self._steps.ring(plan, spot)

    def _is_watched(self, view: RunView, spot: Spot) -> bool:
        """Whether the watcher rings for a step that sleeps, now or later: it does for all waits
        that nobody claimed."""
        step = view.step(spot.task, spot.iteration)
        if step is None or step.status != WAITING:
            return False
        with self._store.catalog.read() as snapshot:
            wait = snapshot.get(
                Subscription, subscription_id(view.run.tenant_id, spot.run, spot.step)
            )
        return wait is not None and wait.claimed_at is None

    def _answer(self, wait: Subscription) -> None:
        """Ring for the step whose wait this is."""
        if not self._steps.database.has(Execution(wait.workflow_run_id)):
            return  # nobody's here, or one that looks by itself when it begins
        view = self._steps.log_of(wait.workflow_run_id).read()
        if view.run.status in ENDED:
            return
        plan = self._plan(view.run)
        task, iteration = parsed_step(wait.step.removesuffix(TIMER))
        if view.run.tenant_id == wait.tenant_id and task in plan.tasks:
            self._steps.ring(plan, Spot(view.run.run_id, task, iteration))

    # --- the doorbell: called by the watcher's thread

    def _ring(self, wait: Subscription) -> None:
        if not self._is_mine(wait.workflow_run_id):
            return
        with self._changed:
            self._rung.append(wait)
            self._changed.notify_all()

    def _commit(self) -> None:
        with self._changed:
            self._moved = True
            self._changed.notify_all()

    def _pause(self, seconds: float) -> bool:
        """Wait; True when told to stop."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)


def _is_over(snapshot: Snapshot, run_id: str) -> bool:
    run = snapshot.get(Run, run_id)
    return run is None or run.status in ENDED
