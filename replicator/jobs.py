"""What runs in the background: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from cas.background import CacheState
from cas.config import PRIMARY
from cas.keys import Keys
from cas.store import Store
from replicator.backfilling import Backfill
from replicator.bandwidth import Bandwidth
from replicator.callbacks import Sender
from replicator.canary import Canary
from replicator.deliveries import SendDeliveries
from replicator.destinations import CheckedNetwork
from replicator.drilling import Drill
from replicator.evicting import Evict
from replicator.fetching import Fetches
from replicator.healing import Heal
from replicator.link import Link
from replicator.loop import Job
from replicator.mail import Mailer
from replicator.mirror import Mirror
from replicator.names import Names
from replicator.reaching import Reach
from replicator.removing import Abandoned, Removal
from replicator.scrubbing import ScrubRound
from replicator.shipping import Compact, Ship
from replicator.socket_server import Answering
from replicator.sweeping import Collect, Date, Forget, Sweep, Upkeep


@final
class Jobs:
    """The jobs of one store. Make it where an event loop runs; for one process at a time."""

    def __init__(self, store: Store, keys: Keys, links: Sequence[Link] = ()) -> None:
        settings = store.settings
        self._store = store
        self._links = links
        self._evict = Evict(store, links, settings.cache.max_size)
        self._fetches = Fetches(store, links, self._evict.room)
        bandwidth = Bandwidth(settings.replicator.bandwidth)
        self._ships = {link.name: Ship(store, link) for link in links}
        self._mirrors = {
            link.name: Mirror(
                store,
                link,
                concurrency=settings.replicator.concurrency,
                bandwidth=bandwidth,
                bring=self._fetches.bring,
            )
            for link in links
        }
        mailer = Mailer(settings.mail)
        self._sending = SendDeliveries(
            store, keys.callbacks, sender_of(store), mailer, ring=keys.secrets
        )

    def due(self) -> list[Job]:
        """Those that end when nothing is due, in the order in which `replicate once` does them.

        Shipping comes more than once: what was copied may be evicted, and be deleted, once the
        journal that tells so is shipped; and what a run did is shipped by the same run.
        """
        store, links = self._store, self._links
        return [
            self._sending,
            Date(store),
            Sweep(store),
            Forget(store),
            Collect(store),
            *(job for link in links for job in self._mirroring(link)),
            *([self._evict] if links else []),
            *self._ships.values(),
            Upkeep(store),
        ]

    def lasting(self) -> list[Job]:
        """Those of a process that lasts: also what is at work, or asked, all the time."""
        store, settings = self._store, self._store.settings
        jobs = list(dict.fromkeys(self.due()))  # each once: they go on by themselves
        if self._links:
            primary = self._mirrors.get(PRIMARY)
            copy_now = primary.copy_now if primary else None
            # It ends the fetches when it is closed, so it stands before whom they serve.
            jobs.insert(0, Answering(store.root, self._fetches, copy_now))
            jobs.append(Heal(store, self._links, self._fetches))
            jobs += [Canary(store, link) for link in self._links]
        if settings.replicator.drill_every:
            jobs += [Drill(store, link) for link in self._links]
        if settings.sweeper.scrub_rate:
            jobs.append(ScrubRound(store, settings.sweeper.scrub_rate))
        return jobs

    def cache(self) -> CacheState | None:
        """What was done for readers so far; None where there are no targets."""
        if not self._links:
            return None
        return CacheState(self._fetches.fetched_bytes, self._evict.evicted)

    def _mirroring(self, link: Link) -> list[Job]:
        """The jobs of one target: reached first, and nothing is written before the journal is
        known to be ours to ship (invariant 12)."""
        store, ship = self._store, self._ships[link.name]
        return [
            Reach(store, link),
            Backfill(store, link.name),
            ship,
            self._mirrors[link.name],
            ship,
            Compact(store, link, ship),
            Removal(store, link, store.settings.replicator.delete_delay),
            Abandoned(store, link),
        ]


def sender_of(store: Store) -> Sender:
    """What sends over the network as the settings allow it."""
    callbacks = store.settings.callbacks
    network = CheckedNetwork(Names().resolve, callbacks.allowed_networks)
    return Sender(network, store.clock, timeout_us=callbacks.timeout)
