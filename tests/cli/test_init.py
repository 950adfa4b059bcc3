"""`init`: a manifest and a commented job file from two folders, and what `run` says at its end."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from context_diffusion.cli import run_command
from context_diffusion.cli.job_template import job_text, write_job
from context_diffusion.cli.main import app
from context_diffusion.cli.run_command import _result_lines
from context_diffusion.core.errors import ConfigError, JobError, ManifestError, ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import check_job, parse
from context_diffusion.inputs.from_folders import Pairing
from support.job_files import load_job
from support.manifests import write_pictures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_pictures(tmp_path / "photos", 3)
    write_pictures(tmp_path / "paintings", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_job_can_be_run_as_it_is(folder: Path) -> None:
    summary = write_job(Pairing("photos", "paintings", "all"), "rows.parquet", "job.yaml", "sd15", "results")
    assert (summary["rows"], summary["allow"]) == (6, [])
    job = load_job("job.yaml")
    assert isinstance(job, GenerateJob)
    assert (job.manifest, job.model, job.output, job.allow) == ("rows.parquet", "sd15", "results", [])
    assert len(pq.read_table("rows.parquet")) == 6
    assert "6 rows: each query with each context" in (folder / "job.yaml").read_text()


def test_each_commented_key_is_valid_without_its_mark() -> None:
    text = job_text(Pairing("photos", "paintings", "zip"), "rows.csv", 2, "job.yaml", "bundled", "out", [])
    head, optional = text.split("# Optional keys.", 1)
    lines = optional.splitlines()[1:]
    assert len(lines) >= 8
    job = check_job(parse(head + "\n".join(re.sub("^# ", "", line) for line in lines)))
    assert isinstance(job, GenerateJob)
    named = re.findall(r"^# +(\w+):", optional, flags=re.M)
    assert {name for name in named if name != "settings"} <= {
        *job.model_fields_set,
        *job.settings.model_fields_set,
    }


def test_names_with_signs_of_yaml_stay_names(folder: Path) -> None:
    write_pictures(folder / "a: b #c" / "images", 2)
    pairing = Pairing("photos", "a: b #c/images", "random")
    (folder / "sub").mkdir()
    write_job(pairing, "sub/no.csv", "sub/my job.yml", "bundled", "yes")
    job = load_job("sub/my job.yml")
    assert isinstance(job, GenerateJob)
    assert job.output == "yes"
    assert job.allow == [f"{folder}/sub", f"{folder}/photos", f"{folder}/a: b #c/images"]
    assert "context-diffusion run 'sub/my job.yml'" in (folder / "sub/my job.yml").read_text()


def test_nothing_is_overwritten_or_left_half_done(folder: Path) -> None:
    pairing = Pairing("photos", "paintings", "all")
    (folder / "job.yaml").write_text("mine")
    with pytest.raises(JobError, match=r"--job job\.yaml exists already"):
        write_job(pairing, "rows.parquet", "job.yaml", "bundled", "out")
    assert (folder / "job.yaml").read_text() == "mine"
    assert not (folder / "rows.parquet").exists()
    with pytest.raises(JobError, match=r"ends in \.yaml or \.yml"):
        write_job(pairing, "rows.parquet", "job.txt", "bundled", "out")
    (folder / "rows.parquet").touch()
    with pytest.raises(JobError, match=r"--rows rows\.parquet exists already"):
        write_job(pairing, "rows.parquet", "new.yaml", "bundled", "out")
    (folder / "out").mkdir()
    (folder / "out/plan.json").touch()
    with pytest.raises(JobError, match="--output out holds the images of another job"):
        write_job(pairing, "more.parquet", "new.yaml", "bundled", "out")
    (folder / "out/plan.json").unlink()
    with pytest.raises(ConfigError):
        write_job(pairing, "more.parquet", "new.yaml", "", "out")
    with pytest.raises(ModelError, match="'sd16' not found: expected a folder, a hub id or one of bundled, "):
        write_job(pairing, "more.parquet", "new.yaml", "sd16", "out")
    with pytest.raises(
        ModelError, match="'owner/' not found: expected a folder, a hub id or one of bundled, "
    ):
        write_job(pairing, "more.parquet", "new.yaml", "owner/", "out")
    with pytest.raises(ManifestError, match="equal numbers"):
        write_job(Pairing("photos", "paintings", "zip"), "more.parquet", "new.yaml", "bundled", "out")
    assert not (folder / "new.yaml").exists()
    assert not (folder / "more.parquet").exists()


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ({}, "images: a b/out/images"),
        ({"output_format": "both"}, "images: a b/out/images"),
        ({"output_format": "webdataset"}, "images: a b/out/webdataset"),
        ({"image_format": "none"}, "images: a b/out/data, column image"),
    ],
)
def test_a_run_ends_with_where_its_results_are(values: dict[str, str], images: str) -> None:
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": "rows.csv", "output": "a b/out/"} | values
    )
    lines = _result_lines(job)
    assert lines == [images, "report: a b/out/report.html", "view:   context-diffusion view 'a b/out'"]


def test_without_its_packages_the_viewers_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = GenerateJob.model_validate({"kind": "generate", "manifest": "rows.csv", "output": "out"})
    assert _result_lines(job)[2].endswith("(needs: pip install 'context-diffusion[view]')")


def test_a_job_that_is_refused_says_nothing_of_failed_rows_in_its_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(run_command, "_report_failures", lambda *_: shown.append("failures"))
    monkeypatch.setattr(run_command, "_report_unknown_words", lambda *_: shown.append("words"))
    job = GenerateJob(kind="generate", manifest="rows.parquet", output="out")
    summary = {"failed": 4, "rows": 12, "unknown_words": 1, "error": "out belongs to another job"}
    run_command._report_end(job, "job.yaml", summary | {"exit": 2})
    assert shown == []
    run_command._report_end(job, "job.yaml", summary | {"exit": 4})
    assert shown == ["failures", "words"]


def test_commands_quote_a_job_files_name(folder: Path) -> None:
    done = CliRunner().invoke(app, ["init", "photos", "paintings", "--job", "my job.yaml"])
    assert done.exit_code == 0
    assert "context-diffusion run 'my job.yaml'\n" in done.stderr
    assert "context-diffusion validate 'my job.yaml' --sample" in done.stderr
