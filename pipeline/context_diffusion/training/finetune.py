"""Fine-tune a native model on a user's images; a share of each batch stays generated data.

It is the same loop as training from scratch (training/diffusion.py); the autoencoder stays frozen.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from context_diffusion.core.records import Pixels, Request
from context_diffusion.core.training_job import FinetuneJob
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import digest, model_folder
from context_diffusion.training.data.batches import SAMPLE_SETTINGS, BatchSource
from context_diffusion.training.data.encoded_pools import Generated, encode, encode_controls, looks, summarise
from context_diffusion.training.data.pools import Pools
from context_diffusion.training.data.user_batches import Gallery, Mixed
from context_diffusion.training.data.user_images import Example, UserImages, read_user_images
from context_diffusion.training.diffusion import train_diffusion
from context_diffusion.training.loop.checkpoints import Metrics, save_model
from context_diffusion.training.loop.distributed import Workers

SKIPPED_NAMES = 100  # in the summary at most; the log has them all


def finetune(job: FinetuneJob, device: torch.device) -> dict[str, Any] | None:
    """Fine-tune; write job.output/model (a folder that `model:` takes), metrics.jsonl and samples.

    Returns a summary on the first of several workers, None on the others."""
    cv2.setNumThreads(1)
    workers = Workers.here()
    folder = Path(job.output)
    model = NativeModel.from_pretrained(model_folder(job.model)).to(device)
    images = read_user_images(job, model.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    if workers.first:
        _report_skipped(images)
    pools = Pools(job, model.image_size)
    try:
        summary = train_diffusion(
            job, model, UserData(job, model, images, pools), folder, Metrics(folder, workers.first)
        )
    finally:
        pools.close()
    if not workers.first:
        return None
    save_model(model, folder / "model")
    return {
        "output": str(folder),
        "model": str(folder / "model"),
        **summary,
        "styles": images.styles,
        "pictures": len(images.pixels),
        "skipped": len(images.skipped),
        "skipped_names": list(images.skipped)[:SKIPPED_NAMES],
    }


def _report_skipped(images: UserImages) -> None:
    log = logging.getLogger(__name__)
    for reason in images.skipped.values():
        log.warning("skipped: %s", reason)
    if not images.validation:
        log.warning("too few images to hold any out: the validation loss is that of the training images")


class UserData:
    """A user's images and generated data, as training data of the loop (training/data/batches.py: Data)."""

    def __init__(self, job: FinetuneJob, model: NativeModel, images: UserImages, pools: Pools) -> None:
        self.job = job
        self.model = model
        self.images = images
        self.generated = Generated(model, pools, job.pool_steps)
        self.summaries = summarise(model, images.pixels)
        self.looks = looks(model, images.pixels)
        self.training = self.gallery(images.training)
        self.held = self.gallery(images.validation) if images.validation else self.training
        self.origin = {"model": digest(model_folder(job.model)), "data": images.digest}

    def gallery(self, examples: list[Example]) -> Gallery:
        pixels = self.images.pixels
        latents = encode(self.model, [pixels[example.target] for example in examples])
        return Gallery(
            pixels,
            examples,
            self.job.controls,
            latents,
            self.summaries,
            self.looks,
            partial(encode_controls, self.model),
        )

    def at(self, step: int) -> BatchSource:
        return (
            Mixed(self.generated.at(step), self.training, self.job.keep) if self.job.keep else self.training
        )

    def validations(self) -> dict[str, BatchSource]:
        old = {"old_styles": self.generated.validations()["validation"]} if self.job.keep else {}
        return {"validation": self.held, **old}

    def examples(self, count: int) -> tuple[list[Request], list[Pixels]]:
        requests, targets = [], []
        for number in range(count):
            rng = np.random.default_rng((11, number))
            example = self.held.examples[number % len(self.held.examples)]
            query = self.held.query(example, rng)
            kind = self.held.draw_kind(rng)
            contexts = tuple(self.images.pixels[k] for k in self.held.contexts(example, rng))
            settings = SAMPLE_SETTINGS.model_copy(update={"seed": number})
            prompt = example.prompt or None
            requests.append(
                Request(
                    f"own-{number}", 0, query, controls_of(query, [kind]), contexts, prompt, None, settings
                )
            )
            targets.append(self.images.pixels[example.target])
        return requests, targets
