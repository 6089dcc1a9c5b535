"""What runs in the background: one line each."""

from __future__ import annotations

from cas.keys import Keys
from cas.store import Store
from replicator.callbacks import Sender
from replicator.deliveries import SendDeliveries
from replicator.destinations import CheckedNetwork
from replicator.loop import Job
from replicator.names import Names
from replicator.scrubbing import ScrubRound
from replicator.sweeping import Collect, Forget, Sweep, Upkeep


def jobs_of(store: Store, keys: Keys) -> list[Job]:
    """The jobs of one store, in the order in which `replicate once` does them."""
    return [
        SendDeliveries(store, keys.callbacks, sender_of(store)),
        Sweep(store),
        Forget(store),
        Collect(store),
        Upkeep(store),
    ]


def lasting_jobs_of(store: Store, keys: Keys) -> list[Job]:
    """The jobs of a process that lasts: also what is at work all the time."""
    rate_bytes = store.settings.sweeper.scrub_rate
    return [*jobs_of(store, keys), *([ScrubRound(store, rate_bytes)] if rate_bytes else [])]


def sender_of(store: Store) -> Sender:
    """What sends over the network as the settings allow it."""
    callbacks = store.settings.callbacks
    network = CheckedNetwork(Names().resolve, callbacks.allowed_networks)
    return Sender(network, store.clock, timeout_us=callbacks.timeout)
