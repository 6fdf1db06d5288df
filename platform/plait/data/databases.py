"""Tables and queries of any database that SQLAlchemy speaks to, as Arrow batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from plait.data.lakes import ALLOWED, without_secrets
from plait.errors import DataError, PlaitError, SettingsError, SpecError, UnknownNameError


def sql_batches(url: str, query: str | None, table: str | None, rows: int) -> Iterator[pa.RecordBatch]:
    """A table, in the types that it declares, or a query's result, so many rows at a time."""
    import sqlalchemy as sa

    try:
        address = sa.make_url(url)
        if address.drivername == "postgresql":  # SQLAlchemy's default driver is the one before it
            address = address.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(address)
    except ImportError as error:
        driver = (error.name or "").partition(".")[0]
        raise SettingsError(
            f"reading {url.partition(':')[0]} databases needs the package {driver!r}, which is not installed; "
            f"`pip install {_DRIVERS.get(driver, driver)}`, or name another driver in the URL (postgresql+psycopg://)"
        ) from error
    except sa.exc.ArgumentError as error:  # of an unknown dialect too
        raise SettingsError(
            f"cannot open {without_secrets(url, {})} as a database: {without_secrets(str(error), {})}; "
            f"a source is {ALLOWED}"
        ) from error
    if bool(query) == bool(table):
        raise SpecError("reading a database needs either a query or the name of a table")
    shown = address.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            if table:
                known = sa.inspect(connection).get_table_names()
                if table not in known:
                    raise UnknownNameError("table", table, known, where=shown)
                declared = sa.Table(table, sa.MetaData(), autoload_with=connection)
                statement: Any = sa.select(declared)
                types = {column.name: _arrow_type(column.type) for column in declared.columns}
            else:
                statement, types = sa.text(str(query)), {}
            result = connection.execution_options(stream_results=True).execute(statement)
            names = list(result.keys())
            for some in result.partitions(rows):
                yield _batch(names, some, types)
    except PlaitError:
        raise
    except (sa.exc.SQLAlchemyError, pa.ArrowException) as error:
        raise DataError(f"{shown} cannot be read: {str(error)[:500]}") from error
    finally:
        engine.dispose()


# Where the module of a driver and its package have different names.
_DRIVERS = {
    "psycopg2": "psycopg2-binary",
    "psycopg": "plait[postgres]",
    "MySQLdb": "mysqlclient",
    "cx_Oracle": "oracledb",
    "duckdb_engine": "duckdb-engine",
    "snowflake": "snowflake-sqlalchemy",
}


def _arrow_type(declared: Any) -> pa.DataType | None:
    """The type of a table's column; None where its values tell it better (UUIDs, enumerations, JSON, dates)."""
    import sqlalchemy as sa

    if isinstance(declared, sa.Boolean):
        return pa.bool_()
    if isinstance(declared, sa.Integer):
        return pa.int64()
    if isinstance(declared, sa.Float):
        return pa.float64()
    if isinstance(declared, sa.Numeric) and declared.asdecimal and 0 < (declared.precision or 0) <= 38:
        return pa.decimal128(declared.precision, declared.scale or 0)
    if isinstance(declared, sa.DateTime):
        return pa.timestamp("us", tz="UTC" if declared.timezone else None)
    return pa.string() if isinstance(declared, sa.String) and not isinstance(declared, sa.Enum) else None


def _batch(names: Sequence[str], rows: Sequence[Any], types: Mapping[str, pa.DataType | None]) -> pa.RecordBatch:
    columns = zip(names, zip(*rows, strict=True), strict=True)
    arrays = [_array(name, list(column), types.get(name)) for name, column in columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(names))


def _array(name: str, values: Sequence[object], known: pa.DataType | None) -> pa.Array:
    """A database's values in the type that its table declares, or in their own where they are not of it.

    Raises DataError if they have no type in common.
    """
    if known is not None:
        with suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            return pa.array(values, known)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"column {name!r} holds values of several kinds: {error}") from error
