"""`plait demo`: the whole loop once, each step the command a user would type."""

from __future__ import annotations

import json
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import requests

from plait.clock import Clock
from plait.errors import PlaitError, SettingsError
from plait.files import write_atomically
from plait.models import ModelRegistry
from plait.settings import Home, find_home

MODELS = ("deepfm", "lightgbm", "xgboost", "logistic")
EXPERIMENT = "rank-deepfm-lightgbm"
RETRAINED = "lightgbm"


class DemoError(PlaitError):
    """A step of the demo failed; its own output says why."""


@click.command()
@click.option("--data", "source", default="movielens-100k", show_default=True, help="As for `plait data prepare`.")
@click.option("--data-option", multiple=True, help="Passed on to `plait data prepare`, e.g. --data-option=--users=500.")
@click.option("--users", default=300, show_default=True, help="Simulated users.")
@click.option("--models", default=",".join(MODELS), show_default=True, help="Models to train.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--serve", is_flag=True, help="Leave the server running at the end, until Ctrl-C.")
@click.option("--fresh", is_flag=True, help="Start over: throw the home's data away; registered models stay.")
def demo(
    source: str, data_option: tuple[str, ...], users: int, models: str, host: str, port: int, serve: bool, fresh: bool
) -> None:
    """Run the whole loop: data, features, models, an experiment on simulated users, a retrained model.

    What is already there is reused: a second run goes straight to the server.
    """
    home = find_home().create()
    _require_free(host, port)
    names = [name.strip() for name in models.split(",") if name.strip()]
    run = Run(home, f"http://{host}:{port}")
    marker = home.root / "demo.json"
    if fresh:
        marker.unlink(missing_ok=True)
    done = json.loads(marker.read_text()) if marker.exists() else {}
    if done.get("source") != source:
        run.offline_half(source, [*data_option, *(["--replace"] if fresh else [])], names)
    else:
        click.echo(f"the loop has run on {source} already (--fresh starts over); models: {_champions(home)}")
    with run.server(host, port):
        if done.get("source") != source:
            run.online_half(users)
            write_atomically(marker, json.dumps({"source": source}).encode())
        run.show_prediction()
        run.tell_times()
        run.tell_addresses()
        if serve:
            click.echo("\nserving until Ctrl-C")
            run.wait_for_server()


class Run:
    """One run of the demo: its steps, their times, and the server."""

    def __init__(self, home: Home, url: str) -> None:
        self.home, self.url = home, url
        self.times: list[tuple[str, float]] = []
        self._server: subprocess.Popen[bytes] | None = None

    def offline_half(self, source: str, data_options: list[str], models: list[str]) -> None:
        """From nothing to trained, registered models and a filled online store."""
        self.step("plait", "data", "prepare", source, *data_options)
        self.step("plait", "features", "build")
        self.step("feast", "apply")
        self.materialize()
        self.step("plait", "samples", "build")
        self.step("plait", "dataset", "build", models[0])
        for model in models:  # which build, or find, the dataset of their own feature service
            self.step("plait", "train", model)
        self.step("plait", "experiments", "apply")

    def online_half(self, users: int) -> None:
        """Traffic, verdict, and a model retrained on the server's own log while it serves."""
        self.step("plait", "simulate", "--url", self.url, "--users", str(users), "--visits", "5")
        self.step("plait", "experiments", "report", EXPERIMENT)
        self.step("plait", "audit")
        before = self.served_version(RETRAINED)
        self.step("plait", "features", "build")
        # Only the newest two hundredths are kept from training, so that most served impressions are trained on; and
        # before the traffic that follows, which nobody answers.
        self.step("plait", "samples", "build", "--shares", "0.98,0.01")
        with self.constant_traffic() as traffic:
            self.materialize()
            self.step("plait", "train", RETRAINED)
            after = self.wait_for_version(RETRAINED, before)
        click.echo(
            f"\nthe running server went from {RETRAINED}:{before} to {RETRAINED}:{after} under traffic: "
            f"{traffic['requests']} predictions meanwhile, {traffic['failed']} failed"
        )
        if traffic["failed"]:
            raise DemoError(f"{traffic['failed']} predictions failed while the model was replaced")

    def materialize(self) -> None:
        now = Clock.of(self.home).now().strftime("%Y-%m-%dT%H:%M:%S")
        self.step("feast", "materialize", "1990-01-01T00:00:00", now)

    def step(self, *command: str) -> None:
        """Run one command, its output passed through; DemoError if it fails."""
        line = shlex.join(command)
        click.secho(f"\n$ {line}", bold=True)
        start = time.monotonic()
        program = Path(sys.executable).with_name(command[0])
        result = subprocess.run([str(program), *command[1:]], cwd=self.home.project, check=False)
        self.times.append((line, time.monotonic() - start))
        click.echo(f"  [{self.times[-1][1]:.1f} s]")
        if result.returncode:
            raise DemoError(f"`{line}` ended with exit code {result.returncode}; its message stands above")

    @contextmanager
    def server(self, host: str, port: int) -> Iterator[None]:
        """`plait serve` beside us, ready; asked to drain and stop when the block ends."""
        command = ["plait", "serve", "--host", host, "--port", str(port)]
        click.secho(f"\n$ {shlex.join(command)} &", bold=True)
        start = time.monotonic()
        log_path = self.home.root / "server.log"
        with log_path.open("ab") as log:
            program = str(Path(sys.executable).with_name("plait"))
            self._server = subprocess.Popen([program, *command[1:]], cwd=self.home.project, stdout=log, stderr=log)
        try:
            self._wait_until_ready(log_path)
            self.times.append((shlex.join(command), time.monotonic() - start))
            click.echo(f"  ready in {self.times[-1][1]:.1f} s, logging to {log_path}")
            yield
        finally:
            self._server.send_signal(signal.SIGTERM)
            try:
                self._server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def _wait_until_ready(self, log_path: Path, *, timeout_s: float = 90.0) -> None:
        assert self._server is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                tail = log_path.read_text(errors="replace").strip().splitlines()[-5:]
                raise DemoError("the server stopped at once; the end of its log:\n" + "\n".join(tail))
            try:
                if requests.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            except requests.ConnectionError:
                time.sleep(0.3)
            else:
                time.sleep(0.3)
        raise DemoError(f"the server was not ready within {timeout_s:g} s; see {log_path}")

    def wait_for_server(self) -> None:
        assert self._server is not None
        try:
            self._server.wait()
        except KeyboardInterrupt:
            click.echo("\nstopping")

    def request_body(self) -> dict[str, Any]:
        """A prediction request for a user and movies of the held-out future."""
        import pyarrow.parquet as pq

        held_out = pq.read_table(self.home.root / "holdout" / "impressions", columns=["user_id", "item_id"])
        user = held_out["user_id"][0].as_py()
        seen = dict.fromkeys(
            item for who, item in zip(*(held_out[c].to_pylist() for c in held_out.column_names), strict=True)
            if who == user
        )  # fmt: skip
        return {
            "scene": "home",
            "entities": {"user_id": user},
            "candidates": [{"item_id": item} for item in list(seen)[:8]],
            "top_k": 3,
        }

    def show_prediction(self) -> None:
        body = self.request_body()
        answer = requests.post(f"{self.url}/v1/predict", json=body, timeout=10)
        click.secho("\none prediction:", bold=True)
        click.echo(json.dumps(answer.json(), indent=2))
        click.secho("\nrepeat it:", bold=True)
        click.echo(
            f"curl -s {self.url}/v1/predict -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
        )
        if answer.status_code != 200:
            raise DemoError(f"the prediction answered {answer.status_code}")

    def served_version(self, name: str) -> str | None:
        models = requests.get(f"{self.url}/v1/models", timeout=10).json()["models"]
        return next((model["version"] for model in models if model["name"] == name), None)

    def wait_for_version(self, name: str, before: str | None, *, timeout_s: float = 30.0) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            version = self.served_version(name)
            if version is not None and version != before:
                return version
            time.sleep(0.2)
        raise DemoError(f"the server still serves {name}:{before} {timeout_s:g} s after a new version was registered")

    @contextmanager
    def constant_traffic(self) -> Iterator[dict[str, int]]:
        """Predictions, a few a second, in the background; counts them and those that did not answer 200."""
        counts = {"requests": 0, "failed": 0}
        stop = threading.Event()
        body = self.request_body() | {"model": RETRAINED}

        def send() -> None:
            with requests.Session() as session:
                while not stop.wait(0.1):
                    counts["requests"] += 1
                    try:
                        ok = session.post(f"{self.url}/v1/predict", json=body, timeout=10).status_code == 200
                    except requests.RequestException:
                        ok = False
                    counts["failed"] += not ok

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield counts
        finally:
            stop.set()
            thread.join(timeout=15)

    def tell_times(self) -> None:
        total = sum(seconds for _, seconds in self.times)
        click.secho("\nsteps and their times:", bold=True)
        for line, seconds in self.times:
            click.echo(f"  {seconds:6.1f} s  {line}")
        peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        click.echo(f"  {total:6.1f} s  in all; the largest step held {peak_mb:,.0f} MB")

    def tell_addresses(self) -> None:
        click.secho("\nopen:", bold=True)
        for path, what in (
            ("/", "what this server is"),
            ("/console/", "models, experiments, last requests, a form to try"),
            ("/metrics", "Prometheus metrics"),
            ("/openapi.json", "the API"),
            ("/v2", "the Open Inference Protocol"),
        ):
            click.echo(f"  {self.url}{path:<15} {what}")
        click.echo("  and `feast ui` for the feature store")


def _champions(home: Home) -> str:
    registry = ModelRegistry(home)
    return ", ".join(str(registry.resolve(name)) for name in registry.names())


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"{host}:{port} cannot be used ({error.strerror}); choose another with --port"
            ) from error
