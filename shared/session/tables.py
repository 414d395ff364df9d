"""Read the number columns of table files: ``.csv``, ``.tsv`` and ``.parquet``.

A table is read in blocks of rows: line or row numbers, and float64 cells of the requested columns.
A missing cell is NaN, and a cell that is not a number is infinite. Nothing in a file is executed,
and the lengths of lines, the number of columns and the values of a row group are limited.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray

MAX_LINE_BYTES = 1 << 20
"""Longer lines are skipped."""

MAX_COLUMNS = 16_384
"""A table with more columns is refused."""

MAX_GROUP_VALUES = 1 << 28
MAX_COLUMN_VALUES = 1 << 30
"""Most values of a column of a Parquet file: in a row group, 2 GiB decoded, and in the file."""

MAX_JOINED_LINES = 64
"""A quoted cell that spans more lines is not closed."""

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 8192
"""Size of a block of a text file, and of a Parquet file."""

PARQUET_FIX = "fix: run `pip install pyarrow`, or `pip install '.[parquet]'` in the project"

_DELIMITERS = ",;\t"
_MISSING = dict.fromkeys([b"", b"null", b"na", b"n/a", b"none"], b"nan")
_WORDS = {**_MISSING, b"true": b"1", b"false": b"0"}
"""Cells that are no numbers, and what they mean."""

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class TableError(ValueError):
    """A table can't be read at all."""


@dataclass(frozen=True, slots=True)
class RowIssue:
    """A row, or a list in it, that can't be used."""

    line: int
    kind: Literal["row", "long", "size"]
    message: str
    column: str = ""


@dataclass(frozen=True, slots=True)
class TableBlock:
    """Some rows of a table.

    Shapes: lines int64 [N] (1-based line or row numbers), cells float64 [N, K].
    """

    lines: NDArray[np.int64]
    cells: NDArray[np.float64]
    issues: tuple[RowIssue, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the file that are in the block, skipped ones included."""
        return len(self.lines) + sum(issue.kind != "size" for issue in self.issues)


class Table(Protocol):
    """A table with a header.

    Cells of `list_columns` are lists of numbers. `seconds_columns` are times that know their unit
    and are read in seconds.
    """

    header_line: int
    names: tuple[str, ...]
    list_columns: frozenset[str]
    seconds_columns: frozenset[str]

    def iter_blocks(self, columns: Sequence[tuple[str, int]]) -> Iterator[TableBlock]:
        """Yield the cells of some columns, given as name and number of values."""
        ...


def open_table(file: IO[bytes], suffix: str, *, wanted: Collection[str]) -> Table:
    """Read the header of a table.

    Args:
        file: the file, opened at its start.
        suffix: of its name: ``.csv``, ``.tsv`` or ``.parquet``.
        wanted: names that columns should have; they help to find the delimiter.

    Raises:
        TableError: the file can't be read as a table.
    """
    table: Table
    table = _ParquetTable(file) if suffix == ".parquet" else _DelimitedTable(file, wanted)
    if len(table.names) > MAX_COLUMNS:
        raise TableError(f"{len(table.names)} columns exceed {MAX_COLUMNS}; fix: split the file")
    return table


def choose_columns(table: Table, key: str, *, size: int) -> list[str]:
    """Return the columns that hold the values of a key.

    They are the column KEY, if it holds lists or one value is enough; else the columns KEY_0,
    KEY.0 or KEY[0], ... by their number; else all that begin with KEY_, KEY. or KEY[, in the order
    of the file.
    """
    if key in table.list_columns or (size == 1 and key in table.names):
        return [key]
    numbered = [
        (int(match[1]), name)
        for name in table.names
        if (match := re.fullmatch(re.escape(key) + r"(?:[_.]|\[)([0-9]{1,5})\]?", name))
    ]
    if numbered:
        return [name for _, name in sorted(numbered)]
    return [name for name in table.names if name.startswith((f"{key}_", f"{key}.", f"{key}["))]


class _DelimitedTable:
    """Lines of cells, separated by comma, semicolon or tab."""

    def __init__(self, file: IO[bytes], wanted: Collection[str]) -> None:
        start = file.read(2)
        file.seek(0)
        self._read_line: Callable[[], bytes] = lambda: file.readline(MAX_LINE_BYTES + 1)
        if start in _UTF_16:
            text = io.TextIOWrapper(file, "utf-16", errors="replace", newline="\n")
            self._read_line = lambda: text.readline(MAX_LINE_BYTES + 1).encode()
        self._number = 0
        self._pending: deque[tuple[int, bytes]] = deque()
        header = next(((n, raw) for n, raw in self._iter_records() if not _is_hint(raw)), None)
        if header is None or len(header[1]) > MAX_LINE_BYTES:
            raise TableError("no header line; fix: write the names of the columns in line 1")
        self.header_line, raw = header
        readings = [
            (_parse_row(_decode(raw.removeprefix(b"\xef\xbb\xbf")), delimiter) or [], delimiter)
            for delimiter in _DELIMITERS
        ]
        cells, self.delimiter = max(
            readings, key=lambda r: (len({c.strip() for c in r[0]} & {*wanted}), len(r[0]))
        )
        self.names = tuple(cell.strip() for cell in cells)
        edge = f"[{self.delimiter}\n]".encode()
        words = b"|".join(sorted(_WORDS, reverse=True))
        self._word = re.compile(rb"(?i)(?<=%b) *(%b) *(?=%b)" % (edge, words, edge))
        self._quoted_cell = re.compile(
            rb'(?<=%b)"([^"\n%b]*)"(?=%b)' % (edge, self.delimiter.encode(), edge)
        )
        self.list_columns = self.seconds_columns = frozenset[str]()

    def iter_blocks(self, columns: Sequence[tuple[str, int]]) -> Iterator[TableBlock]:
        """Yield the cells of some columns."""
        indices = [self.names.index(name) for name, _ in columns]
        for records, issues in self._iter_record_blocks():
            numbers = np.array([number for number, _ in records], dtype=np.int64)
            cells = self._parse_fast([raw for _, raw in records], indices)
            if cells is not None:
                yield TableBlock(numbers, cells, issues)
            else:
                yield self._parse_slow(records, indices, issues)

    def _iter_record_blocks(
        self,
    ) -> Iterator[tuple[list[tuple[int, bytes]], tuple[RowIssue, ...]]]:
        """Yield records with their line numbers, and lines that are too long."""
        records: list[tuple[int, bytes]] = []
        issues: list[RowIssue] = []
        length = 0
        for number, raw in self._iter_records():
            if len(raw) > MAX_LINE_BYTES:
                issues.append(RowIssue(number, "long", f"line over {MAX_LINE_BYTES} bytes"))
            else:
                records.append((number, raw if raw.endswith(b"\n") else raw + b"\n"))
            length += len(raw)
            if length > BLOCK_BYTES:
                yield records, tuple(issues)
                records, issues, length = [], [], 0
        yield records, tuple(issues)

    def _iter_records(self) -> Iterator[tuple[int, bytes]]:
        """Yield line numbers and lines that are not blank; quoted cells may span lines."""
        while line := self._next_line():
            number, raw = line
            if raw.count(b'"') % 2 and len(raw) <= MAX_LINE_BYTES:
                raw = self._join_lines(raw)
            if raw.strip():
                yield number, raw

    def _join_lines(self, raw: bytes) -> bytes:
        """Append the lines up to the closing quote, if it is near; else keep them for later."""
        joined = raw
        taken: list[tuple[int, bytes]] = []
        while len(taken) < MAX_JOINED_LINES and len(joined) <= MAX_LINE_BYTES:
            line = self._next_line()
            if line is None:
                break
            taken.append(line)
            joined += line[1]
            if line[1].count(b'"') % 2:
                return joined
        self._pending.extendleft(reversed(taken))
        return raw

    def _next_line(self) -> tuple[int, bytes] | None:
        """Return the next line and its number; of a line that is too long, only the beginning."""
        if self._pending:
            return self._pending.popleft()
        raw = self._read_line()
        if not raw:
            return None
        self._number += 1
        extra = raw
        while len(extra) > MAX_LINE_BYTES and not extra.endswith(b"\n"):
            extra = self._read_line()
        return self._number, raw

    def _parse_fast(self, lines: list[bytes], indices: list[int]) -> NDArray[np.float64] | None:
        """Parse lines of numbers; None if a needed cell is something else, or a row is irregular.

        It gives the same cells as :meth:`_parse_slow`, 5 times faster.
        """
        delimiter = self.delimiter.encode()
        if {raw.count(delimiter) for raw in lines} != {len(self.names) - 1}:
            return None
        content = b"\n" + b"".join(lines).replace(b"\r\n", b"\n")
        if b'"' in content:
            content = self._quoted_cell.sub(rb"\1", content)
            if b'"' in content:
                return None
        if self.delimiter != ",":
            content = content.replace(b",", b".")
        for has_words in (True, False):
            try:
                cells = np.loadtxt(
                    io.BytesIO(content),
                    delimiter=self.delimiter,
                    usecols=indices,
                    comments=None,
                    encoding="latin1",
                    ndmin=2,
                )
            except ValueError:
                if has_words:
                    content = self._word.sub(lambda m: _WORDS[m[1].lower()], content)
            else:
                return cells if len(cells) == len(lines) else None
        return None

    def _parse_slow(
        self,
        records: list[tuple[int, bytes]],
        indices: list[int],
        long_lines: tuple[RowIssue, ...],
    ) -> TableBlock:
        """Parse any lines."""
        numbers, cells, issues = [], [], [*long_lines]
        for number, raw in records:
            row = _parse_row(_decode(raw), self.delimiter)
            while row is not None and len(row) > len(self.names) and not row[-1].strip():
                row.pop()
            if row is None:
                issues.append(RowIssue(number, "row", "a quote is not closed, or inside a cell"))
            elif len(row) != len(self.names):
                message = f"{len(row)} cells in a table of {len(self.names)} columns"
                issues.append(RowIssue(number, "row", message))
            else:
                numbers.append(number)
                cells.append([self._parse_cell(row[index]) for index in indices])
        return TableBlock(
            np.array(numbers, dtype=np.int64),
            np.array(cells, dtype=np.float64).reshape(-1, len(indices)),
            tuple(issues),
        )

    def _parse_cell(self, text: str) -> float:
        """Return a number, NaN if it is missing, and infinity if it is something else."""
        if self.delimiter != ",":
            text = text.replace(",", ".")
        try:
            number = float(text)
        except ValueError:
            word = _WORDS.get(text.strip().lower().encode())
            return np.inf if word is None else float(word)
        return number if text.isascii() and "_" not in text else np.inf


def _is_hint(raw: bytes) -> bool:
    """Check for the line by which Excel says what the delimiter is."""
    return re.fullmatch(rb'(?:\xef\xbb\xbf)?"?sep=.?"?', raw.strip()) is not None


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def _parse_row(text: str, delimiter: str) -> list[str] | None:
    """Return the cells of one record, or None if its quotes are wrong."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


class _ParquetTable:
    """Columns of numbers, or of lists of numbers, in row groups."""

    header_line = 0

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise TableError(f"a Parquet file needs pyarrow; {PARQUET_FIX}") from error
        self._pa: Any = pa
        try:
            self._file: Any = pq.ParquetFile(file)
            self._schema: Any = self._file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TableError(_parquet_message(error)) from error
        self.names = tuple(self._schema.names)
        self.list_columns = frozenset(c.name for c in self._schema if _is_list(c.type, pa))
        self.seconds_columns = frozenset(
            c.name for c in self._schema if pa.types.is_timestamp(c.type)
        )

    def iter_blocks(self, columns: Sequence[tuple[str, int]]) -> Iterator[TableBlock]:
        """Yield the cells of some columns."""
        names = [name for name, _ in columns]
        self._check_lengths(names)
        first = 1
        try:
            for batch in self._file.iter_batches(batch_size=BLOCK_ROWS, columns=names):
                issues: list[RowIssue] = []
                cells = [
                    self._read_column(batch.column(name), name, width, issues, first=first)
                    for name, width in columns
                ]
                lines = np.arange(first, first + batch.num_rows)
                yield TableBlock(lines, np.hstack(cells), tuple(issues))
                first += batch.num_rows
        except (self._pa.ArrowException, OSError, ValueError) as error:
            raise TableError(f"row {first} and later: {_parquet_message(error)}") from error

    def _check_lengths(self, names: Collection[str]) -> None:
        """Check how many values of the columns a file claims: a few bytes can claim billions."""
        metadata, total = self._file.metadata, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = [group.column(i) for i in range(group.num_columns)]
            wanted = [c for c in columns if c.path_in_schema.split(".")[0] in names]
            count = max([group.num_rows, *(column.num_values for column in wanted)])
            total += count
            if count > MAX_GROUP_VALUES or total > MAX_COLUMN_VALUES:
                raise TableError(
                    f"{count} values of a column in row group {index}, {total} up to it, exceed "
                    f"{MAX_GROUP_VALUES} and {MAX_COLUMN_VALUES}; fix: split the recording"
                )

    def _read_column(
        self, column: Any, name: str, width: int, issues: list[RowIssue], *, first: int  # noqa: ANN401
    ) -> NDArray[np.float64]:  # fmt: skip
        """Return the cells of a column, float64 [N, width]."""
        if name not in self.list_columns:
            return self._as_numbers(column).reshape(-1, 1)
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        is_full = lengths == width
        for row in np.flatnonzero(~is_full & (lengths > 0)):
            message = f"{name} has {lengths[row]} values"
            issues.append(RowIssue(first + int(row), "size", message, name))
        cells = np.full((len(column), width), np.nan)
        full = column.filter(self._pa.array(is_full))
        cells[is_full] = self._as_numbers(pc.list_flatten(full)).reshape(-1, width)
        return cells

    def _as_numbers(self, column: Any) -> NDArray[np.float64]:  # noqa: ANN401
        """Return float64 numbers, NaN where they are missing; timestamps are seconds."""
        pa = self._pa
        if pa.types.is_timestamp(column.type):
            ns = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
            return (
                np.asarray(ns.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)) / 1e9
            )
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(numbers, dtype=np.float64)


def _is_list(kind: Any, pa: Any) -> bool:  # noqa: ANN401
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _parquet_message(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"no Parquet file of numbers ({lines[0][:120]}); fix: write it again"
