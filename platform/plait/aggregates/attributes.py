"""Attributes of items and users beside events: as they were known when the event happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from plait.aggregates.moments import to_us
from plait.aggregates.plan import FOREVER
from plait.aggregates.spec import ATTRIBUTE_KEYS, EventSource
from plait.errors import UnknownNameError

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from plait.offline.engine import Engine

# In which rows of a key come into force: by when they are true and known, then by when they happened, then by creation.
_ORDER = ("_since", "_at", "_made")


def with_attributes(engine: Engine, source: EventSource, events: ir.Table, tables: Mapping[str, ir.Table]) -> ir.Table:
    """Events (with `_time` and `_known`) with the source's attributes, a row an element where one is a list.

    An event takes what was known when it happened. One from before anything was known of its item takes what was known
    first and counts from then on: its `_known` becomes that moment.
    """
    for name in source.attribute_tables:
        events = _joined(
            engine, events, tables[name], ATTRIBUTE_KEYS[name], source.attributes_of(name), f"events/{name}"
        )
    return events


def changed_versions(
    engine: Engine, source: EventSource, name: str, new: Sequence[Path], old: Sequence[Path]
) -> ir.Table:
    """(key, `_since`): from when on an item or user is not what it was before the `new` files of its table came.

    A row that says what the one before said, as most of a catalogue that is written anew each day, changes nothing.
    """
    key, wanted = ATTRIBUTE_KEYS[name], source.attributes_of(name)
    needed = [key, "event_timestamp", "created", *dict.fromkeys(wanted.values())]
    rows = engine.read_parquet(list(new)).select(*needed).mutate(_new=True)
    before = engine.read_parquet(list(old)).select(*needed) if old else None
    if before is not None:
        rows = ibis.union(rows, before.mutate(_new=False))
    now = _versions(engine, rows, key, wanted, also=["_new"])
    by_key = ibis.window(group_by=key, order_by=_ORDER)
    same = [now[column].identical_to(now[column].lag().over(by_key)) for column in wanted]
    now = now.mutate(_first=ibis.row_number().over(by_key) == 0, _same=ibis.and_(*same))
    changes = now.filter(now["_new"] & (now["_first"] | ~now["_same"]))
    since = ibis.ifelse(changes["_first"], ibis.literal(-FOREVER, "int64"), changes["_since"])
    changes = changes.select(key, _since=since)
    if before is not None:
        gone = _versions(engine, before, key, wanted).anti_join(now, [key, *_ORDER])
        changes = ibis.union(changes, gone.select(key, "_since"))
    return changes


def unknown_at(
    engine: Engine, source: EventSource, events: ir.Table, tables: Mapping[str, ir.Table], at_us: int
) -> list[ir.Table]:
    """Per attribute table, the events of whose item or user nothing was known at `at_us`."""
    found = []
    for name in source.attribute_tables:
        key = ATTRIBUTE_KEYS[name]
        rows = _versions(engine, tables[name], key, {})
        first = rows.group_by(key).aggregate(_since=rows["_since"].min())
        found.append(events.semi_join(first.filter(first["_since"] > at_us), key))
    return found


def _joined(
    engine: Engine, events: ir.Table, table: ir.Table, key: str, wanted: Mapping[str, str], where: str
) -> ir.Table:
    """Events with the columns of one attribute table, under their names in `wanted`."""
    for column in wanted.values():
        if column not in table.columns:
            raise UnknownNameError("column", column, table.columns, where=where)
    table = _versions(engine, table, key, wanted)
    by_key = ibis.window(group_by=key, order_by=_ORDER)
    table = table.mutate(
        _from=ibis.ifelse(ibis.row_number().over(by_key) == 0, ibis.literal(-FOREVER, "int64"), table["_since"]),
        _to=ibis.coalesce(table["_since"].lead().over(by_key), ibis.literal(FOREVER, "int64")),
    ).select(key, "_from", "_to", "_since", *wanted)
    for name in wanted:
        if isinstance(table[name].type(), ibis.expr.datatypes.Array):
            table = table.mutate(**{name: table[name].unnest()})
    table = table.rename(_key=key)
    joined = events.inner_join(
        table, [events[key] == table["_key"], events["_time"] >= table["_from"], events["_time"] < table["_to"]]
    )
    joined = joined.mutate(_known=ibis.greatest(joined["_known"], joined["_since"]))
    return joined.drop("_key", "_from", "_to", "_since")


def _versions(
    engine: Engine, table: ir.Table, key: str, wanted: Mapping[str, str], *, also: Sequence[str] = ()
) -> ir.Table:
    """Rows of items or users that are in force from `_since` on: `key`, the `wanted` columns (new name → old), `also`.

    `_since` is when a row was both true and known: a correction does not rewrite what was known before it. Of the rows
    in that order those stay that are no older than all before: what is told late of the past replaces nothing newer.
    """
    at = to_us(engine, table["event_timestamp"])
    made = ibis.coalesce(to_us(engine, table["created"]), at)
    columns = {name: table[column] for name, column in wanted.items()}
    table = table.select(key, *also, _at=at, _made=made, _since=ibis.greatest(at, made), **columns)
    newest = table["_at"].max().over(ibis.cumulative_window(group_by=key, order_by=_ORDER))
    table = table.mutate(_newest=newest)
    return table.filter(table["_at"] == table["_newest"]).drop("_newest")
