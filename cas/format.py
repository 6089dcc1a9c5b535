"""The format of a ROOT: what VERSION says, and the steps from an older format to this one.

    1 → 2   usage_counted    the catalog keeps what each tenant stores; the first count
    2 → 3   totals_counted   targets and their rows; sums over blobs and rows, the first count
    3 → 4   events_opened    waits, approvals, webhooks, runs; completed uploads open to later waits

VERSION is written first: before the journal gets the first record that an older version
does not know. No process of an older version is at work then, since its index has another
fingerprint, and two that differ never have ROOT open at once; and none begins any more.
Then each step runs that has not left its mark in the catalog. A step is safe to stop
anywhere and to repeat, and sets the mark in its last transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cas.catalog import Catalog
from cas.catalog.ballast import Ballast
from cas.catalog.recovery import is_full
from cas.durable import Disk, is_temporary
from cas.errors import StoreFull, UnsuitableRoot
from cas.events import open_events
from cas.quotas import recount_usage
from cas.records import Mark
from cas.totals import recount_totals

FORMAT_VERSION: Final = 4

# By the name of the mark, which a step sets at its end; in the order of the formats.
STEPS: Final[dict[str, Callable[[Catalog, Mark], object]]] = {
    "usage_counted": recount_usage,
    "totals_counted": recount_totals,
    "events_opened": open_events,
}


def check_format(root: Path, disk: Disk) -> None:
    """Refuse what is not ours or newer than we are; write VERSION into a new ROOT.

    Raises UnsuitableRoot.
    """
    version_path = root / "VERSION"
    try:
        text = version_path.read_text().strip()
    except FileNotFoundError:
        root.mkdir(parents=True, exist_ok=True)
        # `keys` may come first: they are made before the first store is opened.
        ours = {"keys", "objects", "partial", "quarantine", "lost+found"}
        foreign = [
            entry.name
            for entry in root.iterdir()
            # One that was killed while it wrote VERSION leaves a temporary behind.
            if entry.name not in ours and not is_temporary(entry.name)
        ]
        if foreign and version_path.exists():
            # Another process makes the store at this moment; VERSION comes first.
            return check_format(root, disk)
        if foreign:
            raise UnsuitableRoot(root, f"no store, and not empty: {min(foreign)}") from None
        _write_version(root, disk)
        return None
    if not text.isdigit() or not 1 <= int(text) <= FORMAT_VERSION:
        raise UnsuitableRoot(
            root, f"its format is {text!r}; this version reads up to {FORMAT_VERSION}"
        )
    return None


def upgrade(root: Path, catalog: Catalog, disk: Disk, ballast: Ballast) -> None:
    """Bring an older ROOT, whose catalog this is, to this format; durable on return.

    On a full disk a step waits for the next opening: a store must open, or nothing could be
    deleted from it. Raises StoreFull where even the ballast leaves no room for VERSION, and
    UnsuitableRoot when a newer version was here since `check_format`.
    """
    check_format(root, disk)
    if (root / "VERSION").read_text().strip() != str(FORMAT_VERSION):
        _make_version(root, disk, ballast)
    with catalog.read() as snapshot:
        steps = [name for name in STEPS if snapshot.get(Mark, name) is None]
    for name in steps:
        try:
            STEPS[name](catalog, Mark(name, str(FORMAT_VERSION)))
        except StoreFull:
            return


def _make_version(root: Path, disk: Disk, ballast: Ballast) -> None:
    while True:
        try:
            return _write_version(root, disk)
        except OSError as error:
            if not is_full(error):
                raise
            if not ballast.release():
                raise StoreFull(ballast.free_bytes(), 0, root) from error


def _write_version(root: Path, disk: Disk) -> None:
    disk.write_file(root / "VERSION", f"{FORMAT_VERSION}\n".encode())
