"""The nightly job really run by each orchestrator, in an environment of its own without Ray, torch or this
package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from context_diffusion.ray_jobs import RayJobs
from support.clusters import TOKEN, Cluster, wait_for, write_job
from support.output_reader import read_output

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv" / "orchestrators"
DAY = "2026-11-26"  # over: an orchestrator runs a day when it has ended
NEEDS = {
    "airflow": [
        "apache-airflow-core>=3.3",
        "apache-airflow-task-sdk>=1.3",
        "apache-airflow-providers-standard",
        "pyyaml",
    ],
    "dagster": ["dagster>=1.13", "pyyaml"],
    "prefect": ["prefect>=3.9", "pyyaml"],
    "argo": ["hera[yaml]>=6"],
}
LOAD = "import runpy, sys\nfound = runpy.run_path(sys.argv[1], run_name='nightly')\n"
RUNS = {
    "airflow": (
        "airflow/context_diffusion_nightly.py",
        "import pendulum\n"
        f"run = found['context_diffusion_nightly']().test(logical_date=pendulum.parse('{DAY}'))\n"
        "sys.exit(0 if run.state == 'success' else 1)\n",
    ),
    "dagster": (
        "dagster/nightly.py",
        "import dagster as dg\n"
        "both = [found['context_diffusion_images'], found['few_rows_failed']]\n"
        f"run = dg.materialize(both, partition_key='{DAY}', raise_on_error=False)\n"
        "checks = run.get_asset_check_evaluations()\n"
        "sys.exit(0 if run.success and len(checks) == 1 and checks[0].passed else 1)\n",
    ),
    "prefect": (
        "prefect/nightly.py",
        f"state = found['context_diffusion_nightly'](day='{DAY}', return_state=True)\n"
        "sys.exit(0 if state.is_completed() else 1)\n",
    ),
}


def python_of(name: str) -> str:
    """An environment with the orchestrator, made once."""
    folder, wanted = ENVIRONMENTS / name, "\n".join(NEEDS[name])
    made = folder / "made"
    if not made.exists() or made.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *NEEDS[name]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        made.write_text(wanted)
    return str(folder / "bin" / "python")


def environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "TZ") or name.startswith("PIP_")
    }
    return kept | {
        "HOME": str(folder),
        "PYTHONPATH": str(
            ROOT / "pipeline"
        ),  # for nightly.py and ray_jobs.py: nothing else of it can be imported there
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,
        "RAY_AUTH_TOKEN": cluster.environment["RAY_AUTH_TOKEN"],
        "CONTEXT_DIFFUSION_JOB": str(folder / "nightly.yaml"),
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "jobs" / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "DAGSTER_HOME": str(folder),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # its 20 are too few on a busy machine
        "DO_NOT_TRACK": "1",
    }


def command_of(name: str, settings: dict[str, str]) -> list[str]:
    """A whole night of the orchestrator as a command, its database made."""
    python, (file, code) = python_of(name), RUNS[name]
    if name == "airflow":
        subprocess.run(
            [python, "-m", "airflow", "db", "migrate"], env=settings, check=True, capture_output=True
        )
    return [python, "-c", LOAD + code, str(ROOT / "jobs" / file)]


def write_night(folder: Path, rows: int, bad: int, **more: Any) -> Path:
    """A night's job whose first `bad` rows fail. -> its OUTPUT."""
    write_job(folder / DAY, rows, {number: {"scheduler": "magic"} for number in range(bad)}, **more)
    values = (folder / DAY / "job.yaml").read_text().replace(DAY, "{day}")
    (folder / "nightly.yaml").write_text(values.replace("{day}/model", f"{DAY}/model"))
    return folder / DAY / "out"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("bad", "passes"), [(0, True), (2, False)])
def test_a_night_by_each_orchestrator(
    name: str, bad: int, passes: bool, cluster: Cluster, tmp_path: Path
) -> None:
    out = write_night(tmp_path, 6, bad)
    settings = environment(cluster, tmp_path)
    done = subprocess.run(
        command_of(name, settings), env=settings, cwd=tmp_path, capture_output=True, text=True
    )
    log = (done.stdout + done.stderr)[-5000:]
    assert (done.returncode == 0) is passes, log
    assert len(read_output(out)) == 6
    assert (out / "_SUCCESS").exists(), "exit 3 is no failure; the threshold is"
    if not passes:
        assert "2 of 6 rows failed" in done.stdout + done.stderr, log


@pytest.mark.parametrize("name", [*RUNS, "command"])
def test_who_stops_the_night_stops_its_ray_job(name: str, cluster: Cluster, tmp_path: Path) -> None:
    """By the signal that the orchestrator's cancellation sends to a task's process, then by the kill that
    follows it."""
    out = write_night(tmp_path, 200, 0, rows_per_part=2, settings={"num_inference_steps": 50})
    settings = environment(cluster, tmp_path)
    if name == "command":
        command = [
            sys.executable,
            "-m",
            "context_diffusion.nightly",
            "run",
            str(tmp_path / "nightly.yaml"),
            "--day",
            DAY,
        ]
    else:
        command = command_of(name, settings)
    jobs = RayJobs(cluster.dashboard, TOKEN)
    with (tmp_path / "log").open("w") as log:
        night = subprocess.Popen(command, env=settings, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: list(out.glob("data/*")) or night.poll() is not None)
        [job] = [job for job in jobs.list("out-") if job["status"] == "RUNNING"]
        night.send_signal(signal.SIGINT if name == "dagster" else signal.SIGTERM)
        wait_for(lambda: (jobs.get(job["submission_id"]) or {}).get("status") == "STOPPED", 60)
    finally:
        night.kill()
        night.wait()
        print((tmp_path / "log").read_text()[-5000:])
    assert not (out / "_SUCCESS").exists()
    assert list(out.glob("data/*")), "what was made is kept"


def test_argos_steps_are_commands_that_work(cluster: Cluster, tmp_path: Path) -> None:
    made = subprocess.run(
        [python_of("argo"), str(ROOT / "jobs" / "argo" / "nightly.py")],
        check=True,
        capture_output=True,
        text=True,
    )
    workflow = yaml.safe_load(made.stdout)
    assert (workflow["kind"], workflow["apiVersion"]) == ("CronWorkflow", "argoproj.io/v1alpha1")
    templates = {template["name"]: template for template in workflow["spec"]["workflowSpec"]["templates"]}
    assert [step[0]["template"] for step in templates["night"]["steps"]] == ["manifest", "images"]
    out = write_night(tmp_path, 6, 2)
    settings = environment(cluster, tmp_path)
    del settings["CONTEXT_DIFFUSION_JOB"]
    filled = {
        "/etc/context-diffusion/job.yaml": str(tmp_path / "nightly.yaml"),
        argos_day(templates): DAY,
        "python": sys.executable,
    }

    def call(name: str) -> subprocess.CompletedProcess[str]:
        container = templates[name]["container"]
        command = [filled.get(word, word) for word in (*container["command"], *container["args"])]
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    ready = call("manifest")
    assert (ready.returncode, json.loads(ready.stdout)["rows"]) == (0, 6), ready.stderr
    many = call("images")
    assert (many.returncode, "2 of 6 rows failed, 33.3%; at most 1.0% are allowed" in many.stderr) == (
        2,
        True,
    ), many.stderr
    filled["0.01"] = "0.4"
    done = call("images")
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    assert len(read_output(out)) == 6
    filled[argos_day(templates)] = "1999-01-01"
    none = call("manifest")
    assert (none.returncode, "1999-01-01" in none.stderr) == (75, True), none.stderr


def argos_day(templates: dict[str, Any]) -> str:
    return next(
        word
        for word in templates["images"]["container"]["args"]
        if word.startswith("{{workflow.creationTimestamp")
    )
