"""Leaving: the end of a process whose threads would hold it.

A tool that is at work cannot be ended, and Python waits for its thread: perhaps for hours, with
nothing left to do, for what it comes to is not recorded any more.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

import click

from cas.cli.exits import INTERRUPTED, exit_code


def leave_at_end() -> None:
    """Have the process end as soon as its command has said all, with the code that it has."""
    click.get_current_context().find_root().call_on_close(_leave)


def _leave() -> None:
    error = sys.exc_info()[1]
    code: int | None
    if error is None:
        code = 0
    elif isinstance(error, click.exceptions.Exit):
        code = error.exit_code
    elif isinstance(error, click.ClickException):
        error.show()
        code = error.exit_code
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else None
    elif isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
    else:
        code = exit_code(error)
    if code is None:
        traceback.print_exception(error)
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # whoever read it went away
    os._exit(code)
