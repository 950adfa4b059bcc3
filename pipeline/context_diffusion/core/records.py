"""The records that pass between the stages: control maps, requests, results, failures, shards, counts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.settings import Settings

Pixels = NDArray[np.uint8]
DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"  # an example, for messages


@dataclass(frozen=True)
class Control:
    """A control map, one for each ControlNet of the model. kind: a ControlName. pixels: None where the engine
    computes the map of the query."""

    kind: str
    pixels: Pixels | None

    @property
    def given(self) -> Pixels:
        """The map that the row has. Raises RowError where it has none."""
        if self.pixels is None:
            raise RowError(ErrorCode.INVALID_SETTING, no_map(self.kind))
        return self.pixels


def no_map(kind: str) -> str:
    """Say why there is no map of a kind that is not computed from the query's pixels alone."""
    if kind == "depth":
        return (
            f"control: depth needs a depth model, such as model.depth_estimator: {DEPTH_MODEL}, or a map of "
            "the row's own in the column control_image"
        )
    return f"control: {kind} is not computed here: a row brings its map in the column control_image"


@dataclass(frozen=True)
class Request:
    """One image to generate, as pixels. All arrays are uint8 RGB (H, W, 3).

    `settings.seed` is this image's own seed. size: width and height of the output in pixels; None: those of
    the query, which differ where the model reads the query as a reference of any size. masks: where each
    context acts, grey at the output's size, bright for yes; empty: everywhere.
    """

    id: str
    index: int
    query: Pixels
    controls: tuple[Control, ...]
    contexts: tuple[Pixels, ...]
    prompt: str | None
    negative_prompt: str | None
    settings: Settings
    size: tuple[int, int] | None = None
    masks: tuple[Pixels, ...] = ()

    @property
    def output_size(self) -> tuple[int, int]:
        """The width and height of the output."""
        return self.size or (self.query.shape[1], self.query.shape[0])


@dataclass(frozen=True)
class Result:
    """One generated image, uint8 RGB (H, W, 3), with its cost in time and lane steps."""

    image: Pixels
    seconds: float
    lanes: int
    device: str
    prompt_truncated: bool = False
    used_lane_steps: int = 0  # lane steps of this image
    paid_lane_steps: float = 0.0  # its share of the lane steps that the calls had room for
    vae_tiled: bool = False  # decoded in tiles after running out of memory
    unsafe: bool | None = None  # according to the model's safety checker; None without one
    chunk: int | None = None  # lanes of the calls that generated it, which decide its bits, as does
    compiled: bool = False  # whether the networks were compiled
    # of the prompt, without an effect; None: the model's text encoder reads any word
    unknown_words: tuple[str, ...] | None = None
    # what the model read in place of the prompt; None: the prompt itself
    full_prompt: str | None = None


@dataclass(frozen=True)
class Failure:
    """The reason why a request has no image."""

    code: ErrorCode
    message: str


@dataclass(frozen=True)
class EngineStats:
    """Statistics of an engine. hits, misses: of its caches, by kind, since it started."""

    rows: int = 0  # in its lanes or waiting
    hits: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    gpu_bytes: int | None = None  # that torch has reserved; None without a GPU
    steps: int = 0  # since it started


@dataclass(frozen=True)
class Shard:
    """The unit of work, retry and resume: `rows` rows of the manifest's file `file`, starting at `first_row`.

    Parquet: `group` is the row group and `first_row` counts within it. CSV and JSONL: `offset` and `size` in
    bytes."""

    number: int
    file: int
    first_row: int
    rows: int
    group: int = 0
    offset: int = 0
    size: int = 0


def check_contexts(count: int, slots: int | None, **values: Sequence[Any] | None) -> None:
    """Check the number of a row's contexts, and of what it gives for each of them. Raises RowError.

    slots: contexts that the model takes; None: any number. values: by name; None or empty: not given."""
    if slots is not None and count > slots:
        message = f"{count} contexts, the model takes at most {slots}"
        raise RowError(ErrorCode.TOO_MANY_CONTEXTS, message)
    for name, given in values.items():
        if given and len(given) != count:
            message = f"{name} has {len(given)} values for {count} contexts"
            raise RowError(ErrorCode.INVALID_SETTING, message)


def part_name(number: int) -> str:
    """Return the name of a shard's part and of its folder of images."""
    return f"part-{number:05d}"


def derive_seed(job_seed: int, row_id: str) -> int:
    """Return the seed of a row without one: 32 bits of a hash of the job's seed and the row's id."""
    digest = hashlib.blake2b(f"{job_seed}:{row_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def derive_id(row: dict[str, Any]) -> str:
    """Return the id of a row without one: a hash of all its cells."""

    def plain(value: Any) -> Any:
        return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)

    text = json.dumps(row, sort_keys=True, default=plain, ensure_ascii=True)
    return "row-" + hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def is_derived(row_id: str) -> bool:
    """Return whether an id has the form of those of `derive_id`."""
    return re.fullmatch("row-[0-9a-f]{20}", row_id) is not None


@dataclass
class Counts:
    """Numbers of rows and images of an OUTPUT."""

    rows: int = 0
    ok: int = 0
    failed: int = 0
    images: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    flagged: int = 0  # of the images
    unsafe: int = 0
    unknown_words: int = 0  # rows whose prompt has some

    def __add__(self, other: Counts) -> Counts:
        sums = {name: number + getattr(other, name) for name, number in vars(self).items() if name != "codes"}
        return Counts(**sums, codes=dict(Counter(self.codes) + Counter(other.codes)))
