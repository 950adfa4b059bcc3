"""infra/ray-cluster by Ray's own checks, infra/slurm by shellcheck and by a Slurm made of three small
commands."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SBATCH = INFRA / "slurm" / "context-diffusion.sbatch"


def started(command: str) -> str:
    """The command with a process that tells HF_TOKEN in Ray's place."""
    before, _ = command.split("ray start")
    return f"{before}sh -c 'echo $HF_TOKEN'"


def home(folder: Path) -> dict[str, str]:
    """A machine's, with the file of variables that the page tells of."""
    (folder / "context-diffusion.env").write_text("HF_TOKEN=secret\n")
    return {"PATH": os.environ["PATH"], "HOME": str(folder)}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_takes_the_file(tmp_path: Path, cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "ray-cluster" / f"{cloud}.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["min_workers"] >= 1, "a job looks for GPUs when it starts"
    assert re.search("spot", str(types["gpu"]["node_config"]), re.IGNORECASE)
    assert all(
        "RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")
    )
    for kind in ("head", "worker"):
        told = subprocess.run(
            ["sh", "-c", started(config[f"{kind}_start_ray_commands"][-1])],
            env=home(tmp_path),
            text=True,
            capture_output=True,
        )
        assert told.stdout == "secret\n", told.stderr
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(config | {"max_wrokers": 3}))


@pytest.mark.slow
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), str(SBATCH)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def allocation(folder: Path, command: str) -> dict[str, str]:
    """The environment of a batch script on one node, whose srun runs what follows `--` with `command` for the
    package's."""
    tools = {
        "scontrol": "echo node-1\necho node-2\n",
        "srun": 'while [ "$1" != -- ]; do echo "srun: $1" >> calls; shift; done\nshift\nexec "$@"\n',
        "venv/bin/context-diffusion": command,
        "venv/bin/ray": "exit 99\n",
    }
    for name, text in tools.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    return (
        os.environ
        | slurm
        | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "VENV": str(folder / "venv")}
    )


@pytest.mark.parametrize(("ended", "told"), [(0, 0), (3, 0), (4, 4), (75, 75)])
def test_the_script_runs_the_job_on_all_nodes_and_tells_its_end(
    tmp_path: Path, ended: int, told: int
) -> None:
    environment = allocation(
        tmp_path, f'echo "$@" > words; test -n "$RAY_AUTH_TOKEN" && test "$HF_TOKEN" = mine && exit {ended}\n'
    )
    environment |= {"HF_TOKEN": "mine"}
    done = subprocess.run(
        [str(SBATCH), "job.yaml", "--extend"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == told, done.stderr
    assert (tmp_path / "words").read_text().split() == [
        "run",
        "job.yaml",
        "--address",
        "node-1:6379",
        "--grace",
        "60",
        "--extend",
    ]
    calls = (tmp_path / "calls").read_text()
    assert "symmetric-run" in calls
    assert re.search(r"--min-nodes\nsrun: 2\n", calls)


def test_slurms_signal_reaches_the_job_and_its_code_comes_back(tmp_path: Path) -> None:
    waits = "trap 'exit 143' TERM\ntouch begun\nwhile true; do sleep 0.1; done\n"
    environment = allocation(tmp_path, waits)
    process = subprocess.Popen([str(SBATCH), "job.yaml"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
