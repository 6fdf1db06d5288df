"""The event log loses nothing that was acknowledged, and the tables hold every event once."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from plait.errors import StoreError
from plait.eventlog import EventLog, log_folder, read_segment, roll
from plait.settings import Home


@pytest.fixture
def home(tmp_path):
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def click(event_id, item_id=1, timestamp=1_000_000):
    return {"event_id": event_id, "type": "click", "request_id": "r", "user_id": 7, "item_id": item_id,
            "timestamp": timestamp, "value": None}  # fmt: skip


def request(request_id, items):
    return {
        "request_id": request_id, "timestamp": 5_000_000, "scene": "home", "user_id": 7, "items": items,
        "scores": [0.5] * len(items), "propensities": [1.0] * len(items), "model": "deepfm", "model_version": "3",
        "arms": [{"layer": "rank", "experiment": "e", "arm": "a"}], "config_version": 2,
        "features_request": {"age": 30}, "features_candidates": {"year": [1990 + i for i in range(len(items))]},
    }  # fmt: skip


def rows(home, table):
    parts = sorted((home.events / table).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def segments(home):
    return sorted(path for path in log_folder(home).iterdir() if ".seg" in path.name)


def test_what_was_appended_is_rolled_into_the_tables_once(home):
    log = EventLog(log_folder(home), "test")
    log.append("request", [request("r1", [10, 11])])
    log.append("feedback", [click("e1"), click("e2")])
    log.append("feedback", [click("e1")])
    report = roll(home)
    assert (report.impressions, report.feedback, report.duplicates) == (2, 2, 1)
    log.append("feedback", [click("e2"), click("e3")])
    assert roll(home).feedback == 1
    log.close()
    assert roll(home).feedback == 0
    assert segments(home) == []
    assert [row["event_id"] for row in rows(home, "feedback")] == ["e1", "e2", "e3"]
    shown = rows(home, "impressions")
    assert [(row["item_id"], row["position"], row["features"]) for row in shown] == [
        (10, 1, '{"age":30,"year":1990}'),
        (11, 2, '{"age":30,"year":1991}'),
    ]
    assert shown[0]["arms"] == [{"layer": "rank", "experiment": "e", "arm": "a", "propensity": None}]


def test_a_roll_that_died_before_noting_its_offset_doubles_nothing(home):
    log = EventLog(log_folder(home), "test")
    log.append("request", [request("r1", [10])])
    roll(home)
    (log_folder(home) / "rolled.json").unlink()
    log.append("request", [request("r2", [11])])
    roll(home)
    log.close()
    assert [row["request_id"] for row in rows(home, "impressions")] == ["r1", "r2"]


def test_many_threads_append_and_every_event_is_there(home):
    log = EventLog(log_folder(home), "test", segment_bytes=20_000)
    threads = [
        threading.Thread(target=lambda t=t: [log.append("feedback", [click(f"{t}-{i}")]) for i in range(50)])
        for t in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        roll(home)
    log.close()
    roll(home)
    assert sorted(row["event_id"] for row in rows(home, "feedback")) == sorted(
        f"{t}-{i}" for t in range(8) for i in range(50)
    )


@pytest.mark.parametrize("cut", [1, 5, 11, 40])
def test_a_torn_frame_ends_a_segment_without_taking_the_frames_before_it(home, cut):
    log = EventLog(log_folder(home), "test")
    log.append("feedback", [click("whole")])
    log.append("feedback", [click("torn")])
    log.close()
    (segment,) = segments(home)
    with segment.open("rb+") as file:
        file.truncate(segment.stat().st_size - cut)
    assert [record["event_id"] for _, _, records in read_segment(segment) for record in records] == ["whole"]


def test_a_flipped_bit_is_noticed(home):
    log = EventLog(log_folder(home), "test")
    log.append("feedback", [click("a")])
    log.close()
    (segment,) = segments(home)
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(bytes(data))
    assert list(read_segment(segment)) == []


def test_kill_9_loses_no_acknowledged_event(home, tmp_path):
    acknowledged = tmp_path / "acknowledged"
    script = f"""
        from pathlib import Path
        from plait.eventlog import EventLog
        log = EventLog(Path({str(log_folder(home))!r}), "victim")
        with open({str(acknowledged)!r}, "a", buffering=1) as told:
            for i in range(10**9):
                log.append("feedback", [{{"event_id": f"e{{i}}", "type": "click", "request_id": None, "user_id": 1,
                                          "item_id": 2, "timestamp": i, "value": None}}])
                told.write(f"e{{i}}\\n")
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    victim = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    while not acknowledged.exists() or acknowledged.stat().st_size < 200:
        assert victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    roll(home)
    told = acknowledged.read_text().splitlines()
    kept = {row["event_id"] for row in rows(home, "feedback")}
    assert set(told) <= kept
    assert len(kept) <= len(told) + 1
    assert segments(home) == []


def test_a_full_queue_drops_and_counts_instead_of_blocking(home):
    log = EventLog(log_folder(home), "test", max_queue=1)
    taken = [log.enqueue("feedback", [click(f"e{i}")]) for i in range(2000)]
    log.close()
    roll(home)
    assert log.n_dropped == taken.count(False)
    assert len(rows(home, "feedback")) == taken.count(True)


def test_a_log_that_cannot_be_written_says_so_and_recovers(home, monkeypatch):
    log = EventLog(log_folder(home), "test")
    log.append("feedback", [click("before")])

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            log.append("feedback", [click("lost")])
    log.append("feedback", [click("after")])
    log.close()
    roll(home)
    assert [row["event_id"] for row in rows(home, "feedback")] == ["before", "after"]


def test_what_was_taken_and_could_not_be_written_is_told_by_kind(home, monkeypatch, caplog):
    log = EventLog(log_folder(home), "test")
    told = []

    def hear(kind, n_records):
        told.append((kind, n_records))
        raise RuntimeError("a listener that fails must not end the writer")

    log.on_lost = hear

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert log.enqueue("feedback", [click("lost 1"), click("lost 2")])
        with pytest.raises(StoreError):
            log.append("feedback", [click("told to its caller")])
    assert told == [("feedback", 2)]
    assert "2 feedback records could not be written" in caplog.text
    log.append("feedback", [click("after")])
    log.close()
    roll(home)
    assert [row["event_id"] for row in rows(home, "feedback")] == ["after"]


def test_a_closed_log_refuses(home):
    log = EventLog(log_folder(home), "test")
    log.close()
    with pytest.raises(StoreError, match="closed"):
        log.append("feedback", [click("late")])
