"""All rows of an OUTPUT in DuckDB, for questions over millions: filter, sort, a page, histograms.

data/ is many small files, and a question that opens all of them anew takes too long (51 s for 15,625: tests/benchmarks/LOG.md).
So the columns that one can ask for are read once, part by part, into a database on disk; what a page shows of its rows is
read from their parts.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa

from context_diffusion.core.schema import OUTPUT, PROMPT, SCORE_COLUMNS
from context_diffusion.outputs.output_folder import AHEAD, READERS, Output
from context_diffusion.outputs.report.query import Question
from context_diffusion.outputs.report.row_sample import BINS, NARROW, Place

ASKED = [*NARROW, PROMPT, "error_message", "seconds"]
SCHEMA = pa.schema([*(OUTPUT.field(name) for name in ASKED), ("part", pa.int64()), ("number", pa.int64())])
TELL_S = 5.0  # between lines on how far the reading is
MEMORY, REASONS = "1GB", 3  # of DuckDB, which goes to its disk beyond; failed rows that are quoted of a code


class Index:
    """Of one OUTPUT; threads may share it. `close` removes its file."""

    def __init__(self, output: Output, tell: Callable[[str], None] = lambda _: None) -> None:
        """tell: of how far it is, while it reads."""
        self.output, self._known, self._refreshing, self._tell = output, set[int](), threading.Lock(), tell
        self._folder = tempfile.TemporaryDirectory(prefix="context-diffusion-view-")
        # Nothing but its own file: whatever a question may hold, no other file or address is reached.
        spilled = f"{self._folder.name}/spilled"
        self._database = duckdb.connect(
            f"{self._folder.name}/rows.duckdb", config={"memory_limit": MEMORY, "temp_directory": spilled}
        )
        self._database.register("empty", SCHEMA.empty_table()).execute("create table data as select * from empty")
        self._database.execute("set enable_external_access = false")
        self.refresh()

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()

    def refresh(self) -> None:
        """Adds the parts that were written since. Raises StorageError with the part that cannot be read."""
        with self._refreshing, ThreadPoolExecutor(READERS) as threads:
            new, told = sorted(self.output.finished() - self._known), time.monotonic()
            for begin in range(0, len(new), AHEAD):
                batch = new[begin : begin + AHEAD]
                narrow = pa.concat_tables(threads.map(self._narrow, batch))
                self._cursor().register("narrow", narrow).execute("insert into data select * from narrow")
                self._known.update(batch)
                if time.monotonic() >= told + TELL_S:
                    self._tell(f"{begin + len(batch):,} of {len(new):,} parts")
                    told = time.monotonic()

    def _narrow(self, shard: int) -> pa.Table:
        part = self.output.read_part(shard, ASKED)
        columns = {name: part[name] if name in part.column_names else pa.nulls(len(part)) for name in ASKED}
        return pa.table({**columns, "part": [shard] * len(part), "number": range(len(part))}).cast(SCHEMA)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        return self._database.cursor()  # a connection serves one thread

    def find(self, question: Question) -> tuple[int, list[Place]]:
        """-> how many rows match, and the places of a page of them."""
        where, values = question.where()
        [(total,)] = self._cursor().execute(f"select count(*) from data where {where}", values).fetchall()
        page = f"select part, number from data where {where} order by {question.ordered()} limit ? offset ?"
        return total, self._cursor().execute(page, [*values, question.limit, question.offset]).fetchall()

    def place(self, row_id: str, index: int) -> Place | None:
        found = "select part, number from data where id = ? and coalesce(index, 0) = ? limit 1"
        return self._cursor().execute(found, [row_id, index]).fetchone()

    def codes(self) -> dict[str, int]:
        """Failed rows by code, as summary.json counts them."""
        counted = "select error_code, count(*) from data where status = 'failed' group by 1 order by 2 desc, 1"
        return dict(self._cursor().execute(counted).fetchall())

    def reasons(self) -> dict[str, list[tuple[str, str]]]:
        """Of each code the ids and reasons of some rows."""
        some = "select id, error_message from data where error_code = ? order by part, number limit ?"
        return {code: self._cursor().execute(some, [code, REASONS]).fetchall() for code in self.codes()}

    def histograms(self) -> Iterator[dict[str, Any]]:
        for name in SCORE_COLUMNS:
            binned = f"select least(greatest(floor({name}::double * ?), 0), ?)::int, count(*), sum({name}::double) from data"
            found = self._cursor().execute(f"{binned} where isfinite({name}) group by 1", [BINS, BINS - 1]).fetchall()
            if count := sum(many for _, many, _ in found):
                bins = {number: many for number, many, _ in found}
                mean = sum(total for *_, total in found) / count
                yield {"name": name, "count": count, "mean": mean, "bins": [bins.get(number, 0) for number in range(BINS)]}

    def counts(self) -> dict[str, int]:
        """As summary.json has them; `of`: rows of data/, failed ones too."""
        counted = """select count(distinct id) as rows, count(distinct id) filter (status = 'failed') as failed,
                     count(*) filter (status = 'ok') as images, count(*) as "of" from data"""
        [[rows, failed, images, of]] = self._cursor().execute(counted).fetchall()
        return {"rows": rows, "ok": rows - failed, "failed": failed, "images": images, "of": of}

    def holds(self, place: Place) -> bool:
        found = "select 1 from data where part = ? and number = ?"
        return self._cursor().execute(found, list(place)).fetchone() is not None
