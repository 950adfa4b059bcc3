"""Train the autoencoder: images to latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from context_diffusion.core.training_job import TrainJob
from context_diffusion.image_tensors import channels_first
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.encoded_pools import as_images
from context_diffusion.training.data.pools import Pool, Pools
from context_diffusion.training.loop.checkpoints import (
    Metrics,
    StageSchedule,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.loop.losses import image_loss
from context_diffusion.training.loop.precision import mixed_precision


def train_autoencoder(
    job: TrainJob, model: NativeModel, pools: Pools, folder: Path, metrics: Metrics
) -> None:
    """Train model.vae in place, resuming an earlier run; set its scaling factor at the end."""
    stage = _Stage(job, model, folder / "autoencoder.pt", job.autoencoder.minutes, model.vae)
    if not stage.done:
        stage.run(pools, metrics, "autoencoder", first_pool=0)
        _set_scale(model, pools.validation().targets)
        stage.save(done=True)
    else:
        model.vae.register_to_config(scaling_factor=stage.scale)
    stage.close(pools, metrics, "autoencoder")


def train_decoder(job: TrainJob, model: NativeModel, pools: Pools, folder: Path, metrics: Metrics) -> None:
    """Train the decoder alone: the latents that the diffusion model learned do not change."""
    stage = _Stage(job, model, folder / "decoder.pt", job.autoencoder.decoder_minutes, model.vae.decoder)
    if not stage.done:
        stage.run(pools, metrics, "decoder", first_pool=20_000)
        stage.save(done=True)
    stage.close(pools, metrics, "decoder")


class _Stage:
    """The optimiser, schedule and checkpoint of one of the two stages. trained: the part whose weights are
    trained."""

    def __init__(
        self, job: TrainJob, model: NativeModel, path: Path, minutes: float, trained: torch.nn.Module
    ) -> None:
        self.job = job
        self.model = model
        self.path = path
        self.trained = trained
        self.workers = Workers.here()
        model.vae.requires_grad_(False)
        trained.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            trained.parameters(), lr=job.autoencoder.learning_rate, weight_decay=1e-4, betas=(0.9, 0.99)
        )
        self.step = 0
        self.done = False
        self.scale = 1.0
        spent = 0.0
        if (state := load_checkpoint(path)) is not None:
            load_weights(model.vae, state["vae"], path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.done = state["done"]
            self.scale = state["scale"]
            spent = state["spent"]
        self.progress = StageSchedule(minutes, job.max_steps, job.cpu_threads, model.device, spent)
        model.vae.train().to(memory_format=torch.channels_last)

    def run(self, pools: Pools, metrics: Metrics, name: str, first_pool: int) -> None:
        job = self.job
        while (share := self.progress.at(self.step)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = job.autoencoder.learning_rate * self.progress.learning_rate(self.step)
            loss = self._loss(
                pools.at(first_pool + self.step // job.pool_steps), share < job.autoencoder.crops
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.progress.elapsed = self.workers.average(self.trained.parameters(), self.progress.measured)
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 25 == 0:
                metrics.write(stage=name, step=self.step, share=round(share, 4), loss=round(loss.item(), 5))
            if self.progress.due() or self.step % job.checkpoint_every == 0:
                self.save(done=False)

    def _loss(self, pool: Pool, crop: bool) -> Tensor:
        """Return the loss of one batch, or of a quarter of each of its images; the batch depends on the step
        alone."""
        job = self.job
        model = self.model
        step = self.step
        rng = np.random.default_rng((job.seed, 1, step))
        generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
        half = job.autoencoder.batch_size // 2
        targets = pool.targets[rng.integers(0, len(pool.targets), half)]
        queries = pool.queries[rng.integers(0, len(pool.queries), job.autoencoder.batch_size - half)]
        images = np.concatenate([targets, queries])
        if crop:
            images = quarters(images, rng)
        true = to_signed(self.workers.share(images)).to(model.device)
        side = images.shape[1] // job.architecture.latent_factor
        shape = (job.autoencoder.batch_size, model.vae.config.latent_channels, side, side)
        noise = (
            self.workers.share(torch.randn(shape, generator=generator)).to(model.device)
            * job.autoencoder.latent_noise
        )
        with mixed_precision(model.device):
            latents = model.vae.encode(true).latents
            decoded = model.vae.decode(latents + noise * latents.detach().float().std()).sample
        # Latents are kept near unit size and centred, so that one scaling factor serves all channels.
        size = latents.float().square().mean()
        centre = latents.float().mean((0, 2, 3))
        return image_loss(decoded.float(), true) + 1e-3 * (size - 1).square() + 1e-2 * centre.square().mean()

    def save(self, done: bool) -> None:
        if not self.workers.first:
            return
        state = {
            "vae": self.model.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.progress.elapsed,
            "done": done,
            "scale": float(self.model.vae.config.scaling_factor),
        }
        save_checkpoint(self.path, state)

    def close(self, pools: Pools, metrics: Metrics, name: str) -> None:
        self.model.vae.eval().requires_grad_(False)
        decibels = psnr(self.model, pools.validation().targets[:128])
        metrics.write(stage=name, step=self.step, psnr=round(decibels, 2))


def quarters(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop uint8 (B, H, H, 3) to (B, H/2, H/2, 3), each image at a place of its own."""
    side = images.shape[1] // 2
    places = rng.integers(0, side + 1, (len(images), 2))
    return np.stack([image[y : y + side, x : x + side] for image, (y, x) in zip(images, places, strict=True)])


def to_signed(images: np.ndarray) -> Tensor:
    """Convert uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1], channels last in memory."""
    values = channels_first(images).to(memory_format=torch.channels_last)
    return values.float() / 127.5 - 1


@torch.no_grad()
def psnr(model: NativeModel, pixels: np.ndarray) -> float:
    """Return the mean PSNR of the reconstructions, in dB."""
    images = as_images(model, pixels)
    errors = [
        (model.decode(model.encode_pixels(part)) - part.float() / 255).square().mean((1, 2, 3))
        for part in images.split(16)
    ]
    return float((-10 * torch.cat(errors).log10()).mean())


@torch.no_grad()
def _set_scale(model: NativeModel, pixels: np.ndarray) -> None:
    """Set the scaling_factor by which latents have std 1."""
    images = as_images(model, pixels[:256])
    latents = torch.cat([model.vae.encode(part.float() / 127.5 - 1).latents for part in images.split(16)])
    model.vae.register_to_config(scaling_factor=float(1 / latents.std()))
