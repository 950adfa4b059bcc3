"""Everything in jobs/ says in two lines what it is and how it is run; every job file is one; several run in
turn."""

from __future__ import annotations

import ast
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from context_diffusion import nightly
from context_diffusion.cli.main import app
from context_diffusion.cluster.supervisor import supervise
from context_diffusion.core.errors import ConfigError, JobError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import load_jobs
from context_diffusion.outputs.finalize import close
from support.finished_output import make
from support.manifests import job_values, write_manifest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    str(path.relative_to(ROOT)) for ending in ("yaml", "py") for path in (ROOT / "jobs").rglob(f"*.{ending}")
)


@pytest.mark.parametrize("name", FILES)
def test_a_job_says_what_it_is_and_how_it_is_run(name: str) -> None:
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        lines = [
            line.strip() for line in (ast.get_docstring(ast.parse(text)) or "").splitlines() if line.strip()
        ]
    else:
        lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
        assert text.startswith(f"# {lines[0]}\n# {lines[1]}\nkind: "), "two lines, then the job"
    what, how = lines[:2]
    assert what[0].isupper()
    assert name in how


def test_every_job_file_is_one() -> None:
    kinds = {
        name: [job.model_dump()["kind"] for job in load_jobs(str(ROOT / name))]
        for name in FILES
        if name.endswith(".yaml")
    }
    assert kinds.pop("jobs/generate_and_evaluate.yaml") == ["generate", "evaluate"]
    assert all(len(found) == 1 for found in kinds.values())
    generate, evaluate = load_jobs(str(ROOT / "jobs" / "generate_and_evaluate.yaml"))
    assert isinstance(generate, GenerateJob)
    assert isinstance(evaluate, EvaluateJob)
    assert evaluate.images == generate.output
    [sweep] = load_jobs(str(ROOT / "jobs" / "sweep.yaml"))
    assert isinstance(sweep, GenerateJob)
    assert [len(values) for values in sweep.matrix.values()] == [3, 4]


def run(folder: Path, jobs: list[dict[str, Any]]) -> tuple[int, dict[str, Any], str]:
    """-> exit code, the JSON of stdout's last line, stderr."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = CliRunner().invoke(app, ["run", str(folder / "jobs.json")])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1]), done.stderr


def evaluations(folder: Path, *images: Path) -> list[dict[str, Any]]:
    return [
        {
            "kind": "evaluate",
            "images": str(path),
            "output": str(folder / f"scores-{number}"),
            "score": ["layout"],
        }
        for number, path in enumerate(images, 1)
    ]


def test_jobs_run_in_turn_and_the_code_is_the_worst_of_those_that_finished(tmp_path: Path) -> None:
    _, whole = make(tmp_path / "a", 4)
    _, failed = make(tmp_path / "b", 4, {1: {"query": "gone.png"}})
    close(whole)
    close(failed)
    jobs = evaluations(tmp_path, tmp_path / "b" / "out", tmp_path / "a" / "out")
    code, told, log = run(tmp_path, jobs)
    assert code == told["exit"] == 3
    assert [job["exit"] for job in told["jobs"]] == [3, 0]
    assert [job["output"] for job in told["jobs"]] == [job["output"] for job in jobs]
    assert {key: told[key] for key in ("output", "rows", "failed")} == {
        "output": jobs[1]["output"],
        "rows": 4,
        "failed": 0,
    }
    assert "job 2 of 2: evaluate" in log
    code, told, _ = run(tmp_path, jobs[:1])
    assert (code, "jobs" in told) == (3, False)


def test_the_first_job_that_does_not_finish_ends_them_with_its_code(tmp_path: Path) -> None:
    _, whole = make(tmp_path / "a", 4)
    close(whole)
    jobs = evaluations(tmp_path, tmp_path / "a" / "out", tmp_path / "nowhere", tmp_path / "a" / "out")
    code, told, log = run(tmp_path, jobs)
    assert code == told["exit"] == 2
    assert [job["exit"] for job in told["jobs"]] == [0, 2]
    assert told["error"] == told["jobs"][1]["error"]
    assert f"error: images: folder not found: {tmp_path / 'nowhere'}" in log
    assert not (tmp_path / "scores-3").exists()


def test_a_generate_job_leaves_the_signals_to_the_next_as_they_were(tmp_path: Path) -> None:
    job = GenerateJob.model_validate(job_values("nowhere.parquet", tmp_path / "made"))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    options = {"address": None, "accept_change": False, "retry_failed": False, "extend": False}
    summary = supervise(job, options)
    assert summary["exit"] == 2
    assert "nowhere.parquet" in summary["error"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_validate_looks_at_each_generate_job(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 4, {1: {"query": "gone.png"}})
    jobs = [job_values(manifest, tmp_path / name) for name in ("one", "two")]
    (tmp_path / "jobs.json").write_text(json.dumps([*jobs, *evaluations(tmp_path, tmp_path / "one")]))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "jobs.json"), "--set", "max_failed=0"])
    told = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, told["exit"], told["output"]) == (4, 4, str(tmp_path / "two"))
    assert [(job["output"], job["rows"], len(job["problems"])) for job in told["jobs"]] == [
        (str(tmp_path / name), 4, 1) for name in ("one", "two")
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(evaluations(tmp_path, tmp_path / "one")))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "jobs.json")])
    assert isinstance(done.exception, JobError)


def test_nothing_starts_where_one_of_them_is_wrong(tmp_path: Path) -> None:
    _, whole = make(tmp_path / "a", 4)
    close(whole)
    jobs = evaluations(tmp_path, tmp_path / "a" / "out", tmp_path / "a" / "out")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "jobs.json"), "--set", "2.score=[beauty]"])
    assert isinstance(done.exception, ConfigError)
    assert "job 2: " in str(done.exception)
    assert not (tmp_path / "scores-1").exists()


def test_a_night_of_two_jobs_has_its_day_in_both(tmp_path: Path) -> None:
    path = tmp_path / "night.yaml"
    path.write_text("kind: generate\noutput: out/{day}\n---\nkind: evaluate\noutput: scores/{day}\n---\n")
    both = nightly.job_of("2026-11-27", path)
    assert isinstance(both, list)
    assert [job["output"] for job in both] == ["out/2026-11-27", "scores/2026-11-27"]
    path.write_text("kind: generate\noutput: out/{day}\n")
    assert nightly.job_of("2026-11-27", path) == {"kind": "generate", "output": "out/2026-11-27"}


def test_the_nights_command_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(
        "CONTEXT_DIFFUSION_JOB", str(tmp_path / "another.yaml")
    )  # of those that are given no path
    job = tmp_path / "night.yaml"
    job.write_text("kind: generate\n")
    assert nightly.main(["run", str(job)]) == 2
    assert "set RAY_API_SERVER_ADDRESS" in capsys.readouterr().err
    assert nightly.main(["ready", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
