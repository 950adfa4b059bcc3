"""How far a job is: from its OUTPUT's parts, found by folder or by what `submit` named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from context_diffusion.errors import JobError
from context_diffusion.output import Output, pace
from context_diffusion.ray_jobs import RayJobs


@dataclass(frozen=True)
class Told:
    """lines: for people; values: for the last line of stdout."""

    lines: list[str]
    values: dict[str, Any]


def progress_of(output: Output) -> Told:
    if not output.storage.exists(output.plan):
        return Told([f"{output.root}: not planned yet"], {"output": output.root, "finished": False})
    rows = output.read_json(output.plan)["rows"]
    counts, finished = output.count(), output.storage.exists(output.success)
    state = "finished" if finished else "not finished"
    lines = [f"{output.root}: {state}, {counts.rows} of {rows} rows, {counts.failed} failed, {counts.images} images"]
    lines += [f"  {code}: {count}" for code, count in sorted(counts.codes.items())]
    values = {"output": output.root, "finished": finished, "of": rows, **vars(counts)}
    if not finished and (rates := pace(output)):
        left = (rows - counts.rows) / rates[0]
        lines.append(f"  {rates[1]:.2f} images/s; {left:.0f} s left at that pace")
        values |= {"images_per_second": round(rates[1], 3), "seconds_left": round(left)}
    return Told(lines, values)


def submission_of(name: str, jobs: RayJobs | None) -> dict[str, Any]:
    """A submitted job: its status, message, exit code where it has ended, and OUTPUT. Raises JobError."""
    if "/" in name or jobs is None:
        hint = "" if "/" in name else ", and no cluster to ask for a submission of that name: give --address"
        raise JobError(f"{name}: no plan.json there; is it the `output:` of a job that was run?{hint}")
    job = jobs.get(name)
    if job is None or "output" not in (job.get("metadata") or {}):
        raise JobError(f"{name}: neither an OUTPUT folder nor a submission that {jobs.address} knows")
    ended = {key: job[key] for key in ("status", "message", "driver_exit_code")}
    return {"id": name, **ended, "output": job["metadata"]["output"]}
