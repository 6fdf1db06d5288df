"""Forgetting sticky arms that nobody will ask for again: of experiments that ended, were stopped or removed.

Not at once: a rollback may bring an experiment back, and its units must then find the arms they had. So rows are kept
until the experiment has been over for some time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from experiments.conditions import moment
from experiments.store import ConfigStore, ConfigVersion
from experiments.tables import SCHEMA, sticky_arms
from plait.database import prepare, unreachable

_BATCH = 5_000  # rows a transaction: other writers of the same SQLite file get in between
_PAGE = 200  # versions read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Prunable:
    """One experiment's rows, and since when it is over (None: no version that is kept ever ran it)."""

    experiment: str
    n_rows: int
    over_since: datetime | None


def prunable(
    store: ConfigStore,
    *,
    older_than: timedelta,
    now: datetime | None = None,
    replay: timedelta = timedelta(0),
) -> list[Prunable]:
    """Experiments with sticky rows that have been over for at least `older_than`. StoreError without database.

    now: by the wall's clock, as versions are dated; replay: what the home's clock adds to it, by which
    experiments end.
    """
    now = now or datetime.now(UTC)
    counts = _counts(store)
    over = _over_since(store, set(counts), now, replay)
    return [
        Prunable(experiment=name, n_rows=counts[name], over_since=since)
        for name, since in sorted(over.items())
        if since is None or now - since >= older_than
    ]


def prune(store: ConfigStore, found: list[Prunable]) -> int:
    """Delete their rows; how many there were."""
    key = (sticky_arms.c.experiment, sticky_arms.c.unit_kind, sticky_arms.c.unit)
    deleted = 0
    for each in found:
        some = sa.select(*key).where(sticky_arms.c.experiment == each.experiment).limit(_BATCH)
        while True:
            try:
                with store.engine.begin() as db:
                    n_rows = db.execute(sticky_arms.delete().where(sa.tuple_(*key).in_(some))).rowcount
            except sa.exc.SQLAlchemyError as error:
                raise unreachable("the store of sticky arms", error) from error
            deleted += n_rows
            if not n_rows:
                break
    return deleted


def _counts(store: ConfigStore) -> dict[str, int]:
    query = sa.select(sticky_arms.c.experiment, sa.func.count()).group_by(sticky_arms.c.experiment)
    try:
        prepare(store.engine, SCHEMA)
        with store.engine.connect() as db:
            return {row[0]: row[1] for row in db.execute(query)}
    except sa.exc.SQLAlchemyError as error:
        raise unreachable("the store of sticky arms", error) from error


def _over_since(store: ConfigStore, names: set[str], now: datetime, replay: timedelta) -> dict[str, datetime | None]:
    """Of the names that the live version does not run: when they stopped running. Versions are read newest first."""
    over: dict[str, datetime | None] = dict.fromkeys(names)
    waiting, replaced = set(names), now
    for version in _newest_first(store):
        for name in list(waiting):
            until = _runs_until(version.document, name, replaced, replay)
            if until is None:
                continue
            waiting.discard(name)
            if until >= now:
                del over[name]
            else:
                over[name] = until
        replaced = version.created
        if not waiting:
            break
    return over


def _runs_until(document: Any, name: str, replaced: datetime, replay: timedelta) -> datetime | None:
    """Until when a version ran the experiment: its end, or when the version was replaced; None if it did not run it.
    A draft may run tomorrow with the arms of before, and a configuration that is switched off may be switched on."""
    raw = (document.get("experiments") or {}).get(name)
    if raw is None or raw.get("state") == "stopped":
        return None
    end = moment(raw["end"]) if raw.get("end") else None
    return min(end - replay, replaced) if end else replaced


def _newest_first(store: ConfigStore) -> Iterator[ConfigVersion]:
    before: int | None = None
    while page := store.history(_PAGE, before=before):
        yield from page
        before = page[-1].version
