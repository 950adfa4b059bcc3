"""Argo Workflows: writes the CronWorkflow that validates the night's job, submits it to a Ray cluster and follows it.

    python jobs/argo/nightly.py > nightly.yaml && kubectl apply -f nightly.yaml     # needs `pip install hera`

The job file lies in the ConfigMap of infra/kuberay/common; `max_failed: 1%` in it is the threshold. Exit 3 is success,
75, 143 and 1 are tried again and resume, 2 and 4 are not.
"""

from __future__ import annotations

from hera.workflows import Container, CronWorkflow, Steps, models

IMAGE = "registry.example.com/context-diffusion:cpu"
JOB = "/etc/context-diffusion/job.yaml"
CLUSTER = "http://context-diffusion-head-svc:8265"


def step(name: str, command: str, retry: models.RetryStrategy) -> Container:
    return Container(
        name=name,
        image=IMAGE,
        command=["/bin/sh", "-c"],
        args=[command],
        env=[
            models.EnvVar(name="RAY_API_SERVER_ADDRESS", value=CLUSTER),
            models.EnvVar(
                name="RAY_AUTH_TOKEN",
                value_from=models.EnvVarSource(
                    secret_key_ref=models.SecretKeySelector(name="context-diffusion-ray-token", key="auth_token")
                ),
            ),
        ],
        volume_mounts=[models.VolumeMount(name="job", mount_path="/etc/context-diffusion", read_only=True)],
        resources=models.ResourceRequirements(requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "2Gi"}),
        retry_strategy=retry,
    )


def workflow() -> CronWorkflow:
    """The night's steps, once at two o'clock."""
    waiting = models.RetryStrategy(limit="72", backoff=models.Backoff(duration="300"))
    resuming = models.RetryStrategy(limit="5", expression="!(asInt(lastRetry.exitCode) in [2, 4])")
    with CronWorkflow(
        name="context-diffusion-nightly",
        schedules=["0 2 * * *"],
        timezone="Etc/UTC",
        concurrency_policy="Forbid",
        entrypoint="night",
        volumes=[models.Volume(name="job", config_map=models.ConfigMapVolumeSource(name="context-diffusion-job"))],
    ) as made:
        ready = step("manifest", f"context-diffusion validate {JOB}", waiting)
        run = f"context-diffusion submit {JOB} --wait; code=$?; test $code -eq 3 && exit 0; exit $code"
        images = step("images", run, resuming)
        with Steps(name="night"):
            ready(name="manifest")
            images(name="images")
    return made


if __name__ == "__main__":
    print(workflow().to_yaml())
