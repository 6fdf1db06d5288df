"""A real server process with fake parts: `python fake_server.py PORT WORKERS`. Feature reads take SLOW_S seconds."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "platform")]


def load(folder: Path) -> object:
    from conftest import make_world

    context = make_world(folder)
    world = context.__enter__()
    world.reader.before = lambda: time.sleep(float(os.environ.get("SLOW_S", "0")))
    return world.app


if __name__ == "__main__":
    from serving.launcher import metrics_folder, run_workers

    with metrics_folder() as folder:
        run_workers(partial(load, folder), host="127.0.0.1", port=int(sys.argv[1]), workers=int(sys.argv[2]), threads=4)
