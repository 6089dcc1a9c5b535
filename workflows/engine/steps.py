"""Steps: whose turn it is, and what follows from its end.

Where stabilize is concerned a step always ends well: what a failure means for others is
judged by `verdicts`, from the catalog.

What a tool raises fails its step, or this attempt of it (`attempts`). What the runner's own part
meets with, such as a full disk, fails nobody: the step begins again.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Final, final

from stabilize.models.stage import StageExecution
from stabilize.tasks.interface import RetryableTask
from stabilize.tasks.result import TaskResult

from cas.errors import NotFound, RunEnded
from cas.records import COMPLETED, ENDED, FAILED, Run
from cas.store import Store
from workflows.definitions import FOREACH, Definition
from workflows.engine.beating import AtWork
from workflows.engine.database import FILE, Database
from workflows.engine.kit import Kit
from workflows.engine.outcomes import ENDING, Again, LoopOver, Misfit, Sleeps
from workflows.engine.plan import Plan
from workflows.engine.plans import Plans
from workflows.engine.spots import END, FORK, Execution, Spot, outside, waits_of
from workflows.engine.stages import begins_as, stages_of
from workflows.engine.turn import Turn
from workflows.engine.verdicts import OVER, Judge, is_loop_over
from workflows.run_log import RunLog
from workflows.tools.registry import Registry
from workflows.views import Workflows

_EVER: Final = timedelta(days=36_500)
_TROUBLE_S: Final = 1.0  # before a step begins again that could not be written; doubled
_TROUBLE_S_MAX: Final = 60.0

_log = logging.getLogger(__name__)


@final
class Steps(RetryableTask):
    """Does the steps of all runs; what stabilize calls. Safe for threads."""

    def __init__(
        self,
        store: Store,
        workflows: Workflows,
        registry: Registry,
        at: Callable[[str], None],
        on_end: Callable[[BaseException], None],
    ) -> None:
        """`at` is told of places where tests kill the process, `on_end` why it must end."""
        self._kit = Kit(store, workflows, registry, at)
        self._on_end = on_end
        self._plans = Plans()
        self._asking: Counter[str] = Counter()  # of each run, the steps that would begin it anew
        self._counting = threading.Lock()
        self._renewing = threading.Lock()
        self.at_work = AtWork()

    def attach(self, database: Database) -> None:
        """Where runs and the items of loops begin; before anything else."""
        self._kit.attach(database)

    @property
    def database(self) -> Database:
        return self._kit.database

    def log_of(self, run: str) -> RunLog:
        return self._kit.log_of(run)

    def plan_of(self, run: Run) -> Plan:
        """The plan of a run; its definition never changes."""
        plan = self._plans.get(run.run_id)
        if plan is None:
            text = self.log_of(run.run_id).text().definition
            plan = Plan(Definition.from_json(text))
            self._plans.keep(run.run_id, plan, len(text))
        return plan

    def begin(self, run: Run) -> None:
        """Have a run begin, or go on: durable only as far as the catalog is."""
        plan = self.plan_of(run)
        self.database.begin(Execution(run.run_id), run.tenant_id, stages_of(plan, run, "", ""))

    def late(self) -> int:
        """How many calls of tools go on past their time."""
        return self._kit.attempts.late()

    def forget(self, run: str) -> None:
        """Drop what is kept at hand of a run that has ended."""
        self._plans.forget(run)
        self._kit.forget(run)

    # --- what stabilize asks of a task

    def get_timeout(self) -> timedelta:
        return _EVER  # times are limited by the steps themselves, in catalog time

    def get_backoff_period(self, stage: StageExecution, duration: timedelta) -> timedelta:
        return timedelta(seconds=float(stage.context.get("after_s", _TROUBLE_S)))

    def execute(self, stage: StageExecution) -> TaskResult:
        with self.at_work.one(str(stage.context.get("run", ""))):
            return self._executed(stage)

    def _executed(self, stage: StageExecution) -> TaskResult:
        spot = Spot.of(stage.context)
        try:
            self._turn(spot)
        except Sleeps:
            self._kit.at("suspending")
            return TaskResult.suspend()
        except Again as again:
            return TaskResult.running(context={"after_s": again.after_s, "trouble": 0})
        except LoopOver:
            self._kit.drop(spot)
            return TaskResult.canceled()
        except RunEnded:
            self.forget(spot.run)
            return TaskResult.canceled()
        except ENDING as error:
            self._on_end(error)
            return TaskResult.running(context={"after_s": _TROUBLE_S})
        except BaseException:  # noqa: BLE001  a full disk, for instance: no reason to fail the run
            # Whatever it is: stabilize loses what raises no Exception, with the place it has.
            trouble = int(stage.context.get("trouble", 0)) + 1
            after_s = min(_TROUBLE_S * 2.0 ** (trouble - 1), _TROUBLE_S_MAX)
            _log.exception("step %s of run %s begins again in %g s", spot.step, spot.run, after_s)
            return TaskResult.running(context={"after_s": after_s, "trouble": trouble})
        return TaskResult.success()

    # --- one turn

    def _turn(self, spot: Spot) -> None:
        """Do what there is to do for `spot`, which has ended when this returns."""
        log = self.log_of(spot.run)
        try:
            run = log.read().run
        except NotFound:
            raise RunEnded("forgotten") from None
        if run.status in ENDED:
            raise RunEnded(run.status)
        plan = self.plan_of(run)
        if is_loop_over(plan, log, spot):
            raise LoopOver
        if spot.iteration and log.items(plan.level_of_spot(spot), outside(spot.iteration)) is None:
            self.anew(run)  # an item of a loop that has not begun
            raise Sleeps
        if spot.role == END:
            self._end(plan, run, log, spot)
            return
        turn = Turn(self._kit, plan, run, log, spot)
        try:
            if spot.role == FORK:
                turn.open()
                return
            step = turn.step()
            if step is None or step.status not in OVER:
                turn.take(step)
        except LoopOver:
            turn.drop()
            raise
        except Misfit:
            self.anew(run)
            raise Sleeps from None
        self._after(plan, log, spot)

    def _after(self, plan: Plan, log: RunLog, spot: Spot) -> None:
        """What follows from the end of a step; again after a crash, and with the same outcome."""
        step = log.step(spot.task, spot.iteration)
        fatal = not plan.level_of[spot.task] and not plan.tolerated(spot.task)
        if step is not None and step.status == FAILED and fatal:
            # Nothing can come of the run any more: what else it does or waits for ends.
            log.end(FAILED, f"{spot.task}: {step.error}")
            raise RunEnded(FAILED)
        if step is not None and step.status == FAILED and plan.tasks[spot.task].operator == FOREACH:
            self._kit.items.over(spot)  # its time was over before they had ended
            self.end_items(plan, log, spot)
        for name in plan.early(spot.task):
            self.ring(plan, Spot(spot.run, name, spot.iteration, begins_as(plan.tasks[name])))

    def end_items(self, plan: Plan, log: RunLog, loop: Spot) -> None:
        """What is still at work or waits inside of a loop that has ended is cancelled."""
        names = [
            name
            for name in plan.tasks
            if any(around.task_id == loop.task for around in plan.loops_around(name))
        ]
        log.cancel_within([*names, loop.task], loop.iteration, waits_of)

    def ring(self, plan: Plan, spot: Spot) -> None:
        """Have a step look again."""
        level = plan.level_of[spot.task]
        self._kit.at("signalling")
        self.database.ring(Execution(spot.run, level, spot.iteration), spot)

    def anew(self, run: Run) -> None:
        """Begin a run again in stabilize, which holds steps to have ended that have not: its
        file is of another time than the catalog, as after a restore.

        Raises Again while a step of it is at work, which would begin beside itself; those that
        ask for this as well do not count.
        """
        with self._counting:
            self._asking[run.run_id] += 1
        try:
            with self._renewing:
                if self.at_work.of(run.run_id) > self._asking[run.run_id]:
                    raise Again(_TROUBLE_S)
                _log.warning("run %s begins anew: %s does not fit the catalog", run.run_id, FILE)
                self._kit.items.forget(run.run_id)
                self.database.forget_run(run.run_id)
                self.begin(run)
        finally:
            with self._counting:
                self._asking -= Counter({run.run_id: 1})

    # --- the end of a run, or of a loop's item

    def _end(self, plan: Plan, run: Run, log: RunLog, spot: Spot) -> None:
        judge = Judge.at(plan, log, spot)
        if any(judge.state(task) is None for task in plan.level(spot.task)):
            self.anew(run)
            raise Sleeps
        failed = judge.unforgiven(plan.level(spot.task))
        error = f"{failed[0].step_id}: {failed[0].error}" if failed else ""
        if not spot.task:
            log.end(FAILED if failed else COMPLETED, error)
            return
        step = log.step(spot.task, spot.iteration)
        if step is None or step.status not in OVER:
            log.begin(spot.task, spot.iteration)
            if failed:
                log.fail(spot.task, spot.iteration, error)
            else:
                # The results are those of the item's steps: what they are is not kept twice.
                log.finish(spot.task, spot.iteration, None)
        loop = Spot(spot.run, spot.task, outside(spot.iteration))
        if self._kit.items.ended(loop, spot.item):
            self.ring(plan, loop)
