"""Stage two: U-Net, ControlNet, context and text encoders and fusion, all together, on cached latents.

B samples  C h w latents
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from context_diffusion.images import resize
from context_diffusion.model.native import NativeModel
from context_diffusion.training.config import SMALL, TrainJob
from context_diffusion.training.data import Batch, Pool, draw
from context_diffusion.training.losses import AuxiliaryHeads, noised, spread_timesteps, update_ema, v_loss
from context_diffusion.training.optimizer import Optimizer
from context_diffusion.training.pools import Pools
from context_diffusion.training.samples import save_samples
from context_diffusion.training.state import Metrics, Progress, load_checkpoint, save_checkpoint
from context_diffusion.training.styles import TEXTURES
from context_diffusion.training.workers import Workers

TRAINED = ("unet", "controlnet", "image_encoder", "text_encoder", "fusion")


@dataclass
class Encoded:
    """A pool with its latents and what the auxiliary heads should say of its styles."""

    pool: Pool
    latents: Tensor  # float16 (S·P, C, h, w)
    controls: Tensor  # float16 (layouts · 2, C, h, w)
    palettes: Tensor  # (S, 24), about unit deviation
    textures: Tensor  # (S,)
    summaries: tuple[Tensor, Tensor] | None  # of each picture by a frozen context encoder: it sees it but once


def train_diffusion(job: TrainJob, model: NativeModel, pools: Pools, folder: Path, metrics: Metrics) -> dict[str, Any]:
    """Trains in place, from where an earlier run stopped; the model ends with the averaged weights."""
    run = Run(job, model, folder)
    _set_attention(model, AttnProcessor(), "eager")  # SDPA's backward pass is slow on a CPU
    encoded: tuple[int, Encoded] | None = None
    validation = encode_pool(model, pools.validation())

    def report(name: str) -> float:
        loss = run.validate(validation)
        metrics.write(stage="validation", step=run.step, loss=round(loss, 5))
        save_samples(model, validation.pool, folder / f"samples{name}.png")
        return loss

    while (share := run.progress.at(run.step)) < 1:
        number = run.step // job.pool_steps
        if encoded is None or encoded[0] != number:
            encoded = (number, encode_pool(model, pools.at(10_000 + number)))
        loss = run.train_step(encoded[1])
        if run.step % 25 == 0:
            metrics.write(stage="diffusion", step=run.step, share=round(share, 4), loss=round(loss, 5))
        if run.step % job.checkpoint_every == 0:
            run.save(done=False)
            if run.workers.first:
                with run.averaged():
                    report(f"-{run.step:06d}")
                    model.save_pretrained(folder / "model")
    run.save(done=True)
    run.modules.load_state_dict(run.average, strict=False)
    _set_attention(model, AttnProcessor2_0(), "sdpa")
    return {"steps": run.step, "validation_loss": report("") if run.workers.first else None}


def _set_attention(model: NativeModel, processor: Any, encoders: str) -> None:
    model.unet.set_attn_processor(processor)
    for name in ("image_encoder", "text_encoder"):
        if name in trained(model):
            model.modules[name].set_attn_implementation(encoders)


def trained(model: NativeModel) -> list[str]:
    """The modules that this stage trains: a pretrained context encoder stays as it is."""
    return [name for name in TRAINED if name != "image_encoder" or model.context_encoder == SMALL]


class Run:
    """Optimiser, average and step of the second stage."""

    def __init__(self, job: TrainJob, model: NativeModel, folder: Path) -> None:
        self.job, self.model, self.path, self.workers = job, model, folder / "diffusion.pt", Workers.here()
        self.modules = nn.ModuleDict({name: model.modules[name] for name in trained(model)}).requires_grad_(True).train()
        for module in self.modules.values():
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(job.seed + 1)
        self.heads = AuxiliaryHeads(job.architecture.width, len(TEXTURES))
        self.optimizer = Optimizer(self.modules, self.heads, job.diffusion, self.workers)
        self.alphas = DDIMScheduler.from_config(model.scheduler_config).alphas_cumprod
        self.step, spent = 0, 0.0
        state = load_checkpoint(self.path)
        if state is not None:
            self.modules.load_state_dict(state["modules"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, spent = state["step"], state["spent"]
        self.average = state["average"] if state else {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.progress = Progress(job.diffusion.minutes, job.max_steps, job.cpu_threads, spent)

    def save(self, done: bool) -> None:
        optimizer = self.optimizer.state_dict()  # all workers have a part of it
        if not self.workers.first:
            return
        state = {
            "modules": self.modules.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer,
            "average": self.average,
            "step": self.step,
            "spent": self.progress.elapsed,
            "done": done,
        }
        save_checkpoint(self.path, state)

    def train_step(self, encoded: Encoded) -> float:
        stage = self.job.diffusion
        rng = np.random.default_rng((self.job.seed, 2, self.step))
        batch = draw(encoded.pool, rng, stage.batch_size, stage.context_dropout, stage.prompt_dropout)
        loss = self.loss(encoded, batch, torch.Generator().manual_seed(self.job.seed * 7_368_787 + self.step), self.workers)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [*self.modules.parameters(), *self.heads.parameters()]
        self.progress.elapsed = self.workers.average(parameters, self.progress.measured)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step(self.progress.learning_rate(self.step))
        self.step += 1
        # A short memory at first, so that the average isn't that of the first, untrained weights.
        update_ema(self.average, self.modules, min(stage.ema, self.step / (self.step + 10)))
        return loss.item()

    def loss(self, encoded: Encoded, batch: Batch, generator: torch.Generator, workers: Workers) -> Tensor:
        """The loss of this worker's share of a batch; noise and timesteps of it all follow from the generator."""
        pool, model = encoded.pool, self.model
        timesteps = workers.share(spread_timesteps(len(batch.targets), len(self.alphas), generator))
        noise = workers.share(torch.randn(len(batch.targets), *model.latent_shape, generator=generator))
        batch = batch.share(workers)
        alphas = self.alphas[timesteps]
        noisy, target = noised(encoded.latents[batch.targets].float(), noise, alphas)
        shown = torch.arange(batch.contexts.shape[1])[None] < torch.from_numpy(batch.counts)[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            contexts = context_tokens(model, encoded, batch.contexts[shown.numpy()])
            slots = contexts.new_zeros(*shown.shape, *contexts.shape[1:])
            slots[shown] = contexts
            text, mask = model.encode_text(list(batch.prompts))
            hidden, bias = model.fuse(text, mask, slots, shown.float())
            down, mid = model.control(noisy, timesteps, encoded.controls[batch.controls].float())
            output = model.predict(noisy, timesteps, hidden, bias, down, mid)
        loss = v_loss(output, target, alphas, self.job.diffusion.min_snr)
        styles = batch.contexts[shown.numpy()] // (len(pool.targets) // len(pool.styles))
        # Each row counts alike, whatever the number of its contexts.
        weights = (1 / torch.from_numpy(batch.counts).clamp(min=1) / len(shown))[:, None].expand(shown.shape)[shown]
        hints = self.heads(contexts, encoded.palettes[styles], encoded.textures[styles], weights)
        return loss + self.job.diffusion.auxiliary * hints

    @torch.no_grad()
    def validate(self, encoded: Encoded) -> float:
        """The loss on held-out styles, always the same batches."""
        losses = []
        for number in range(4):
            batch = draw(encoded.pool, np.random.default_rng((7, number)), 32, 0.1, 0.5)
            losses.append(self.loss(encoded, batch, torch.Generator().manual_seed(number), Workers()).item())
        return float(np.mean(losses))

    def averaged(self) -> _Averaged:
        return _Averaged(self.modules, self.average)


class _Averaged:
    """Within it the modules carry the averaged weights, and are in eval mode."""

    def __init__(self, modules: nn.Module, average: dict[str, Tensor]) -> None:
        self.modules, self.average = modules, average

    def __enter__(self) -> None:
        self.kept = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        self.modules.eval()

    def __exit__(self, *_: object) -> None:
        self.modules.load_state_dict(self.kept)
        self.modules.train()


def to_uint8(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def context_tokens(model: NativeModel, encoded: Encoded, indices: np.ndarray) -> Tensor:
    """The tokens (M, K, D) of so many of a pool's pictures."""
    if encoded.summaries is not None:
        return model.fusion.encode(*(part[indices].float() for part in encoded.summaries))
    return model.encode_images(to_uint8(encoded.pool.targets[indices]))


@torch.no_grad()
def encode_pool(model: NativeModel, pool: Pool) -> Encoded:
    """Latents of a pool's targets and control maps."""
    palettes = np.stack([style.lut[16::32].reshape(-1) for style in pool.styles]) * 4 - 2
    textures = torch.tensor([TEXTURES.index(style.texture) for style in pool.styles])
    summaries = None if "image_encoder" in trained(model) else summarise(model, pool.targets)
    return Encoded(
        pool,
        _in_parts(len(pool.targets), lambda part: [model.encode_pixels(to_uint8(pool.targets[part]))])[0],
        _in_parts(
            len(pool.controls),
            lambda part: [model.encode_control(to_uint8(pool.controls[part]), [pool.control_kinds[i] for i in part])],
        )[0],
        torch.from_numpy(palettes),
        textures,
        summaries,
    )


def summarise(model: NativeModel, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (B, H, W, 3) -> float16, what NativeModel.summarise_images makes of them at the encoder's own size."""
    side = model.context_size

    def see(part: np.ndarray) -> tuple[Tensor, ...]:
        return model.summarise_images(to_uint8(np.stack([resize(pictures[i], side, side, "crop") for i in part])))

    summaries, statistics = _in_parts(len(pictures), see)
    return summaries, statistics


def _in_parts(rows: int, see: Callable[[np.ndarray], Iterable[Tensor]]) -> list[Tensor]:
    """What `see` makes of so many rows, given by index, as float16, 32 at a time; each worker does its share."""
    workers = Workers.here()
    mine = workers.share(np.arange(rows))
    with torch.autocast("cpu", torch.bfloat16):
        parts = [[seen.half() for seen in see(mine[i : i + 32])] for i in range(0, len(mine), 32)]
    return [workers.gather(torch.cat(column), rows) for column in zip(*parts, strict=True)]
