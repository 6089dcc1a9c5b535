"""Work on texts of strangers, in processes of their own with limits: see `text_process`.

One that is led astray ends alone: not the runner, whose threads would all stand still while it
works in one call of C, and not the machine, whose memory and cores only a few may take at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from workflows.llm import text_process

CPU_S_MAX: Final = 60
SECONDS_MAX: Final = 180.0  # of the clock: a machine may be busy with other things
# Processes at once, of all steps of a runner together. Each may take 2 GiB and a core: four take
# at worst the 8 GiB and the half of the cores of a usual server. Fewer would let two slow files
# hold up all others.
AT_ONCE: Final = 4
# Of one tenant, also while nobody else wants any: one whose files take a minute each would have
# all of them when the next one comes.
AT_ONCE_OF_A_TENANT: Final = 3
# One thread each: their stacks count as memory, and their time as the process's.
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@final
class _Places:
    """Those that are at work, by tenant. Safe for threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """A place, which is waited for."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._at_work.total() < AT_ONCE and self._at_work[tenant] < AT_ONCE_OF_A_TENANT
                )
            )
            self._at_work[tenant] += 1
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= Counter({tenant: 1})  # keeps no zeros
                self._changed.notify_all()


_places: Final = _Places()


@final
class TooCostly(ValueError):
    """It took more time or memory than it may; the text of this error says which."""


@final
class Broken(ValueError):
    """The process ended with an error: what it was given is not what it was said to be."""


def work(tenant: str, job: str, data: bytes, *arguments: str) -> dict[str, Any]:
    """What the job makes of a tenant's `data`, {"problem"} included; waits for its turn.

    Raises TooCostly, Broken.
    """
    words = [sys.executable, "-I", str(Path(text_process.__file__)), str(CPU_S_MAX), job]
    with _places.one(tenant):
        try:
            done = subprocess.run(
                [*words, *arguments],
                input=data,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # the remarks of parsers quote the text
                env=_ENVIRONMENT,  # and none of our secrets
                cwd="/",
                timeout=SECONDS_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TooCostly(f"not done within {SECONDS_MAX:g} s") from None
    if done.returncode < 0:  # killed, at the limit of its time or by a machine without memory
        raise TooCostly("more time or memory than a text may take")
    if done.returncode != 0:
        raise Broken
    found: dict[str, Any] = json.loads(done.stdout)
    if found.get("problem") == text_process.TOO_COSTLY:
        raise TooCostly("more time or memory than a text may take")
    return found
