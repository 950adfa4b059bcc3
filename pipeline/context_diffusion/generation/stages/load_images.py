"""The second stage: load the images of a shard's rows, and compute their control maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.records import Control, Pixels
from context_diffusion.core.schema import (
    CONTEXT,
    CONTEXT_MASKS,
    CONTROL_IMAGE,
    LOADED,
    QUERY,
    SOURCES,
    known_rows,
    to_image,
    with_span,
)
from context_diffusion.core.settings import Settings
from context_diffusion.inputs.context_images import (
    NO_MASKS,
    ContextPreprocessing,
    ReferenceImage,
    mask_of,
)
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.inputs.decode import (
    Size,
    decode_image,
    decode_resized,
    output_size,
    reference_output_size,
    statistics,
)
from context_diffusion.inputs.image_sources import ImageSource, read_bytes, without_bytes
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.storage.content_cache import ContentCache
from context_diffusion.storage.filesystem import Storage

IMAGE_CACHE = ContentCache(64 * 2**20)  # the loaded images of this process, whatever shards it loads
KnownPixels = dict[tuple[str, Hashable], Pixels]


@dataclass(frozen=True)
class LoadImages:
    """Loads a shard's sources as pixels of the sizes that the model takes, and computes the control maps.

    control_kinds: the map of each ControlNet; allow: URI prefixes that rows may read; image_size: the model's
    own; preprocessing: of context images. no_map: why rows must bring their control maps, if they must.
    masks: contexts may have masks."""

    fit: Fit
    control_kinds: list[str]
    limits: Limits
    allow: list[str]
    image_size: int
    preprocessing: ContextPreprocessing
    storage: Storage
    no_map: str | None = None
    masks: bool = False

    @classmethod
    def for_job(cls, job: GenerateJob, model: ResolvedModel, allow: list[str], storage: Storage) -> Self:
        """job: with its model's defaults filled in."""
        return cls.for_model(model, job.fit, job.control_kinds, job.limits, allow, storage)

    @classmethod
    def for_model(
        cls,
        model: ResolvedModel,
        fit: Fit,
        kinds: list[str],
        limits: Limits,
        allow: list[str],
        storage: Storage,
    ) -> Self:
        """kinds: the control map of each ControlNet that runs."""
        no_map, masks = model.defaults.no_map(kinds), model.defaults.takes_masks
        return cls(fit, kinds, limits, allow, model.image_size, model.contexts, storage, no_map, masks)

    def __call__(self, table: pa.Table) -> pa.Table:
        began = time.time()
        known = KnownPixels()
        rows, codes, messages = [], [], []
        for row in known_rows(table):
            loaded: dict[str, Any] = dict.fromkeys(LOADED.names)
            code, message = row["error_code"], row["error_message"]
            if code is None:
                try:
                    loaded = self._load(row, known)
                except RowError as error:
                    code, message = str(error.code), error.message
            rows.append(loaded)
            codes.append(code)
            messages.append(message)
        for name, values in (("error_code", codes), ("error_message", messages)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        for name, values in ((n, table[n]) for n in SOURCES):
            table = table.set_column(table.column_names.index(name), name, without_bytes(values))
        for name in LOADED.names:
            table = table.append_column(name, pa.array([row[name] for row in rows], LOADED.field(name).type))
        return with_span(table, "load", began)

    def _load(self, row: dict[str, Any], known: KnownPixels) -> dict[str, Any]:
        settings = Settings.from_trusted_json(row["settings"])
        query, (width, height) = self._query(row, settings, known)
        contexts = [self._context(source, known) for source in row[CONTEXT]]
        mean, std = statistics(query)
        return {
            "query_image": to_image(query),
            "output_width": width,
            "output_height": height,
            "control_images": [to_image(control.pixels) for control in self._controls(row, query, known)],
            "context_images": [to_image(context) for context in contexts],
            "mask_images": [to_image(mask) for mask in self._masks(row, (width, height), known)],
            "query_mean": mean,
            "query_std": std,
        }

    def _query(self, row: dict[str, Any], settings: Settings, known: KnownPixels) -> tuple[Pixels, Size]:
        """Return the query as the model reads it, and the width and height of the output."""
        width, height = settings.width, settings.height
        if not isinstance(self.preprocessing, ReferenceImage):
            query = self._resized(row[QUERY], width, height, known)
            return query, (query.shape[1], query.shape[0])
        query = self._context(row[QUERY], known)
        return query, reference_output_size(self.fit, query, width, height, self.image_size)

    def _controls(self, row: dict[str, Any], query: Pixels, known: KnownPixels) -> tuple[Control, ...]:
        """Return the row's own control maps, or those computed from its query."""
        kinds, sources = self.control_kinds, row[CONTROL_IMAGE]
        problem = None if sources else self.no_map
        if sources and isinstance(self.preprocessing, ReferenceImage):
            problem = f"{CONTROL_IMAGE}: this model has no ControlNet; it reads the query itself"
        elif sources and kinds and len(sources) != len(kinds):
            problem = f"{CONTROL_IMAGE} has {len(sources)} images, the job's `control` has {len(kinds)} kinds"
        if problem:
            raise RowError(ErrorCode.INVALID_SETTING, problem)
        if not kinds or not sources:
            return controls_of(query, kinds)
        height, width = query.shape[:2]
        maps = [self._resized(source, width, height, known) for source in sources]
        return tuple(map(Control, kinds, maps))

    def _masks(self, row: dict[str, Any], size: Size, known: KnownPixels) -> list[Pixels]:
        """Return the masks of the row's contexts at the output's size."""
        width, height = size
        if row[CONTEXT_MASKS] and not self.masks:
            raise RowError(ErrorCode.INVALID_SETTING, f"{CONTEXT_MASKS}: {NO_MASKS}")

        def decode(data: bytes, name: str) -> Pixels:
            return mask_of(decode_image(data, self.limits, name, "black"), width, height, name)

        return [
            self._loaded(source, (CONTEXT_MASKS, size), decode, known) for source in row[CONTEXT_MASKS] or []
        ]

    def _resized(
        self, source: ImageSource, width: int | None, height: int | None, known: KnownPixels
    ) -> Pixels:
        def size(source_width: int, source_height: int) -> Size:
            return output_size(self.fit, source_width, source_height, width, height, self.image_size)

        def decode(data: bytes, name: str) -> Pixels:
            return decode_resized(data, self.limits, name, size, self.fit)

        return self._loaded(source, (self.fit, width, height, self.image_size), decode, known)

    def _context(self, source: ImageSource, known: KnownPixels) -> Pixels:
        def decode(data: bytes, name: str) -> Pixels:
            return self.preprocessing.decode(data, self.limits, name)

        return self._loaded(source, self.preprocessing, decode, known)

    def _loaded(
        self, source: ImageSource, way: Hashable, decode: Callable[[bytes, str], Pixels], known: KnownPixels
    ) -> Pixels:
        """Return a source's pixels. Sources repeat over the rows of a shard, so the pixels of a URI are kept
        for them.

        way: what `decode` depends on.
        """
        key = (source["path"], way)
        if source["bytes"] is None and key in known:
            return known[key]
        data = read_bytes(source, self.allow, self.limits, self.storage)
        name = source["path"] or "inline image"
        pixels = IMAGE_CACHE.get(data, (way, self.limits.max_pixels), lambda: decode(data, name))
        if source["bytes"] is None:
            known[key] = pixels
        return pixels
