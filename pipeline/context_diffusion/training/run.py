"""Run a train or finetune job. A train job trains, stage by stage, relief, autoencoder, diffusion model,
decoder, memory.

It resumes exactly where it stopped."""

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
    """Train by the job's kind, alone or as one of several workers; return a summary on the first of them."""
    torch.set_num_threads(job.cpu_threads)
    device = find_device(job.device)
    if isinstance(job, FinetuneJob):
        return finetune(job, device)
    assert isinstance(job, TrainJob)
    return train(job, device)


def find_device(wanted: str) -> torch.device:
    """Return the device that the job asks for; of several GPUs the process's current one. Raises ConfigError
    if there is none."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError(
            "device: cuda, but torch finds no GPU; use `auto`, which takes a GPU if there is one"
        )
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def train(job: TrainJob, device: torch.device) -> dict[str, Any] | None:
    """Train from scratch; write job.output/model (a folder that `model:` takes), metrics.jsonl and samples.

    Returns a summary on the first of several workers, None on the others."""
    torch.manual_seed(job.seed)  # for the fresh weights; all later draws have generators of their own
    folder = Path(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(job.architecture, vocabulary()).to(device)
    workers = Workers.here()
    metrics = Metrics(folder, workers.first)
    pools = Pools(job, job.architecture.image_size)
    try:
        # it is needed for drafts, from which the diffusion model starts
        train_relief(job, model, folder, metrics)
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
    """Train in this process, resuming an earlier run; return the summary. (cluster/train_workers.py: several
    workers.)"""
    summary = run(job)
    assert summary is not None
    return summary
