"""All workloads, by the names that `blobcask bench` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from bench.cataloguing import commits, lookup, rebuild
from bench.crowd import get_small, put_small, slow_crowd, upload_memory
from bench.loopback import get_http, memory, put_http
from bench.mirroring import mirror, read_backlog
from bench.report import Row
from bench.restoring import restore
from bench.scale import Bench
from bench.storing import dedupe, get_by_size, put_by_size, put_held, put_many, put_unique
from bench.sweeping import sweep
from bench.waking import waking

Workload = Callable[[Bench], list[Row]]

# In the order of the table: what has a target first.
WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "put_unique": put_unique,
        "put_held": put_held,
        "put_many": put_many,
        "commits": commits,
        "lookup": lookup,
        "rebuild": rebuild,
        "sweep": sweep,
        "waking": waking,
        "get_http": get_http,
        "put_http": put_http,
        "memory": memory,
        "put_small": put_small,
        "get_small": get_small,
        "slow_crowd": slow_crowd,
        "upload_memory": upload_memory,
        "put_by_size": put_by_size,
        "get_by_size": get_by_size,
        "dedupe": dedupe,
        "mirror": mirror,
        "backlog": read_backlog,
        "restore": restore,
    }
)
