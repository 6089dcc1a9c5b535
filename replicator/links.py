"""The links to all targets of a store: opened, and told to the catalog, when a process starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cas.config import TargetSettings
from cas.records import Target
from cas.replicas import register
from cas.store import Store
from replicator.link import Link
from replicator.opening import open_target
from replicator.reaching import profile_of


@contextmanager
def opened_links(store: Store) -> Iterator[list[Link]]:
    """A link for each configured target, closed at the end. No target is spoken to yet.

    From here on the catalog makes rows for just these targets. Raises TargetNeeded where one
    with copies is configured no more, or is another place now.
    """
    with ExitStack() as stack:
        links = [_opened(stack, store, settings) for settings in store.settings.targets]
        register(store.catalog, [(link.name, link.target.place) for link in links])
        for link in links:  # after that: a target whose place is another now was never probed
            link.profile = profile_of(store, link.name)
        yield links


def _opened(stack: ExitStack, store: Store, settings: TargetSettings) -> Link:
    with store.catalog.read() as snapshot:
        record = snapshot.get(Target, settings.name)
    target = open_target(settings, known=bool(record and record.profile))
    stack.callback(target.close)
    return Link(target, settings, None)
