"""What the engine asks of a model: encode a row's conditions once, predict for the lanes, decode.

Every method treats its samples one by one: no batch-wide statistic. A lane is one guidance branch of a row.
`predict` runs in each step: it allocates nothing on the host, reads no tensor there and keeps nothing on
modules.

P lanes  H W pixels
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from context_diffusion.core.records import Request
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.inputs.context_images import ContextPreprocessing

# By name: tensors, or tuples of them that are read by position; each (1, ...) for one lane or row, (P, ...)
# for the lanes of a chunk.
Conditions = dict[str, Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Encoded:
    """A row, encoded.

    lanes: what `predict` reads, for each branch. control: what `predict` reads of the row's control maps,
    among it `scale` (1, N), the strength of each of the N ControlNets; None: the row has none. truncated: the
    prompt was longer than the model reads. unknown_words: of the prompt; None: the model's text encoder reads
    any word. finish: the model's own last step for this row, on its decoded image (1, 3, H, W) in [0, 1];
    None: the model has no such step. full_prompt: what the model read in place of the prompt; None: the
    prompt itself.
    """

    lanes: list[Conditions]
    control: Conditions | None
    truncated: bool = False
    unknown_words: tuple[str, ...] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    full_prompt: str | None = None


class Backbone(Protocol):
    """Knows nothing of chunks, steps and schedulers."""

    scheduler_config: dict[str, Any]
    image_size: int  # pixels, the size it was trained for
    contexts: ContextPreprocessing  # how a context image of any size becomes the encoder's pixels
    context_slots: int  # contexts that a row may have
    noise_scale: float  # of the noise that sampling begins with; 1: as trained
    tiles: bool  # whether `decode` can work in tiles
    num_controlnets: int

    @property
    def denoisers(self) -> list[nn.Module]:
        """The networks that `predict` runs."""

    def branches(self, request: Request) -> list[Branch]:
        """Return the guidance branches that the row needs, 1 to 3. Raises RowError for guidance that the
        model lacks."""

    def shape_group(self, request: Request) -> Hashable:
        """Return what fixes the shapes of the row's tensors and the weights that it needs, a function of the
        row alone. Only rows of the same group share a call of `predict`."""

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Return the shape of the row's latents, without a batch dimension."""

    def schedule(self, request: Request) -> dict[str, Any]:
        """Return what the row's scheduler needs beside the number of steps, as keyword arguments of
        diffusers' `set_timesteps`: JSON values."""

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        """Encode the row's prompts, contexts and control maps. Raises RowError for a row that the model
        cannot take. Called from several threads at once on a CPU."""

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        """Return the query's latents (1, ...) float32, for image to image; draws what the model's own
        pipeline draws."""

    def predict(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, control: Conditions | None, group: Any
    ) -> Tensor:
        """Return the model's output for latents (P, ...) float32 at timesteps (P,) float32.

        group: the shape group of the lanes' rows. control: of the row of each lane, (P, ...); a `scale` of 0
        is no control. None: no lane has any."""

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Decode one row's latents (1, ...) float32 to an image (1, 3, H, W) in [0, 1].

        tiled: decode in tiles, which takes less memory and changes pixels."""
