"""A real server process with fake parts: `python fake_server.py PORT WORKERS`. Feature reads take SLOW_S seconds.

With LOG_HOME it writes a real log there, of MAX_QUEUE frames, to a disk that takes SLOW_DISK_S seconds for each write.
With ADMIN_HOME it follows a real store of experiments and API keys there, and requires keys.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "platform")]


def load(folder: Path) -> object:
    from conftest import make_world

    context = make_world(folder)
    if home := os.environ.get("LOG_HOME"):
        context = real_log(Path(home), folder)
    elif home := os.environ.get("ADMIN_HOME"):
        context = make_world(folder, **real_stores(Path(home)))
    world = context.__enter__()
    world.reader.before = lambda: time.sleep(float(os.environ.get("SLOW_S", "0")))
    return world.app


def real_stores(project: Path) -> dict[str, Any]:
    from experiments.live import LiveConfig
    from experiments.store import ConfigStore
    from plait.keys import KeyStore
    from plait.settings import Home
    from serving.admin import Admin
    from serving.keyring import KeyRing

    home = Home(project=project, root=project / ".plait")
    store, keys = ConfigStore.at(home), KeyRing(KeyStore(home), home.root / "api-keys.json").start()
    return {
        "experiments": LiveConfig(store).start(),
        "admin": Admin(store=store, keys=keys, require_keys=True),
    }


@contextmanager
def real_log(project: Path, folder: Path) -> Iterator[Any]:
    from conftest import make_world
    from test_units import configuration

    from plait.eventlog import EventLog, log_folder
    from plait.settings import Home

    slow_s, fsync = float(os.environ.get("SLOW_DISK_S", "0")), os.fsync

    def slow_fsync(file: int) -> None:
        time.sleep(slow_s)
        fsync(file)

    os.fsync = slow_fsync
    home = Home(project=project, root=project / ".plait")
    log = EventLog(log_folder(home), "worker", max_queue=int(os.environ.get("MAX_QUEUE", "10000")))
    with make_world(folder, snapshot=configuration("session"), log=log) as world:
        Finalize(None, log.close, exitpriority=100)  # as the launcher does
        yield world


if __name__ == "__main__":
    from serving.launcher import metrics_folder, run_workers

    with metrics_folder() as folder:
        run_workers(partial(load, folder), host="127.0.0.1", port=int(sys.argv[1]), workers=int(sys.argv[2]), threads=4)
