"""The expression behind feature tables, against a loop over Python rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ibis
import pytest
from hypothesis import given, settings

from plait.aggregates import AggregateSpec
from plait.aggregates.events import normalised, raw_events
from plait.aggregates.exact import as_of
from plait.aggregates.plan import Plan
from plait.aggregates.tables import Span, feature_rows
from plait.offline.engine import Engine
from tests.aggregates.witness import (
    DAY,
    NO_SHRINKING,
    START,
    all_keys,
    everything,
    items_table,
    lists,
    look_up,
    naive,
    probes,
    random_events,
    to_table,
)

LATER = START + 100 * DAY
SPECS = [
    everything("event"),
    everything("hour"),
    everything("day"),
    everything("event", keys=("item_id",)),
    everything("event", keys=("user_id", "genre")),
    everything("day", keys=("user_id", "genre")),
    lists("event"),
    lists("day"),
]


def normal_events(engine: Engine, spec: AggregateSpec, events: Sequence[dict[str, Any]]) -> ibis.Table:
    plan = Plan(spec)
    raw = raw_events(engine, plan, engine.from_arrow(to_table(events)))
    return normalised(engine, plan, raw, {"items": engine.from_arrow(items_table())})


def table_rows(engine: Engine, spec: AggregateSpec, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = feature_rows(Plan(spec), normal_events(engine, spec, events), Span(until=LATER))
    found = engine.to_arrow(rows).to_pylist()
    return [{**row, "event_timestamp": row["_at"], "created": row["_at"]} for row in found]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}-{spec.cadence}")
@settings(max_examples=3, deadline=None, phases=NO_SHRINKING)
@given(events=random_events())
def test_a_table_read_at_any_moment_agrees_with_the_naive_loop(engine, spec, events):
    rows = table_rows(engine, spec, events)
    for key in all_keys(spec):
        own = [row for row in rows if tuple(row[name] for name in spec.keys) == key]
        for at in probes(own, events):
            assert look_up(own, spec, key, at) == naive(spec, events, key, at), (key, at)


@pytest.mark.parametrize("spec", SPECS[:3] + SPECS[-2:], ids=lambda spec: f"{spec.name}-{spec.cadence}")
@settings(max_examples=2, deadline=None, phases=NO_SHRINKING)
@given(events=random_events(max_size=15))
def test_exact_values_as_of_a_moment_agree_with_the_naive_loop(engine, spec, events):
    asked = [{"user_id": key[0], "_at": at} for key in all_keys(spec) for at in probes([], events)]
    rows = engine.from_arrow(ibis.memtable(asked).to_pyarrow())
    found = engine.to_arrow(as_of(Plan(spec), normal_events(engine, spec, events), rows)).to_pylist()
    assert len(found) == len(asked)
    for row in found:
        expected = naive(spec, events, (row["user_id"],), row["_at"])
        assert {name: row[name] for name in spec.columns} == (expected or dict.fromkeys(spec.columns)), row
