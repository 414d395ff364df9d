"""Read the number columns of table files: ``.csv``, ``.tsv`` and ``.parquet``.

A table is read in blocks of rows: line or row numbers, and float64 cells of the requested columns.
A missing cell is NaN, and a cell that is not a number is infinite. Nothing in a file is executed,
and the length of lines and the number of columns and rows are limited.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from shared.session.records import MAX_LINE_BYTES, decode_line, iter_lines, open_utf8

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

MAX_COLUMNS = 16_384
"""A table with more columns is refused."""

MAX_ROWS = 1 << 28
"""A Parquet file that claims more rows is refused: a few bytes can claim billions. A day at 2000 Hz
has fewer."""

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 8192
"""Size of a block of a text file, and of a Parquet file."""

PARQUET_FIX = "fix: run `pip install pyarrow`, or `pip install '.[parquet]'` in the project"

_DELIMITERS = ",;\t"
_WORDS = {**dict.fromkeys(["", "null", "na", "n/a", "none"], np.nan), "true": 1.0, "false": 0.0}
"""Cells that are no numbers, and what they mean."""


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
    """Some rows: 1-based numbers int64 [N], and cells float64 [N, width] by name of the column."""

    lines: NDArray[np.int64]
    cells: Mapping[str, NDArray[np.float64]]
    issues: tuple[RowIssue, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the file that are in the block, skipped ones included."""
        return len(self.lines) + sum(issue.kind != "size" for issue in self.issues)


class Table(Protocol):
    """A table with a header.

    Cells of `list_columns` are lists of numbers. `seconds_columns` are times that know their unit
    and are read in seconds. The `encoding` is empty if it is UTF-8.
    """

    header_line: int
    encoding: str
    names: tuple[str, ...]
    list_columns: frozenset[str]
    seconds_columns: frozenset[str]

    def iter_blocks(self, widths: Mapping[str, int]) -> Iterator[TableBlock]:
        """Yield the cells of some columns, given as name and number of values."""
        ...


def open_table(file: IO[bytes], suffix: str, *, wanted: Collection[str]) -> Table:
    """Read the header of a table, a file opened at its start.

    `suffix` is that of its name; the names that columns should have help to find the delimiter.

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
    pattern = re.compile(re.escape(key) + r"(?:[_.]|\[)([0-9]{1,5})\]?")
    numbered = [(int(m[1]), m[0]) for name in table.names if (m := pattern.fullmatch(name))]
    if numbered:
        return [name for _, name in sorted(numbered)]
    return [name for name in table.names if name.startswith((f"{key}_", f"{key}.", f"{key}["))]


class _DelimitedTable:
    """Lines of cells, separated by comma, semicolon or tab; quoted cells stay in their line."""

    list_columns = seconds_columns = frozenset[str]()

    def __init__(self, file: IO[bytes], wanted: Collection[str]) -> None:
        text, self.encoding = open_utf8(file)
        self._lines = iter_lines(text)
        self.header_line, raw = next(self._lines, (0, b""))
        if not 0 < len(raw) <= MAX_LINE_BYTES:
            raise TableError("no header line; fix: write the names of the columns in line 1")
        readings = [(_parse_row(raw, d) or [], d) for d in _DELIMITERS]
        cells, self.delimiter = max(
            readings, key=lambda r: (len({c.strip() for c in r[0]} & {*wanted}), len(r[0]))
        )
        self.names = tuple(cell.strip() for cell in cells)

    def iter_blocks(self, widths: Mapping[str, int]) -> Iterator[TableBlock]:
        """Yield the cells of some columns."""
        indices = [self.names.index(name) for name in widths]
        while lines := list(self._iter_block()):
            issues: list[RowIssue] = []
            cells, numbers = self._parse_fast(lines, indices), [number for number, _ in lines]
            if cells is None:
                cells, numbers = self._parse_slow(lines, indices, issues)
            columns = {name: cells[:, i : i + 1] for i, name in enumerate(widths)}
            yield TableBlock(np.array(numbers, dtype=np.int64), columns, tuple(issues))

    def _iter_block(self) -> Iterator[tuple[int, bytes]]:
        length = 0
        for number, raw in self._lines:
            yield number, raw
            length += len(raw)
            if length > BLOCK_BYTES:
                return

    def _parse_fast(
        self, lines: list[tuple[int, bytes]], indices: list[int]
    ) -> NDArray[np.float64] | None:
        """Parse lines of bare numbers, 5 times faster than :meth:`_parse_slow`; None for others."""
        content = b"\n" + b"".join(raw for _, raw in lines).replace(b"\r\n", b"\n") + b"\n"
        edge = self.delimiter.encode()
        if {raw.count(edge) for _, raw in lines} != {len(self.names) - 1} or b'"' in content:
            return None
        if edge != b",":
            content = content.replace(b",", b".")
        for empty in (edge + edge, edge + edge, b"\n" + edge, edge + b"\n"):
            content = content.replace(empty, empty[:1] + b"nan" + empty[1:])
        options: dict[str, Any] = {"comments": None, "encoding": "latin1", "ndmin": 2}
        try:
            cells = np.loadtxt(
                io.BytesIO(content), delimiter=self.delimiter, usecols=indices, **options
            )
        except ValueError:
            return None
        return cells if len(cells) == len(lines) else None

    def _parse_slow(
        self, lines: list[tuple[int, bytes]], indices: list[int], issues: list[RowIssue]
    ) -> tuple[NDArray[np.float64], list[int]]:
        """Parse any lines; return the cells and numbers of the usable ones."""
        numbers, cells = [], []
        for number, raw in lines:
            row = _parse_row(raw, self.delimiter) if len(raw) <= MAX_LINE_BYTES else []
            while row and len(row) > len(self.names) and not row[-1].strip():
                row.pop()
            if len(raw) > MAX_LINE_BYTES:
                issues.append(RowIssue(number, "long", f"line over {MAX_LINE_BYTES} bytes"))
            elif row is None:
                issues.append(RowIssue(number, "row", "a quote is not closed, or inside a cell"))
            elif len(row) != len(self.names):
                message = f"{len(row)} cells in a table of {len(self.names)} columns"
                issues.append(RowIssue(number, "row", message))
            else:
                numbers.append(number)
                cells.append([self._parse_cell(row[index]) for index in indices])
        return np.array(cells, dtype=np.float64).reshape(-1, len(indices)), numbers

    def _parse_cell(self, text: str) -> float:
        """Return a number, NaN if it is missing, and infinity if it is something else."""
        if self.delimiter != ",":
            text = text.replace(",", ".")
        try:
            number = float(text)
        except ValueError:
            return _WORDS.get(text.strip().lower(), np.inf)
        return number if text.isascii() and "_" not in text else np.inf


def _parse_row(raw: bytes, delimiter: str) -> list[str] | None:
    """Return the cells of a line, or None if its quotes are wrong."""
    try:
        rows = list(csv.reader([decode_line(raw)[0]], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


class _ParquetTable:
    """Columns of numbers, or of lists of numbers, in row groups."""

    header_line = 0
    encoding = ""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise TableError(f"a Parquet file needs pyarrow; {PARQUET_FIX}") from error
        self._pa: Any = pa
        try:
            self._file: Any = pq.ParquetFile(file)
            schema: Any = self._file.schema_arrow
            num_rows = self._file.metadata.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TableError(_parquet_message(error)) from error
        if num_rows > MAX_ROWS:
            raise TableError(f"{num_rows} rows exceed {MAX_ROWS}; fix: split the recording")
        types = pa.types
        is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        self.names = tuple(schema.names)
        self.list_columns = frozenset(c.name for c in schema if any(f(c.type) for f in is_list))
        self.seconds_columns = frozenset(c.name for c in schema if types.is_timestamp(c.type))

    def iter_blocks(self, widths: Mapping[str, int]) -> Iterator[TableBlock]:
        """Yield the cells of some columns."""
        first = 1
        try:
            for batch in self._file.iter_batches(batch_size=BLOCK_ROWS, columns=list(widths)):
                issues: list[RowIssue] = []
                lines = np.arange(first, first + batch.num_rows)
                cells = {
                    name: self._read_column(batch, name, width, lines=lines, issues=issues)
                    for name, width in widths.items()
                }
                yield TableBlock(lines, cells, tuple(issues))
                first += batch.num_rows
        except (self._pa.ArrowException, OSError, ValueError) as error:
            raise TableError(f"row {first} and later: {_parquet_message(error)}") from error

    def _read_column(
        self, batch: Any, name: str, width: int,  # noqa: ANN401
        *, lines: NDArray[np.int64], issues: list[RowIssue],
    ) -> NDArray[np.float64]:  # fmt: skip
        """Return the cells of a column, float64 [N, width]."""
        column = batch.column(name)
        if name not in self.list_columns:
            return self._as_numbers(column).reshape(-1, 1)
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        is_full = lengths == width
        for row in np.flatnonzero(~is_full & (lengths > 0)):
            message = f"{name} has {lengths[row]} values"
            issues.append(RowIssue(int(lines[row]), "size", message, name))
        cells = np.full((len(column), width), np.nan)
        full = column.filter(self._pa.array(is_full))
        cells[is_full] = self._as_numbers(pc.list_flatten(full)).reshape(-1, width)
        return cells

    def _as_numbers(self, column: Any) -> NDArray[np.float64]:  # noqa: ANN401
        """Return float64 numbers, NaN where they are missing; timestamps are seconds."""
        pa, units_per_s = self._pa, 1.0
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
            units_per_s = 1e9
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(numbers, dtype=np.float64) / units_per_s


def _parquet_message(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"no Parquet file of numbers ({lines[0][:120]}); fix: write it again"
