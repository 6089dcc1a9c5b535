"""`blobcask workflow`: the runner, and what `runs_cli` has."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import click

from cas.cli.call import Call, pass_call
from cas.keys import load_keys
from cas.log_forms import form_of
from cas.parent import die_with
from workflows import runs_cli, tools_cli
from workflows.leaving import leave_at_end


@click.group()
def workflow() -> None:
    """Workflows of highway_dsl: run them, and look at their runs."""


@workflow.command()
@click.option("--with-parent", type=int, hidden=True, help="The PID of a parent to end with.")
@pass_call
def serve(call: Call, with_parent: int | None) -> None:
    """Carry out the workflows of a ROOT until stopped.

    `blobcask serve` runs this by itself, unless told not to. One at a time works on a ROOT; a
    second one waits for its turn. It may be killed at any time: the next one goes on.
    """
    # Late, so that the other verbs start without the engine.
    from workflows.engine.runner import Runner
    from workflows.views import Workflows

    if with_parent is not None:
        die_with(with_parent)
    _log_to_stderr(call)
    with call.open() as store:
        workflows = Workflows(store, load_keys(call.settings))
        try:
            runner = Runner(store, workflows, say=call.say)

            def stop(number: int, frame: FrameType | None) -> None:
                runner.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            try:
                runner.run()
            finally:
                if runner.left:
                    leave_at_end()
        finally:
            workflows.close()


def _log_to_stderr(call: Call) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form_of(call.settings.log.format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


workflow.add_command(runs_cli.run)
workflow.add_command(runs_cli.resume)
workflow.add_command(runs_cli.list_runs)
workflow.add_command(runs_cli.show)
workflow.add_command(runs_cli.cancel)
workflow.add_command(tools_cli.tools)
