"""From a dataset's parquet parts to numpy batches: shuffled, sharded, no pandas, never a whole split in memory.

Rows are read a row group at a time (one ahead, in a thread), gathered into a buffer, shuffled there and cut into
batches. Shuffling is by blocks: the order of row groups is drawn for each epoch, then every buffer of `shuffle_rows`
is permuted; with a buffer of a few row groups this mixes rows that were far apart and costs one gather a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.errors import DataError, SpecError
from plait.offline.dataset import Split, corrupt_part

NULL_INTEGER = -1
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of differing length, one a row: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray  # int64, one more than rows, offsets[0] == 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows start to stop, without copying values."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: np.ndarray) -> Ragged:
        """The chosen rows, in the order given."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Position within the output minus that of its row's start, plus the row's start in the source.
        source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[source], offsets)


Column = np.ndarray | Ragged
Batch = dict[str, Column]
Encode = Callable[[pa.Table], Mapping[str, Column]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSpec:
    """How to read a split. shard/shards: this reader's part of the rows (rank x worker), disjoint and complete.

    shuffle_rows: size of the shuffle buffer; 0 reads in order. even: every shard gets equally many rows, up to
    shards - 1 rows being left out, so that data-parallel ranks make equally many steps. pack: matrices to stack from
    columns of one kind, name -> columns; other columns stay single.
    """

    batch_rows: int
    columns: tuple[str, ...] | None = None
    shuffle_rows: int = 0
    seed: int = 0
    shard: int = 0
    shards: int = 1
    even: bool = False
    drop_last: bool = False
    pack: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or self.shuffle_rows < 0:
            raise SpecError(f"batch_rows={self.batch_rows} shuffle_rows={self.shuffle_rows}: give at least 1 and 0")
        if not 0 <= self.shard < self.shards:
            raise SpecError(f"shard {self.shard} of {self.shards} does not exist; give 0 to {self.shards - 1}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rows inside one row group."""

    file: Path
    group: int
    start: int
    stop: int

    def read(self, columns: Sequence[str]) -> pa.Table:
        with corrupt_part(self.file), pq.ParquetFile(self.file) as parquet:
            table = parquet.read_row_group(self.group, columns=list(columns), use_threads=True)
        return table.slice(self.start, self.stop - self.start).select(list(columns))


class BatchReader:
    """Batches of one split (or one shard of it); iterate `epoch(n)` as often as wanted.

    encode: turns a table of the read columns into arrays of as many rows (a model's encoders); without it, columns
    become arrays as they are: numbers keep their type (null integers become -1, null floats NaN), lists become Ragged.
    """

    def __init__(self, split: Split, spec: ReadSpec, *, encode: Encode | None = None) -> None:
        self.spec, self.encode = spec, encode
        self.columns = split.check_columns(spec.columns)
        self._pieces = list(_row_groups(split))
        self._total = sum(piece.stop - piece.start for piece in self._pieces)

    @property
    def n_rows(self) -> int:
        """Rows of this shard."""
        start, stop = self._range()
        return stop - start

    def __len__(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(self.n_rows, self.spec.batch_rows)
        return whole + (rest > 0 and not self.spec.drop_last)

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """The shard's batches; with shuffling, another order for each `number`, the same in every process."""
        waiting: list[Batch] = []
        n_waiting = 0
        for buffer in self._buffers(number):
            n = _n_rows(buffer)
            if n_waiting:  # finish the batch that the last buffer began
                need = min(self.spec.batch_rows - n_waiting, n)
                waiting.append(_rows(buffer, 0, need))
                n_waiting += need
                at = need
            else:
                at = 0
            if n_waiting == self.spec.batch_rows:
                yield _joined(waiting)
                waiting, n_waiting = [], 0
            while n_waiting == 0 and at + self.spec.batch_rows <= n:
                yield _rows(buffer, at, at + self.spec.batch_rows)
                at += self.spec.batch_rows
            if at < n:
                waiting.append(_rows(buffer, at, n))
                n_waiting += n - at
        if n_waiting and not self.spec.drop_last:
            yield _joined(waiting)

    def _range(self) -> tuple[int, int]:
        total, shard, shards = self._total, self.spec.shard, self.spec.shards
        if self.spec.even:
            each = total // shards
            return shard * each, (shard + 1) * each
        return total * shard // shards, total * (shard + 1) // shards

    def _buffers(self, number: int) -> Iterator[Batch]:
        """Arrays of about shuffle_rows rows (without shuffling, of one row group), the next being read meanwhile."""
        plan = self._plan(number)
        with ThreadPoolExecutor(1, thread_name_prefix="plait-read") as pool:
            ahead: Future[Batch] | None = None
            try:
                for index, pieces in enumerate(plan):
                    following = pool.submit(self._load, pieces, number, index)
                    if ahead is not None:
                        yield ahead.result()
                    ahead = following
                if ahead is not None:
                    yield ahead.result()
            finally:
                if ahead is not None:
                    ahead.cancel()

    def _plan(self, number: int) -> list[list[Piece]]:
        """This shard's pieces, grouped into buffers. The order of row groups is common to all shards."""
        pieces = self._pieces
        if self.spec.shuffle_rows:
            order = np.random.default_rng([self.spec.seed, number]).permutation(len(pieces))
            pieces = [pieces[i] for i in order]
        start, stop = self._range()
        plan: list[list[Piece]] = []
        at = gathered = 0
        for piece in pieces:
            n = piece.stop - piece.start
            low, high = max(start - at, 0), min(stop - at, n)
            at += n
            if low >= high:
                continue
            if not plan or gathered >= self.spec.shuffle_rows:
                plan.append([])
                gathered = 0
            plan[-1].append(Piece(piece.file, piece.group, piece.start + low, piece.start + high))
            gathered += high - low
        return plan

    def _load(self, pieces: Sequence[Piece], number: int, index: int) -> Batch:
        """One buffer, shuffled; all of it happens in the reading thread, beside the caller's work."""
        tables = [piece.read(self.columns) for piece in pieces]
        if self.encode is not None:
            parts = [self._encoded(pa.concat_tables(tables))]
        else:
            parts = [{name: to_numpy(table.column(name), name) for name in self.columns} for table in tables]
        buffer = self._packed(parts)
        if not self.spec.shuffle_rows:
            return buffer
        rng = np.random.default_rng([self.spec.seed, number, self.spec.shard, index])
        order = rng.permutation(_n_rows(buffer))
        return {
            name: column.take(order) if isinstance(column, Ragged) else np.take(column, order, axis=0)
            for name, column in buffer.items()
        }

    def _encoded(self, table: pa.Table) -> Batch:
        assert self.encode is not None
        arrays = dict(self.encode(table))
        for name, array in arrays.items():
            if len(array) != table.num_rows:
                raise DataError(f"encode gave {len(array)} rows of {name!r} for {table.num_rows}")
        return arrays

    def _packed(self, parts: list[Batch]) -> Batch:
        """The parts one after the other, with the columns of `pack` side by side."""
        packed = {name: _stacked(name, columns, parts) for name, columns in (self.spec.pack or {}).items()}
        taken = {column for columns in (self.spec.pack or {}).values() for column in columns}
        single = [{name: array for name, array in part.items() if name not in taken} for part in parts]
        return {**_joined(single), **packed}


def to_numpy(column: pa.ChunkedArray | pa.Array, name: str = "column") -> Column:
    """Numbers and booleans as an array, lists of them as Ragged, timestamps as int64 microseconds.

    Null integers become -1, null floats NaN, null lists empty. Raises DataError for strings: they need an encoder.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # an empty column combines to itself
        array = pa.array([], array.type)
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if array.null_count:
            array = pc.fill_null(array, pa.scalar([], kind))
        offsets = array.offsets.to_numpy().astype(np.int64)
        values = to_numpy(array.values.slice(offsets[0], offsets[-1] - offsets[0]), name)
        assert isinstance(values, np.ndarray)
        return Ragged(values, offsets - offsets[0])
    if pa.types.is_timestamp(kind):
        array = array.cast(pa.timestamp("us", tz=kind.tz)).cast(pa.int64())
    elif pa.types.is_integer(kind):
        array = array.fill_null(NULL_INTEGER) if array.null_count else array
    elif pa.types.is_boolean(kind):
        array = array.fill_null(False)
    elif not pa.types.is_floating(kind):
        raise DataError(f"column {name!r} is {kind}, which is no number: give an `encode`, or leave it out")
    return array.to_numpy(zero_copy_only=False)


def _row_groups(split: Split) -> Iterator[Piece]:
    for file in split.files:
        with corrupt_part(file):
            metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            n = metadata.row_group(group).num_rows
            if n:
                yield Piece(file, group, 0, n)


def _stacked(name: str, columns: Sequence[str], parts: Sequence[Batch]) -> np.ndarray:
    """(rows of all parts, columns), filled in blocks small enough to stay in the cache."""
    first = [parts[0][column] for column in columns]
    for column, array in zip(columns, first, strict=True):
        if isinstance(array, Ragged):
            raise SpecError(f"pack {name!r}: {column!r} is a list; only single numbers can be stacked")
    matrix = np.empty((sum(_n_rows(part) for part in parts), len(columns)), np.result_type(*first))  # type: ignore[arg-type]
    at = 0
    for part in parts:
        n = _n_rows(part)
        for start in range(0, n, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, n)
            for i, column in enumerate(columns):
                matrix[at + start : at + stop, i] = part[column][start:stop]  # type: ignore[index]
        at += n
    return matrix


def _n_rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _rows(buffer: Batch, start: int, stop: int) -> Batch:
    return {
        name: column.slice(start, stop) if isinstance(column, Ragged) else column[start:stop]
        for name, column in buffer.items()
    }


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    out: Batch = {}
    for name, first in parts[0].items():
        columns = [part[name] for part in parts]
        if isinstance(first, Ragged):
            lists = [column for column in columns if isinstance(column, Ragged)]
            ends = np.concatenate([[0], np.cumsum([len(each.values) for each in lists])[:-1]])
            offsets = [each.offsets[1:] + end for each, end in zip(lists, ends, strict=True)]
            out[name] = Ragged(
                np.concatenate([each.values for each in lists]), np.concatenate([np.zeros(1, np.int64), *offsets])
            )
        else:
            out[name] = np.concatenate(columns)  # type: ignore[arg-type]
    return out
