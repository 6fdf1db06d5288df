"""Measures as text: a model beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MEASURES = ("auc", "log_loss", "ece", "calibration", "ndcg@10", "grouped_auc")


def measures_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per named set of measures, aligned; what does not exist is a dash."""
    width = max(len(name) for name in rows) + 2
    lines = [" " * width + "".join(f"{measure:>13}" for measure in _MEASURES)]
    for name, measures in rows.items():
        lines.append(name.ljust(width) + "".join(f"{_number(measures.get(m)):>13}" for m in _MEASURES))
    return "\n".join(lines)


def beaten(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong: a sentence for each baseline that the model does not beat in AUC and in log loss."""
    found = []
    for name, baseline in baselines.items():
        if not metrics["auc"] > baseline["auc"]:
            found.append(f"AUC {metrics['auc']:.4f} is not above the {name} baseline's {baseline['auc']:.4f}")
        if not metrics["log_loss"] < baseline["log_loss"]:
            found.append(
                f"log loss {metrics['log_loss']:.4f} is not below the {name} baseline's {baseline['log_loss']:.4f}"
            )
    return found


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
