"""Reads rows of JSONL and CSV with their byte offsets. Knows no files and no meaning of columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from context_diffusion.core.errors import ManifestError

Row = dict[str, Any]
LINE_BYTES = 64 * 2**20  # the longest line, so that a file without line ends is not read whole
CELL_CHARACTERS = 16 * 2**20  # the longest CSV cell, in case a quote is never closed


def _lines(uri: str, handle: BinaryIO) -> Iterator[bytes]:
    """Read a file line by line. Raises ManifestError for a line over LINE_BYTES."""
    buffered = io.BufferedReader(handle, 2**20)  # type: ignore[type-var]
    begin = 0
    while line := buffered.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            problem = f"the line that begins at byte {begin} is over {LINE_BYTES >> 20} MiB long"
            raise ManifestError(f"{uri}: {problem}: expected one row per line")
        begin += len(line)
        yield line


def json_rows(uri: str, handle: BinaryIO, first: int) -> Iterator[tuple[int, int, Row]]:
    """Read JSONL rows as (begin, end, row) with their byte offsets. first: the number of earlier lines."""
    end = 0
    for number, line in enumerate(_lines(uri, handle), first + 1):
        begin, end = end, end + len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{uri}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{uri}: line {number} is not a JSON object but {type(row).__name__}")
        yield begin, end, row


def _constant(name: str) -> float | None:
    """Return null for NaN, which pandas writes for missing values, and infinities as floats."""
    return None if name == "NaN" else float(name)


def csv_records(uri: str, handle: BinaryIO, first: int) -> Iterator[tuple[int, int, list[str]]]:
    """Read CSV records as (begin, end, cells) with their byte offsets; quoted cells may have line ends."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in _lines(uri, handle):
            text = line.decode("utf-8-sig" if end == 0 else "utf-8")
            end += len(line)
            yield text

    begin = 0
    number = first
    csv.field_size_limit(CELL_CHARACTERS)
    try:
        for record in csv.reader(lines(), strict=True):
            number += 1
            if record:
                yield begin, end, record
            begin = end
    except (csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"{uri}: record {number + 1} is not CSV in UTF-8: {error}") from error
    if end == 0 and first == 0:
        raise ManifestError(f"{uri}: the file is empty; expected a header")


def csv_rows(
    uri: str, columns: list[str], records: Iterator[tuple[int, int, list[str]]]
) -> Iterator[tuple[int, int, Row]]:
    """Convert records to rows; empty cells become null. Raises ManifestError for a wrong number of cells."""
    for begin, end, record in records:
        if len(record) != len(columns):
            counts = f"a record has {len(record)} cells, the header has {len(columns)}"
            raise ManifestError(f"{uri}: {counts}: {','.join(record)[:120]}")
        cells = zip(columns, record, strict=True)
        yield begin, end, {name: cell if cell != "" else None for name, cell in cells}
