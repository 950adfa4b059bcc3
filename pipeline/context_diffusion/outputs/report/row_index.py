"""Indexes all rows of an OUTPUT in DuckDB: filters, sorts and pages over millions of rows, and histograms.

data/ is many small files, and a query that opens all of them is slow (51 s for 15,625:
tests/benchmarks/LOG.md). So the columns of queries are read once, part by part, into a database on disk; the
other columns of the rows on a page are read from their parts.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa

from context_diffusion.core.schema import OUTPUT, PROMPT, SCORE_COLUMNS
from context_diffusion.outputs.output_folder import AHEAD, READERS, Output
from context_diffusion.outputs.report.query import RowQuery
from context_diffusion.outputs.report.row_sample import BINS, SAMPLED, Position

INDEXED = [*SAMPLED, PROMPT, "error_message", "seconds"]
SCHEMA = pa.schema([*(OUTPUT.field(name) for name in INDEXED), ("part", pa.int64()), ("number", pa.int64())])
NOTICE_INTERVAL_S = 5.0  # between progress lines
MEMORY = "1GB"  # of DuckDB, which spills to disk beyond it
REASONS = 3  # failed rows that are quoted for each error code


class RowIndex:
    """The index of one OUTPUT. It may be used by several threads; `close` deletes its file."""

    def __init__(self, output: Output, notify: Callable[[str], None] = lambda _: None) -> None:
        """notify: called with a progress line from time to time."""
        self.output = output
        self._indexed: set[int] = set()
        self._refresh_lock = threading.Lock()
        self._notify = notify
        self._folder = tempfile.TemporaryDirectory(prefix="context-diffusion-view-")
        # The database can access its own files only, so that no query can reach another file or address.
        self._database = duckdb.connect(
            f"{self._folder.name}/rows.duckdb",
            config={"memory_limit": MEMORY, "temp_directory": f"{self._folder.name}/spilled"},
        )
        self._database.register("empty", SCHEMA.empty_table()).execute(
            "create table data as select * from empty"
        )
        self._database.execute("set enable_external_access = false")
        self.refresh()

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()

    def refresh(self) -> None:
        """Add the parts that were written since the last call.

        Raises StorageError if a part is unreadable.
        """
        with self._refresh_lock, ThreadPoolExecutor(READERS) as threads:
            new = sorted(self.output.finished() - self._indexed)
            last_notice = time.monotonic()
            for begin in range(0, len(new), AHEAD):
                batch = new[begin : begin + AHEAD]
                rows = pa.concat_tables(threads.map(self._read, batch))
                self._cursor().register("new_rows", rows).execute("insert into data select * from new_rows")
                self._indexed.update(batch)
                if time.monotonic() >= last_notice + NOTICE_INTERVAL_S:
                    self._notify(f"{begin + len(batch):,} of {len(new):,} parts")
                    last_notice = time.monotonic()

    def _read(self, shard: int) -> pa.Table:
        part = self.output.read_part(shard, INDEXED)
        columns = {name: part[name] if name in part.column_names else pa.nulls(len(part)) for name in INDEXED}
        return pa.table({**columns, "part": [shard] * len(part), "number": range(len(part))}).cast(SCHEMA)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        return self._database.cursor()  # a connection must not be shared by threads

    def find(self, query: RowQuery) -> tuple[int, list[Position]]:
        """Return the number of matching rows and the positions of those on the page."""
        where, values = query.where()
        [(total,)] = self._cursor().execute(f"select count(*) from data where {where}", values).fetchall()
        page = f"select part, number from data where {where} order by {query.order_by()} limit ? offset ?"
        return total, self._cursor().execute(page, [*values, query.limit, query.offset]).fetchall()

    def position(self, row_id: str, index: int) -> Position | None:
        select = "select part, number from data where id = ? and coalesce(index, 0) = ? limit 1"
        return self._cursor().execute(select, [row_id, index]).fetchone()

    def codes(self) -> dict[str, int]:
        """Count the failed rows by error code, as summary.json does."""
        select = "select error_code, count(*) from data where status = 'failed' group by 1 order by 2 desc, 1"
        return dict(self._cursor().execute(select).fetchall())

    def reasons(self) -> dict[str, list[tuple[str, str]]]:
        """Return the ids and error messages of some rows for each error code."""
        select = "select id, error_message from data where error_code = ? order by part, number limit ?"
        return {code: self._cursor().execute(select, [code, REASONS]).fetchall() for code in self.codes()}

    def histograms(self) -> Iterator[dict[str, Any]]:
        """Yield the histogram of each score that some row has."""
        for name in SCORE_COLUMNS:
            columns = f"least(greatest(floor({name}::double * ?), 0), ?)::int, count(*), sum({name}::double)"
            select = f"select {columns} from data where isfinite({name}) group by 1"
            bins = self._cursor().execute(select, [BINS, BINS - 1]).fetchall()
            count = sum(in_bin for _, in_bin, _ in bins)
            if count:
                counts = {number: in_bin for number, in_bin, _ in bins}
                mean = sum(bin_sum for *_, bin_sum in bins) / count
                heights = [counts.get(number, 0) for number in range(BINS)]
                yield {"name": name, "count": count, "mean": mean, "bins": heights}

    def counts(self) -> dict[str, int]:
        """Return the counts of summary.json, and as `entries` the rows of data/: images and failed rows."""
        select = """select count(distinct id), count(distinct id) filter (status = 'failed'),
                    count(*) filter (status = 'ok'), count(*) from data"""
        [[rows, failed, images, entries]] = self._cursor().execute(select).fetchall()
        return {"rows": rows, "ok": rows - failed, "failed": failed, "images": images, "entries": entries}

    def last_image(self) -> datetime | None:
        """Return when the last image was generated."""
        [[last]] = self._cursor().execute("select epoch_ms(max(created_at)) from data").fetchall()
        return None if last is None else datetime.fromtimestamp(last / 1000, UTC)

    def contains(self, position: Position) -> bool:
        select = "select 1 from data where part = ? and number = ?"
        return self._cursor().execute(select, list(position)).fetchone() is not None
