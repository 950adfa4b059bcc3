"""Runs a train or finetune job on Ray Train, whose TorchTrainer starts the workers and joins them into a
process group."""

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
    """Train with job.workers processes, on this machine or on the cluster of `address` or RAY_ADDRESS.

    All nodes must share job.output and the job's inputs. Returns the run's summary, or the `exit` and `error`
    of one that was interrupted. Raises ConfigError, ClusterError."""
    folder = Path(job.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ray_session(job.workers * job.cpu_threads, address):
        device = _device(job, int(ray.cluster_resources().get("GPU", 0)))
        trainer = TorchTrainer(
            _train,
            train_loop_config={"job": absolute(job) | {"device": device}},
            torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=job.workers,
                use_gpu=device == "cuda",
                resources_per_worker={"CPU": job.cpu_threads},
            ),
            run_config=RunConfig(name="workers", storage_path=str(folder / "ray")),
        )
        try:
            trainer.fit()
        except Exception as error:
            return _failure(error)
    return json.loads((folder / RESULT).read_text())


def _device(job: TrainingJob, gpus: int) -> str:
    """Return the device of all workers, "cuda" or "cpu". Raises ConfigError if the cluster lacks GPUs."""
    if job.device == "cuda" and gpus < job.workers:
        raise ConfigError(
            f"device: cuda: each of {job.workers} worker(s) needs a GPU, the cluster has {gpus}"
        )
    return "cuda" if job.device != "cpu" and gpus >= job.workers else "cpu"


def _train(config: dict[str, Any]) -> None:
    """Run one worker. Its summary is written to a file, since Ray Train returns metrics only with a
    checkpoint of its own."""
    from context_diffusion.training.run import run

    job = check_job(config["job"])
    assert isinstance(job, TrainingJob)
    summary = run(job)
    if summary is not None:
        (Path(job.output) / RESULT).write_text(json.dumps(summary))


def _failure(error: Exception) -> dict[str, Any]:
    """Return the exit code and message of the error that caused the others: if one worker fails, the errors
    of the others report that it is gone, with EXIT_EXTERNAL."""
    errors = getattr(error, "worker_failures", {}).values() or [error]
    return min(map(classify, errors), key=lambda failure: failure["exit"] == EXIT_EXTERNAL)
