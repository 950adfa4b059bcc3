"""Sources of pictures: every way to name one, and the pixels behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from context_diffusion.core.errors import RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.inputs.image_sources import as_source, as_sources, read_pixels
from context_diffusion.storage.filesystem import Storage
from support.manifests import write_pictures


@pytest.mark.parametrize(
    ("cell", "source"),
    [
        ("a.png", {"bytes": None, "path": "/base/a.png"}),
        (b"bytes", {"bytes": b"bytes", "path": None}),
        ({"bytes": b"bytes", "path": "a.png"}, {"bytes": b"bytes", "path": "a.png"}),
        ({"bytes": None, "path": "s3://bucket/a.png"}, {"bytes": None, "path": "s3://bucket/a.png"}),
        ("", None),
        ({"bytes": b"", "path": ""}, None),
        (7, None),
    ],
)
def test_a_cell_is_a_source_or_nothing(cell: Any, source: Any) -> None:
    assert as_source(cell, "/base") == source
    assert as_sources([cell, None], "/base") == ([source] if source else [])


def test_a_list_may_be_json_or_one_alone() -> None:
    assert [source["path"] for source in as_sources('["a.png", "b.png"]', "/base")] == [
        "/base/a.png",
        "/base/b.png",
    ]
    assert [source["path"] for source in as_sources("a.png", "/base")] == ["/base/a.png"]
    with pytest.raises(RowError, match="context is not a JSON list"):
        as_sources('["a.png"', "/base")


def test_pixels_come_from_bytes_or_from_where_reading_is_allowed(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    path, allow, storage = tmp_path / name, [str(tmp_path)], Storage()
    pixels = np.asarray(Image.open(path))
    assert np.array_equal(read_pixels({"bytes": None, "path": str(path)}, allow, Limits(), storage), pixels)
    assert np.array_equal(
        read_pixels({"bytes": path.read_bytes(), "path": None}, [], Limits(), storage), pixels
    )
    for source, limits, words in (
        ({"bytes": None, "path": str(path)}, Limits(max_bytes=10), "file_too_large"),
        ({"bytes": None, "path": "/etc/passwd"}, Limits(), "forbidden_uri"),
        ({"bytes": b"no picture", "path": None}, Limits(), "not_an_image: row 3: context 1"),
        ({"bytes": b"no picture", "path": "a.png"}, Limits(), "not_an_image: a.png"),
    ):
        with pytest.raises(RowError, match=words):
            read_pixels(source, allow, limits, storage, "row 3: context 1")
