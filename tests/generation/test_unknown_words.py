"""Words of prompts that have no effect, from the model to a job's rows, its summary, its report and its
commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from context_diffusion import ContextDiffusion
from context_diffusion.cli import main, run_command
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.validate import validate_job
from context_diffusion.models.resolution.resolve import ResolvedModel, find_model
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.report.build import rebuild
from context_diffusion.outputs.status import progress_of
from context_diffusion.storage.parquet_files import to_parquet
from support.finished_output import make
from support.manifests import job_values, write_manifest
from support.report_outputs import data_of

PROMPTS: dict[int, dict[str, Any]] = {
    1: {"prompt": "a yellow dragon"},
    2: {"prompt": "a castle and a dragon"},
    3: {"prompt": "striped \N{CAT} <b>knights</b>"},
    4: {"prompt": ""},
}
WORDS = [[], ["dragon"], ["castle", "dragon"], ["b", "knights"], [], []]


class Bundled:
    """The bundled model itself, as an engine of a flow."""

    def __init__(self) -> None:
        self.model = ContextDiffusion.from_pretrained("bundled", "cpu")

    def generate(self, requests: list[Request]) -> list[Result | Failure]:
        outcomes = {request.id: outcome for request, outcome in self.model.generate(requests)}
        return [outcomes[request.id] for request in requests]


def test_a_job_of_the_bundled_model_tells_the_words_without_an_effect(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, output = make(tmp_path, 6, PROMPTS, engine=Bundled())
    rows = [row for _, part in output.read_parts() for row in part.to_pylist()]
    assert [row["unknown_words"] for row in rows] == WORDS
    assert output.count().unknown_words == 3
    assert output.unknown_words(2) == ["dragon", "castle"]
    assert output.unknown_words(9) == ["dragon", "castle", "b", "knights"]

    summary = rebuild(output)
    assert summary["unknown_words"] == 3
    page = Path(output.report).read_text()
    assert "3 rows have words in the prompt that the model does not know" in page
    assert "dragon, castle, b, knights" in page
    assert [row["unknown_words"] for row in data_of(page)["rows"]] == WORDS
    assert "  rows with unknown words: 3" in progress_of(output).lines

    run_command._report_end(job, "job.yaml", summary)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "does not know" in line] == [
        "3 rows have words in the prompt that the model does not know, such as: dragon, castle, b, knights"
    ]


def test_a_model_that_reads_any_word_has_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job, output = make(tmp_path, 6, PROMPTS)  # the fake engine leaves the words out, as Stable Diffusion does
    assert all(row["unknown_words"] is None for _, part in output.read_parts() for row in part.to_pylist())
    assert output.unknown_words(9) == []
    summary = rebuild(output)
    run_command._report_end(job, "job.yaml", summary)
    assert "words in the prompt" not in Path(output.report).read_text() + capfd.readouterr().err


def test_an_output_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    _, output = make(tmp_path, 6)
    for shard, part in list(output.read_parts()):
        output.storage.replace(output.part(shard), to_parquet(part.drop_columns(["unknown_words"])))
    assert output.count().unknown_words == 0
    assert output.unknown_words(9) == []
    assert rebuild(output)["rows"] == 6


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_validate_counts_the_words_of_all_rows(
    tmp_path: Path, column: str, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "in" / "rows.jsonl"
    write_manifest(tmp_path / "in", 6)
    prompts = [PROMPTS.get(number, {}).get("prompt") for number in range(6)]
    lines = [
        {"id": str(number), "query": "picture-0.png", "context": ["picture-1.png"], column: prompt}
        for number, prompt in enumerate(prompts)
    ]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    values = job_values(str(manifest), tmp_path / "out", model="bundled")
    values |= {"columns": {"prompt": column}} if column != "prompt" else {}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["context-diffusion", "validate", str(file), "--sample", "1"])
        assert main._run() == 0
    out, err = capfd.readouterr()
    summary = json.loads(out)
    assert summary["unknown_words"] == 3
    assert summary["rows_by_unknown_word"] == {"dragon": 2, "castle": 1, "b": 1, "knights": 1}
    line = "3 rows have words in the prompt that the model does not know, such as: dragon, castle, b, knights"
    assert f"warning: {line}" in " ".join(err.split())


def test_validate_says_nothing_of_words_to_a_model_that_reads_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_folder(model: str, commits: None) -> ResolvedModel:
        return replace(find_model(model), folder=None)

    monkeypatch.setattr("context_diffusion.generation.plan.find_model", without_folder)
    manifest = write_manifest(tmp_path / "in", 6, PROMPTS)
    job = GenerateJob.model_validate(job_values(manifest, tmp_path / "out", model="bundled"))
    assert validate_job(job, 0)["unknown_words"] is None


def test_an_image_folder_has_the_words_beside_its_images(tmp_path: Path) -> None:
    _, output = make(tmp_path, 6, PROMPTS, engine=Bundled())
    close(output)
    folder = pq.read_table(next(iter(sorted((tmp_path / "out" / "images").rglob("metadata.parquet")))))
    assert folder["unknown_words"].to_pylist()[1] == ["dragon"]
