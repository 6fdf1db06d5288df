"""Interleaved lists of the event log, and which of their two rankers users prefer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from experiments.interleaving import Preference, credit_test
from experiments.report_events import event_views, micros, quote
from plait.errors import DataError
from plait.settings import Home


@dataclass(frozen=True, kw_only=True)
class InterleavedArm:
    """One arm's lists: what either team showed and got, and the test over users (a positive effect favours b)."""

    arm: str
    n_lists: int
    n_users: int
    shown: dict[str, int]
    hits: dict[str, int]
    preference: Preference

    @property
    def conclusion(self) -> str:
        """The better ranker in words."""
        effect = self.preference.effect
        if effect.p_value >= effect.alpha or effect.estimate == 0:
            return "no difference found yet: keep running"
        return f"users prefer {'b, the second ranker' if effect.estimate > 0 else 'a, the first ranker'}"


def interleaved_arms(
    home: Home, experiment: str, *, event: str, since: datetime | None = None, alpha: float = 0.05
) -> list[InterleavedArm]:
    """Per arm of `experiment` whose lists carry teams. Raises DataError if none does.

    An item counts once per list, however often the event was reported.
    """
    after = "" if since is None else f"AND timestamp >= make_timestamptz({micros(since)})"
    with event_views(home.events, "impressions", "feedback") as db:
        rows = db.execute(f"""
            WITH hits AS (SELECT DISTINCT request_id, item_id FROM feedback WHERE type = {quote(event)}),
            shown AS (
                SELECT request_id, user_id, item_id, team,
                       list_filter(arms, lambda a: a.experiment = {quote(experiment)})[1].arm AS arm
                FROM impressions WHERE team IS NOT NULL {after})
            SELECT arm, s.request_id, any_value(user_id),
                   count(*) FILTER (team = 'a'), count(*) FILTER (team = 'b'),
                   count(h.item_id) FILTER (team = 'a'), count(h.item_id) FILTER (team = 'b')
            FROM shown s LEFT JOIN hits h ON s.request_id = h.request_id AND s.item_id = h.item_id
            WHERE arm IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2""").fetchall()
    if not rows:
        raise DataError(
            f"no list of experiment {experiment!r} was interleaved; give an arm rank.interleave_with and let it serve"
        )
    answer = []
    for arm in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == arm]
        answer.append(
            InterleavedArm(
                arm=arm,
                n_lists=len(mine),
                n_users=len({row[2] for row in mine}),
                shown={"a": sum(row[3] for row in mine), "b": sum(row[4] for row in mine)},
                hits={"a": sum(row[5] for row in mine), "b": sum(row[6] for row in mine)},
                preference=credit_test([row[6] - row[5] for row in mine], [row[2] for row in mine], alpha=alpha),
            )
        )
    return answer
