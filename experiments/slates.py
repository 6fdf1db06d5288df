"""Lists drawn at random: two rankers interleaved, and the Plackett-Luce model of explored ones.

Nothing here needs scipy: the server imports it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Team = Literal["a", "b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interleaved:
    """The list to show and, per position, the ranker that put its item there."""

    items: tuple[Hashable, ...]
    teams: tuple[Team, ...]


def team_draft(a: Sequence[Hashable], b: Sequence[Hashable], *, k: int, rng: np.random.Generator) -> Interleaved:
    """Rankers pick in turn their best item not yet taken; each round a coin says who picks first.

    Source: Radlinski, Kurup and Joachims, "How does clickthrough data reflect retrieval quality?", CIKM 2008, alg. 2.
    Stops at k items, or when both lists are exhausted.
    """
    items: list[Hashable] = []
    teams: list[Team] = []
    taken: set[Hashable] = set()
    lists: dict[Team, list[Hashable]] = {"a": list(a), "b": list(b)}
    at: dict[Team, int] = {"a": 0, "b": 0}

    def pick(team: Team) -> bool:
        ranked = lists[team]
        while at[team] < len(ranked) and ranked[at[team]] in taken:
            at[team] += 1
        if at[team] >= len(ranked):
            return False
        items.append(ranked[at[team]])
        taken.add(ranked[at[team]])
        teams.append(team)
        return True

    while len(items) < k:
        first: Team = "a" if rng.random() < 0.5 else "b"
        second: Team = "b" if first == "a" else "a"
        picked = pick(first)
        if len(items) < k:
            picked = pick(second) or picked
        if not picked:
            break
    return Interleaved(items=tuple(items), teams=tuple(teams))


def probabilistic(
    a: Sequence[Hashable], b: Sequence[Hashable], *, k: int, rng: np.random.Generator, tau: float = 3.0
) -> Interleaved:
    """At each position a coin chooses the ranker, which draws an item with probability ~ rank^-tau among those left.

    Every item has a chance, so that any two rankers can be compared on the log (`probabilistic_credit`).
    Source: Hofmann, Whiteson and de Rijke, "A probabilistic method for inferring preferences from clicks", CIKM 2011.
    """
    left: dict[Team, list[tuple[Hashable, float]]] = {"a": _weighted(a, tau), "b": _weighted(b, tau)}
    items: list[Hashable] = []
    teams: list[Team] = []
    while len(items) < k and (left["a"] or left["b"]):
        team: Team = "a" if rng.random() < 0.5 else "b"
        if not left[team]:
            team = "b" if team == "a" else "a"
        weights = np.array([weight for _, weight in left[team]])
        chosen = left[team][int(rng.choice(len(weights), p=weights / weights.sum()))][0]
        items.append(chosen)
        teams.append(team)
        left = {name: [(item, w) for item, w in pool if item != chosen] for name, pool in left.items()}
    return Interleaved(items=tuple(items), teams=tuple(teams))


def _weighted(ranked: Sequence[Hashable], tau: float) -> list[tuple[Hashable, float]]:
    return [(item, softmax_rank(rank, tau)) for rank, item in enumerate(ranked, start=1)]


def softmax_rank(rank: int, tau: float = 3.0) -> float:
    """Unnormalised weight of a rank (1 = top)."""
    return float(rank**-tau)


def plackett_luce(weights: np.ndarray) -> np.ndarray:
    """Chance of each item at its position given those above it, for log-weights (k,) in the order shown.

    >>> plackett_luce(np.log([3.0, 1.0, 1.0])).round(3).tolist()
    [0.6, 0.5, 1.0]
    """
    left = np.logaddexp.accumulate(weights[::-1])[::-1]
    return np.asarray(np.exp(weights - left))
