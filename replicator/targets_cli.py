"""`blobcask replicate fetch`, `moved` and `claim`: when a target is to go, has another address, or
had another node that ships to it."""

from __future__ import annotations

from contextlib import ExitStack, closing

import click

from cas.alone import Alone
from cas.background import PLACE
from cas.cli.call import Call, counted, pass_call, size
from cas.cli.exits import WrongFound
from cas.errors import Conflict, InvalidRequest, NotFound
from cas.records import Target as TargetRecord
from cas.replicas import moved as write_moved
from cas.store import Store
from cas.totals import blobs_elsewhere
from replicator.places import place_of
from replicator.targets import Target


@click.command()
@pass_call
def fetch(call: Call) -> None:
    """Bring the bytes of all evicted blobs back to this disk, from whichever target has them.

    For a target that is to go: blobs that are nowhere else keep it. Bytes are verified as they
    come. It may run beside a server and its background process, and be killed and begun anew.
    Refuses while [cache] max_size is set, since the cache would let go of them again, and when
    the disk has no room for all of them. Not 0 when some could not be fetched.
    """
    # Late, so that other verbs start without asyncio.
    from replicator.opening import open_target
    from replicator.restoring import Fetched, fetch_all

    if call.settings.cache.max_size:
        raise Conflict(
            "[cache] max_size is set, so what is fetched would be evicted again: set it to 0, "
            "restart the background process, then fetch"
        )
    with ExitStack() as stack:
        store = stack.enter_context(call.open())
        with store.catalog.read() as snapshot:
            elsewhere = blobs_elsewhere(snapshot)
        done = Fetched()
        if elsewhere.count:
            store.blobs.need_room(elsewhere.size_bytes)
            targets = [
                stack.enter_context(closing(open_target(settings, known=True)))
                for settings in call.settings.targets
            ]
            if not targets:
                raise InvalidRequest("[replicator] targets", "names none to fetch from")
            bar = stack.enter_context(call.progress("fetch"))
            bar.total(elsewhere.size_bytes)
            done = fetch_all(store, targets[0], bar.advance, targets[1:])
    call.answer(
        {
            "fetched_blobs": done.blobs,
            "fetched_bytes": done.size_bytes,
            "not_fetched": done.failed,
        },
        [
            f"{counted(done.blobs, 'blob')} fetched, {size(done.size_bytes)}.",
            *(f"not fetched: {digest}: {why}" for digest, why in done.failed.items()),
        ],
    )
    if done.failed:
        raise WrongFound


@click.command()
@click.argument("name")
@pass_call
def moved(call: Call, name: str) -> None:
    """Say that target NAME is the same place as before, under the address the settings tell now.

    A bucket with another endpoint, a folder that was mounted elsewhere: what was copied there
    counts on. Else a target whose address changes is taken for another place. Refuses while a
    background process runs, and where this store's journal is not at the new address. The
    server there is probed anew.
    """
    from replicator.fence import judge, node_of, read_head
    from replicator.opening import open_target

    settings = next((each for each in call.settings.targets if each.name == name), None)
    if settings is None:
        raise NotFound("target", name)
    alone = Alone(call.store_root / PLACE)
    try:
        if not alone.take():
            raise Conflict(f"a background process (PID {alone.holder()}) runs here; stop it first")
        with call.open() as store, closing(open_target(settings)) as target:
            with store.catalog.read() as snapshot:
                record = snapshot.get(TargetRecord, name)
            if record is None:
                raise NotFound("target", name)
            seen = read_head(target)
            if seen.head is None:
                raise Conflict(f"{target.place} is not where {record.place} was: no journal there")
            node = node_of(store.root, store.disk)
            judge(store.catalog, store.store_id(), node, target, seen)
            write_moved(store.catalog, name, target.place)
            place = target.place
    finally:
        alone.close()
    call.answer(
        {"target": name, "was": record.place, "place": place},
        [f"{name} was {record.place} and is {place} now; what was copied there counts on."],
    )


@click.command()
@click.argument("name")
@pass_call
def claim(call: Call, name: str) -> None:
    """Make this node the one that ships to target NAME, in the place of one that is gone.

    For a ROOT that was moved or copied here for good. Only one node may ship to a target; the
    other one stops when it next looks. Refuses where the target holds what this store does not
    know: then restore from there.
    """
    from replicator.opening import open_target

    target = open_target(place_of(call, name))
    try:
        with call.open() as store:
            told = _claimed(store, target)
    finally:
        target.close()
    call.answer({"target": name, "claimed": told}, [told])


def _claimed(store: Store, target: Target) -> str:
    """Make this node the one that ships to `target`; returns what to tell people."""
    from replicator.fence import claim as take_over
    from replicator.fence import node_of
    from replicator.probe import Profile

    node = node_of(store.root, store.disk)
    with store.catalog.read() as snapshot:
        record = snapshot.get(TargetRecord, target.name)
    known = Profile.from_json(record.profile) if record and record.profile else Profile()
    conditional = known.conditional
    before = take_over(store.catalog, store.store_id(), node, target, conditional=conditional)
    if before is None:
        return f"Nobody ships to {target.place} yet; the next replicator that runs does."
    if before.node == node:
        return f"This node ships to {target.place} already."
    return f"This node ships to {target.place} now, in the place of {before.node} on {before.host}."
