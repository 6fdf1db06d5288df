"""Writing aside and renaming: a folder is always whole, whoever else writes it, dies, or finds the disk full."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from plait import files
from plait.errors import StoreError
from plait.files import atomic_file, atomic_folder

N = 5


def write(path: Path, word: str) -> None:
    with atomic_folder(path) as aside:
        for i in range(N):
            (aside / str(i)).write_text(word)


def words(path: Path) -> set[str]:
    """What the files of the folder say: one word if the folder is whole. Opened by the folder's handle, as readers do
    who opened it before another writer took its place."""
    folder = os.open(path, os.O_RDONLY)
    try:
        found = [os.open(str(i), os.O_RDONLY, dir_fd=folder) for i in range(N)]
        texts = {os.read(handle, 100).decode() for handle in found}
        for handle in found:
            os.close(handle)
        return texts
    finally:
        os.close(folder)


@pytest.mark.parametrize("exchange", [True, False])
def test_writers_at_once_never_mix_and_none_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "folder"
    write(path, "first")
    failures: list[BaseException] = []

    def many(word: str) -> None:
        try:
            for _ in range(8):
                write(path, word)
        except BaseException as failure:
            failures.append(failure)

    writers = [threading.Thread(target=many, args=(word,)) for word in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        # Removed behind the reader, or (without exchange) between two renames: it tries again.
        with suppress(FileNotFoundError):
            assert len(words(path)) == 1
    assert failures == []
    assert words(path) <= {"a", "b", "c"}
    assert [left.name for left in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_another_writer_took_for_an_orphan_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between its making and its opening."""
    open_, taken = os.open, []

    def open_after_the_other(path, *arguments, **options):
        if ".tmp-" in str(path) and not taken:
            taken.append(path)
            Path(path).rmdir()
        return open_(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_after_the_other)
    write(tmp_path / "folder", "a")
    assert taken
    assert words(tmp_path / "folder") == {"a"}
    assert [left.name for left in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_without_a_moment_in_which_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write(path, "first")
    done = threading.Event()
    missing = []

    def look() -> None:
        while not done.is_set():
            if not path.exists():
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    for i in range(40):
        write(path, str(i))
    done.set()
    looker.join()
    if not files._exchange(tmp_path / "folder", tmp_path / "folder"):
        pytest.skip("this file system cannot exchange two folders in one step")
    assert missing == []


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom plait.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as aside:\n"
        "    (aside / '0').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    (orphan,) = tmp_path.glob(".folder.tmp-*")
    assert words(path) == {"old"}
    with atomic_folder(path) as living:
        (living / "0").write_text("half")
        write(path, "new")
        assert living.exists()
        assert not orphan.exists()
        for i in range(N):
            (living / str(i)).write_text("last")
    assert words(path) == {"last"}


def test_a_writer_killed_between_two_renames_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write(path, "only copy")
    path.rename(tmp_path / ".folder.old-0123")
    with pytest.raises(RuntimeError), atomic_folder(path):
        raise RuntimeError
    assert words(path) == {"only copy"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_the_place_and_what_to_do(tmp_path: Path, code: int) -> None:
    path = tmp_path / "folder"
    write(path, "old")
    (tmp_path / "file").write_text("old")
    with pytest.raises(StoreError, match=r"cannot write .*/folder: .*MB free there.*make room"), atomic_folder(path):
        raise OSError(code, os.strerror(code))
    with pytest.raises(StoreError, match="cannot write"), atomic_file(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert words(path) == {"old"}
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(PermissionError), atomic_folder(path):
        raise PermissionError(errno.EACCES, "not yours")
