"""infra/kuberay against the schemas that the API server would hold it to, unknown fields refused; and the
rules beyond them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from context_diffusion.core.model_parts import PRESETS
from support.job_files import load_job

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
PAGE = (ROOT / "infra" / "README.md").read_text()
SCHEMAS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay-crds"))
KINDS = {
    "RayJob": "batch/rayjob.yaml",
    "RayCronJob": "nightly/raycronjob.yaml",
    "RayCluster": "shared/raycluster.yaml",
}


def load(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERAY / KINDS[kind]).read_text())
    return found


def job_of(kind: str) -> dict[str, Any]:
    spec = load(kind)["spec"]
    found: dict[str, Any] = spec["jobTemplate"] if kind == "RayCronJob" else spec
    return found


def cluster_of(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = load(kind)["spec"] if kind == "RayCluster" else job_of(kind)["rayClusterSpec"]
    return found


def pods(kind: str) -> Iterator[dict[str, Any]]:
    """The specs of all pods."""
    cluster = cluster_of(kind)
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
    if kind != "RayCluster":
        yield job_of(kind)["submitterPodTemplate"]["spec"]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown fields, as the API server's strict validation
    does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    elif isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def validator(kind: str) -> jsonschema.Draft7Validator:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.json"
    if not path.exists():
        pytest.skip(
            f"no {path}: KUBERAY_CRDS names a folder with the CRDs of ray-project/kuberay "
            "(helm-chart/kuberay-operator/crds)"
        )
    versions = json.loads(path.read_text())["spec"]["versions"]
    schema = next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")
    made = strict(schema)
    made["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifests_are_valid_and_a_typo_would_not_be(kind: str) -> None:
    checked, document = validator(kind), load(kind)
    assert [f"{list(error.path)}: {error.message}" for error in checked.iter_errors(document)] == []
    cluster = (
        document["spec"]
        if kind == "RayCluster"
        else document["spec"].get("jobTemplate", document["spec"])["rayClusterSpec"]
    )
    cluster["workerGroupSpecs"][0]["maxReplica"] = 3
    assert "maxReplica" in next(checked.iter_errors(document)).message


def test_the_three_clusters_are_one_and_the_two_jobs_too() -> None:
    assert cluster_of("RayJob") == cluster_of("RayCronJob") == cluster_of("RayCluster")
    assert job_of("RayJob") == job_of("RayCronJob")


@pytest.mark.parametrize("kind", ["RayJob", "RayCronJob"])
def test_what_the_schema_cannot_say_of_a_job(kind: str) -> None:
    job = job_of(kind)
    assert job["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished and Kueue need it"
    assert job["activeDeadlineSeconds"] > job["ttlSecondsAfterFinished"] > 0
    assert job["backoffLimit"] > 0, "a retry resumes"
    wait = int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    grace = int(re.search(r"--grace (\d+)", job["entrypoint"])[1])  # type: ignore[index]
    assert grace < wait < min(pod.get("terminationGracePeriodSeconds", 999) for pod in pods(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_pods_are_locked_down_and_say_what_they_need(kind: str) -> None:
    for pod in pods(kind):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            context, resources = container["securityContext"], container["resources"]
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= resources["requests"].keys()
            assert (
                resources["limits"]["memory"] == resources["requests"]["memory"]
                or "submitter" in container["name"]
            )
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, "Ray writes there"
            assert not [
                one for one in container.get("env", []) if re.search("TOKEN|SECRET|KEY", one["name"])
            ], "by reference"


@pytest.mark.parametrize("kind", KINDS)
def test_the_cluster_is_of_this_ray_with_tokens_and_scales(kind: str) -> None:
    cluster = cluster_of(kind)
    assert cluster["rayVersion"].rsplit(".", 1)[0] == version("ray").rsplit(".", 1)[0]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "context-diffusion-ray-token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpu, cpu = cluster["workerGroupSpecs"]
    [container] = gpu["template"]["spec"]["containers"]
    assert (
        container["resources"]["requests"]["nvidia.com/gpu"]
        == container["resources"]["limits"]["nvidia.com/gpu"]
    )
    for group in (gpu, cpu):
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kustomizations_name_what_is_there() -> None:
    for path in KUBERAY.glob("*/kustomization.yaml"):
        said = yaml.safe_load(path.read_text())
        for name in said["resources"]:
            assert (path.parent / name).exists(), f"{path}: {name}"
        for generator in said.get("configMapGenerator", []):
            assert all((path.parent / name).exists() for name in generator["files"])


def secrets() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((KUBERAY / "secrets.example.yaml").read_text())
    return {one["metadata"]["name"]: one for one in documents}


def accounts() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((KUBERAY / "common" / "access.yaml").read_text())
    return {one["metadata"]["name"]: one for one in documents if one["kind"] == "ServiceAccount"}


def secrets_used(kind: str) -> set[str]:
    """All that the pods, their account and the cluster name."""
    used = {cluster_of(kind)["authOptions"]["secretName"]}
    for pod in pods(kind):
        account = accounts().get(pod.get("serviceAccountName", ""), {})
        used |= {
            one["name"] for one in (*pod.get("imagePullSecrets", []), *account.get("imagePullSecrets", []))
        }
        used |= {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        for container in pod["containers"]:
            used |= {source["secretRef"]["name"] for source in container.get("envFrom", [])}
            told = [variable["valueFrom"] for variable in container.get("env", []) if "valueFrom" in variable]
            used |= {one["secretKeyRef"]["name"] for one in told}
    return used


@pytest.mark.parametrize("kind", KINDS)
def test_pods_example_and_page_name_the_same_secrets(kind: str) -> None:
    assert secrets_used(kind) == secrets().keys()
    assert {*re.findall(r"^\| `(context-diffusion-[a-z0-9-]+)` \|", PAGE, re.MULTILINE)} == secrets().keys()
    for secret in secrets().values():
        keys = {key for key in secret["stringData"] if key.isupper()}
        assert all(key in PAGE for key in keys), secret["metadata"]["name"]
        assert "CHANGE-ME" in str(secret["stringData"]), "an example holds no secret"


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_that_reads_or_makes_has_the_secrets_and_starts_without_them(kind: str) -> None:
    [*nodes] = (pod for pod in pods(kind) if pod.get("serviceAccountName"))
    assert len(nodes) == 3, "the head, GPU workers, CPU workers"
    key_file = secrets()["context-diffusion-gcs"]["stringData"]["path"]
    for pod in nodes:
        assert accounts()[pod["serviceAccountName"]]["imagePullSecrets"]
        [container] = pod["containers"]
        sources = {one["secretRef"]["name"]: one["secretRef"]["optional"] for one in container["envFrom"]}
        assert sources == dict.fromkeys(
            ("context-diffusion-storage", "context-diffusion-azure", "context-diffusion-hugging-face"), True
        )
        [told] = [
            one["valueFrom"]["secretKeyRef"]
            for one in container["env"]
            if one["name"] == "GOOGLE_APPLICATION_CREDENTIALS"
        ]
        assert (told["key"], told["optional"]) == ("path", True)
        [volume] = [one["secret"] for one in pod["volumes"] if "secret" in one]
        assert volume["optional"]
        [place] = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "gcs"]
        assert key_file == f"{place}/{volume['items'][0]['path']}"
    for pod in pods(kind):
        assert pod.get("serviceAccountName") or pod["imagePullSecrets"]


def test_the_memory_that_the_page_names_is_what_its_rule_gives_and_the_pods_ask_for() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) M \| (\d+) Gi \| (\d+) Gi \|", PAGE, re.MULTILINE)
    table = {model: tuple(int(value.replace(",", "")) for value in values) for model, *values in rows}
    assert table.keys() == {"bundled", *PRESETS}

    def rule(millions: int, width: int, cpus: int) -> int:
        """In GiB: Ray, the engine's process, weights, loading workers, beside an object store of 30 %; in
        steps of 4."""
        weights = millions * 1e6 * width / 2**30
        return math.ceil((1 + 3 + weights + 0.7 * cpus) / 0.7 / 4) * 4

    for millions, on_gpu, on_cpu in table.values():
        assert (on_gpu, on_cpu) == (rule(millions, 2, 4), rule(millions, 4, 8))
    model = str(yaml.safe_load((KUBERAY / "common" / "job.yaml").read_text())["model"])
    for kind in KINDS:
        gpu = next(group for group in cluster_of(kind)["workerGroupSpecs"] if group["groupName"] == "gpu")
        [container] = gpu["template"]["spec"]["containers"]
        assert container["resources"]["requests"]["cpu"] == "4"
        assert container["resources"]["requests"]["memory"] == f"{table[model][1]}Gi"


def test_the_job_is_a_job() -> None:
    load_job(str(KUBERAY / "common" / "job.yaml"))


@pytest.mark.slow
def test_core_kinds_are_kubernetes_own() -> None:
    import kubernetes_validate

    checked = 0
    for path in [*KUBERAY.glob("common/*.yaml"), KUBERAY / "secrets.example.yaml"]:
        for document in yaml.safe_load_all(path.read_text()):
            if "apiVersion" in document and "kustomize" not in document["apiVersion"]:
                kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
                checked += 1
    for pod in pods("RayJob"):
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert checked >= 6
