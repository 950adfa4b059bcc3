"""Small parts to large files: every row once, pictures and all; a second run, another source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from context_diffusion.core.errors import JobError, OutputConflictError, StorageError
from context_diffusion.outputs import compact as module
from context_diffusion.outputs.compact import compact
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet
from support.finished_output import STORAGE, make


def finished(folder: Path, **more: Any) -> Output:
    _, output = make(folder, 10, {3: {"query": "gone.png"}, 5: {"author": None}}, rows_per_part=4, **more)
    close(output)
    return output


def rows_of(output: Output) -> dict[str, Any]:
    return {row["id"]: row for _, part in output.read_parts() for row in part.to_pylist()}


@pytest.mark.parametrize("form", ["files", "parquet", "webdataset"])
def test_every_row_and_picture_arrives_once(tmp_path: Path, form: str) -> None:
    from datasets import load_dataset

    output, to = finished(tmp_path, output_format=form), Output(str(tmp_path / "to"), STORAGE)
    assert compact(output, to, rows=7) == {"output": to.root, "rows": 10, "files": 2}
    loaded = load_dataset(
        "parquet", data_files=f"{to.root}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    expected = rows_of(output)
    assert [row["id"] for row in loaded] == list(expected)
    for row in loaded.filter(lambda row: row["status"] == "ok"):
        picture = np.asarray(row["image"])
        assert hashlib.sha256(output.image(expected[row["id"]])).hexdigest() == row["sha256"]
        assert picture.shape == (row["height"], row["width"], 3)
    assert compact(output, to, rows=7)["files"] == 2, "the same command again"


def test_a_file_is_closed_when_it_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, to = finished(tmp_path), Output(str(tmp_path / "to"), STORAGE)
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    assert compact(output, to)["files"] == 3, "each part at once"


def test_what_does_not_read_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, to = finished(tmp_path), Output(str(tmp_path / "to"), STORAGE)
    monkeypatch.setattr(module, "to_parquet", lambda table, binary: to_parquet(table.slice(1), binary))
    with pytest.raises(StorageError, match="its 9 rows differ from the 10 rows"):
        compact(output, to)
    assert not STORAGE.exists(to.success)


def test_wrong_sources_and_targets_are_refused(tmp_path: Path) -> None:
    output, to = finished(tmp_path), Output(str(tmp_path / "to"), STORAGE)
    compact(output, to)
    with pytest.raises(OutputConflictError, match="with other options"):
        compact(output, to, rows=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "more.png")
    with pytest.raises(OutputConflictError, match="is not empty"):
        compact(output, Output(str(tmp_path / "in"), STORAGE))
    STORAGE.delete(output.success)
    with pytest.raises(JobError, match="not finished"):
        compact(output, Output(str(tmp_path / "other"), STORAGE))
