"""What a report says about its job, and how it explains its terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.schema import SCORE_COLUMNS
from context_diffusion.outputs.report.build import rebuild
from context_diffusion.outputs.report.cards import card
from context_diffusion.outputs.report.glossary import glossary
from context_diffusion.outputs.report.job_facts import job_facts, retry_command
from context_diffusion.outputs.report.row_index import RowIndex
from context_diffusion.outputs.report.row_sample import sample_rows
from support.report_outputs import finished


def test_the_job_is_described_without_what_concerns_access(tmp_path: Path) -> None:
    output = finished(tmp_path, 6, {}, storage_options={"s3": {"endpoint_url": "http://internal"}})
    last = sample_rows(output, 6).last_image
    plan = output.read_plan()
    facts = job_facts(output, plan, {}, last)
    about = dict(facts["about"])
    assert about["model"] == plan["model"]["name"]
    assert about["revision"] == plan["model"]["revision"]
    assert about["last image"].endswith(" UTC")
    assert f"context-diffusion {plan['versions']['context-diffusion']}" in about["versions"]
    assert facts["seconds"] > -2
    assert dict(facts["settings"])["score"] == '["layout", "style"]'
    assert "internal" not in json.dumps(facts)
    index = RowIndex(output)
    assert index.last_image() == last
    index.close()


@pytest.mark.parametrize(
    ("job_file", "command"),
    [
        ("my job.yaml", "context-diffusion run 'my job.yaml' --retry-failed"),
        ("/dev/stdin", "context-diffusion run JOB --retry-failed"),
        (None, "context-diffusion run JOB --retry-failed"),
    ],
)
def test_the_command_for_failed_rows_names_the_job_file(job_file: str | None, command: str) -> None:
    assert retry_command(job_file) == command


def test_totals_stand_beside_the_last_run_in_rounded_numbers(tmp_path: Path) -> None:
    output = finished(tmp_path, 8)
    told = {"images_per_second": 0.30923, "seconds": 6123.4, "occupancy": 0.84721, "images_made": 3}
    output.storage.replace(output.summary, json.dumps(told).encode())
    rebuild(output)
    page = Path(output.report).read_text()
    last_run = page.split("Last run")[1].split("</section>")[0]
    for text in (">3<", "1.7 <small>h<", "0.31", "85 <small>%<"):
        assert text in last_run
    assert ">8<" in page.split('id="total-title"')[1].split("</section>")[0]


def test_each_score_and_error_code_is_explained() -> None:
    terms = glossary()
    assert {*SCORE_COLUMNS, *map(str, ErrorCode), "occupancy"} <= terms.keys()
    assert all(text.endswith(".") for text in terms.values())


@pytest.mark.parametrize(
    ("changes", "leads"),
    [
        ({}, True),
        ({"prompt": None}, False),
        ({"context": []}, False),
        ({"context_guidance_scale": 3.0}, False),
        ({"context_guidance_scale": 1.5}, True),
        ({"guidance_scale": None}, True),
        ({"status": "failed"}, False),
    ],
)
def test_rows_whose_prompt_goes_before_their_contexts_are_marked(
    changes: dict[str, object], leads: bool
) -> None:
    row = {
        "id": "a",
        "status": "ok",
        "prompt": "ocean",
        "context": ["a.png"],
        "guidance_scale": 2.0,
        "file_name": "images/part-00000/a-0.png",
    }
    assert card(row | changes, None, "out")["prompt_leads"] == leads


@pytest.mark.parametrize(
    ("file_name", "command"),
    [
        (
            "images/part-00000/a-0.png",
            "context-diffusion reproduce '/my out/images/part-00000/a-0.png'",
        ),
        ("webdataset/part-00000.tar/a-0.png", None),
        ("../../$(touch hacked).png", None),
        (None, None),
    ],
)
def test_an_image_that_is_a_file_has_the_command_that_reproduces_it(
    file_name: str | None, command: str | None
) -> None:
    row = {"id": "a", "status": "ok", "file_name": file_name}
    assert card(row, None, "/my out")["reproduce"] == command
