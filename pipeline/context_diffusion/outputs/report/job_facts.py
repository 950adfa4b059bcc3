"""What a report says about its job: the model, dates, versions, settings, and the command for failed rows."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import Any

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import dotted
from context_diffusion.outputs.output_folder import Output

# Without those that concern machines or access: storage_options, cluster, limits, allow.
SHOWN = {
    "control", "settings", "matrix", "columns", "fit", "seed", "score", "keep", "thresholds", "image_format",
    "output_format", "rows_per_part", "max_failed",
}  # fmt: skip
Facts = dict[str, Any]
WORDS = 30  # without an effect, that the page lists


def job_facts(output: Output, plan: Any, summary: dict[str, Any], last_image: datetime | None) -> Facts:
    """Return what the page shows of the job.

    plan: the content of plan.json.

    about: pairs of name and text; settings: pairs of key and text; seconds: from the job's start to its last
    image; retry: the command for failed rows; unknown_words: some of those that had no effect.
    """
    model, versions = plan.get("model", {}), plan.get("versions", {})
    started = datetime.fromisoformat(plan["created_at"]) if plan.get("created_at") else None
    uris = [file["uri"] for file in plan["manifest"]]
    about = {
        "model": model.get("name"),
        "revision": model.get("revision"),
        "started": _time(started),
        "last image": _time(last_image),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "manifest": uris[0] + (f" and {len(uris) - 1} more files" if len(uris) > 1 else ""),
    }
    values = GenerateJob.model_validate(plan["job"]).model_dump(mode="json", include=SHOWN)
    known = {name: text for name, text in about.items() if text}
    return {
        "about": list(known.items()),
        "settings": _texts(values),
        "seconds": (last_image - started).total_seconds() if last_image and started else None,
        "unknown_words": output.unknown_words(WORDS) if summary.get("unknown_words") else [],
        "retry": retry_command(summary.get("job_file")),
    }


def retry_command(job_file: str | None) -> str:
    """Return the command that generates the failed rows again. JOB stands for a file that is not known."""
    is_known = job_file is not None and not job_file.startswith("/dev/")
    return f"context-diffusion run {shlex.quote(str(job_file)) if is_known else 'JOB'} --retry-failed"


def _time(moment: datetime | None) -> str | None:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if moment else None


def _texts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the dotted keys and values as text, without empty ones."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in dotted(values).items()
        if value not in (None, [], "")
    ]
