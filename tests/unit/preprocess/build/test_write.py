"""Recordings and finished shards give the same encoded rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.oracles import open_indexes, tiny_recipe

from preprocess.build.plan_types import Row
from preprocess.build.reuse_reader import ColumnFileCache, ShardReader
from preprocess.build.write import EncodedRow, IndexBuilder, SessionEncoder, write_column
from shared.clock import Segment
from shared.errors import JobError
from shared.kinds.text import SegmentText, encode_text
from shared.session.reader import SessionReader
from shared.session.scan import scan_session
from shared.shardset.columns import ColumnFile
from shared.shardset.layout import columns_of
from shared.shardset.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from preprocess.build.write import RowReader

RECIPE = tiny_recipe()
COLUMNS = columns_of(RECIPE)


def rows_of(reader: SessionReader) -> list[Row]:
    """Every segment of a session that is a sample."""
    scan, segments = reader.scan, reader.scan.segments(RECIPE)
    return [
        Row(
            number,
            scan.session,
            segments[index],
            scan.present(index),
            [scan.coverage.get(name, (0.0,) * len(segments))[index] for name in RECIPE.streams],
        )
        for number, index in enumerate(scan.stored_segments(RECIPE))
    ]


def read(reader: RowReader, column: str, rows: list[Row]) -> list[EncodedRow]:
    builder = IndexBuilder(rows=rows, recipe=RECIPE, durations_s={rows[0].session: 9.0})
    stored = builder.rows_of(COLUMNS[column])
    failures: list[dict[str, object]] = []
    encoded = list(reader.iter_rows(COLUMNS[column], stored.get(rows[0].session, []), failures))
    assert failures == []
    return encoded


def test_a_member_that_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    row = Row(0, "one", Segment(3, 1.0), ("internal_text",), [1.0] * len(RECIPE.streams))
    builder = IndexBuilder(rows=[row], recipe=RECIPE, durations_s={"one": 9.0})
    encoded = [EncodedRow(row, content := encode_text(SegmentText()))]
    column = replace(COLUMNS["internal_text"], max_bytes=len(content))
    write_column(builder, column, tmp_path / "a.tar", encoded)
    column = replace(column, max_bytes=len(content) - 1)
    with pytest.raises(JobError, match=r"^one/000003\.internal_text\.json has .*; fix: lower segm"):
        write_column(builder, column, tmp_path / "b.tar", encoded)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_recording_and_its_shard_give_the_same_members(recorded: Path, built: Path, column: str):
    tokenizer = read_manifest(built).load_tokenizer()
    num_rows = 0
    for _, index in open_indexes(built):
        for session in index.sessions:
            folder = recorded / session
            scan = scan_session(folder, recipe=RECIPE)
            reader = SessionReader(folder, scan, recipe=RECIPE, tokenizer=tokenizer)
            rows = rows_of(reader)
            fresh = read(SessionEncoder(reader), column, rows)
            with ColumnFileCache(lambda name: ColumnFile(built / name)) as files:
                shards = [(index, index.columns[column]["file"])]
                copied = read(ShardReader(session, shards=shards, files=files), column, rows)
            assert [item.content for item in copied] == [item.content for item in fresh]
            for one, other in zip(copied, fresh, strict=True):
                assert (one.error_s is None) == (other.error_s is None)
                if one.error_s is not None:
                    np.testing.assert_array_equal(one.error_s, other.error_s)
            num_rows += len(fresh)
    assert num_rows > 0
