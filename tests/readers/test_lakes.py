"""Delta and Iceberg tables by URI and by catalog, with options; what is no secret, and what no message may show."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from plait.cli import cli
from plait.data.lakes import without_secrets
from plait.data.readers import ImportSpec, detect_format, import_table, open_source
from plait.errors import DataError, PlaitError, SettingsError, SpecError
from plait.settings import Home

ROWS = pa.table({"user_id": [1, 2, 3], "event_timestamp": ["2024-01-01T00:00:00Z"] * 3, "tier": ["a", None, "c"]})
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def delta(tmp_path: Path) -> str:
    """The address of a table in a folder whose name a URI writes otherwise."""
    folder = tmp_path / "a lake"
    pytest.importorskip("deltalake").write_deltalake(str(folder), ROWS)
    return folder.as_uri()


@pytest.fixture
def catalog(tmp_path: Path) -> dict[str, str]:
    """Properties of a catalog that knows shop.people and shop.eu.people."""
    module = pytest.importorskip("pyiceberg.catalog.sql")
    properties = {"type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": f"file://{tmp_path}/wh"}
    made = module.SqlCatalog("prod", **properties)
    for namespace in ("shop", "shop.eu"):
        made.create_namespace(namespace)
        made.create_table(f"{namespace}.people", schema=ROWS.schema).append(ROWS)
    made.close()
    return properties


def tiers(source: str, **words) -> list[str | None]:
    return pa.Table.from_batches(open_source(source, **words))["tier"].to_pylist()


def test_a_delta_table_is_read_by_its_uri(home: Home, delta: str) -> None:
    assert detect_format(delta) == "delta"
    assert tiers(delta) == tiers(delta, as_format="delta", options={"timeout": "5s"}) == ["a", None, "c"]
    assert import_table(home, ImportSpec(kind="users", source=delta)).rows == 3


def test_an_iceberg_table_is_read_by_its_uri_and_that_of_its_metadata(tmp_path: Path, catalog: dict[str, str]) -> None:
    folder = tmp_path / "wh" / "shop" / "people"
    assert detect_format(folder.as_uri()) == "iceberg"
    assert tiers(folder.as_uri()) == ["a", None, "c"]
    newest = max((folder / "metadata").glob("*.metadata.json")).as_uri()
    assert tiers(newest, options={"py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO"}) == ["a", None, "c"]
    assert detect_format("s3://lake/people/metadata/00001-x.metadata.json") == "iceberg"


@pytest.mark.parametrize("name", ["shop.people", "shop.eu.people"])
def test_an_iceberg_table_is_read_by_its_name_in_a_catalog(
    home: Home, monkeypatch: pytest.MonkeyPatch, catalog: dict[str, str], name: str
) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(home.root))
    options = [word for key, value in catalog.items() for word in ("--option", f"{key}={value}")]
    source = f"iceberg://prod/{name}"
    assert detect_format(source) == "iceberg"
    done = CliRunner().invoke(cli, ["data", "import", "users", source, *options], catch_exceptions=False)
    assert "users: 3 rows" in done.output
    (path,) = (home.events / "users").iterdir()
    assert pq.read_table(path)["tier"].to_pylist() == ["a", None, "c"]


def test_a_catalog_comes_from_the_configuration_of_pyiceberg(tmp_path: Path, catalog: dict[str, str]) -> None:
    (tmp_path / ".pyiceberg.yaml").write_text(
        "catalog:\n  prod:\n" + "".join(f"    {key}: {value}\n" for key, value in catalog.items())
    )
    environment = {**os.environ, "PYICEBERG_HOME": str(tmp_path), "PLAIT_HOME": str(tmp_path / ".plait")}
    command = [sys.executable, "-W", "ignore", "-m", "plait", "data", "import", "users", "iceberg://prod/shop.people"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "users: 3 rows" in done.stdout, done.stderr


def test_what_a_catalog_does_not_know_is_said(catalog: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"iceberg://prod/shop\.poeple cannot be read as iceberg: .*not exist.*poeple"):
        tiers("iceberg://prod/shop.poeple", options=catalog)
    with pytest.raises(DataError, match=r"iceberg://nowhere/shop\.people cannot be read as iceberg: URI missing"):
        tiers("iceberg://nowhere/shop.people")
    for wrong in ("iceberg://prod/people", "iceberg://prod", "iceberg:///shop.people"):
        with pytest.raises(SpecError, match="write iceberg://CATALOG/NAMESPACE"):
            tiers(wrong)


@pytest.fixture
def object_store(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with as much of S3 as reading takes, and the requests' paths and signatures.

    It lists and gives out what lies in the test's folder `store`, and knows no account but AKIAMINE.
    """
    asked: list[str] = []
    root = tmp_path / "store"

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Authorization']}")
            address = urlsplit(self.path)
            if "Credential=AKIAMINE/" not in self.headers["Authorization"]:
                return self.answer(403, b"")
            if "list-type" in address.query:
                return self.answer(200, listing(root / address.path.strip("/"), parse_qs(address.query)))
            file = root / unquote(address.path).strip("/")
            if not file.is_file():
                return self.answer(404, b"")
            data = file.read_bytes()
            if span := re.match(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
                first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
                return self.answer(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")
            return self.answer(200, data)

        do_HEAD = do_GET

        def answer(self, code: int, body: bytes, span: str | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("ETag", '"1"')
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def listing(bucket: Path, query: dict[str, list[str]]) -> bytes:
    (prefix,), (after,) = query.get("prefix", [""]), query.get("start-after", [""])
    keys = sorted(file.relative_to(bucket).as_posix() for file in bucket.rglob("*") if file.is_file())
    found = "".join(
        f"<Contents><Key>{key}</Key><Size>{(bucket / key).stat().st_size}</Size><ETag>1</ETag>"
        "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        for key in keys
        if key.startswith(prefix) and key > after
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()


def delta_options(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "AKIAMINE",
        "AWS_SECRET_ACCESS_KEY": "hunter2hunter2",
    }


def iceberg_options(endpoint: str) -> dict[str, str]:
    return {
        "s3.endpoint": endpoint,
        "s3.region": "eu-west-1",
        "s3.access-key-id": "AKIAMINE",
        "s3.secret-access-key": "hunter2hunter2",
    }


def test_a_delta_table_is_read_from_an_object_store(
    home: Home, tmp_path: Path, object_store: tuple[str, list[str]]
) -> None:
    deltalake = pytest.importorskip("deltalake")
    for rows in (ROWS.slice(2), ROWS):  # the files of the first version stay
        deltalake.write_deltalake(str(tmp_path / "store" / "lake" / "people"), rows, mode="overwrite")
    spec = ImportSpec(kind="users", source="s3://lake/people", format="delta", options=delta_options(object_store[0]))
    assert pq.read_table(import_table(home, spec).path)["tier"].to_pylist() == ["a", None, "c"]


def test_the_metadata_of_an_iceberg_table_are_read_from_an_object_store(
    tmp_path: Path, object_store: tuple[str, list[str]], catalog: dict[str, str]
) -> None:
    metadata = tmp_path / "store" / "lake" / "people" / "metadata"
    shutil.copytree(tmp_path / "wh" / "shop" / "people" / "metadata", metadata)  # they say where the rows lie: here
    newest = max(metadata.glob("*.metadata.json"))
    options = iceberg_options(object_store[0])
    assert tiers(f"s3://lake/people/metadata/{newest.name}", options=options) == ["a", None, "c"]
    (metadata / "version-hint.text").write_text(newest.name)
    assert tiers("s3://lake/people", as_format="iceberg", options=options) == ["a", None, "c"]


def test_an_iceberg_table_that_is_not_there_is_said_with_what_finds_one(object_store: tuple[str, list[str]]) -> None:
    pytest.importorskip("pyiceberg")
    with pytest.raises(DataError, match=r"s3://lake/people has no Iceberg metadata.*metadata\.json, or .*iceberg://"):
        tiers("s3://lake/people", as_format="iceberg", options=iceberg_options(object_store[0]))


@pytest.mark.parametrize(("known", "given"), [("delta", delta_options), ("iceberg", iceberg_options)])
def test_options_reach_the_object_store_and_no_message(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    object_store: tuple[str, list[str]],
    known: str,
    given: Callable[[str], dict[str, str]],
) -> None:
    pytest.importorskip("deltalake" if known == "delta" else "pyiceberg")
    endpoint, asked = object_store
    monkeypatch.setenv("PLAIT_HOME", str(home.root))
    options = {key: value.replace("MINE", "THEIRS") for key, value in given(endpoint).items()}
    spec = ImportSpec(kind="users", source="s3://lake/people", format=known, options=options)
    with pytest.raises(DataError, match=f"s3://lake/people cannot be read as {known}: [^\x1b\n]*$") as told:
        import_table(home, spec)
    assert any("Credential=AKIATHEIRS/" in line and "/eu-west-1/s3/" in line for line in asked)
    words = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    command = ["data", "import", "users", "s3://lake/people", "--format", known, *words]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code != 0
    for text in (str(told.value), repr(spec), done.output):
        assert "hunter2" not in text
        assert "AKIATHEIRS" not in text
    assert list((home.events / "users").iterdir()) == []


def test_a_source_whose_scheme_is_unknown_or_not_of_its_format_is_told_what_is_allowed() -> None:
    for known in (None, "delta", "iceberg", "csv"):
        with pytest.raises(PlaitError, match=r"ftp://.*a source is a path or file://.*s3://.*iceberg://.*SQLAlchemy"):
            tiers("ftp://me:hunter2@host/people", as_format=known)
    for known in ("parquet", "csv", "jsonl"):
        with pytest.raises(DataError, match=f"no {known} is read from s3://.*copy files of other formats here"):
            tiers("s3://lake/people", as_format=known)
    with pytest.raises(DataError, match=r"s3://lake/people tells no format; .*--format delta or iceberg"):
        tiers("s3://lake/people")
    with pytest.raises(SettingsError) as told:
        tiers("ftp://me:hunter2@host/people")
    assert "hunter2" not in str(told.value)


def test_options_of_other_formats_and_without_a_value_are_refused_without_showing_them(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("user_id\n1\n")
    with pytest.raises(SpecError, match=r"options \(token\) are for delta and iceberg tables; csv takes none"):
        tiers(str(tmp_path / "p.csv"), options={"token": "hunter2"})
    done = CliRunner().invoke(cli, ["data", "import", "users", "s3://b/t", "--option", "=hunter2"])
    assert "--option: write KEY=VALUE" in done.output
    assert "hunter2" not in done.output


def test_a_database_without_rows_does_not_show_its_password(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.data.readers.sql_batches", lambda *words: iter(()))
    spec = ImportSpec(kind="users", source="postgresql://me:hunter2@host/db", table="people")
    with pytest.raises(DataError, match=r"postgresql://\*\*\*@host/db holds no row"):
        import_table(home, spec)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("abfss://box@me.dfs.core.windows.net/people", "abfss://box@me.dfs.core.windows.net/people"),
        ("see postgresql://me:p/a@ss@host:5432/db now", "see postgresql://***@host:5432/db now"),
        ("az://box/t?sv=1&sig=abc%3D&x=2", "az://box/t?sv=1&sig=***&x=2"),
        (
            "{'s3.secret-access-key': 'hunter2', 's3.region': 'eu'}",
            "{'s3.secret-access-key': '***', 's3.region': 'eu'}",
        ),
    ],
)
def test_secrets_are_left_out_and_addresses_stay(text: str, told: str) -> None:
    assert without_secrets(text, {"s3.secret-access-key": "hunter2", "s3.region": "eu"}) == told


@pytest.mark.parametrize("name", ["p.json", "p.json.gz", "p.jsonl.gz", "p.ndjson.gz", "p.csv.gz", "p.tsv.gz", "p.csv"])
@pytest.mark.parametrize("how", ["path", "uri", "folder"])
def test_names_of_files_tell_their_format_and_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    monkeypatch.setattr("plait.data.textfiles._BLOCK_BYTES", 60)
    comma = "\t" if ".tsv" in name else ","
    table = [ROWS.column_names, *(row.values() for row in ROWS.to_pylist())]
    text = "".join(comma.join(str(value or "-") for value in row) + "\n" for row in table)
    if "js" in name:
        text = "".join(json.dumps({**row, "tier": row["tier"] or "-"}) + "\n" for row in ROWS.to_pylist())
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source = {"path": str(folder / name), "uri": (folder / name).as_uri(), "folder": str(folder)}[how]
    assert tiers(source) == ["a", "-", "c"]


def test_a_json_file_beside_files_of_another_format_is_a_note_about_them(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(ROWS, tmp_path / name)
    (tmp_path / "schema.json").write_text('{\n "about": "them"\n}')
    assert detect_format(str(tmp_path)) == "parquet"
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    (tmp_path / "a.jsonl").write_text('{"tier": "a"}\n')
    assert tiers(str(tmp_path)) == ["a"]


@pytest.mark.parametrize("name", ["p.csv.gz", "p.jsonl.gz"])
def test_a_torn_compressed_file_is_named(home: Home, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"user_id,event_timestamp\n" + os.urandom(200).hex().encode())[:-60])
    with pytest.raises(DataError, match=rf"{name} cannot be read as"):
        import_table(home, ImportSpec(kind="users", source=str(tmp_path / name)))
    assert list((home.events / "users").iterdir()) == []
