"""The link to one target: what all jobs that speak to it share.

One is made for each configured target when the background process starts. Jobs of a target
never know of each other; what one finds out and another must know stands here. All of it is
in memory: what must outlive the process is in the catalog or at the target.
"""

from __future__ import annotations

from typing import Final, final

from cas.config import TargetSettings
from replicator.probe import Profile
from replicator.speed import Speed
from replicator.targets import Target

NOT_ASKED: Final = "not asked yet"  # `Link.fenced` before the first look at HEAD


@final
class Link:
    """A target, how it is used, and how it is. Changed by the loop's thread, where not said."""

    def __init__(self, target: Target, settings: TargetSettings, profile: Profile | None) -> None:
        self.target = target
        self.settings = settings
        self.profile = profile  # None: not probed yet; nothing is mirrored before
        # Set by shipping: why nothing may be written there (invariant 12), "" while all is well,
        # and the catalog time of the newest frame that is at the target and in its HEAD.
        self.fenced = NOT_ASKED
        self.shipped_at_us = 0
        # Whether the last look at HEAD was answered: nothing is evicted on the word of rows whose
        # target does not answer.
        self.answers = True
        # The number of that frame: eviction and removal wait for `Replica.seq` to be shipped,
        # since catalog time may stand still.
        self.shipped_seq = 0
        # Set by the mirror: why the whole target is left alone for now, in words; "" when not.
        self.down = ""
        self.last_error = ""  # the last thing that went wrong with a copy, "" after a success
        self.speed = Speed()  # of what was copied
        # The multipart uploads of this process that no record names; changed by any thread.
        self.nameless: set[str] = set()
        # Set by the canary: when (time.monotonic) the last one came back, None: none did.
        self.canary_at_s: float | None = None
        self.canary_error = ""

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def open(self) -> bool:
        """Whether anything may be written there."""
        return self.profile is not None and not self.fenced
