"""Values exactly as of each sample: every event before it, never its own, whatever the view's cadence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from plait.aggregates.exact import exact_values
from plait.errors import DataError, UnknownNameError
from tests.aggregates.test_faults import EVENTS, SPEC, event
from tests.aggregates.witness import DAY, HOUR, START, everything, known, lists, naive

UTC_US = pa.timestamp("us", tz="UTC")


def samples_of(moments: list[tuple[int, int]]) -> pa.Table:
    users, at = zip(*moments, strict=True)
    columns = {"label": list(range(len(users))), "user_id": users, "event_timestamp": pa.array(at, pa.int64())}
    table = pa.table(columns)
    return table.set_column(2, "event_timestamp", table["event_timestamp"].cast(UTC_US))


@pytest.mark.parametrize("spec", [everything("event"), everything("day"), lists("hour")], ids=["event", "day", "list"])
def test_a_sample_sees_every_event_before_it_and_never_its_own(make_home, spec):
    """Samples at the events themselves, as training samples are, and 1 us before and after."""
    events = [*EVENTS, *(event(50 + i, START + i * DAY, created=START + i * DAY + 5 * HOUR) for i in range(4))]
    moments = [(e["user_id"], e["timestamp"] + step) for e in events for step in (1, 0, -1)] + [(9, START + DAY)]
    samples = samples_of(moments + moments[:2])
    found = exact_values(make_home(events), spec, samples)
    assert found.select(samples.column_names).equals(samples)
    exactly = everything("event") if spec.name == "stats" else lists("event")
    for row, (user, at) in zip(found.to_pylist(), moments + moments[:2], strict=True):
        before = [e for e in events if e["timestamp"] < at and known(e) <= at]
        expected = naive(exactly, before, (user,), at) or dict.fromkeys(spec.columns)
        assert {name: row[name] for name in spec.columns} == expected, (user, at)


def test_the_number_of_a_key_s_events_before_each_of_them_is_its_place(make_home):
    mine = [e for e in EVENTS if e["user_id"] == 1]
    found = exact_values(make_home(EVENTS), SPEC, samples_of([(1, e["timestamp"]) for e in mine]))
    assert [n or 0 for n in found["n_all"].to_pylist()] == list(range(len(mine)))


def test_samples_that_cannot_be_answered_are_refused(make_home):
    home = make_home(EVENTS)
    with pytest.raises(UnknownNameError, match="no column 'user_id'; did you mean 'user'"):
        exact_values(home, SPEC, samples_of([(1, START)]).rename_columns(["label", "user", "event_timestamp"]))
    plain = pa.table({"user_id": [1], "event_timestamp": [datetime(2024, 1, 1)]})
    with pytest.raises(DataError, match="give timestamps with a time zone"):
        exact_values(home, SPEC, plain)
    holey = pa.table({"user_id": [1, 2], "event_timestamp": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(1), None]})
    with pytest.raises(DataError, match="1 of 2 have no event_timestamp"):
        exact_values(home, SPEC, holey)
