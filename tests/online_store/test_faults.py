"""Writers killed, stores gone: every row whole, every answered write kept, every failure one clear error."""

import os
import resource
import signal
import sqlite3
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.types import Int64, String

from plait.errors import StoreError
from plait.stores import redis as plait_redis
from plait.stores.redis import LATE_ANSWERS

T0 = datetime(2024, 1, 1, tzinfo=UTC)
NOW = T0 + timedelta(days=1)
N_USERS = 500
# Forking is how a second process is had here without the seconds that importing Feast takes.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def sqlite(tmp_path, stores):
    return stores.config(tmp_path, {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": "online.db"})


@pytest.fixture
def redis(tmp_path, stores, durable_redis):
    online = {"type": "plait.stores.redis.PackedRedisOnlineStore", "url": durable_redis.url, "timeout_s": 5}
    return stores.config(tmp_path, online)


@pytest.fixture
def view(stores):
    return stores.view({"a": Int64, "b": String, "c": Int64})


def version(stores, number, n_users=N_USERS):
    """All users' rows of one version: every feature says which."""
    columns = {"user_id": list(range(n_users)), "a": [number] * n_users, "c": [number] * n_users}
    text = [f"{number} " + "x" * (number % 50)] * n_users
    return stores.rows({**columns, "b": text}, at=T0 + timedelta(seconds=number))


def read_versions(store, config, view, n_users=N_USERS):
    """The version each row is of; fails if a row is of two."""
    got = store.read_columns(config, view, {"user_id": list(range(n_users))}, now=NOW)
    rows = got.table.to_pylist()
    seconds = [None if us == 0 else us // 1_000_000 - int(T0.timestamp()) for us in got.event_us.tolist()]
    for row, second in zip(rows, seconds, strict=True):
        text = None if row["b"] is None else int(row["b"].split()[0])
        assert row["a"] == row["c"] == text == second
    return seconds


@contextmanager
def child(work):
    """A process that runs `work(say)`; yields (pid, read end of what it says, one line a call)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work(lambda text: os.write(writing, f"{text}\n".encode()))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as said:
        try:
            yield pid, said
        finally:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                reading = -1  # it had ended by itself


def write_forever(config, view, stores, n_users=N_USERS):
    def work(say):
        store = get_online_store_from_config(config.online_store)
        for number in range(1, 10_000):
            store.write_columns(config, view, version(stores, number, n_users))
            say(number)

    return work


@pytest.mark.parametrize("patience_s", [0.0, 0.013, 0.05, 0.11])
def test_a_writer_killed_in_a_sqlite_write_loses_nothing_answered_and_leaves_nothing_half(
    sqlite, view, stores, patience_s
):
    store = get_online_store_from_config(sqlite.online_store)
    store.update(sqlite, [], [view], [], [], partial=False)
    with child(write_forever(sqlite, view, stores)) as (pid, said):
        last = int(said.readline())
        time.sleep(patience_s)
        os.kill(pid, signal.SIGKILL)
        last = max([last, *map(int, said)])
        os.waitpid(pid, 0)
    versions = read_versions(store, sqlite, view)
    assert len(set(versions)) == 1, "a write of one transaction is seen in part"
    assert last <= versions[0] <= last + 1
    store.write_columns(sqlite, view, version(stores, 9_999))
    assert set(read_versions(store, sqlite, view)) == {9_999}


def test_readers_in_other_processes_see_whole_writes_in_order_while_one_writes(sqlite, view, stores):
    store = get_online_store_from_config(sqlite.online_store)
    store.write_columns(sqlite, view, version(stores, 0))

    def read(say):
        mine = get_online_store_from_config(sqlite.online_store)
        last, until = 0, time.monotonic() + 1.5
        while time.monotonic() < until:
            versions = set(read_versions(mine, sqlite, view))
            assert len(versions) == 1
            assert min(versions) >= last
            last = min(versions)
        say(last)

    with child(write_forever(sqlite, view, stores)) as (_, written), child(read) as (_, one), child(read) as (_, two):
        written.readline()
        assert int(one.readline()) > 0
        assert int(two.readline()) > 0


def test_a_full_disk_ends_a_sqlite_write_with_an_error_and_keeps_what_was_there(sqlite, view, stores, tmp_path):
    store = get_online_store_from_config(sqlite.online_store)
    store.write_columns(sqlite, view, version(stores, 1))
    size = sum(file.stat().st_size for file in tmp_path.glob("online.db*"))

    def fill(say):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50_000, size + 50_000))
        mine = get_online_store_from_config(sqlite.online_store)
        try:
            for number in range(2, 100):
                mine.write_columns(sqlite, view, version(stores, number))
                say(number)
        except StoreError as error:
            say(f"error: {error}")

    with child(fill) as (_, said):
        *written, error = said.read().splitlines()
    assert "online.db" in error
    assert "nothing of this call was stored" in error
    assert set(read_versions(store, sqlite, view)) == {int(written[-1]) if written else 1}


def test_a_writer_that_waits_too_long_for_another_says_so(tmp_path, view, stores):
    online = {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": "online.db", "timeout_s": 0.05}
    config = stores.config(tmp_path, online)
    store = get_online_store_from_config(config.online_store)
    store.write_columns(config, view, version(stores, 1))
    other = sqlite3.connect(tmp_path / "online.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        store.write_columns(config, view, version(stores, 2))
    assert set(read_versions(store, config, view)) == {1}
    other.execute("ROLLBACK")
    other.close()
    store.write_columns(config, view, version(stores, 2))
    assert set(read_versions(store, config, view)) == {2}


def test_a_missing_or_foreign_sqlite_file_is_told_from_an_empty_one(sqlite, view, tmp_path):
    store = get_online_store_from_config(sqlite.online_store)
    with pytest.raises(StoreError, match="run `feast apply`"):
        store.read_columns(sqlite, view, {"user_id": [1]})
    assert not (tmp_path / "online.db").exists()
    (tmp_path / "online.db").write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        store.read_columns(sqlite, view, {"user_id": [1]})


def test_a_view_that_was_never_applied_is_an_error_and_not_an_empty_answer(sqlite, view, stores):
    store = get_online_store_from_config(sqlite.online_store)
    store.update(sqlite, [], [view], [], [], partial=False)
    with pytest.raises(StoreError, match="run `feast apply`"):
        store.read_columns(sqlite, stores.view(name="other"), {"user_id": [1]})


def test_a_reader_notices_a_new_file_in_the_place_of_the_old(sqlite, view, stores, tmp_path):
    store = get_online_store_from_config(sqlite.online_store)
    store.write_columns(sqlite, view, version(stores, 1))
    assert set(read_versions(store, sqlite, view)) == {1}
    for file in tmp_path.glob("online.db*"):
        file.unlink()
    get_online_store_from_config(sqlite.online_store).write_columns(sqlite, view, version(stores, 2))
    assert set(read_versions(store, sqlite, view)) == {2}


@pytest.mark.redis
def test_redis_killed_in_mid_write_is_an_error_and_every_row_stays_whole(redis, view, stores, durable_redis):
    store = get_online_store_from_config(redis.online_store)

    def write(say):
        try:
            write_forever(redis, view, stores)(say)
        except StoreError as error:
            say(f"error: {error}")

    with child(write) as (_, said):
        said.readline()
        time.sleep(0.03)
        durable_redis.kill()
        *written, error = said.read().splitlines()
    assert error.startswith("error: online store Redis at 127.0.0.1")
    with pytest.raises(StoreError, match="repeat the call"):
        store.read_columns(redis, view, {"user_id": [1]})
    durable_redis.start()
    last = int(written[-1]) if written else 1
    assert all(last <= number <= last + 1 for number in read_versions(store, redis, view))
    store.write_columns(redis, view, version(stores, 9_999))
    assert set(read_versions(store, redis, view)) == {9_999}


MANY = 4_000  # rows that take Redis several scripts: a write may be cut between them


@pytest.mark.redis
def test_a_writer_killed_in_a_redis_write_leaves_every_row_whole_and_no_answered_one_lost(redis, view, stores):
    n_users = 24_000  # three round trips

    def write(say):
        mine = get_online_store_from_config(redis.online_store)
        mine.write_columns(redis, view, version(stores, 1, n_users))
        say(1)
        run, trips = plait_redis._run, []

        def killed_at_the_second(client, commands):
            trips.append(1)
            if len(trips) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(client, commands)

        plait_redis._run = killed_at_the_second
        mine.write_columns(redis, view, version(stores, 2, n_users))
        say(2)

    with child(write) as (pid, said):
        assert said.read().split() == ["1"]
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    store = get_online_store_from_config(redis.online_store)
    versions = read_versions(store, redis, view, n_users)
    assert (versions.count(2), versions.count(1)) == (8_000, n_users - 8_000)
    store.write_columns(redis, view, version(stores, 3, n_users))
    assert set(read_versions(store, redis, view, n_users)) == {3}


@pytest.mark.redis
def test_redis_killed_between_the_scripts_of_a_write_keeps_whole_rows(redis, view, stores, durable_redis):
    store = get_online_store_from_config(redis.online_store)
    store.write_columns(redis, view, version(stores, 1, MANY))
    run, n_run = plait_redis._run, []

    def killed_after_the_first(client, commands):
        if not n_run:
            n_run.append(1)
            run(client, commands[:1])
            durable_redis.kill()
        return run(client, commands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plait_redis, "_run", killed_after_the_first)
        with pytest.raises(StoreError, match="repeat the call"):
            store.write_columns(redis, view, version(stores, 2, MANY))
    durable_redis.start()
    versions = read_versions(store, redis, view, MANY)
    assert (versions.count(2), versions.count(1)) == (1_000, MANY - 1_000)
    store.write_columns(redis, view, version(stores, 2, MANY))
    assert set(read_versions(store, redis, view, MANY)) == {2}


@pytest.mark.redis
def test_a_redis_without_memory_left_is_an_error_and_keeps_what_was_there(redis, view, stores):
    import redis as client

    store = get_online_store_from_config(redis.online_store)
    store.write_columns(redis, view, version(stores, 1))
    with client.Redis.from_url(redis.online_store.url) as raw:
        raw.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match=r"(?i)memory"):
            store.write_columns(redis, view, version(stores, 2))
        assert set(read_versions(store, redis, view)) == {1}
        raw.config_set("maxmemory", 0)
    store.write_columns(redis, view, version(stores, 2))
    assert set(read_versions(store, redis, view)) == {2}


@pytest.mark.redis
def test_readers_in_other_processes_see_whole_rows_that_never_grow_older_on_redis(redis, view, stores):
    store = get_online_store_from_config(redis.online_store)
    store.write_columns(redis, view, version(stores, 1, MANY))

    def read(say):
        mine = get_online_store_from_config(redis.online_store)
        last, until = [0] * MANY, time.monotonic() + 1.5
        while time.monotonic() < until:
            versions = read_versions(mine, redis, view, MANY)
            assert all(new >= old for new, old in zip(versions, last, strict=True))
            last = versions
        say(max(last))

    with child(write_forever(redis, view, stores, MANY)) as (_, written), child(read) as (_, one):
        with child(read) as (_, two):
            written.readline()
            assert int(one.readline()) > 1
            assert int(two.readline()) > 1


@pytest.mark.redis
def test_a_redis_that_hangs_is_an_error_within_the_timeout(tmp_path, view, stores, durable_redis):
    online = {"type": "plait.stores.redis.PackedRedisOnlineStore", "url": durable_redis.url, "timeout_s": 0.2}
    config = stores.config(tmp_path, online)
    store = get_online_store_from_config(config.online_store)
    store.write_columns(config, view, version(stores, 1))
    durable_redis.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"[Tt]imeout"):
            store.write_columns(config, view, version(stores, 2))
        with pytest.raises(StoreError, match=r"[Tt]imeout"):
            store.read_columns(config, view, {"user_id": [1]}, now=NOW)
        assert time.monotonic() - began < 5
    finally:
        durable_redis.process.send_signal(signal.SIGCONT)
    store.write_columns(config, view, version(stores, 3))
    assert set(read_versions(store, config, view)) == {3}


@pytest.mark.redis
def test_a_redis_that_answers_late_is_not_polled_for_long(redis, view, stores, monkeypatch):
    from redis.connection import AbstractConnection

    store = get_online_store_from_config(redis.online_store)
    store.write_columns(redis, view, version(stores, 1))
    polled = []

    def never_yet(self, timeout=0):
        polled.append(timeout)
        return False

    def reads(n):
        polled.clear()
        for user in range(n):
            got = store.read_columns(redis, view, {"user_id": [user]}, ["a"], now=NOW)
            assert got.columns["a"].to_pylist() == [1]
        return len(polled)

    monkeypatch.setattr(AbstractConnection, "can_read", never_yet)
    assert reads(LATE_ANSWERS) > 0
    assert reads(50) == 0
    monkeypatch.setattr(AbstractConnection, "can_read", lambda self, timeout=0: True)
    reads(100)  # one of them looks again, and finds the answer in time
    monkeypatch.setattr(AbstractConnection, "can_read", never_yet)
    assert reads(1) > 0


@pytest.mark.redis
def test_a_row_that_another_program_put_into_redis_is_an_error_and_not_a_value(redis, view, stores):
    import redis as client

    store = get_online_store_from_config(redis.online_store)
    store.write_columns(redis, view, version(stores, 1))
    with client.Redis.from_url(redis.online_store.url) as raw:
        raw.set(f"plait:{redis.project}.stats:7", b"something of quite another kind")
    with pytest.raises(StoreError, match="not written by Plait"):
        store.read_columns(redis, view, {"user_id": [7]}, now=NOW)


@pytest.mark.redis
def test_rows_not_written_for_the_store_s_own_time_to_live_are_forgotten(tmp_path, view, stores, durable_redis):
    import redis as client

    online = {"type": "plait.stores.redis.PackedRedisOnlineStore", "url": durable_redis.url, "key_ttl_seconds": 60}
    config = stores.config(tmp_path, online)
    get_online_store_from_config(config.online_store).write_columns(config, view, version(stores, 1))
    with client.Redis.from_url(durable_redis.url) as raw:
        assert 0 < raw.ttl(f"plait:{config.project}.stats:7") <= 60
