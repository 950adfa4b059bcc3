"""A job's model in this process: requests in, outcomes out, and the device's memory. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.core.uris import normal
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.outputs.contact_sheet import Cell, contact_sheet
from context_diffusion.outputs.encode import encode_image
from context_diffusion.storage.filesystem import Storage

CONTEXTS = 4  # of a row that are shown
Outcome = Result | Failure


class LocalModel:
    """What one engine of a job would be on this machine. device: None takes a GPU where there is one.
    compiled: whether the networks are compiled, if it is a GPU."""

    def __init__(
        self, model: ResolvedModel, cpu_threads: int, device: str | None = None, compiled: bool = False
    ) -> None:
        from context_diffusion.pipeline import ContextDiffusion

        self.pipeline = ContextDiffusion.from_pretrained(
            model.parts or str(model.folder), device, cpu_threads, "auto" if compiled else "off"
        )

    @property
    def chunks(self) -> tuple[int, ...]:
        """The possible numbers of lanes in one call of the model; an engine of a job uses the first."""
        return self.pipeline.chunks

    def generate(self, requests: list[Request], chunk: int | None = None) -> list[Outcome]:
        """Return the outcomes in the order of the requests. chunk: one of `chunks`; default: the smallest
        that holds all of them."""
        outcomes = {
            id(request): outcome for request, outcome in self.pipeline.generate(requests, None, chunk)
        }
        return [outcomes[id(request)] for request in requests]

    def device(self) -> dict[str, Any]:
        """Describe the device: its type, and for a GPU its name, peak memory and total memory in GiB."""
        import torch

        if self.pipeline.device.type != "cuda":
            return {"device": self.pipeline.device.type}
        properties = torch.cuda.get_device_properties(self.pipeline.device)
        peak = torch.cuda.max_memory_reserved(self.pipeline.device)
        sizes = {
            "gpu_used_gib": round(peak / 2**30, 2),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 2),
        }
        return {"device": "cuda", "gpu": properties.name, **sizes}


def engines_of(job: GenerateJob) -> int:
    """Return the job's number of engines, the least of a range, or by default one per GPU of this machine."""
    actors = job.cluster.actors
    if actors:
        return actors[0] if isinstance(actors, list) else actors
    import torch

    return max(1, int(torch.cuda.device_count() / (job.cluster.gpus_per_actor or 1)))


def png_uri(option: str, name: str) -> str:
    """Return the URI of a sheet that an option names. Raises ConfigError before any image is generated for
    it."""
    if not name.lower().endswith(".png"):
        raise ConfigError(f"{option} {name}: the contact sheet is a PNG file; its name must end in .png")
    return normal(name)


def write_sheet(uri: str, rows: Sequence[Sequence[Cell]]) -> None:
    """Write a contact sheet, replacing a present file. Raises ConfigError where it cannot be written."""
    try:
        Storage().replace(uri, encode_image(contact_sheet(rows), "png", {}))
    except OSError as error:
        raise ConfigError(f"{uri} cannot be written: {error}") from error


def inputs_of(request: Request) -> list[Cell]:
    """Return a request's query and contexts with captions."""
    contexts = [(f"context {number}", pixels) for number, pixels in enumerate(request.contexts[:CONTEXTS], 1)]
    return [(f"query {request.prompt or ''}", request.query), *contexts]
