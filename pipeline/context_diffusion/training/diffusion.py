"""Train U-Net, ControlNet, context and text encoders and fusion together, on cached latents.

Knows nothing of where its data come from (training/data/batches.py). B samples  M contexts of all samples  C
h w latents"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from context_diffusion.core.training_job import SMALL, TrainingJob
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.preconditioning import REST
from context_diffusion.training.data.batches import (
    CONTEXTS,
    BatchSource,
    Data,
    Hints,
    Samples,
    Summaries,
    cropped,
)
from context_diffusion.training.data.styles import TEXTURES
from context_diffusion.training.loop.checkpoints import (
    Metrics,
    StageSchedule,
    check_origin,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_model,
)
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.loop.losses import (
    AuxiliaryHeads,
    noised,
    rest_timesteps,
    spread_timesteps,
    v_loss,
)
from context_diffusion.training.loop.optimizer import LOOK, Averaged, Clipping, Optimizer, update_ema
from context_diffusion.training.loop.precision import SOUND, mixed_precision
from context_diffusion.training.samples import draw_curves, save_samples

VALIDATION_BATCHES = 4
PADDED = 64  # contexts of a batch are padded to a multiple of it
TRAINED = ("unet", "controlnet", "image_encoder", "text_encoder", "fusion")


def train_diffusion(
    job: TrainingJob, model: NativeModel, data: Data, folder: Path, metrics: Metrics
) -> dict[str, Any]:
    """Train in place, resuming an earlier run; the model ends with the averaged weights."""
    run = Run(job, model, folder, data.origin)
    if model.device.type == "cpu":
        _set_attention(model, AttnProcessor(), "eager")  # SDPA's backward pass is slow there
    validations = data.validations()

    def validate() -> dict[str, float]:
        losses = {stage: round(run.validate(source), 5) for stage, source in validations.items()}
        for stage, loss in losses.items():
            metrics.write(stage=stage, step=run.step, loss=loss)
        return {f"{stage}_loss": loss for stage, loss in losses.items()}

    def report(name: str) -> dict[str, float]:
        losses = validate()
        save_samples(model, *data.examples(12), folder / f"samples{name}.png")
        draw_curves(folder)
        return losses

    if run.step == 0 and run.workers.first:
        validate()
    while (share := run.progress.at(run.step)) < 1:
        loss = run.train_step(data.at(run.step))
        if run.step % LOOK == 0:
            values = {"loss": round(loss.item(), 5), "left_out": run.clipping.left_out()}
            metrics.write(stage="diffusion", step=run.step, share=round(share, 4), **values)
        reporting = run.step % job.checkpoint_every == 0
        if run.progress.due() or reporting:
            run.save(done=False)
        if reporting and run.workers.first:
            with run.averaged():
                report(f"-{run.step:06d}")
                save_model(model, folder / "model")
    run.save(done=True)
    run.modules.load_state_dict(run.average, strict=False)
    _set_attention(model, AttnProcessor2_0(), "sdpa")
    return {"steps": run.step, **(report("") if run.workers.first else {})}


def _set_attention(model: NativeModel, processor: Any, encoders: str) -> None:
    model.unet.set_attn_processor(processor)
    for name in ("image_encoder", "text_encoder"):
        if name in trained(model):
            model.modules[name].set_attn_implementation(encoders)


def trained(model: NativeModel) -> list[str]:
    """Return the modules that this stage trains: a pretrained context encoder stays frozen."""
    return [name for name in TRAINED if name != "image_encoder" or model.context_encoder == SMALL]


class Run:
    """The optimiser, averaged weights and step of the diffusion stage."""

    def __init__(self, job: TrainingJob, model: NativeModel, folder: Path, origin: dict[str, str]) -> None:
        self.job = job
        self.model = model
        self.path = folder / "diffusion.pt"
        self.workers = Workers.here()
        self.origin = origin
        self.modules = (
            nn.ModuleDict({name: model.modules[name] for name in trained(model)}).requires_grad_(True).train()
        )
        for module in self.modules.values():
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(job.seed + 1)
        self.heads = AuxiliaryHeads(model.unet.config.cross_attention_dim, len(TEXTURES)).to(model.device)
        self.optimizer = Optimizer(self.modules, self.heads, job.diffusion, self.workers)
        self.clipping = Clipping([*self.modules.parameters()], [*self.heads.parameters()], model.device)
        # timesteps are drawn on the CPU
        self.schedule = DDIMScheduler.from_config(model.scheduler_config).alphas_cumprod
        self.alphas = self.schedule.to(model.device)
        self.step = 0
        spent = 0.0
        state = load_checkpoint(self.path)
        if state is not None:
            load_weights(self.modules, state["modules"], self.path)
            load_weights(self.heads, state["heads"], self.path)
            check_origin(self.path, state.get("origin", {}), origin)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            spent = state["spent"]
        average = state["average"] if state else self.modules.state_dict()
        self.average = {name: value.to(model.device, copy=True) for name, value in average.items()}
        self.progress = StageSchedule(
            job.diffusion.minutes, job.max_steps, job.cpu_threads, model.device, spent
        )

    def save(self, done: bool) -> None:
        optimizer = self.optimizer.state_dict()  # collective: each worker holds a part of it
        if not self.workers.first:
            return
        state = {
            "modules": self.modules.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer,
            "average": self.average,
            "origin": self.origin,
            "step": self.step,
            "spent": self.progress.elapsed,
            "done": done,
        }
        save_checkpoint(self.path, state)

    def train_step(self, source: BatchSource) -> Tensor:
        """Train one step; return the loss on the model's device: reading it would wait for the step."""
        stage = self.job.diffusion
        self.optimizer.zero_grad()
        mine = self.workers.share(np.arange(stage.batch_size))
        parts = [mine[part :: stage.accumulate] for part in range(stage.accumulate)]
        loss = torch.stack([self.backward(source, rows, len(rows) / len(mine)) for rows in parts]).sum()
        parameters = [*self.modules.parameters(), *self.heads.parameters()]
        self.progress.elapsed = self.workers.average(parameters, self.progress.measured)
        self.clipping.bound()
        self.optimizer.step(self.progress.learning_rate(self.step))
        self.step += 1
        # A short average at first, so that the untrained weights leave it soon.
        update_ema(self.average, self.modules, min(stage.ema, self.step / (self.step + 10)))
        return loss

    def backward(self, source: BatchSource, rows: NDArray[np.int64], weight: float) -> Tensor:
        """Add the gradients of some rows of the step's batch, which depends on seed and step alone; return
        their weighted loss."""
        stage = self.job.diffusion
        size = stage.batch_size
        rng = np.random.default_rng((self.job.seed, 2, self.step))
        samples = source.samples(rng, size, stage.context_dropout, stage.prompt_dropout, rows)
        generator = torch.Generator().manual_seed(self.job.seed * 7_368_787 + self.step)
        with sdpa_kernel(SOUND):
            loss = (
                self.loss(samples, rows, size, generator, self.progress.at(self.step) < stage.crops) * weight
            )
        loss.backward()
        return loss.detach()

    def loss(
        self,
        samples: Samples,
        rows: NDArray[np.int64],
        size: int,
        generator: torch.Generator,
        crop: bool = False,
    ) -> Tensor:
        """Return the loss of some rows of a batch of `size`; all noise, timesteps and crops depend on the
        generator alone."""
        model = self.model
        device = model.device
        if crop:
            samples = cropped(samples, rows, size, generator)
        has_draft = samples.drafts.flatten(1).any(1).to(device) & model.drafts
        draft_timesteps = rest_timesteps(size, self.schedule, REST, generator)[rows].to(device)
        plain_timesteps = spread_timesteps(size, len(self.alphas), generator)[rows].to(device)
        timesteps = torch.where(has_draft, draft_timesteps, plain_timesteps)
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        noise_generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(noise_seed)
        noise = torch.randn(size, *samples.latents.shape[1:], generator=noise_generator, device=device)[rows]
        alphas = self.alphas[timesteps]
        noisy, target = noised(samples.latents.float(), noise, alphas)
        # On the CPU: a mask on a GPU would synchronise.
        filled = torch.arange(CONTEXTS)[None] < torch.from_numpy(samples.counts)[:, None]
        with torch.no_grad(), mixed_precision(device):
            draft = model.encode_draft(samples.drafts.to(device)) if model.drafts else None
        with mixed_precision(device):
            contexts = context_tokens(model, samples.contexts)
            slots = contexts.new_zeros(*filled.shape, *contexts.shape[1:])
            slots[filled] = contexts
            text, mask = model.encode_text(list(samples.prompts))
            hidden, bias = model.fuse(text, mask, slots, filled.float().to(device))
            down, mid = model.control(noisy, timesteps, samples.controls.float())
            output = model.predict(noisy, timesteps, hidden, bias, down, mid, draft)
        loss = v_loss(output, target, alphas, self.job.diffusion.min_snr, has_draft, REST)
        if samples.hints is None or not self.job.diffusion.auxiliary:
            return loss
        return loss + self.job.diffusion.auxiliary * self._auxiliary_loss(samples.hints, contexts, filled)

    def _auxiliary_loss(self, hints: Hints, contexts: Tensor, filled: Tensor) -> Tensor:
        """Return the loss of the auxiliary heads. Each row has the same weight for any number of contexts.

        contexts: tokens of all contexts; filled: (B, CONTEXTS) bool, which of a row's slots have one.
        """
        counts = filled.sum(1)
        weights = (1 / counts.clamp(min=1) / len(filled))[:, None].expand(filled.shape)[filled]
        hinted = len(hints.palettes)
        return self.heads(
            contexts[:hinted], hints.palettes, hints.textures, weights.to(self.model.device)[:hinted]
        )

    @torch.no_grad()
    def validate(self, source: BatchSource) -> float:
        """Return the loss on held-out data, always of the same batches."""
        losses = []
        rows = np.arange(32)
        for number in range(VALIDATION_BATCHES):
            samples = source.samples(np.random.default_rng((7, number)), len(rows), 0.1, 0.5, rows)
            losses.append(self.loss(samples, rows, len(rows), torch.Generator().manual_seed(number)).item())
        return float(np.mean(losses))

    def averaged(self) -> Averaged:
        return Averaged(self.modules, self.average)


def context_tokens(model: NativeModel, contexts: Tensor | Summaries) -> Tensor:
    """Return the contexts' tokens (M, K, D); M may be 0."""
    if isinstance(contexts, tuple):
        return model.fusion.encode(*(part.float() for part in contexts))
    if not len(contexts):
        return model.fusion.null_context[None][:0]  # an encoder fails on an empty batch
    # Few sizes: a GPU searches for kernels and memory again for each new one.
    padding = contexts[:1].expand(-len(contexts) % (PADDED if model.device.type == "cuda" else 1), -1, -1, -1)
    return model.encode_images(torch.cat([contexts, padding]))[: len(contexts)]
