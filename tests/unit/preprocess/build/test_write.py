"""Recordings and finished shards give the same encoded rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.oracles import open_indexes, tiny_recipe

from preprocess.build.plan_types import Row
from preprocess.build.reuse_reader import ColumnFileCache, ShardReader
from preprocess.build.write import EncodedRow, IndexBuilder, SessionEncoder
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
