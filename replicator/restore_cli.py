"""`blobcask restore`: a node from a target alone; the drill; accepting a state of the past."""

from __future__ import annotations

from contextlib import ExitStack

import click

from cas.alone import Alone
from cas.background import PLACE
from cas.cli.call import JSON, Call, counted, pass_call, read_value, size
from cas.cli.exits import WrongFound
from cas.clock import parse_rfc3339, rfc3339
from cas.config import TargetSettings
from cas.errors import NotFound
from cas.records import Mark
from cas.restored import FETCHING, accept
from replicator.places import place_of
from replicator.probe import Profile
from replicator.restoring import (
    Fetched,
    Options,
    Restored,
    RestoreRefused,
    fetch_all,
    refuse,
)
from replicator.restoring import restore as make_store
from replicator.targets import Target

_KEYS = (
    "Keys are not mirrored: put the files of ROOT/keys back from your own copy. Without them "
    "new ones are made, and tokens, signed links and callbacks signed before are not valid; "
    "receipts given before cannot be checked with this server's keys."
)


@click.command("restore")
@click.option(
    "--from",
    "source",
    metavar="NAME|s3://BUCKET/PREFIX|FOLDER",
    help="A target of the settings, or a place. Only needed where the settings name several.",
)
@click.option("--lazy", is_flag=True, help="Serve at once; bytes are fetched when they are read.")
@click.option("--at", metavar="TIME", help="The state at this time, as 2025-12-11T10:00:00Z.")
@click.option(
    "--accept-loss", is_flag=True, help="Go on where the history at the target is broken."
)
@click.option(
    "--no-claim", is_flag=True, help="Leave the target to the node that ships there; for a look."
)
@click.option("--drill", is_flag=True, help="Practise it with the store that is here, and compare.")
@click.option("--accept", "accepts", is_flag=True, help="After --at: let sweep and mirror go on.")
@pass_call
def restore(
    call: Call,
    source: str | None,
    lazy: bool,
    at: str | None,
    accept_loss: bool,
    no_claim: bool,
    drill: bool,
    accepts: bool,
) -> None:
    """Make a store at ROOT, which is empty, from what a target holds.

    Names, retention, pending uploads and versions come first; then all bytes, verified, or
    with --lazy each when it is read. This node is then the one that ships to the target; a
    node that did so before stops. What is begun and killed is done again by the same command.
    """
    if accepts:
        _accept(call)
        return
    settings = place_of(call, source)
    if drill:
        _drill(call, settings)
        return
    options = Options(
        None if at is None else read_value("--at", parse_rfc3339, at),
        accept_loss,
        not lazy,
        not no_claim,
    )
    target = _open(settings)
    try:
        _restore(call, target, options)
    finally:
        target.close()


def _restore(call: Call, target: Target, options: Options) -> None:
    root = call.settings.store.root.absolute()
    made: Restored | None = None
    if not _goes_on(call, target, options):
        refuse(root)  # before the target is asked
        profile = _probed(target) if options.claims else None
        made = make_store(root, call.settings, target, profile, options, say=call.say)
        _tell(call, made)
    fetched = Fetched()
    if options.eager:
        fetched = _fetch(call, target)
    call.answer(_form(made, fetched), _lines(made, fetched))
    if fetched.failed or (made and made.counted.missing_blobs):
        raise WrongFound


def _goes_on(call: Call, target: Target, options: Options) -> bool:
    """Whether an eager restore from this place was killed while it fetched."""
    root = call.settings.store.root
    if not options.eager or not (root / "VERSION").is_file():
        return False
    with call.open() as store, store.catalog.read() as snapshot:
        mark = snapshot.get(Mark, FETCHING)
    if mark is None:
        return False
    if mark.value != target.place:
        raise RestoreRefused(root, f"a restore from {mark.value} is under way there")
    call.say("The catalog is back; going on with the bytes.")
    return True


def _fetch(call: Call, target: Target) -> Fetched:
    alone = Alone(call.settings.store.root / PLACE)
    try:
        if not alone.take():
            call.say("A background process runs already; it fetches what is read.")
            return Fetched()
        with ExitStack() as stack:
            others = []
            for settings in call.settings.targets:
                other = _open(settings)
                stack.callback(other.close)
                if other.place != target.place:
                    others.append(other)
            store = stack.enter_context(call.open())
            bar = stack.enter_context(call.progress("fetch"))
            return fetch_all(store, target, bar.advance, others)
    finally:
        alone.close()


def _tell(call: Call, made: Restored) -> None:
    call.say(f"The state of {rfc3339(made.state_of_us)}, of node {made.head.node}.")
    if made.lost:
        call.say(f"Lost: {made.lost}.")
    if made.counted.missing_blobs:
        call.say(
            f"{counted(made.counted.missing_blobs, 'blob')} had not reached the target: their "
            "files are listed, and their bytes missing until somebody sends them again."
        )
    if made.counted.partials:
        call.say(f"{counted(made.counted.partials, 'unfinished upload')} must begin again.")
    call.say(_KEYS)


def _accept(call: Call) -> None:
    with call.open() as store:
        time = accept(store.catalog, actor=call.actor)
    if not time:
        raise NotFound("restore that waits for acceptance", "")
    call.answer({"accepted": time}, [f"The state of {time} is accepted."])


def _drill(call: Call, settings: TargetSettings) -> None:
    from replicator.drilling import drill

    target = _open(settings)
    try:
        with call.open() as store:
            made = drill(store, target)
    finally:
        target.close()
    call.answer(
        {"files": made.files, "blobs": made.blobs, "size_bytes": made.size_bytes},
        [
            f"A restore from {target.place} brings back {counted(made.files, 'file')}.",
            f"It is as of {made.head.told}.",
            f"{counted(made.blobs, 'blob')} were read and hashed, {size(made.size_bytes)}.",
        ],
    )


def _open(settings: TargetSettings) -> Target:
    from replicator.opening import open_target

    return open_target(settings)


def _probed(target: Target) -> Profile:
    from replicator.probe import probe

    return probe(target)


def _form(made: Restored | None, fetched: Fetched) -> JSON:
    form: JSON = {
        "fetched_blobs": fetched.blobs,
        "fetched_bytes": fetched.size_bytes,
        "not_fetched": fetched.failed,
    }
    if made is not None:
        form |= {
            "state_of": rfc3339(made.state_of_us),
            "epoch": made.began.epoch,
            "seq": made.began.seq,
            "lost": made.lost,
            "files": made.counted.files,
            "blobs": made.counted.blobs,
            "size_bytes": made.counted.size_bytes,
            "missing_blobs": made.counted.missing_blobs,
            "missing": made.counted.missing,
            "unfinished_uploads": made.counted.partials,
        }
    return form


def _lines(made: Restored | None, fetched: Fetched) -> list[str]:
    lines = []
    if made is not None:
        counts = made.counted
        lines.append(
            f"{counted(counts.files, 'file')} are back, in {counted(counts.blobs, 'blob')} of "
            f"{size(counts.size_bytes)}; epoch {made.began.epoch} begins at frame {made.began.seq}."
        )
    if fetched.blobs:
        lines.append(f"{counted(fetched.blobs, 'blob')} fetched, {size(fetched.size_bytes)}.")
    lines += [f"not fetched: {digest}: {why}" for digest, why in fetched.failed.items()]
    return lines
