"""How far a job is, from its parts alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from context_diffusion.cluster.submit import submission_of
from context_diffusion.core.errors import JobError
from context_diffusion.core.schema import OUTPUT
from context_diffusion.outputs.output_folder import COUNTED, Output
from context_diffusion.outputs.status import progress_of
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import to_parquet

SCHEMA = pa.schema([OUTPUT.field(name) for name in (*COUNTED, "created_at")])
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def write_part(folder: Path, shard: int, at: datetime) -> None:
    """Three rows: one of two images, one of one, one that failed."""
    rows: list[tuple[Any, ...]] = [
        ("a", 0, "ok", None, True, False, None),
        ("a", 1, "ok", None, None, True, None),
        ("b", 0, "ok", None, True, None, None),
        ("c", 0, "failed", "missing_file", None, None, None),
    ]
    names = [field.name for field in SCHEMA]
    table = pa.Table.from_pylist(
        [dict(zip(names, (f"{row[0]}{shard}", *row[1:], at), strict=True)) for row in rows], SCHEMA
    )
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"part-{shard:05d}.parquet").write_bytes(to_parquet(table))


def test_the_pace_is_that_of_the_last_quarter_of_an_hour_in_which_parts_were_written(tmp_path: Path) -> None:
    output = Output(str(tmp_path), Storage())
    assert progress_of(output).lines == [f"{tmp_path}: not planned yet"]
    (tmp_path / "plan.json").write_text(json.dumps({"rows": 60}))
    write_part(tmp_path, 0, NOON)
    assert "seconds_left" not in progress_of(output).values, "one part has no pace"
    for shard, minutes in ((1, 60), (2, 70), (3, 65)):  # after a night's rest, and not in order
        write_part(tmp_path, shard, NOON + timedelta(minutes=minutes))
    told = progress_of(output)
    keys = ("rows", "ok", "failed", "images", "codes", "flagged", "unsafe", "of", "finished")
    assert {key: told.values[key] for key in keys} == {
        "rows": 12, "ok": 8, "failed": 4, "images": 12, "codes": {"missing_file": 4}, "flagged": 8,
        "unsafe": 4, "of": 60, "finished": False,
    }  # fmt: skip
    assert told.lines[1:4] == ["  missing_file: 4", "  flagged: 8", "  unsafe: 4"]
    assert told.values["images_per_second"] == pytest.approx(6 / 600, abs=1e-3)
    assert told.values["seconds_left"] == 48 / (6 / 600)
    (tmp_path / "_SUCCESS").touch()
    assert "seconds_left" not in progress_of(output).values


def test_a_name_that_is_neither_a_folder_nor_a_submission() -> None:
    with pytest.raises(JobError, match=r"some/where: no plan\.json there"):
        submission_of("some/where", None)
    with pytest.raises(JobError, match="with --address"):
        submission_of("demo-1", None)
