"""A data card: what is in a dataset's columns, and whether a feature knows the label too well.

The statistics are of the training split (up to MAX_ROWS rows, evenly spaced), the label rates by day of all splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plait.errors import UnknownNameError
from plait.files import write_atomically
from plait.offline.dataset import Dataset
from plait.offline.splits import PARTS

MAX_ROWS = 500_000
IMPLAUSIBLE_AUC = 0.9  # good click models as a whole seldom get here; one feature alone does not, unless it leaks
MANY_NULLS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureCard:
    """One feature of the training split. `auc` is the feature's alone, in the better of both directions."""

    name: str
    view: str
    dtype: str
    null_rate: float
    distinct: int | None
    minimum: float | None = None
    mean: float | None = None
    maximum: float | None = None
    mean_length: float | None = None
    auc: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCard:
    """The card of one dataset, as data; `to_markdown` draws it."""

    dataset: str
    data_hash: str
    feature_service: str
    label: str
    rows: Mapping[str, int]
    label_rates: Mapping[str, Mapping[str, float | None]]  # label -> split -> rate
    by_day: tuple[Mapping[str, Any], ...]  # day, rows, one rate per label
    features: tuple[FeatureCard, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_markdown(self) -> str:
        labels = list(self.label_rates)
        lines = [f"# Data card of {self.dataset}", ""]
        lines += [f"Feature service `{self.feature_service}`, label `{self.label}`.", ""]
        rates = self.label_rates
        rows = [(part, f"{n:,}", *(_percent(rates[x][part]) for x in labels)) for part, n in self.rows.items()]
        lines += _table(("split", "rows", *labels), rows)
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.warnings)]
        lines += ["", "## Features (training split)", ""]
        head = ("feature", "view", "type", "nulls", "distinct", "min", "mean", "max", "length", "AUC alone")
        lines += _table(head, [_feature_row(feature) for feature in self.features])
        lines += ["", "## Label rate by day", ""]
        days = [(day["day"], f"{day['rows']:,}", *(_percent(day[x]) for x in labels)) for day in self.by_day]
        lines += _table(("day", "rows", *labels), days)
        return "\n".join(lines) + "\n"


def write_card(dataset: Dataset, *, label: str | None = None) -> DataCard:
    """Make the card and put card.json and card.md into the dataset's folder."""
    card = make_card(dataset, label=label)
    write_atomically(dataset.folder / "card.json", json.dumps(asdict(card), indent=2).encode() + b"\n")
    write_atomically(dataset.folder / "card.md", card.to_markdown().encode())
    return card


def card_warnings(dataset: Dataset, *, label: str | None = None) -> list[str]:
    """The warnings of the dataset's card, which is made if there is none yet or if it is another label's."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: made again
        stored = json.loads((dataset.folder / "card.json").read_bytes())
        if stored["label"] == (label or dataset.manifest.label):
            return list(stored["warnings"])
    return list(write_card(dataset, label=label).warnings)


def make_card(dataset: Dataset, *, label: str | None = None, max_rows: int = MAX_ROWS) -> DataCard:
    """The card of `dataset`; `label` (default the dataset's) is the one the leakage check looks at."""
    manifest = dataset.manifest
    label = label or manifest.label
    if label not in manifest.labels:
        raise UnknownNameError("label", label, manifest.labels, where=str(dataset.folder))
    train = dataset.split("train")
    stride = max(1, -(-train.n_rows // max_rows))
    truth = _strided(dataset, label, stride)
    hits = truth.to_numpy(zero_copy_only=False).astype(bool)
    features, warnings = [], []
    for feature in manifest.features:
        column = _strided(dataset, feature.name, stride)
        card = feature_card(feature.name, feature.view, column, hits)
        features.append(card)
        warnings += feature_warnings(card, label)
    rates = {
        name: {part: _ratio(counts[part], manifest.rows[part]) for part in PARTS}
        for name, counts in manifest.positives.items()
    }
    if 0 in (hits.sum(), (~hits).sum()) and len(hits):
        warnings.append(f"label {label} has one class only in the training split: nothing can be learned")
    return DataCard(
        dataset=dataset.folder.name,
        data_hash=manifest.data_hash,
        feature_service=manifest.feature_service,
        label=label,
        rows=manifest.rows,
        label_rates=rates,
        by_day=tuple(_by_day(dataset)),
        features=tuple(features),
        warnings=tuple(warnings),
    )


def feature_card(name: str, view: str, column: pa.Array, hits: np.ndarray) -> FeatureCard:
    """Statistics of one feature; hits: bool, one per row."""
    nulls = column.null_count / len(column) if len(column) else 0.0
    common: dict[str, Any] = {"name": name, "view": view, "dtype": str(column.type), "null_rate": nulls}
    if _is_list(column.type):
        lengths = pc.list_value_length(column)
        return FeatureCard(
            **common, distinct=None, mean_length=pc.mean(lengths).as_py(), auc=_auc_of_numbers(lengths, hits)
        )
    distinct = pc.count_distinct(column, mode="only_valid").as_py()
    if _is_number(column.type):
        numbers = column.cast(pa.float64())
        ends = pc.min_max(numbers).as_py()
        return FeatureCard(
            **common,
            distinct=distinct,
            minimum=ends["min"],
            mean=pc.mean(numbers).as_py(),
            maximum=ends["max"],
            auc=_auc_of_numbers(numbers, hits),
        )
    return FeatureCard(**common, distinct=distinct, auc=_auc_of_categories(column, hits))


def feature_warnings(card: FeatureCard, label: str) -> list[str]:
    found = []
    if card.auc is not None and card.auc >= IMPLAUSIBLE_AUC:
        found.append(
            f"feature {card.name} ({card.view}) alone predicts {label} with AUC {card.auc:.3f}: it probably leaks; "
            "check that its event_timestamp is when the value became known"
        )
    if card.null_rate == 1.0:
        found.append(f"feature {card.name} ({card.view}) is null in every row: check its source, keys and ttl")
    elif card.null_rate > MANY_NULLS:
        found.append(f"feature {card.name} ({card.view}) is null in {card.null_rate:.0%} of the rows")
    elif card.distinct == 1 and card.null_rate == 0:
        found.append(f"feature {card.name} ({card.view}) has the same value in every row")
    return found


def rank_auc(score: np.ndarray, hits: np.ndarray) -> float | None:
    """Area under the ROC curve with ties at one half; None if there is one class only.

    >>> rank_auc(np.array([1.0, 2.0, 2.0]), np.array([False, False, True]))
    0.75
    """
    n_hits = int(hits.sum())
    n_misses = len(hits) - n_hits
    if n_hits == 0 or n_misses == 0:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each distinct score
    return float((middle[inverse][hits].sum() - n_hits * (n_hits + 1) / 2) / (n_hits * n_misses))


def _auc_of_numbers(column: pa.Array, hits: np.ndarray) -> float | None:
    """Missing values are a place of their own, tried below and above all numbers: being missing can leak too."""
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    best = None
    for place in (-np.inf, np.inf):
        auc = rank_auc(np.where(np.isnan(values), place, values), hits)
        if auc is None:
            return None
        best = max(best or 0.0, auc, 1 - auc)
    return best


def _auc_of_categories(column: pa.Array, hits: np.ndarray) -> float | None:
    """Each category scored by its rate in the even rows, judged on the odd ones, so that rare ones do not flatter."""
    codes = column.dictionary_encode(null_encoding="encode")
    codes = (codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes).indices.to_numpy()
    if len(codes) < 4:
        return None
    even, odd = codes[::2], codes[1::2]
    size = int(codes.max()) + 1
    prior = hits[::2].mean() if len(even) else 0.0
    seen = np.bincount(even, minlength=size)
    rate = (np.bincount(even, weights=hits[::2], minlength=size) + prior) / (seen + 1)
    return rank_auc(rate[odd], hits[1::2])


def _strided(dataset: Dataset, column: str, stride: int) -> pa.Array:
    """Every stride-th row of one column of the training split."""
    taken, at = [], 0
    for batch in dataset.split("train").batches([column]):
        first = -at % stride
        taken.append(batch.column(0).take(pa.array(range(first, batch.num_rows, stride), pa.int64())))
        at += batch.num_rows
    return pa.concat_arrays(taken) if taken else pa.array([], dataset.schema.field(column).type)


def _by_day(dataset: Dataset) -> list[dict[str, Any]]:
    days: dict[str, dict[str, int]] = {}
    labels = dataset.manifest.labels
    for part in PARTS:
        for batch in dataset.split(part).batches(["event_timestamp", *labels]):
            day = pc.strftime(batch.column("event_timestamp"), format="%Y-%m-%d")
            table = pa.table({"day": day, **{name: batch.column(name).cast(pa.int64()) for name in labels}})
            grouped = table.group_by("day").aggregate([("day", "count"), *((name, "sum") for name in labels)])
            for row in grouped.to_pylist():
                counts = days.setdefault(row["day"], dict.fromkeys(("rows", *labels), 0))
                counts["rows"] += row["day_count"]
                for name in labels:
                    counts[name] += row[f"{name}_sum"] or 0
    return [
        {"day": day, "rows": counts["rows"], **{name: _ratio(counts[name], counts["rows"]) for name in labels}}
        for day, counts in sorted(days.items())
    ]


def _is_list(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) or pa.types.is_large_list(dtype)


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _feature_row(card: FeatureCard) -> tuple[str, ...]:
    distinct = "" if card.distinct is None else f"{card.distinct:,}"
    numbers = (card.minimum, card.mean, card.maximum, card.mean_length, card.auc)
    return (card.name, card.view, card.dtype, _percent(card.null_rate), distinct, *map(_short, numbers))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
