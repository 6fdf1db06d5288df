"""A disk that fills up and `kill -9` in mid-import: nothing half is left, and the next import succeeds."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from plait.data.readers import ImportSpec, import_table
from plait.data.widening import WideningWriter
from plait.errors import StoreError
from plait.settings import Home

N = 2_000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Its readers take some rows at a time."""
    monkeypatch.setattr("plait.data.textfiles._BLOCK_BYTES", 20_000)
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def people(folder: Path, *, rows: int, grows: bool) -> ImportSpec:
    """Users whose names are long and all different; with `grows`, the second half has a further attribute."""
    with (folder / "people.jsonl").open("w") as file:
        for i in range(rows):
            row = {"user_id": i, "event_timestamp": "2024-01-01T00:00:00Z", "name": f"{i * 7919:x}" * 5}
            file.write(json.dumps({**row, **({"late": i} if grows and i >= rows // 2 else {})}) + "\n")
    return ImportSpec(kind="users", source=str(folder / "people.jsonl"))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The kernel refuses what goes beyond `size` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def holds(home: Home, rows: int) -> None:
    """The table is one whole file, and nothing lies beside it."""
    (path,) = (home.events / "users").iterdir()
    assert pq.read_table(path)["user_id"].to_pylist() == list(range(rows))


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_disk_that_fills_up_leaves_the_earlier_import(home: Home, tmp_path: Path, grows: bool, share: float) -> None:
    """Of a file that grows, each half fits at a share of 0.8, and the whole that is made of them does not."""
    whole = import_table(home, people(tmp_path, rows=N, grows=grows)).path
    size = whole.stat().st_size
    import_table(home, people(tmp_path, rows=10, grows=False))
    spec = people(tmp_path, rows=N, grows=grows)
    with (
        disk_of(int(size * share)),
        pytest.raises(StoreError, match=r"cannot write .*import-\w+\.parquet: File too large .*make room"),
    ):
        import_table(home, spec)
    holds(home, 10)
    assert import_table(home, spec).path == whole
    holds(home, N)


KILLED = """
import os, signal, sys
from pathlib import Path
from plait.data import readers, textfiles, widening
from plait.settings import Home

textfiles._BLOCK_BYTES = 20_000
home = Home(project=Path(sys.argv[1]), root=Path(sys.argv[1]) / ".plait")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "writing":
    progress = lambda rows: die() if rows > 500 else None
else:
    progress, finish = lambda rows: None, widening.WideningWriter.finish
    widening.WideningWriter.finish = lambda self: (finish(self), die())  # every row is there, not in its place
readers.import_table(home, readers.ImportSpec(kind="users", source=sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("when", ["writing", "finished"])
@pytest.mark.parametrize("again", [False, True])
def test_an_import_killed_in_its_midst_leaves_the_table_and_the_next_one_clears_up(
    home: Home, tmp_path: Path, when: str, again: bool
) -> None:
    folder = home.events / "users"
    if again:
        import_table(home, people(tmp_path, rows=10, grows=False))
    spec = people(tmp_path, rows=N, grows=True)
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(home.project), spec.source, when]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(folder.rglob("*.parquet"))) == again  # what the dead one left has other names
    assert len([path for path in folder.iterdir() if path.name.startswith(".")]) == 1
    if again:
        assert pq.read_table(next(folder.glob("*.parquet"))).num_rows == 10
    import_table(home, spec)
    holds(home, N)


def test_two_imports_of_a_source_at_once_do_not_disturb_each_other(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = people(tmp_path, rows=N, grows=True)
    finish = WideningWriter.finish

    def finished(self: WideningWriter) -> Path:
        monkeypatch.setattr(WideningWriter, "finish", finish)
        import_table(home, spec)  # from its first row to its last while another is about to end
        return finish(self)

    monkeypatch.setattr(WideningWriter, "finish", finished)
    import_table(home, spec)
    holds(home, N)
