"""Small manifests with real picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from support.tiny import picture

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("query", pa.string()),
        ("context", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("num_inference_steps", pa.int64()),
        ("scheduler", pa.string()),
        ("author", pa.string()),
    ]
)


def write_pictures(folder: Path, count: int = 6) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"picture-{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(folder / name)
    return names


def rows(count: int, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"row-{number:03d}",
            "query": names[number % len(names)],
            "context": [names[(number + 1 + k) % len(names)] for k in range(1 + number % 3)],
            "prompt": "ocean" if number % 2 else None,
            "num_inference_steps": 1 + number % 3,
            "scheduler": ["ddim", "euler"][number % 2],
            "author": f"person {number % 4}",
        }
        for number in range(count)
    ]


def write_manifest(folder: Path, count: int = 24, changes: dict[int, dict[str, Any]] | None = None) -> str:
    """A Parquet manifest of so many rows; changes: what to set otherwise in some of them. -> its path."""
    made = rows(count, write_pictures(folder))
    for number, change in (changes or {}).items():
        made[number] |= change
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(made, SCHEMA), path, row_group_size=90)
    return str(path)


def job_values(manifest: str, output: Path | str, **more: Any) -> dict[str, Any]:
    cluster = {"num_cpus": 2, "no_progress_timeout_s": 120} | more.pop("cluster", {})
    return {
        "kind": "generate",
        "manifest": manifest,
        "output": str(output),
        "model": "bundled",
        "cluster": cluster,
        **more,
    }
