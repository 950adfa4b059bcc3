"""The job's model in this process: requests in, outcomes out, and what that takes. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.core.uris import normal
from context_diffusion.models.resolve import ResolvedModel
from context_diffusion.outputs.contact_sheet import Cell, contact_sheet
from context_diffusion.outputs.encode import encode_image
from context_diffusion.storage.filesystem import Storage

CONTEXTS = 4  # of a row that are shown
Outcome = Result | Failure


class Maker:
    """What one engine of the job would be on this machine. device: None takes a GPU where there is one."""

    def __init__(self, job: GenerateJob, model: ResolvedModel, device: str | None = None) -> None:
        from context_diffusion.pipeline import ContextDiffusion

        where = model.parts or str(model.folder)
        self.pipeline = ContextDiffusion.from_pretrained(where, device, job.cluster.cpu_threads)

    def make(self, requests: list[Request]) -> list[Outcome]:
        """In the order of the requests."""
        made = {id(request): outcome for request, outcome in self.pipeline.generate(requests)}
        return [made[id(request)] for request in requests]

    def device(self) -> dict[str, Any]:
        """Its kind, and of a GPU the name and the memory: what making took at most, and all of it, in GiB."""
        import torch

        if self.pipeline.device.type != "cuda":
            return {"device": self.pipeline.device.type}
        told = torch.cuda.get_device_properties(self.pipeline.device)
        used = torch.cuda.max_memory_reserved(self.pipeline.device)
        sizes = {"gpu_used_gib": round(used / 2**30, 2), "gpu_memory_gib": round(told.total_memory / 2**30, 2)}
        return {"device": "cuda", "gpu": told.name, **sizes}


def engines_of(job: GenerateJob) -> int:
    """As many as the job asks for, the least where it gives a range; else one a GPU of this machine."""
    asked = job.cluster.actors
    if asked:
        return asked[0] if isinstance(asked, list) else asked
    import torch

    return max(1, int(torch.cuda.device_count() / (job.cluster.gpus_per_actor or 1)))


def png_uri(option: str, name: str) -> str:
    """Where a sheet is to be written. Raises ConfigError before anything is made for it."""
    if not name.lower().endswith(".png"):
        raise ConfigError(f"{option} {name}: the sheet is a PNG, its name ends in .png")
    return normal(name)


def write_sheet(uri: str, rows: Sequence[Sequence[Cell]]) -> None:
    """Over the one that may be there. Raises ConfigError where it cannot be."""
    try:
        Storage().replace(uri, encode_image(contact_sheet(rows), "png", {}))
    except OSError as error:
        raise ConfigError(f"{uri} cannot be written: {error}") from error


def inputs_of(request: Request) -> list[Cell]:
    """What a picture is made from, captioned."""
    contexts = [(f"context {number}", pixels) for number, pixels in enumerate(request.contexts[:CONTEXTS], 1)]
    return [(f"query {request.prompt or ''}", request.query), *contexts]
