"""Reports the progress of a job, from the parts of its OUTPUT."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from context_diffusion.core.records import Counts
from context_diffusion.outputs.output_folder import COUNTED, Output, counts_of

RATE_WINDOW_S = 900.0
WrittenPart = tuple[datetime, Counts]  # when a part was written, and what it contains


@dataclass(frozen=True)
class StatusReport:
    """lines: shown on stderr; values: the JSON of the last line of stdout."""

    lines: list[str]
    values: dict[str, Any]


def progress_of(output: Output) -> StatusReport:
    """Count the rows and images of the finished parts, and estimate the time left from the recent rate."""
    if not output.storage.exists(output.plan):
        return StatusReport([f"{output.root}: not planned yet"], {"output": output.root, "finished": False})
    rows = output.read_json(output.plan)["rows"]
    # Each part is read once: there may be hundreds of thousands.
    columns = [*COUNTED, "created_at"]
    parts = [(part["created_at"][0].as_py(), counts_of(part)) for _, part in output.read_parts(columns)]
    counts = sum((part_counts for _, part_counts in parts), Counts())
    finished = output.storage.exists(output.success)
    state = "finished" if finished else "not finished"
    counted = f"{counts.rows} of {rows} rows, {counts.failed} failed, {counts.images} images"
    lines = [f"{output.root}: {state}, {counted}"]
    lines += [f"  {code}: {count}" for code, count in sorted(counts.codes.items())]
    marked = {
        "flagged": counts.flagged,
        "unsafe": counts.unsafe,
        "rows with unknown words": counts.unknown_words,
    }
    lines += [f"  {name}: {count}" for name, count in marked.items() if count]
    values = {"output": output.root, "finished": finished, "of": rows, **vars(counts)}
    rates = None if finished else recent_rates(parts)
    if rates:
        rows_per_second, images_per_second = rates
        seconds_left = (rows - counts.rows) / rows_per_second
        lines.append(f"  {images_per_second:.2f} images/s; {seconds_left:.0f} s left at this rate")
        values |= {"images_per_second": round(images_per_second, 3), "seconds_left": round(seconds_left)}
    return StatusReport(lines, values)


def recent_rates(parts: list[WrittenPart]) -> tuple[float, float] | None:
    """Return rows and images per second in the RATE_WINDOW_S before the last part; None for too few parts."""
    last = max((at for at, _ in parts), default=None)
    if last is None:
        return None
    recent = sorted(
        (part for part in parts if (last - part[0]).total_seconds() <= RATE_WINDOW_S),
        key=lambda part: part[0],
    )
    seconds = (last - recent[0][0]).total_seconds()
    if seconds <= 0:
        return None
    # the first part was generated before
    counts = sum((part_counts for _, part_counts in recent[1:]), Counts())
    return counts.rows / seconds, counts.images / seconds
