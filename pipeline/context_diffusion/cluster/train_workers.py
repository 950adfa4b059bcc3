"""A train or finetune job on Ray Train: its TorchTrainer starts the workers and joins them into a process group.

At Ray's edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from context_diffusion.cluster.ray_session import ray_session
from context_diffusion.core.errors import EXIT_EXTERNAL, ConfigError, classify
from context_diffusion.core.job_file import absolute, check_job
from context_diffusion.core.training_job import TrainingJob

RESULT = "result.json"


def train_on_ray(job: TrainingJob, address: str | None = None) -> dict[str, Any]:
    """Trains with job.workers processes, here or on the cluster that `address` or RAY_ADDRESS names; all of them must
    see job.output and what the job reads. -> the summary of the run, or the `exit` and `error` of one that broke off."""
    folder = Path(job.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ray_session(job.workers * job.cpu_threads, address):
        device = _device(job, int(ray.cluster_resources().get("GPU", 0)))
        trainer = TorchTrainer(
            _train,
            train_loop_config={"job": absolute(job) | {"device": device}},
            torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=job.workers, use_gpu=device == "cuda", resources_per_worker={"CPU": job.cpu_threads}
            ),
            run_config=RunConfig(name="workers", storage_path=str(folder / "ray")),
        )
        try:
            trainer.fit()
        except Exception as error:
            return _told(error)
    return json.loads((folder / RESULT).read_text())


def _device(job: TrainingJob, gpus: int) -> str:
    """All workers are on one kind of device. Raises ConfigError where there are fewer GPUs than are asked for."""
    if job.device == "cuda" and gpus < job.workers:
        raise ConfigError(f"device: cuda: each of {job.workers} worker(s) needs a GPU, the cluster has {gpus}")
    return "cuda" if job.device != "cpu" and gpus >= job.workers else "cpu"


def _train(config: dict[str, Any]) -> None:
    """One worker. Its summary goes to a file: Ray Train brings back metrics only with a checkpoint of its own."""
    from context_diffusion.training.run import run

    job = check_job(config["job"])
    assert isinstance(job, TrainingJob)
    summary = run(job)
    if summary is not None:
        (Path(job.output) / RESULT).write_text(json.dumps(summary))


def _told(error: Exception) -> dict[str, Any]:
    """Exit code and message. Ray brings the errors of all workers: where one failed, the others' say that it is gone."""
    failures = getattr(error, "worker_failures", {}).values() or [error]
    return min(map(classify, failures), key=lambda told: told["exit"] == EXIT_EXTERNAL)
