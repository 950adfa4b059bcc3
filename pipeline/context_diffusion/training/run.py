"""A training run by its kind; the one from nothing: relief, autoencoder, diffusion model, the decoder once more, the memory.

Resumes exactly where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.training_job import FinetuneJob, TrainingJob, TrainJob
from context_diffusion.models.native.build import build
from context_diffusion.training.autoencoder import train_autoencoder, train_decoder
from context_diffusion.training.data.encoded_pools import Generated
from context_diffusion.training.data.pools import Pools
from context_diffusion.training.data.prompts import vocabulary
from context_diffusion.training.diffusion import train_diffusion
from context_diffusion.training.finetune import finetune
from context_diffusion.training.look_memory import remember
from context_diffusion.training.loop.checkpoints import Metrics, save_model
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.texture_separation import train_relief


def run(job: TrainingJob) -> dict[str, Any] | None:
    """Trains by the job's kind, here or as one of several workers. -> a summary, from the first of them."""
    torch.set_num_threads(job.cpu_threads)
    device = find_device(job.device)
    if isinstance(job, FinetuneJob):
        return finetune(job, device)
    assert isinstance(job, TrainJob)
    return train(job, device)


def find_device(wanted: str) -> torch.device:
    """By the job's word for it; of several GPUs the process's current one. Raises ConfigError where there is none."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("device: cuda, but torch finds no GPU here; `auto` takes one where there is one")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def train(job: TrainJob, device: torch.device) -> dict[str, Any] | None:
    """Trains; leaves job.output/model (a folder that `model:` takes), metrics.jsonl and samples. -> a summary, from
    the first of several workers."""
    torch.manual_seed(job.seed)  # the fresh weights; everything later draws from generators of its own
    folder = Path(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(job.architecture, vocabulary()).to(device)
    workers = Workers.here()
    metrics, pools = Metrics(folder, workers.first), Pools(job, job.architecture.image_size)
    try:
        train_relief(job, model, folder, metrics)  # drafts, which the diffusion model begins from, are drawn with it
        train_autoencoder(job, model, pools, folder, metrics)
        summary = train_diffusion(job, model, Generated(model, pools, job.pool_steps), folder, metrics)
        train_decoder(job, model, pools, folder, metrics)
    finally:
        pools.close()
    if not workers.first:
        return None
    if steps := min(job.memory_steps, job.max_steps or job.memory_steps):
        summary["words_read"] = remember(model, job.seed, job.styles, job.pictures, steps)
    save_model(model, folder / "model")
    return {"output": str(folder), "model": str(folder / "model"), **summary}


def run_training(job: TrainingJob) -> dict[str, Any]:
    """Trains in this process, from where an earlier run stopped; returns the summary. (cluster/train_workers.py: several
    workers.)"""

    summary = run(job)
    assert summary is not None
    return summary
