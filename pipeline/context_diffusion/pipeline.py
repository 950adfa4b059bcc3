"""The Python API: one model, images in, an image out. A job's engine is made here too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, overload

import torch
from PIL import Image
from pydantic import ValidationError

from context_diffusion.backbones import load_backbone
from context_diffusion.core.errors import ConfigError, ModelError, RowError
from context_diffusion.core.generate_job import ControlName, GenerateJob
from context_diffusion.core.job_base import Fit, problem_of
from context_diffusion.core.model_parts import CHUNKS, ModelKind, Parts
from context_diffusion.core.records import Failure, Pixels, Request, Result, derive_seed
from context_diffusion.core.settings import Settings, did_you_mean
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.engine import MAX_WAIT, Engine
from context_diffusion.engine.rows import StepUpdate
from context_diffusion.engine.service import EngineService
from context_diffusion.image_tensors import to_context, to_mask, to_resized
from context_diffusion.inputs.context_images import NO_MASKS, ReferenceImage
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.inputs.decode import Size, output_size, reference_output_size
from context_diffusion.models.compilation import Compile, compile_blocks, wants_compilation
from context_diffusion.models.flux2.offloading import Offload
from context_diffusion.models.resolution.defaults import Defaults, resolved_control, resolved_settings
from context_diffusion.models.resolution.resolve import find_model

CPU_THREADS = 2


class ContextDiffusion:
    """A model that keeps a query's layout, takes its style from context images and follows a prompt.

    model = ContextDiffusion.from_pretrained()
    image = model(query, context, "blue and yellow stripes")
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: ModelKind,
        device: torch.device,
        cpu_threads: int = CPU_THREADS,
        unsafe: Callable[[Pixels], bool] | None = None,
        defaults: Defaults | None = None,
        compile: Compile = "off",
    ) -> None:
        """Wrap a loaded backbone.

        kind: a key of CHUNKS. cpu_threads: calls of the model that run at once, on a CPU. unsafe: a safety
        checker. defaults: the settings that a call which leaves them out gets. compile: see
        `from_pretrained`."""
        self.backbone = backbone
        self.device = device
        self.chunks: tuple[int, ...] = CHUNKS[kind, device.type]
        self.unsafe = unsafe
        self.threads = cpu_threads
        self.defaults = defaults or Defaults()
        self.compiled = wants_compilation(compile, device)
        if self.compiled:
            compile_blocks(backbone.denoisers)

    @classmethod
    def from_pretrained(
        cls,
        model: str | dict[str, Any] | Parts = "bundled",
        device: str | None = None,
        cpu_threads: int = CPU_THREADS,
        compile: Compile = "off",
        offload: Offload = "auto",
    ) -> ContextDiffusion:
        """Load a model and its weights.

        model: bundled, flux2-klein, sdxl, sd15, a folder, a hub id, a single-file checkpoint of Stable
        Diffusion (FILE.safetensors), or a mapping of parts as a job's `model:`. device: default, a GPU if
        there is one. compile: auto compiles the networks on a GPU, which takes minutes and changes the last
        bits of images. offload: auto keeps a FLUX.2's text encoder in the host's memory while it is not used,
        where a GPU has no room for all. Raises ModelError."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            resolved = find_model(Parts.model_validate(model) if isinstance(model, dict) else model)
        except ValidationError as error:
            raise ModelError(f"model: {error}") from None
        if resolved.defaults.loras and wants_compilation(compile, where):
            raise ModelError("compile: auto does not apply to model.loras: leave one of them out")
        backbone, unsafe = load_backbone(resolved, where, offload)
        return cls(backbone, resolved.kind, where, cpu_threads, unsafe, resolved.defaults, compile)

    def engine(self, chunk: int | None = None, max_wait: int = MAX_WAIT) -> Engine:
        """Make an engine. chunk: the most lanes in a call of the model; default: what suits many rows.
        max_wait: see Engine. Raises ModelError for a chunk that the table of the model and device lacks."""
        if chunk is not None and chunk not in self.chunks:
            known = ", ".join(map(str, sorted(self.chunks)))
            raise ModelError(f"chunk {chunk}: this model on this device has chunks of {known} lanes")
        usual = chunk or self.chunks[0]
        sizes = [usual, *[size for size in self.chunks if size != usual]]
        return Engine(
            self.backbone,
            self.device,
            sizes,
            unsafe=self.unsafe,
            threads=self.threads,
            max_wait=max_wait,
            compiled=self.compiled,
        )

    @overload
    def __call__(
        self, query: Any, context: list[Any], prompt: str | None = None, *, num_images: int, **settings: Any
    ) -> Any: ...  # an image, or a list of them

    @overload
    def __call__(
        self, query: Any, context: list[Any], prompt: str | None = None, **settings: Any
    ) -> Image.Image: ...

    def __call__(
        self,
        query: Any,
        context: list[Any],
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        control: str | list[str] | None = None,
        context_masks: list[Any] | None = None,
        fit: Fit = "crop",
        callback: Callable[[StepUpdate], None] | None = None,
        **settings: Any,
    ) -> Any:
        """Generate an image with the query's layout and the contexts' style.

        query and each context: a tensor of load_image_as_tensor, PIL image, array, path, URI or bytes.
        control: the query's control map for each ControlNet; default: the kinds that they were trained on.
        context_masks: an image for each context, bright where it acts, of the output's aspect ratio.
        settings: row settings (num_inference_steps, guidance_scale, seed, ...) that replace the model's own.
        callback: called after each step.

        Returns a PIL image, or a list of them when num_images is over 1; a safety checker's verdict is the
        image's info["unsafe"], and words of the prompt that the model does not know are its
        info["unknown_words"]. Raises ValueError for a wrong setting, RowError for a row that cannot be
        generated."""
        requests = self.requests(
            query, context, prompt, negative_prompt, control, fit, settings, context_masks
        )
        images: dict[int, Image.Image] = {}
        for request, outcome in self.generate(requests, callback):
            if isinstance(outcome, Failure):
                raise ValueError(f"{outcome.code}: {outcome.message}")
            images[request.index] = Image.fromarray(outcome.image)
            if outcome.unsafe is not None:
                images[request.index].info["unsafe"] = outcome.unsafe
            if outcome.unknown_words:
                images[request.index].info["unknown_words"] = list(outcome.unknown_words)
        in_order = [images[index] for index in range(len(requests))]
        return in_order[0] if len(in_order) == 1 else in_order

    def generate(
        self,
        requests: list[Request],
        callback: Callable[[StepUpdate], None] | None = None,
        chunk: int | None = None,
    ) -> Iterator[tuple[Request, Result | Failure]]:
        """Generate requests of any settings in shared batches; yield each with its outcome as it finishes.

        chunk: as for `engine`; default: the smallest that holds all of them, so that few images cost
        little."""
        engine = self.engine(chunk or self._fitting_chunk(requests))
        engine.callback = callback
        return engine.run(requests)

    def _fitting_chunk(self, requests: list[Request]) -> int:
        lanes = 0
        for request in requests:
            try:
                lanes += len(self.backbone.branches(request))
            except RowError:  # the engine makes it the row's outcome
                continue
        return min((size for size in self.chunks if size >= lanes), default=self.chunks[0])

    def requests(
        self,
        query: Any,
        context: list[Any],
        prompt: str | None,
        negative_prompt: str | None,
        control: str | list[str] | None,
        fit: Fit,
        settings: dict[str, Any],
        context_masks: list[Any] | None = None,
    ) -> list[Request]:
        """Return the requests of one row, the same as a job makes of the same images and settings."""
        kinds = self._control_kinds(control)
        context, masks_given = _listed(context), _listed(context_masks)
        if not context:
            raise ValueError("context: give one image or a list of them")
        checked = self._checked_settings(settings)

        pixels, size = self._query(query, fit, checked.width, checked.height)
        controls = controls_of(pixels, kinds)
        contexts = tuple(to_context(image, self.backbone.contexts) for image in context)
        masks = self._masks(masks_given, size)
        seed = checked.seed
        if seed is None:
            seed = derive_seed(0, hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest())
        seeded = [checked.model_copy(update={"seed": seed + index}) for index in range(checked.num_images)]
        return [
            Request(
                "row", index, pixels, controls, contexts, prompt, negative_prompt, image_settings, size, masks
            )
            for index, image_settings in enumerate(seeded)
        ]

    def _query(self, query: Any, fit: Fit, width: int | None, height: int | None) -> tuple[Pixels, Size]:
        """Return the query as the model reads it, and the width and height of the output."""
        side = self.backbone.image_size
        if isinstance(self.backbone.contexts, ReferenceImage):
            pixels = to_context(query, self.backbone.contexts)
            return pixels, reference_output_size(fit, pixels, width, height, side)

        def size(query_width: int, query_height: int) -> Size:
            return output_size(fit, query_width, query_height, width, height, side)

        pixels = to_resized(query, size, fit)
        return pixels, (pixels.shape[1], pixels.shape[0])

    def _masks(self, masks: Sequence[Any], size: Size) -> tuple[Pixels, ...]:
        """Return the contexts' masks at the output's size."""
        if masks and not self.defaults.takes_masks:
            raise ValueError(f"context_masks: {NO_MASKS}")
        return tuple(to_mask(mask, size, f"mask {number}") for number, mask in enumerate(masks, 1))

    def _control_kinds(self, control: str | list[str] | None) -> list[str]:
        """Return the kind of control map for each ControlNet. Raises ValueError for an unknown kind."""
        try:
            kinds = resolved_control(self.defaults, control)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for kind in kinds:
            if kind not in get_args(ControlName):
                raise ValueError(f"control must be one of {', '.join(get_args(ControlName))}, not {kind!r}")
        if reason := self.defaults.no_map(kinds):
            raise ValueError(reason)
        return kinds

    def _checked_settings(self, settings: dict[str, Any]) -> Settings:
        """Return the settings over the model's own defaults. Raises ValueError for an unknown name or a wrong
        value."""
        for name in settings:
            if name not in Settings.model_fields:
                raise ValueError(f"{name} is not a setting; {did_you_mean(name, Settings.model_fields)}")
        try:
            return resolved_settings(self.defaults, Settings.model_validate(settings))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "settings"
            message = problem_of(first)
            raise ValueError(f"{where}: {message}, got {str(first['input'])[:80]!r}") from None
        except ConfigError as error:
            raise ValueError(str(error)) from None


def _listed(images: Any) -> list[Any]:
    """Return a list of images; one image is a list of it."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def make_engine(job: GenerateJob, broken: Callable[[BaseException], None]) -> EngineService:
    """Load the model of a job and start its engine; each actor holds one."""
    pipeline = ContextDiffusion.from_pretrained(
        job.model,
        cpu_threads=job.cluster.cpu_threads,
        compile=job.cluster.compile,
        offload=job.cluster.offload,
    )
    return EngineService(pipeline.engine(job.cluster.chunk, job.cluster.max_wait_steps), broken)
