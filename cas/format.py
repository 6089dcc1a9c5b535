"""The format of a ROOT: what VERSION says, and the steps from an older format to this one.

    1 → 2   count_usage    the catalog keeps what each tenant stores; the first count

A step is safe to stop anywhere and to repeat, and VERSION is written after it: a crash in
between runs the step once more. No process of an older version can be at work meanwhile,
since its index has another fingerprint, and two that differ never have ROOT open at once.
Once VERSION is written, older versions refuse the ROOT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cas.catalog import Catalog
from cas.catalog.recovery import is_full
from cas.durable import Disk, is_temporary
from cas.errors import StoreFull, UnsuitableRoot
from cas.quotas import recount_usage

FORMAT_VERSION: Final = 2


def _count_usage(catalog: Catalog) -> None:
    recount_usage(catalog)


# From each older format to the next one.
STEPS: Final[dict[int, Callable[[Catalog], None]]] = {1: _count_usage}


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
        disk.write_file(version_path, f"{FORMAT_VERSION}\n".encode())
        return None
    if not text.isdigit() or not 1 <= int(text) <= FORMAT_VERSION:
        raise UnsuitableRoot(
            root, f"its format is {text!r}; this version reads up to {FORMAT_VERSION}"
        )
    return None


def upgrade(root: Path, catalog: Catalog, disk: Disk) -> None:
    """Bring an older ROOT, whose catalog this is, to this format; durable on return.

    On a full disk it stays as it is, to be upgraded when it is opened next: a store must
    open, or nothing could be deleted from it.
    """
    version_path = root / "VERSION"
    try:
        for version in range(int(version_path.read_text()), FORMAT_VERSION):
            STEPS[version](catalog)
            disk.write_file(version_path, f"{version + 1}\n".encode())
    except StoreFull:
        return
    except OSError as error:
        if not is_full(error):
            raise
