"""The schema page: what is on the disk must be readable for ever."""

from __future__ import annotations

import msgspec
import pytest

from cas.catalog.layout import LAYOUTS
from cas.records import RECORDS, Record, Replica


def test_every_table_has_its_own_name_and_number() -> None:
    assert len({kind.schema.number for kind in RECORDS}) == len(RECORDS)
    assert len({kind.schema.table for kind in RECORDS}) == len(RECORDS)
    # Two bytes begin every key of the index, and 0 is the head's.
    assert all(0 < kind.schema.number < 256 for kind in RECORDS)


def test_the_numbers_of_tables_never_change() -> None:
    """They are in every journal; a new table takes a new number."""
    numbers = {kind.schema.table: kind.schema.number for kind in RECORDS}
    known = {"blobs": 1, "stored_files": 2, "pending_uploads": 3, "upload_files": 4, "events": 5,
             "marks": 6, "partials": 7, "deliveries": 8, "usage": 9,
             "delivery_payloads": 10, "targets": 11, "replicas": 12, "copies": 13, "totals": 14,
             "once": 15, "subscriptions": 16, "approvals": 17, "webhooks": 18, "secrets": 19,
             "runs": 20, "steps": 21, "step_values": 22,
             "run_texts": 23}  # fmt: skip
    assert known.items() <= numbers.items()


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: str(kind.schema.table))
def test_the_schema_names_fields_that_exist(kind: type[Record]) -> None:
    fields = set(kind.__struct_fields__)
    schema = kind.schema
    assert set(schema.key) <= fields
    assert set(schema.digests) <= fields
    derived = {name for name, member in vars(kind).items() if isinstance(member, property)}
    for names in [*schema.unique.values(), *schema.indexes.values()]:
        assert set(names) <= fields | derived
    assert not set(schema.unique) & set(schema.indexes)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: str(kind.schema.table))
def test_no_two_records_share_an_entry_of_an_index(kind: type[Record]) -> None:
    """An entry holds one key, so an index must end with what tells records apart."""
    # Where a record is listed at all, these two are the name of its target.
    same = {"queue": "target", "ending": "target"} if kind is Replica else {}
    for fields in kind.schema.indexes.values():
        assert set(kind.schema.key) <= {same.get(field, field) for field in fields}


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: str(kind.schema.table))
def test_a_record_is_an_array_that_may_grow_at_its_end(kind: type[Record]) -> None:
    class Grown(kind, frozen=True, array_like=True):  # type: ignore[valid-type,misc,call-arg]
        """As a later version may declare it."""

        added: int = 7

    layout = LAYOUTS[kind]
    assert msgspec.json.schema(kind)["$defs"][kind.__name__]["type"] == "array"
    values = {field.name: sample(field.type) for field in msgspec.structs.fields(kind)}
    record = kind(**values)
    raw = msgspec.msgpack.encode(record)
    assert layout.decode(raw) == record
    assert msgspec.msgpack.decode(raw, type=Grown).added == 7
    # And the other way round, for a node that was not upgraded yet.
    assert layout.decode(msgspec.msgpack.encode(Grown(**values))) == record


def sample(kind: object) -> object:
    """A value of a field's type."""
    if getattr(kind, "__origin__", None) is list:
        return []
    for wanted, value in ((bytes, b"b"), (str, "s"), (bool, True), (int, 1)):
        if kind is wanted or wanted in getattr(kind, "__args__", ()):
            return value
    for choice in getattr(kind, "__args__", ()):
        if getattr(choice, "__origin__", None) is tuple:
            return tuple(sample(part) for part in choice.__args__)
    return b"b"
