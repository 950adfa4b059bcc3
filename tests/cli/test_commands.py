"""The command line as a person meets it: help, completion, colours, the commands that need no Ray and no
model."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement

from context_diffusion.cli.doctor import cluster, readable, weights, writable
from context_diffusion.cli.machine_checks import extras, machine_checks, problems_of
from context_diffusion.cli.main import app
from context_diffusion.core.model_parts import PRESETS
from context_diffusion.models.resolution.hub import split
from context_diffusion.storage.filesystem import Storage
from support.http_server import serving
from support.hub_server import hub_of
from support.manifests import job_values, write_manifest, write_pictures
from support.ports import free_port
from support.processes import COMMAND, ENVIRONMENT, PATIENCE_S

STORAGE = Storage(deadline_s=1)
UNDETECTED = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # typer's own way to name the shell
NAMES = {*typer.main.get_command(app).commands}  # type: ignore[attr-defined]


def call(*arguments: str, **more: str) -> tuple[int, str, str]:
    """-> exit code, stdout, stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT | more, timeout=PATIENCE_S
    )
    return done.returncode, done.stdout, done.stderr


def test_each_command_has_help_with_an_example() -> None:
    assert {"run", "validate", "manifest", "doctor", "preview", "reproduce"} <= NAMES
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        text = " ".join(command.help.split())
        assert f"Example: context-diffusion {name} " in text
        options = set(re.findall(r"(?<= )--[a-z-]+", text))
        assert options <= {option for parameter in command.params for option in parameter.opts}, name


def test_the_module_is_the_command_and_its_help_needs_no_torch() -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in NAMES)
    heavy = (
        "import sys, context_diffusion.cli.main; print([m for m in ('torch', 'ray', 'diffusers') if m "
        "in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_what_preview_needs_is_shown_as_needed() -> None:
    _, out, _ = call("preview", "--help", COLUMNS="140")
    assert re.search(r"--grid .*\[required\]", out)
    assert re.search(r"--out .*\[required\]", out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_completes(shell: str) -> None:
    code, script, _ = call("--show-completion", shell, **UNDETECTED)
    assert code == 0
    assert f"complete_{shell}" in script
    code, _, _ = call("--show-completion", "no-such-shell", **UNDETECTED)
    assert code == 2


def test_a_shell_is_told_the_commands_that_begin_so() -> None:
    words = {
        "_CONTEXT_DIFFUSION_COMPLETE": "complete_bash",
        "COMP_WORDS": "context-diffusion re",
        "COMP_CWORD": "1",
    }
    installed = Path(sys.executable).with_name("context-diffusion")
    done = subprocess.run([installed], capture_output=True, text=True, env=ENVIRONMENT | words)
    assert (done.returncode, set(done.stdout.split())) == (0, {"report", "reproduce"})


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_has_colours_unless_it_wants_none(no_color: str) -> None:
    own, terminal = pty.openpty()
    variables = {**ENVIRONMENT, "TERM": "xterm-256color", "NO_COLOR": no_color}
    process = subprocess.Popen([*COMMAND, "run", "--help"], stdout=terminal, stderr=terminal, env=variables)
    os.close(terminal)
    text = b""
    while True:
        try:
            more = os.read(own, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not more:
            break
        text += more
    assert process.wait() == 0
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]m", text)) == (not no_color)


def test_stdout_holds_the_result_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path / "queries", 2)
    write_pictures(tmp_path / "contexts", 2)
    told = [
        "--queries",
        f"{tmp_path}/queries",
        "--contexts",
        f"{tmp_path}/contexts",
        "--out",
        f"{tmp_path}/rows.csv",
    ]
    code, out, err = call("manifest", *told, "--pair", "zip")
    assert (code, json.loads(out)) == (
        0,
        {"manifest": f"{tmp_path}/rows.csv", "rows": 2, "allow": [], "exit": 0},
    )
    assert err == f"2 rows: {tmp_path}/rows.csv\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["manifest", "--queries", ".", "--contexts", ".", "--pair", "each", "--out", "x.csv"],
            "'--pair': 'each' is not one of 'all', 'zip'",
        ),
        (["manifest", "--queries", ".", "--pair", "all", "--out", "x.csv"], "Missing option '--contexts'"),
        (
            ["manifest", "--queries", "/nowhere", "--contexts", ".", "--pair", "all", "--out", "x.csv"],
            "the folder does not exist",
        ),
        (
            ["preview", "jobs/demo.yaml", "--grid", "guidance_scale=1", "--out", "grid.jpg"],
            "--out grid.jpg: the contact sheet is a PNG",
        ),
        (
            ["preview", "jobs/demo.yaml", "--grid", "guidance=1", "--out", "grid.png"],
            "did you mean 'guidance_scale'?",
        ),
        (
            ["preview", "jobs/demo.yaml", "--grid", "num_images=1,2", "--out", "grid.png"],
            "not a setting that a grid can vary",
        ),
        (["preview", "jobs/demo.yaml", "--out", "grid.png"], "Missing option '--grid'"),
        (
            ["preview", "nowhere.yaml", "--grid", "seed=1", "--out", "grid.png"],
            "nowhere.yaml: cannot read the job file",
        ),
        (
            ["preview", "jobs/demo.yaml", "--grid", "seed=1", "seed=2", "--out", "g.png"],
            "seed is given twice",
        ),
        (["preview", "jobs/demo.yaml", "--grid", "seed=[1", "--out", "g.png"], "the values are not YAML"),
        (
            ["preview", "jobs/train.yaml", "--grid", "seed=1", "--out", "g.png"],
            "takes a job of kind generate",
        ),
        (["reproduce", "nowhere.png"], "nowhere.png does not exist"),
        (["reproduce", "README.md"], "not one of JPEG, PNG"),
        (["reproduce", "jobs/demo.png"], "the image has no metadata of its generation"),
        (["reproduce", "jobs/demo.png", "--output", "jobs/demo.gif"], "ends in .png, .webp"),
        (["reproduce", "jobs/demo.png", "--output", "jobs/demo.png"], "exists already"),
        (
            ["validate", "jobs/demo.yaml", "--pictures", "sheet"],
            "--pictures sheet: the contact sheet is a PNG",
        ),
        (
            ["submit", "jobs/demo.yaml", "--address", "http://127.0.0.1:1", "--wheel", "x.whl"],
            "--wheel x.whl: file not found",
        ),
        (["doctor", "--nonsense"], "No such option: --nonsense"),
    ],
)
def test_wrong_words_end_with_2_and_say_why(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from context_diffusion.cli import main

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["context-diffusion", *arguments])
        patched.chdir(Path(__file__).parents[2])
        assert main._run() == 2
    out, err = capfd.readouterr()
    assert words in err
    assert len(out.splitlines()) <= 1


def test_doctor_looks_at_all_and_ends_with_2_where_something_is_broken(tmp_path: Path) -> None:
    code, out, err = call("doctor", str(tmp_path), "--output", str(tmp_path / "new" / "out"), RAY_ADDRESS="")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (code, [check["told"] for check in checks.values() if not check["ok"]]) == (0, [])
    assert {
        "packages",
        "extras",
        "devices",
        "memory",
        "disk",
        "sockets",
        "storage",
        "output",
        "cluster",
        "model",
    } == set(checks)
    assert checks["packages"]["versions"]["torch"]
    assert checks["memory"]["gib"] >= checks["memory"]["free_gib"] > 0
    assert "to generate content use flux2-klein, sdxl or sd15" in checks["model"]["told"]
    assert not (tmp_path / "new").exists()
    assert len(err.splitlines()) == len(checks)
    code, out, err = call(
        "doctor",
        str(tmp_path / "gone"),
        "--model",
        "no-such-model",
        "--address",
        f"http://127.0.0.1:{free_port()}",
    )
    broken = [check["name"] for check in json.loads(out)["checks"] if not check["ok"]]
    assert (code, json.loads(out)["exit"], broken) == (2, 2, ["storage", "cluster", "model"])
    assert err.count("BROKEN") == 3


def test_doctor_names_a_temporary_folder_that_is_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    code, out, _ = call("doctor", RAY_ADDRESS="", TMPDIR=str(long))
    broken = [check["told"] for check in json.loads(out)["checks"] if not check["ok"]]
    assert (code, len(broken)) == (2, 1)
    assert "set RAY_TMPDIR to a short path" in broken[0]
    assert call("doctor", RAY_ADDRESS="", TMPDIR=str(long), RAY_TMPDIR="/tmp")[0] == 0


def test_doctor_says_what_forbids_the_download_of_weights(tmp_path: Path) -> None:
    """As `validate` and `run` would find, which cannot begin then."""
    away = {
        "HF_HUB_CACHE": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "HF_HUB_OFFLINE": "0",
    }
    code, out, _ = call("doctor", "--model", "sd15", RAY_ADDRESS="", **away)
    [check] = [check for check in json.loads(out)["checks"] if not check["ok"]]
    assert (code, check["name"]) == (2, "model")
    assert f"the hub at {away['HF_ENDPOINT']} cannot be reached: ConnectError" in check["told"]
    with hub_of(tmp_path / "hub") as (endpoint, _):  # it has none of them
        code, out, _ = call("doctor", "--model", "sd15", RAY_ADDRESS="", **away | {"HF_ENDPOINT": endpoint})
        assert code == 2
        assert "needs HF_TOKEN" in out
        for part in PRESETS["sd15"].all:
            path = tmp_path / "hub" / split(part)[0] / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        code, out, _ = call("doctor", "--model", "sd15", RAY_ADDRESS="", **away | {"HF_ENDPOINT": endpoint})
        assert code == 0, out


def test_a_model_whose_licence_is_not_accepted_is_refused_before_anything_starts(tmp_path: Path) -> None:
    base = PRESETS["flux2-klein-base"].base
    index = tmp_path / "hub" / base / "model_index.json"
    index.parent.mkdir(parents=True)
    index.write_text('{"_class_name": "Flux2KleinPipeline"}')
    values = job_values(write_manifest(tmp_path / "in", 2), tmp_path / "out", model="flux2-klein-base")
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    with hub_of(tmp_path / "hub", gated=base) as (endpoint, _):
        own = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        code, _, told = call("validate", str(tmp_path / "job.yaml"), **own)
    assert code == 2
    assert f"{base} is gated: accept its licence at {endpoint}/{base}, then set HF_TOKEN" in told


def test_a_package_that_is_too_old_or_missing_is_named() -> None:
    assert problems_of(Requirement("pillow>=1")) == []
    assert problems_of(Requirement("pillow>=999"))[0].startswith("pillow>=999 is required, ")
    assert problems_of(Requirement("no-such-package")) == [
        "no-such-package is required, it is not installed: pip install 'no-such-package'"
    ]
    assert all(check.ok for check in machine_checks())
    assert not {"dev", "full"} & set(extras().values["missing"])


def test_storage_is_tried_as_a_run_uses_it(s3: str, tmp_path: Path) -> None:
    STORAGE.create(f"{s3}/rows/a.jsonl", b"{}\n")
    assert readable(f"{s3}/rows", STORAGE).message == f"{s3}/rows: 1 entries"
    assert readable(f"{s3}/rows/a.jsonl", STORAGE).ok
    assert not readable(f"{s3}/rows/b.jsonl", STORAGE).ok
    assert not readable("gs://bucket/rows", STORAGE).ok
    assert "context-diffusion[gcs]" in readable("gs://bucket/rows", STORAGE).message
    assert writable(f"{s3}/out", STORAGE).ok
    assert not STORAGE.exists(f"{s3}/out")
    (tmp_path / "file").touch()
    assert "cannot be written" in writable(str(tmp_path / "file"), STORAGE).message
    assert not writable("s3://no-such-bucket/out", STORAGE).ok


def test_the_cluster_is_asked_at_its_dashboard_or_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert cluster(None).ok
    with serving(lambda *_: (200, {}, b'[{"submission_id": "a"}]')) as dashboard:
        assert cluster(dashboard).message == f"{dashboard} answers, 1 jobs"
        monkeypatch.setenv("RAY_ADDRESS", dashboard.removeprefix("http://"))
        assert cluster(None).message == f"{dashboard.removeprefix('http://')} is open"
    assert not cluster(None).ok


def test_weights_are_here_or_kept_or_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights("bundled").values["cached"]
    assert not weights("./nowhere").ok
    assert not weights("sd15").values["cached"]
    assert not weights("somebody/model").ok
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / "0a1b" / "unet"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert weights("somebody/model").values["cached"]


def test_a_file_of_several_jobs_lists_those_that_ran_even_if_the_first_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from context_diffusion.cli import run_command

    ended = {"output": "x", "exit": 75, "error": "the store is away"}
    monkeypatch.setattr(run_command, "_run_job", lambda *_: ended)
    jobs = [{"kind": "generate", "manifest": "rows.csv", "output": str(tmp_path / name)} for name in "ab"]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    with pytest.raises(typer.Exit) as exit_:
        run_command.run(str(tmp_path / "jobs.json"))
    assert exit_.value.exit_code == 75
    assert json.loads(capsys.readouterr().out)["jobs"] == [ended]
