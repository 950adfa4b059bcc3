"""Stage two: U-Net, ControlNet, context and text encoders and fusion, all together, on cached latents.

B samples  C h w latents
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from numpy.typing import NDArray
from pytorch_optimizer import Muon
from torch import Tensor, nn

from context_diffusion.model.native import NativeModel
from context_diffusion.training.batches import CONTEXTS, Data, Hints, Samples, Source
from context_diffusion.training.config import DiffusionSteps, TrainingJob
from context_diffusion.training.data import Pool, draw
from context_diffusion.training.layouts import Rng
from context_diffusion.training.losses import AuxiliaryHeads, noised, spread_timesteps, update_ema, v_loss
from context_diffusion.training.samples import save_samples
from context_diffusion.training.state import (
    Metrics,
    Progress,
    check_origin,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_model,
)
from context_diffusion.training.styles import TEXTURES
from context_diffusion.training.workers import Workers

TRAINED = ("unet", "controlnet", "image_encoder", "text_encoder", "fusion")


@dataclass
class Encoded:
    """A pool with its latents and what the auxiliary heads should say of its styles."""

    pool: Pool
    latents: Tensor  # float16 (S·P, C, h, w)
    layouts: Tensor  # float16 (layouts, C, h, w), of the layouts undressed, in grey
    palettes: Tensor  # (S, 24), about unit deviation
    textures: Tensor  # (S,)

    def samples(self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]) -> Samples:
        pool = self.pool
        batch = draw(pool, rng, size, context_dropout, prompt_dropout).at(rows)
        contexts = batch.contexts[np.arange(CONTEXTS) < batch.counts[:, None]]
        styles = contexts // (len(pool.targets) // len(pool.styles))
        return Samples(
            self.latents[batch.targets],
            pool.targets[contexts],
            batch.counts,
            pool.controls[batch.controls],
            [pool.control_kinds[index] for index in batch.controls],
            batch.prompts,
            Hints(self.layouts[batch.controls // 2], self.palettes[styles], self.textures[styles]),
        )


def train_diffusion(job: TrainingJob, model: NativeModel, data: Data, folder: Path, metrics: Metrics) -> dict[str, Any]:
    """Trains in place, from where an earlier run stopped; the model ends with the averaged weights."""
    run = _Run(job, model, folder, data.origin)
    _set_attention(model, AttnProcessor(), "eager")  # SDPA's backward pass is slow on a CPU
    validations = data.validations()

    def validate() -> dict[str, float]:
        losses = {stage: round(run.validate(source), 5) for stage, source in validations.items()}
        for stage, loss in losses.items():
            metrics.write(stage=stage, step=run.step, loss=loss)
        return {f"{stage}_loss": loss for stage, loss in losses.items()}

    def report(name: str) -> dict[str, float]:
        losses = validate()
        save_samples(model, *data.examples(12), folder / f"samples{name}.png")
        return losses

    if run.step == 0 and run.workers.first:
        validate()
    while (share := run.progress.at(run.step)) < 1:
        loss = run.train_step(data.at(run.step))
        if run.step % 25 == 0:
            metrics.write(stage="diffusion", step=run.step, share=round(share, 4), loss=round(loss, 5))
        if run.step % job.checkpoint_every == 0:
            run.save(done=False)
            if run.workers.first:
                with run.averaged():
                    report(f"-{run.step:06d}")
                    save_model(model, folder / "model")
    run.save(done=True)
    run.modules.load_state_dict(run.average, strict=False)
    _set_attention(model, AttnProcessor2_0(), "sdpa")
    return {"steps": run.step, **(report("") if run.workers.first else {})}


def _set_attention(model: NativeModel, processor: Any, encoders: str) -> None:
    model.unet.set_attn_processor(processor)
    for encoder in (model.image_encoder, model.text_encoder):
        encoder.set_attn_implementation(encoders)


class _Run:
    """Optimiser, average and step of the second stage."""

    def __init__(self, job: TrainingJob, model: NativeModel, folder: Path, origin: dict[str, str]) -> None:
        self.job, self.model, self.path, self.workers = job, model, folder / "diffusion.pt", Workers.here()
        self.origin = origin
        self.modules = nn.ModuleDict({name: model.modules[name] for name in TRAINED}).requires_grad_(True).train()
        for module in self.modules.values():
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(job.seed + 1)
        embedding = model.controlnet.controlnet_cond_embedding
        sizes = model.controlnet.config.block_out_channels[0], model.latent_shape[0], model.unet.config.cross_attention_dim
        self.heads = AuxiliaryHeads(*sizes, len(TEXTURES))
        self.features: list[Tensor] = []
        embedding.register_forward_hook(lambda _m, _i, output: self.features.append(output))
        self.optimizer = make_optimizer(self.modules, self.heads, job.diffusion)
        self.alphas = DDIMScheduler.from_config(model.scheduler_config).alphas_cumprod
        self.step, spent = 0, 0.0
        state = load_checkpoint(self.path)
        if state is not None:
            load_weights(self.modules, state["modules"], self.path)
            load_weights(self.heads, state["heads"], self.path)
            check_origin(self.path, state.get("origin", {}), origin)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, spent = state["step"], state["spent"]
        self.average = state["average"] if state else {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.progress = Progress(job.diffusion.minutes, job.max_steps, job.cpu_threads, spent)

    def save(self, done: bool) -> None:
        if not self.workers.first:
            return
        state = {
            "modules": self.modules.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "origin": self.origin,
            "step": self.step,
            "spent": self.progress.elapsed,
            "done": done,
        }
        save_checkpoint(self.path, state)

    def train_step(self, source: Source) -> float:
        stage = self.job.diffusion
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.progress.learning_rate(self.step)
        rng = np.random.default_rng((self.job.seed, 2, self.step))
        rows = self.workers.share(np.arange(stage.batch_size))
        samples = source.samples(rng, stage.batch_size, stage.context_dropout, stage.prompt_dropout, rows)
        generator = torch.Generator().manual_seed(self.job.seed * 7_368_787 + self.step)
        loss = self.loss(samples, rows, stage.batch_size, generator)
        self.optimizer.zero_grad()
        loss.backward()
        trained = [*self.modules.parameters(), *self.heads.parameters()]
        self.progress.elapsed = self.workers.average(trained, self.progress.measured)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # A short memory at first, so that the average isn't that of the first, untrained weights.
        update_ema(self.average, self.modules, min(stage.ema, self.step / (self.step + 10)))
        return loss.item()

    def loss(self, samples: Samples, rows: NDArray[np.int64], size: int, generator: torch.Generator) -> Tensor:
        """The loss of these rows of a batch of `size`; noise and timesteps of it all follow from the generator."""
        model = self.model
        timesteps = spread_timesteps(size, len(self.alphas), generator)[rows]
        noise = torch.randn(size, *model.latent_shape, generator=generator)[rows]
        alphas = self.alphas[timesteps]
        noisy, target = noised(samples.latents.float(), noise, alphas)
        counts = torch.from_numpy(samples.counts)
        shown = torch.arange(CONTEXTS)[None] < counts[:, None]
        self.features.clear()
        with torch.autocast("cpu", torch.bfloat16):
            none = model.fusion.null_context[None][:0]  # (0, K, D): CLIP cannot take no picture
            contexts = model.encode_images(to_uint8(samples.contexts)) if len(samples.contexts) else none
            slots = contexts.new_zeros(*shown.shape, *contexts.shape[1:])
            slots[shown] = contexts
            text, mask = model.encode_text(list(samples.prompts))
            hidden, bias = model.fuse(text, mask, slots, shown.float())
            down, mid = model.control(noisy, timesteps, to_uint8(samples.controls), samples.kinds)
            output = model.predict(noisy, timesteps, hidden, bias, down, mid)
        loss = v_loss(output, target, alphas, self.job.diffusion.min_snr)
        hints = samples.hints
        if hints is None or not self.job.diffusion.auxiliary:
            return loss
        b, m = len(hints.layouts), len(hints.palettes)
        # Each row counts alike, whatever the number of its contexts.
        weights = (1 / counts.clamp(min=1) / b)[:, None].expand(shown.shape)[shown][:m]
        told = self.heads(self.features[0][:b], hints.layouts.float(), contexts[:m], hints.palettes, hints.textures, weights)
        return loss + self.job.diffusion.auxiliary * told

    @torch.no_grad()
    def validate(self, source: Source) -> float:
        """The loss on what is held out, always the same batches."""
        losses, rows = [], np.arange(32)
        for number in range(4):
            samples = source.samples(np.random.default_rng((7, number)), len(rows), 0.1, 0.5, rows)
            losses.append(self.loss(samples, rows, len(rows), torch.Generator().manual_seed(number)).item())
        return float(np.mean(losses))

    def averaged(self) -> _Averaged:
        return _Averaged(self.modules, self.average)


def make_optimizer(modules: nn.Module, heads: nn.Module, stage: DiffusionSteps) -> Muon:
    """Muon (Jordan et al. 2024) for the matrices within, AdamW for what is at the rims, for vectors and for the heads.

    At equal steps its loss was 7 % lower than AdamW's and named the palette in .89 instead of .72 of the rows."""
    rims = ("embed", "conv_in", "conv_out")
    inner = {n for n, p in modules.named_parameters() if p.ndim >= 2 and not any(rim in n for rim in rims)}
    matrices = [p for n, p in modules.named_parameters() if n in inner]
    others = [p for n, p in modules.named_parameters() if n not in inner] + list(heads.parameters())
    groups = [
        {"params": matrices, "lr": stage.matrix_learning_rate, "weight_decay": 0.01, "use_muon": True},
        {"params": others, "lr": stage.learning_rate, "betas": (0.9, 0.98), "use_muon": False},
    ]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return Muon(groups)


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


@torch.no_grad()
def encode_pool(model: NativeModel, pool: Pool) -> Encoded:
    bare = np.repeat(pool.tones[..., None], 3, 3)
    latents, layouts = encode(model, pool.targets), encode(model, bare)
    palettes = np.stack([style.lut[16::32].reshape(-1) for style in pool.styles]) * 4 - 2
    textures = torch.tensor([TEXTURES.index(style.texture) for style in pool.styles])
    return Encoded(pool, latents, layouts, torch.from_numpy(palettes), textures)


def encode(model: NativeModel, pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float16 latents (B, C, h, w); each worker does its share."""
    workers = Workers.here()
    mine = workers.share(pictures)
    parts = [torch.empty(0, *model.latent_shape, dtype=torch.float16)]  # fewer pictures than workers leave one none
    with torch.autocast("cpu", torch.bfloat16):
        parts += [model.encode_pixels(to_uint8(mine[i : i + 32])).half() for i in range(0, len(mine), 32)]
    return workers.gather(torch.cat(parts), len(pictures))
