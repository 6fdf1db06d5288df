"""Which ranked items are shown, in which order: sorted, explored (Plackett-Luce), or interleaved from two rankers.

Draws come from the request's id alone, so that a request can be answered again exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import mmh3
import numpy as np

from experiments.slates import plackett_luce, probabilistic, team_draft

METHODS = ("team_draft", "probabilistic")


@dataclass(frozen=True, slots=True)
class Slate:
    """order: candidates shown, best first, (k,). propensities: chance of each at its position, given those above it.

    Propensities are None where nobody knows them (an interleaved list); teams where there is one ranker.
    """

    order: np.ndarray
    propensities: np.ndarray | None
    teams: tuple[str, ...] | None = None


def sorted_slate(item_ids: np.ndarray, scores: np.ndarray | None, k: int) -> Slate:
    """The k best; equal scores go to the lower item id. Without scores, the order the candidates came in."""
    order = np.arange(len(item_ids)) if scores is None else np.lexsort((item_ids, -scores))
    return Slate(order[:k], np.ones(min(k, len(order))))


def explored_slate(item_ids: np.ndarray, scores: np.ndarray, k: int, temperature: float, request_id: str) -> Slate:
    """The k best in an order drawn from the Plackett-Luce model with log-weights score / temperature.

    Only the order is drawn, so nobody is shown what the ranker would not have shown. The draw sorts scores with Gumbel
    noise: Yellott, "The relationship between Luce's choice axiom, Thurstone's theory …", J. Math. Psych. 15, 1977.
    """
    best = sorted_slate(item_ids, scores, k).order
    weights = scores[best].astype(np.float64) / temperature
    drawn = np.argsort(-(weights + draws_of(request_id).gumbel(size=len(best))), kind="stable")
    return Slate(best[drawn], plackett_luce(weights[drawn]))


def interleaved_slate(
    item_ids: np.ndarray, a: np.ndarray, b: np.ndarray, k: int, method: str, request_id: str
) -> Slate:
    """One list from the rankers whose scores are `a` and `b`; the draws are those of experiments.slates."""
    merge = probabilistic if method == "probabilistic" else team_draft
    ranked = [sorted_slate(item_ids, scores, len(item_ids)).order.tolist() for scores in (a, b)]
    shown = merge(*ranked, k=min(k, len(item_ids)), rng=draws_of(request_id))
    return Slate(np.array(shown.items, np.int64), None, shown.teams)


def draws_of(request_id: str) -> np.random.Generator:
    """The random numbers of a request: the same id, the same numbers."""
    return np.random.default_rng(mmh3.hash128(f"slate:{request_id}".encode("utf-8", "surrogatepass")))
