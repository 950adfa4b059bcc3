"""Reads a finished OUTPUT with nothing of ours: pyarrow, Pillow and hashlib. The check that counts."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


def read_output(folder: Path) -> list[dict[str, Any]]:
    """All rows of data/, each part whole, each picture's file there with the bytes that its row names."""
    rows: list[dict[str, Any]] = []
    for part in sorted((folder / "data").glob("*.parquet")):
        rows += pq.read_table(part).to_pylist()
    pictures = {
        str(path.relative_to(folder))
        for path in (folder / "images").rglob("*")
        if path.is_file() and path.name != "metadata.parquet"
    }
    named = {row["file_name"] for row in rows if row["status"] == "ok"}
    assert named == pictures, "pictures without rows, or rows without pictures"
    for row in rows:
        if row["status"] == "ok":
            data = (folder / row["file_name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"], row["id"]
            row["pixels"] = np.asarray(Image.open(io.BytesIO(data)))
            assert row["pixels"].shape == (row["height"], row["width"], 3)
    hidden = [path for path in folder.rglob(".*") if path.is_file()]
    assert not hidden, f"left behind: {hidden}"
    if (folder / "_SUCCESS").exists():
        digest = hashlib.sha256((folder / "checksums.parquet").read_bytes()).hexdigest()
        assert (folder / "_SUCCESS").read_text().strip() == digest
    return rows


def plan_rows(folder: Path) -> int:
    return int(json.loads((folder / "plan.json").read_text())["rows"])
