"""How far a job is: from its OUTPUT's parts, found by folder or by what `submit` named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from context_diffusion.core.records import Counts
from context_diffusion.outputs.output_folder import COUNTED, Output, counts_of

PACE_S = 900.0


@dataclass(frozen=True)
class Told:
    """lines: for people; values: for the last line of stdout."""

    lines: list[str]
    values: dict[str, Any]


def progress_of(output: Output) -> Told:
    if not output.storage.exists(output.plan):
        return Told([f"{output.root}: not planned yet"], {"output": output.root, "finished": False})
    rows = output.read_json(output.plan)["rows"]
    # Each part is looked at once: there may be hundreds of thousands.
    made = [(part["created_at"][0].as_py(), counts_of(part)) for _, part in output.read_parts([*COUNTED, "created_at"])]
    counts, finished = sum((one for _, one in made), Counts()), output.storage.exists(output.success)
    state = "finished" if finished else "not finished"
    lines = [f"{output.root}: {state}, {counts.rows} of {rows} rows, {counts.failed} failed, {counts.images} images"]
    lines += [f"  {code}: {count}" for code, count in sorted(counts.codes.items())]
    lines += [f"  {name}: {count}" for name in ("flagged", "unsafe") if (count := getattr(counts, name))]
    values = {"output": output.root, "finished": finished, "of": rows, **vars(counts)}
    if not finished and (rates := pace(made)):
        left = (rows - counts.rows) / rates[0]
        lines.append(f"  {rates[1]:.2f} images/s; {left:.0f} s left at that pace")
        values |= {"images_per_second": round(rates[1], 3), "seconds_left": round(left)}
    return Told(lines, values)


def pace(made: list[tuple[datetime, Counts]]) -> tuple[float, float] | None:
    """Rows and images a second of the last PACE_S in which parts were written, and so also after the run is gone. made:
    when each part was, and what it holds. None where there are too few."""
    last = max((at for at, _ in made), default=None)
    if last is None:
        return None
    recent = sorted(((at, one) for at, one in made if (last - at).total_seconds() <= PACE_S), key=lambda pair: pair[0])
    seconds = (last - recent[0][0]).total_seconds()
    if seconds <= 0:
        return None
    counts = sum((one for _, one in recent[1:]), Counts())  # what the first of them holds was made before its time
    return counts.rows / seconds, counts.images / seconds
