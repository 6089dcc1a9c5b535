"""`blobcask replicate forget`: let go of a target for good."""

from __future__ import annotations

import click
from msgspec import to_builtins

from cas import replicas
from cas.cli.call import Call, counted, pass_call
from cas.errors import TargetNeeded


@click.command()
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Show what would be forgotten, and forget nothing.")
@pass_call
def forget(call: Call, name: str, dry_run: bool) -> None:
    """Let go of target NAME: nothing is known of its copies any more.

    For a target that is configured no more, or whose name stands for another place now. What it
    holds stays there. Refuses while blobs have their good bytes there alone. One that is
    configured still is a new one when the background process starts next: all is copied there.
    """
    with call.open() as store:
        plan = replicas.plan_forgetting(store.catalog, name)
        if plan.needed:
            raise TargetNeeded(name, plan.place, blobs=plan.needed)
        if not dry_run:
            replicas.forget(store.catalog, name)
    told = f"{name} ({plan.place}): {counted(plan.rows, 'blob')}"
    call.answer({**to_builtins(plan), "dry_run": dry_run}, [told])
    call.say(f"Target {name} {'would be' if dry_run else 'is'} forgotten; what it holds stays.")
