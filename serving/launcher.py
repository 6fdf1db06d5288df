"""`plait serve`: granian in front, one application per worker process, built after the fork."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from plait.errors import PlaitError, SettingsError, StoreError
from plait.settings import Home
from serving.lean import go_lean, resident_bytes

GRACE_S = 30


def serve_forever(
    home: Home,
    *,
    host: str,
    port: int,
    workers: int,
    threads: int,
    access_log: bool,
    say: Callable[[str], None],
    require_keys: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is in flight and return.

    Raises SettingsError if the port is taken, no model is registered, or the feature store was never applied.
    """
    check_ready_to_serve(home)
    port = claim_port(host, port)
    go_lean()
    say("loading Feast and onnxruntime …")
    # Before prometheus_client is first imported: it looks for the folder then.
    with metrics_folder() as folder:
        importlib.import_module("serving.build")  # once, before the fork: the workers share its pages
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"{workers} worker{'s' if workers > 1 else ''} on {url}")
        for path, what in (
            ("/console", "what serves, who gets what, a form to try it"),
            ("/openapi.json", "every route"),
            ("/metrics", "Prometheus"),
        ):
            say(f"  {url}{path:<14} {what}")
        loader = partial(
            load_worker,
            home=home,
            threads=threads,
            access_log=access_log,
            metrics_folder=folder,
            require_keys=require_keys,
        )
        run_workers(loader, host=host, port=port, workers=workers, threads=threads)


def run_workers(load: Callable[[], Any], *, host: str, port: int, workers: int, threads: int) -> None:
    """Granian with `workers` processes; each calls `load` for its WSGI application. Returns after a signal's drain."""
    from granian.constants import Interfaces
    from granian.log import LogLevels
    from granian.server import Server

    server = Server(
        "plait",
        address=host,
        port=port,
        interface=Interfaces.WSGI,
        workers=workers,
        blocking_threads=threads,
        websockets=False,
        log_level=LogLevels.warning,
        respawn_failed_workers=True,
        workers_kill_timeout=GRACE_S,
    )
    server.serve(target_loader=load, wrap_loader=False)


def load_worker(*, home: Home, threads: int, access_log: bool, metrics_folder: Path, require_keys: bool) -> Any:
    """The WSGI application of this worker. A PlaitError is printed and ends the worker."""
    go_lean()
    started = time.perf_counter()
    _configure_logging()
    from serving.app import create_app
    from serving.build import build_parts

    try:
        parts = build_parts(home, n_reads=threads + 4, metrics_folder=metrics_folder, require_keys=require_keys)
    except PlaitError as error:
        print(f"plait: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    # Run when the worker has drained and its process ends; plain atexit hooks are not, in a forked process.
    Finalize(None, parts.close, exitpriority=100)
    app = create_app(parts, access_log=access_log)
    print(
        f"worker {os.getpid()} serves {', '.join(sorted(m.ref for m in parts.pool.models.values())) or 'no model yet'} "
        f"({time.perf_counter() - started:.1f} s, {resident_bytes() / 2**20:.0f} MB resident)",
        file=sys.stderr,
        flush=True,
    )
    return app


def claim_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. SettingsError if it cannot be listened on.

    Granian's workers share the port, so a second server would join the first unnoticed; this bind does not share.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = "another process listens there" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
            raise SettingsError(
                f"cannot listen on {host} port {port}: {why}; stop it, or choose another with --port (0: any free one)"
            ) from error
        return int(probe.getsockname()[1])


def check_ready_to_serve(home: Home) -> None:
    """SettingsError, naming the command to run, unless there is an applied feature store and a registered model."""
    from plait.database import database_name
    from plait.models import ModelRegistry
    from serving.remembered import remembered_file

    registry = home.root / "registry.db"
    config = (home.project / "feature_store.yaml").read_text()
    if "sqlite" in config and not _has_rows(registry, "feature_services"):
        raise SettingsError(f"no feature service is registered in {registry}; run `feast apply` in {home.project}")
    models = ModelRegistry(home)
    try:
        names = models.names()
    except StoreError:  # then what served last serves again
        if remembered_file(home).exists():
            return
        raise
    finally:
        models.close()  # no connection may cross the fork
    if not names:
        raise SettingsError(f"no model is registered in {database_name(home)}; run `plait train deepfm` first")


def _has_rows(database: Path, table: str) -> bool:
    if not database.exists():
        return False
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            return db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return False


@contextmanager
def metrics_folder() -> Iterator[Path]:
    """A fresh folder in which the workers of this server add up their metrics; it goes when the server does."""
    folder = tempfile.mkdtemp(prefix="plait-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("serving", logging.INFO), ("experiments", logging.INFO), ("plait", logging.INFO)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    access = logging.getLogger("serving.access")
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [plain], False
