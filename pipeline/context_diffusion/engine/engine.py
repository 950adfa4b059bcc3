"""The engine: rows in slots, and chunks of lanes that are always full while rows are at hand.

Rows have their own timestep, number of steps, sampler, guidance, control window and contexts. The model sees
chunks of one fixed shape, padded, so a row's bits don't depend on its neighbours. Knows nothing of Ray or
files.

R rows in slots, each of 1 to 3 lanes   P lanes a chunk   C h w latents
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import EngineStats, Failure, Pixels, Request, Result
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.conditioning import is_finite
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.model_calls import Calls, Shape, same_bits
from context_diffusion.engine.packing import choose
from context_diffusion.engine.slots import Slot, advance, open_slot

Outcome = tuple[Request, Result | Failure]
CACHE_BYTES = 2**30


TOO_LARGE = Failure(
    ErrorCode.OUT_OF_MEMORY,
    "the row alone does not fit into the device's memory: try a smaller width and height",
)


@dataclass(frozen=True)
class Decoded:
    """A finished row with its uint8 image (H, W, 3) on the device; None: it did not fit into memory."""

    slot: Slot
    image: Tensor | None
    tiled: bool


@dataclass(frozen=True)
class StepUpdate:
    """What a callback is told after a step of a row; preview() decodes what the model holds to be the picture
    now."""

    request: Request
    step: int
    steps: int
    preview: Callable[[], Pixels]


@dataclass
class Occupancy:
    """Lane-steps: those that rows used, and those that calls of the model had room for."""

    used: int = 0
    paid: int = 0

    @property
    def share(self) -> float:
        return self.used / self.paid if self.paid else 1.0


@dataclass
class Engine:
    """backbone on its device. callback: told of each step of each row; unsafe: asked of each finished
    picture; threads: calls of the model at once, on a CPU."""

    backbone: Backbone
    device: torch.device
    shape: Shape
    callback: Callable[[StepUpdate], None] | None = None
    unsafe: Callable[[Pixels], bool] | None = None
    waiting: deque[Request] = field(default_factory=deque)
    slots: list[Slot] = field(default_factory=list)
    occupancy: Occupancy = field(default_factory=Occupancy)
    cache: Cache = field(default_factory=lambda: Cache(CACHE_BYTES))
    threads: int = 1

    def __post_init__(self) -> None:
        self.calls = Calls(self.backbone, self.device, self.shape, self.threads)
        # Of the rows that go on in a step, and of those at hand; fewer where memory is short.
        self.lanes, self.room = self.shape.lanes, self.shape.lanes + self.shape.chunk
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._decoding: list[Decoded] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Frees the row's lanes; it has no outcome. Does nothing for a row that has ended."""
        self.waiting = deque(one for one in self.waiting if one is not request)
        self.slots = [slot for slot in self.slots if slot.request is not request]
        self._decoding = [decoded for decoded in self._decoding if decoded.slot.request is not request]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.slots and not self._decoding

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        rows = len(self.waiting) + len(self.slots) + len(self._decoding)
        reserved = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None
        return EngineStats(rows, dict(self.cache.hits), dict(self.cache.misses), reserved)

    def run(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """All requests, each as it finishes."""
        self.waiting.extend(requests)
        while not self.idle:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """Admits waiting rows and moves as many on by one step as fill the chunks; returns the rows that
        ended. What ended in the step before is decoded beside this one."""
        with same_bits(self.device):
            return self._step()

    def _step(self) -> list[Outcome]:
        failed, decoding = self._admit(), self._decoding
        self._decoding = []
        try:
            for shape in dict.fromkeys(slot.latents.shape for slot in self.slots):
                self._advance([slot for slot in self.slots if slot.latents.shape == shape])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed += self._make_room()
        ended = [slot for slot in self.slots if not slot.left]
        self.slots = [slot for slot in self.slots if slot.left]
        self._decoding = [self._decode(slot) for slot in ended]
        done, self._decoding = (
            (decoding, self._decoding) if self._stream else ([*decoding, *self._decoding], [])
        )
        return failed + [(decoded.slot.request, self._finish(decoded)) for decoded in done]

    def _admit(self) -> list[Outcome]:
        """Open slots, first come first served: a chunk more than can advance at once, to choose from. Returns
        the rows that cannot be generated: whatever goes wrong with one of them is its own failure, unless the
        device itself is lost."""
        failed: list[Outcome] = []
        resident = sum(slot.lanes for slot in self.slots)
        while self.waiting:
            request = self.waiting[0]
            try:
                lanes = len(self.backbone.branches(request))
                if self.slots and resident + lanes > self.room:
                    break
                slot = open_slot(request, self.backbone, self.device, self.cache)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                if is_out_of_memory(error) and self.slots:
                    self.room = resident  # it is tried again when one of these rows has finished
                    self._free_memory()
                    break
                failed.append((self.waiting.popleft(), failure_of(error)))
                continue
            self.waiting.popleft()
            self.slots.append(slot)
            resident += lanes
        return failed

    def _advance(self, slots: list[Slot]) -> None:
        """One step for rows of one shape. While rows wait the oldest are the most urgent, at the end the
        longest."""
        slots = [slot for slot in slots if slot.left]
        if not slots:
            return
        if not self.waiting:
            slots.sort(key=lambda slot: -slot.left)
        started = perf_counter()
        slots = [slots[i] for i in choose([slot.lanes for slot in slots], self.shape.chunk, self.lanes)]
        outputs, paid = self.calls.guided(slots)
        advance(slots, outputs)
        used = sum(slot.lanes for slot in slots)
        self.occupancy.used += used
        self.occupancy.paid += paid
        seconds = perf_counter() - started
        for slot in slots:
            slot.charge(slot.lanes / used, seconds, paid)
            if self.callback:
                preview = partial(self._preview, slot)
                self.callback(StepUpdate(slot.request, slot.step, len(slot.table), preview))

    def _decode(self, slot: Slot) -> Decoded:
        """Decode a finished row, whole; after out-of-memory in tiles, then with fewer rows beside it."""
        tiled = False
        while True:
            try:
                return Decoded(slot, self._pixels(slot, tiled), tiled)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._free_memory()
                if self.backbone.tiles and not tiled:
                    tiled = True
                elif self.slots:
                    self._keep(len(self.slots) // 2)
                else:
                    return Decoded(slot, None, tiled)

    def _pixels(self, slot: Slot, tiled: bool) -> Tensor:
        """Return uint8 (H, W, 3) on the device, on a stream of its own where there is one."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        started = perf_counter()
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            pixels = self._image(slot, slot.latents, tiled)
            image = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        slot.seconds += perf_counter() - started
        return image

    def _image(self, slot: Slot, latents: Tensor, tiled: bool = False) -> Tensor:
        """Decode latents (1, C, h, w) of the row and finish them as its encoding says. Returns (3, H, W) in
        [0, 1]."""
        image = self.backbone.decode(latents, tiled)
        finish = slot.encoded.finish
        return (finish(image) if finish else image)[0]

    def _finish(self, decoded: Decoded) -> Result | Failure:
        slot = decoded.slot
        if decoded.image is None:
            return TOO_LARGE
        if self._stream:
            self._stream.synchronize()
        if not is_finite(slot.latents):
            return Failure(ErrorCode.ENGINE_ERROR, "the latents are not finite: try a smaller guidance_scale")
        started = perf_counter()
        pixels = decoded.image.cpu().numpy()
        unsafe = self.unsafe(pixels) if self.unsafe else None
        slot.seconds += perf_counter() - started
        return Result(
            pixels,
            slot.seconds,
            slot.lanes,
            self.device.type,
            slot.encoded.truncated,
            slot.used,
            slot.paid,
            vae_tiled=decoded.tiled,
            unsafe=unsafe,
            unknown_words=slot.encoded.unknown_words,
        )

    def _preview(self, slot: Slot) -> Pixels:
        assert slot.x0 is not None
        with torch.inference_mode():
            pixels = self._image(slot, slot.x0)
        return (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()

    def _make_room(self) -> list[Outcome]:
        """After a step ran out of memory: the newer half of the rows waits again, from the start; a row that
        was alone fails."""
        self._free_memory()
        if len(self.slots) == 1:
            [slot], self.slots = self.slots, []
            return [(slot.request, TOO_LARGE)]
        self._keep(len(self.slots) // 2)
        return []

    def _keep(self, rows: int) -> None:
        """Keep the oldest rows; the others wait again."""
        self.waiting.extendleft(slot.request for slot in reversed(self.slots[rows:]))
        self.slots = self.slots[:rows]
        self.room = sum(slot.lanes for slot in self.slots)
        self.lanes = min(self.lanes, max(self.room, self.shape.chunk))

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory, the device's or the machine's, was not enough."""
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)


def failure_of(error: Exception) -> Failure:
    """A row's failure, from whatever its admission raised."""
    if isinstance(error, RowError):
        return Failure(error.code, error.message)
    if is_out_of_memory(error):
        return TOO_LARGE
    return Failure(ErrorCode.ENGINE_ERROR, " ".join(f"{type(error).__name__}: {error}".split())[:500])
