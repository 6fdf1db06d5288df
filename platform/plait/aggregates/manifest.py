"""What a feature table was built from and up to when: the commit record beside the table.

It lies in `features/.state/<view>/`, apart from the parts that Feast reads, together with the state from which the
next increment starts. It is written last: a build that died before leaves a table that does not match it, and the
next build starts over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from plait.aggregates.spec import AggregateSpec
from plait.errors import DataError
from plait.files import write_atomically
from plait.settings import Home

FileStamps = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class BuildManifest:
    """until_us: rows exist up to and including this moment. sources, parts: file -> [size in bytes, mtime in ns]."""

    spec_hash: str
    until_us: int
    sources: dict[str, FileStamps]
    parts: FileStamps
    state: str
    rows: int
    spec: dict[str, object] = field(default_factory=dict)

    def with_parts(self, parts: FileStamps) -> BuildManifest:
        return replace(self, parts=parts)


def table_folder(home: Home, view: str) -> Path:
    return home.features / view


def state_folder(home: Home, view: str) -> Path:
    return home.features / ".state" / view


def read_manifest(home: Home, view: str) -> BuildManifest | None:
    """The manifest of a table; None if it was never built. Raises DataError if it cannot be read."""
    path = state_folder(home, view) / "manifest.json"
    if not path.exists():
        return None
    try:
        return BuildManifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run `plait features build --view {view} --full`") from error


def write_manifest(home: Home, view: str, manifest: BuildManifest) -> None:
    text = json.dumps(asdict(manifest), indent=1)
    write_atomically(state_folder(home, view) / "manifest.json", text.encode() + b"\n")


def stamps(folder: Path) -> FileStamps:
    """Every visible parquet file below a folder, by path within it."""
    found = {}
    for path in sorted(folder.glob("**/*.parquet")):
        if not path.name.startswith((".", "_")):
            stat = path.stat()
            found[path.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns]
    return found


def source_stamps(home: Home, spec: AggregateSpec) -> dict[str, FileStamps]:
    """The files of every event table that a spec reads."""
    return {name: stamps(home.events / name) for name in (spec.events.table, *spec.events.attribute_tables)}


def added(before: FileStamps, now: FileStamps) -> list[str] | None:
    """Files that are new since `before`; None if one of the old ones changed or went away."""
    if any(now.get(name) != stamp for name, stamp in before.items()):
        return None
    return [name for name in now if name not in before]
