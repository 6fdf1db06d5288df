"""`plait samples build`: impressions and feedback in, labelled, split, weighted samples out.

    impressions ─ complete ─ dedupe ─┐
    feedback ──── complete ─ dedupe ─┴ attribute → filters → maturity → split → negatives → weights → parquet

Every arrow is an ibis expression that DuckDB and Spark run alike; each step's row count goes into the manifest and to
the user, so that one sees where rows went.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from plait.clock import Clock
from plait.errors import DataError, UnknownNameError
from plait.files import atomic_folder, write_atomically
from plait.offline.attribution import fates, first_of_each, label_impressions, positives_by_user
from plait.offline.engine import Engine, check_columns, open_engine, parquet_files, stack
from plait.offline.filters import filter_steps
from plait.offline.negatives import ALWAYS, with_negatives
from plait.offline.parts import Part, PartWriter, content_hash
from plait.offline.spec import SampleSpec
from plait.offline.splits import PARTS, with_split
from plait.offline.weights import with_weights
from plait.progress import Progress, silent, stepwise
from plait.settings import Home

if TYPE_CHECKING:
    import ibis.expr.types as ir

STAGES = ("impressions", "feedback", "join", "filters", "split", "negatives", "write")
MICROS = pa.timestamp("us", tz="UTC")
IMPRESSIONS = {
    "request_id": "string",
    "timestamp": "timestamp",
    "user_id": "int64",
    "item_id": "int64",
    "scene": "string",
    "position": "int32",
    "propensity": "float64",
    "created": "timestamp",
}
FEEDBACK = {
    "event_id": "string",
    "type": "string",
    "request_id": "string",
    "user_id": "int64",
    "item_id": "int64",
    "timestamp": "timestamp",
    "value": "float64",
    "created": "timestamp",
}
ITEMS = {"item_id": "int64", "event_timestamp": "timestamp", "created": "timestamp"}
REQUIRED = {
    "impressions": ("request_id", "timestamp", "user_id", "item_id"),
    "feedback": ("event_id", "type", "user_id", "item_id", "timestamp"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What was done and how many rows were left after it."""

    step: str
    rows: int
    table: str = "samples"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleManifest:
    """What a samples folder holds and how it came to be."""

    name: str
    spec: Mapping[str, Any]
    steps: tuple[Step, ...]
    rows: Mapping[str, int]  # split -> rows
    positives: Mapping[str, Mapping[str, int]]  # label -> split -> rows with 1
    immature: int
    first: str | None
    last: str | None
    parts: tuple[Part, ...]
    data_hash: str
    engine: str
    as_of: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.positives)


def read_manifest(folder: Path) -> SampleManifest:
    """The manifest of a samples folder. Raises DataError if there is none or it is not one."""
    path = folder / "manifest.json"
    try:
        values = json.loads(path.read_text())
        values["steps"] = tuple(Step(**step) for step in values["steps"])
        values["parts"] = tuple(Part(**part) for part in values["parts"])
        return SampleManifest(**values)
    except FileNotFoundError as error:
        raise DataError(f"no samples in {folder}; run `plait samples build` first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a samples manifest ({error}); run `plait samples build` again") from error


def build_samples(
    home: Home,
    spec: SampleSpec,
    *,
    engine: str = "duckdb",
    memory: str | None = None,
    now: datetime | None = None,
    report: Callable[[Step], None] = lambda step: None,
    progress: Progress = silent,
) -> SampleManifest:
    """Write `home.samples/<spec.name>` and return its manifest; the old folder stays until the new one is whole.

    now: the present, by default the home's clock; a sample younger than its attribution window is not yet mature.
    report: called with each step as its count is known. progress: called as each of STAGES begins.
    Raises DataError for missing, corrupt or unusable tables, UnknownNameError for a feedback type nobody sent.
    """
    now = now or Clock.of(home).now()
    steps: list[Step] = []
    begin = stepwise(progress, STAGES)

    def note(step: str, rows: int, table: str = "samples") -> None:
        steps.append(Step(step=step, rows=rows, table=table))
        report(steps[-1])

    with open_engine(engine, memory=memory) as running:
        table = sample_rows(running, home, spec, now=now, note=note, begin=begin)
        begin("write")
        folder = home.samples / spec.name
        with atomic_folder(folder) as aside:
            manifest = _write(running, table, spec, aside, steps=steps, now=now)
    note("written", sum(manifest.rows.values()))
    return manifest


def sample_rows(
    engine: Engine,
    home: Home,
    spec: SampleSpec,
    *,
    now: datetime,
    note: Callable[..., None],
    begin: Callable[[str], None] = lambda stage: None,
) -> ir.Table:
    """All of the pipeline but the writing: an expression with the samples' columns, unordered, without sample_id."""
    import ibis

    begin("impressions")
    impressions = load(engine, home, "impressions", note)
    begin("feedback")
    feedback = load(engine, home, "feedback", note)
    _refuse_unknown_types(feedback, spec)

    begin("join")
    labelled = engine.keep(label_impressions(impressions, feedback, spec))
    credited = ", ".join(f"{_ones(labelled, label.name)} {label.name}" for label in spec.labels)
    note(f"joined to feedback: {credited}", engine.count(labelled))
    _tell_fates(fates(impressions, feedback, spec), note)
    begin("filters")
    table = labelled
    for what, filtered in filter_steps(labelled, spec.filters, spec.label):
        table = engine.keep(filtered)
        note(what, engine.count(table))

    widest = max(spec.window(label) for label in spec.labels) + spec.attribution.skew
    ripe = ibis.literal(now - widest, type=table.timestamp.type())
    table = table.mutate(label_mature=table.timestamp <= ripe)
    if spec.immature == "drop":
        table = table.filter(table.label_mature)
        note(f"older than the attribution window ({widest})", engine.count(table))
    if engine.count(table) == 0:
        raise DataError(f"no impression is left after: {steps_hint(spec)}; loosen the filters or check the events")

    begin("split")
    table = engine.keep(with_split(engine, table, spec.split, seed=spec.seed))
    begin("negatives")
    names = tuple(label.name for label in spec.labels)
    own = engine.keep(
        ibis.union(*(positives_by_user(feedback, labelled, label) for label in spec.labels), distinct=True)
        if len(spec.labels) > 1
        else positives_by_user(feedback, labelled, spec.labels[0])
    )
    items = _items(engine, home, impressions)
    with_all = with_negatives(engine, table, own, items, spec.negatives, labels=names, seed=spec.seed)
    table = engine.keep(with_all)
    if spec.negatives.kind != "impressions":
        note(f"with {spec.negatives.kind} negatives", engine.count(table))
    table = with_weights(engine, table, spec.weights, spec.label)
    _refuse_one_class(table, spec)
    return table


def _tell_fates(told: ir.Table, note: Callable[..., None]) -> None:
    """Where the feedback of the labels went."""
    sums = told.aggregate(n=told.count(), **{name: told[name].cast("int64").sum() for name in _FATES}).execute()
    n, *counts = (int(sums[name][0]) if sums[name][0] == sums[name][0] else 0 for name in ("n", *_FATES))
    note("of a label's type", n, "feedback")
    for what, rows in zip(_FATES.values(), counts, strict=True):
        if rows or what == _FATES["credited"]:
            note(what, rows, "feedback")
    if rest := n - sum(counts):
        note("left out: of no impression that we have", rest, "feedback")


_FATES = {
    "credited": "credited to an impression",
    "late": "left out: after the attribution window",
    "early": "left out: before its impression, by more than the skew",
}


def load(engine: Engine, home: Home, kind: str, note: Callable[..., None]) -> ir.Table:
    """An event table in the columns and types the pipeline wants, complete and without duplicates."""
    folder = home.events / kind
    if not folder.is_dir():
        raise DataError(f"no {kind} in {folder}; run `plait data prepare`, or send events to a server and roll its log")
    table = read_events(engine, folder, IMPRESSIONS if kind == "impressions" else FEEDBACK, required=REQUIRED[kind])
    note("read", engine.count(table), kind)
    # request_id may be missing from feedback (it is joined by user and item then), never from an impression.
    needed = [table[name].notnull() for name in REQUIRED[kind]]
    complete = table.filter(*needed)
    note("complete", engine.count(complete), kind)
    keys = ("request_id", "item_id") if kind == "impressions" else ("event_id",)
    # Down to the last column: rows that differ anywhere are told apart the same way whatever order they came in.
    order = tuple(dict.fromkeys(name for name in ("created", "timestamp", *complete.columns) if name not in keys))
    unique = engine.keep(first_of_each(complete, keys, order).drop("created"))
    note("without duplicates", engine.count(unique), kind)
    return unique


def read_events(engine: Engine, folder: Path, wanted: Mapping[str, str], *, required: Sequence[str]) -> ir.Table:
    """The columns `wanted` (name -> ibis type) of an event table's parts; those that no part has are null.

    Raises DataError naming the part and the column for one that is required and missing, or of another type.
    """
    import ibis

    files = parquet_files(folder)
    found = check_columns(files, wanted, required=required)
    raw = engine.read_parquet(files)
    # Whether timestamps have a zone depends on the engine; literals and differences take the type that is there.
    stamp = next((raw[name].type() for name in wanted if wanted[name] == "timestamp" and name in found), "timestamp")
    columns = {}
    for name, dtype in wanted.items():
        kept = stamp if dtype == "timestamp" else dtype
        columns[name] = raw[name].cast(kept) if name in found else ibis.null(kept)
        if dtype == "float64":  # NaN and infinity are missing, as to the aggregates; SQL holds NaN above every number
            odd = columns[name].isnan() | columns[name].isinf()
            columns[name] = ibis.ifelse(odd, ibis.null(dtype), columns[name])
    return raw.select(**columns)


def steps_hint(spec: SampleSpec) -> str:
    active = [name for name, value in spec.to_dict()["filters"].items() if value]
    return "filters " + ", ".join(active) + (", immature=drop" if spec.immature == "drop" else "")


def _items(engine: Engine, home: Home, impressions: ir.Table) -> ir.Table:
    """What may be drawn as a negative: the items table if there is one, and all that was ever shown.

    `since_us` is the first sign of life: the earliest of its rows' event_timestamp and created in the items table and
    of its impressions. An items table loaded today says little of when its items came, and their impressions do.
    """
    import ibis

    seen = impressions.select("item_id", since_us=engine.micros(impressions.timestamp))
    folder = home.events / "items"
    if any(folder.glob("**/*.parquet")):
        known = read_events(engine, folder, ITEMS, required=("item_id",))
        known = known.filter(known.item_id.notnull())
        for name in ("event_timestamp", "created"):
            seen = stack(seen, known.select("item_id", since_us=engine.micros(known[name])))
    first = seen.group_by("item_id").aggregate(since_us=seen.since_us.min())
    return engine.keep(first.mutate(since_us=ibis.coalesce(first.since_us, ibis.literal(ALWAYS, type="int64"))))


def _refuse_unknown_types(feedback: ir.Table, spec: SampleSpec) -> None:
    known = set(feedback.select("type").distinct().execute()["type"])
    if not known:
        raise DataError("the feedback table is empty, so no sample could bear a label; check `plait data prepare`")
    for label in spec.labels:
        for kind in label.types:
            if kind not in known:
                raise UnknownNameError("feedback type", kind, known, where=f"label {label.name!r}")


def _refuse_one_class(table: ir.Table, spec: SampleSpec) -> None:
    train = table.filter(table.split == "train")
    got = train.aggregate(rows=train.count(), hits=train[spec.label].cast("int64").sum()).execute()
    rows, hits = int(got["rows"][0]), int(got["hits"][0] or 0) if got["rows"][0] else 0
    if hits in (0, rows):
        raise DataError(
            f"label {spec.label!r} is {int(hits > 0)} in all {rows} training samples, so nothing can be learned from "
            "them; check the label's feedback types, the attribution window and the negatives"
        )


def _ones(table: ir.Table, label: str) -> int:
    got = table[label].cast("int64").sum().execute()
    return int(got) if got == got and got is not None else 0


def output_schema(spec: SampleSpec) -> pa.Schema:
    fields = [
        ("sample_id", pa.int64()),
        ("request_id", pa.string()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("event_timestamp", MICROS),
        ("scene", pa.string()),
        ("position", pa.int32()),
        *((label.name, pa.int8()) for label in spec.labels),
        ("weight", pa.float32()),
        ("split", pa.string()),
        ("label_mature", pa.bool_()),
    ]
    if spec.negatives.kind != "impressions":
        fields.append(("origin", pa.string()))
    return pa.schema(fields)


def _write(
    engine: Engine, table: ir.Table, spec: SampleSpec, folder: Path, *, steps: list[Step], now: datetime
) -> SampleManifest:
    import pyarrow.compute as pc

    schema = output_schema(spec)
    # A total order up to rows that are equal in every column, so that sample ids are the same from either engine.
    ordered = table.order_by("timestamp", "request_id", "user_id", "item_id", "origin", "slot")
    ordered = ordered.rename(event_timestamp="timestamp")
    ordered = ordered.select(*(name for name in schema.names if name != "sample_id"))
    body = pa.schema([schema.field(name) for name in ordered.columns])
    writer = PartWriter(folder, schema)
    rows = dict.fromkeys(PARTS, 0)
    positives = {label.name: dict.fromkeys(PARTS, 0) for label in spec.labels}
    first = last = None
    immature = 0
    for batch in engine.batches(ordered, schema=body):
        if not batch.num_rows:
            continue
        ids = pa.array(range(writer_rows := sum(rows.values()), writer_rows + batch.num_rows), pa.int64())
        writer.write(pa.RecordBatch.from_arrays([ids, *batch.columns], schema=schema))
        first = first or batch.column("event_timestamp")[0].as_py()
        last = batch.column("event_timestamp")[-1].as_py()
        immature += batch.num_rows - (pc.sum(batch.column("label_mature")).as_py() or 0)
        for part in PARTS:
            mask = pc.equal(batch.column("split"), part)
            rows[part] += pc.sum(mask).as_py() or 0
            for name, counts in positives.items():
                counts[part] += pc.sum(pc.and_(mask, pc.equal(batch.column(name), 1))).as_py() or 0
    parts = writer.close()
    manifest = SampleManifest(
        name=spec.name,
        spec=spec.to_dict(),
        steps=tuple(steps),
        rows=rows,
        positives=positives,
        immature=immature,
        first=first.isoformat() if first else None,
        last=last.isoformat() if last else None,
        parts=tuple(parts),
        data_hash=content_hash(parts),
        engine=engine.name,
        as_of=now.isoformat(),
    )
    write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=2).encode() + b"\n")
    return manifest
