"""Naive answers that the tests compare with."""

from __future__ import annotations

from typing import Any


def ids(answer: dict[str, Any]) -> list[int]:
    return [row["item_id"] for row in answer["ranking"]]


def same_ranking_as_naive(answer: dict[str, Any], items: list[int], top_k: int) -> bool:
    """Distinct items by falling score (item % 10, or 0.5 for an unknown item), then by id, cut at top_k."""
    score = {item: item % 10 if item <= 999 else 0.5 for item in items}
    return ids(answer) == sorted(score, key=lambda item: (-score[item], item))[:top_k]
