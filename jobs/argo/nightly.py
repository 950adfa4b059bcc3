"""Argo Workflows: writes the CronWorkflow that waits for the night's manifest, runs the job on a Ray cluster
and checks it.

    python jobs/argo/nightly.py > nightly.yaml && kubectl apply -f nightly.yaml     # needs `pip install hera`

The job file lies in the ConfigMap of infra/kuberay/common, {day} in it is the day of the workflow. 75, 143
and 1 are tried again and resume, 2 is not; a workflow that is stopped stops the Ray job."""

from __future__ import annotations

from hera.workflows import Container, CronWorkflow, Steps, models

IMAGE = "registry.example.com/context-diffusion:cpu"
JOB = "/etc/context-diffusion/job.yaml"
DAY = "{{workflow.creationTimestamp.Y}}-{{workflow.creationTimestamp.m}}-{{workflow.creationTimestamp.d}}"
CLUSTER = "http://context-diffusion-head-svc:8265"


def step(name: str, words: list[str], retry: models.RetryStrategy) -> Container:
    return Container(
        name=name,
        image=IMAGE,
        command=["python", "-m", "context_diffusion.nightly"],
        args=[*words, "--day", DAY],
        env=[
            models.EnvVar(name="RAY_API_SERVER_ADDRESS", value=CLUSTER),
            models.EnvVar(
                name="RAY_AUTH_TOKEN",
                value_from=models.EnvVarSource(
                    secret_key_ref=models.SecretKeySelector(
                        name="context-diffusion-ray-token", key="auth_token"
                    )
                ),
            ),
        ],
        volume_mounts=[models.VolumeMount(name="job", mount_path="/etc/context-diffusion", read_only=True)],
        resources=models.ResourceRequirements(
            requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "2Gi"}
        ),
        retry_strategy=retry,
    )


def workflow() -> CronWorkflow:
    """The night's steps, once at two o'clock."""
    again = "asInt(lastRetry.exitCode) != 2"
    waiting = models.RetryStrategy(limit="72", backoff=models.Backoff(duration="300"), expression=again)
    resuming = models.RetryStrategy(limit="5", expression=again)
    with CronWorkflow(
        name="context-diffusion-nightly",
        schedules=["0 2 * * *"],
        timezone="Etc/UTC",
        concurrency_policy="Forbid",
        entrypoint="night",
        volumes=[
            models.Volume(name="job", config_map=models.ConfigMapVolumeSource(name="context-diffusion-job"))
        ],
    ) as made:
        ready = step("manifest", ["ready", JOB], waiting)
        images = step("images", ["run", JOB, "--max-failed-share", "0.01"], resuming)
        with Steps(name="night"):
            ready(name="manifest")
            images(name="images")
    return made


if __name__ == "__main__":
    print(workflow().to_yaml())
