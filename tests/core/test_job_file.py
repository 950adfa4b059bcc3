"""Job files: all errors in one go, the nearest known key, what is allowed; YAML without its traps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.cluster.supervisor import driver_input
from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import absolute, check_job, load_jobs, parse
from context_diffusion.core.model_parts import PRESETS, Parts, parts_of
from support.job_files import load_job

GOOD: dict[str, Any] = {"kind": "generate", "manifest": "m.parquet", "output": "out"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("no", "no"),
        ("on", "on"),
        ("012", 12),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2026-11-24", "2026-11-24"),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("0x1F", "0x1F"),
    ],
)
def test_yaml_scalars_are_what_one_reads(text: str, value: Any) -> None:
    assert parse(f"a: {text}")["a"] == value
    assert type(parse(f"a: {text}")["a"]) is type(value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: generate\nmanifest: a\nmanifest: b\noutput: c\n")
    with pytest.raises(ConfigError, match="duplicate key 'manifest'"):
        load_job(str(path))


def test_all_errors_come_in_one_go_each_with_what_to_do() -> None:
    bad = GOOD | {
        "modle": "bundled",
        "control": "cany",
        "rows_per_part": 0,
        "settings": {
            "num_inference_step": 5,
            "guidance_scale": "high",
            "control_guidance_start": 0.9,
            "control_guidance_end": 0.1,
        },
        "max_failed": "many",
        "storage_options": {"s3": {"secret": "x"}},
        "columns": {"image": "x"},
        "output": "https://example.com/out",
    }
    with pytest.raises(ConfigError) as caught:
        check_job(bad, "job.yaml")
    text = str(caught.value)
    for expected in (
        "modle: unknown key; did you mean 'model'?",
        "settings.num_inference_step: unknown key; did you mean 'num_inference_steps'?",
        "control: should be 'none', 'canny', 'gray', 'soft_edges', 'tile', 'depth', ",
        "output: http:// is read-only; use",
        "rows_per_part: should be greater than or equal to 1, got 0",
        'settings.guidance_scale: should be a valid number, got "high"',
        "max_failed",
        "is a secret",
        "unknown name 'image'",
    ):
        assert expected in text, text
    assert "control: should be a valid list" not in text


def test_missing_keys_and_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match="output: is missing"):
        check_job({"kind": "generate", "manifest": "m"})
    with pytest.raises(ConfigError, match="did you mean 'generate'"):
        check_job(GOOD | {"kind": "generat"})


def test_set_overrides_dotted_keys(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(GOOD))
    job = load_job(str(path), ["settings.num_inference_steps=7", "max_failed=5%", "score=[layout]"])
    assert isinstance(job, GenerateJob)
    assert (job.settings.num_inference_steps, job.max_failed, job.score) == (7, "5%", ["layout"])
    quick = load_job(str(path), ["model=sdxl", "model.few_steps=lightning"])
    assert isinstance(quick, GenerateJob)
    assert quick.model == Parts(base="sdxl", few_steps="lightning")
    with pytest.raises(ConfigError, match="key=value"):
        load_job(str(path), ["seed"])
    with pytest.raises(ConfigError, match="manifest is not a mapping"):
        load_job(str(path), ["manifest.a=1"])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\t"])
def test_what_is_no_mapping_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_job(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: [generate]", r"kind: \['generate'\] is unknown"),
        ("? {a: 1}\n: 2", "a list or mapping is no key"),
        ("kind: generate\nsettings: &again {seed: *again}", "Circular"),
        ("a: " + "[" * 3000 + "]" * 3000, "recursion"),
        ("seed: " + "1" * 5000, "digits"),
    ],
)
def test_odd_yaml_is_refused_in_a_message(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"job.yaml: .*{told}"):
        load_jobs(str(tmp_path / "job.yaml"))


def test_what_the_drivers_process_is_given_leaves_a_presets_parts_to_the_preset() -> None:
    job = check_job(GOOD | {"model": {"base": "sd15", "vae": "mine/vae", "safety_checker": None}})
    assert isinstance(job, GenerateJob)
    given = GenerateJob.model_validate(json.loads(driver_input(job, {}))["job"])
    assert given == job
    assert isinstance(given.model, Parts)
    assert parts_of(given.model) == PRESETS["sd15"].model_copy(
        update={"vae": "mine/vae", "safety_checker": None}
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": "best"}, "keep: best needs `score`"),
        ({"keep": "first", "score": ["layout"]}, "keep: should be 'all' or 'best'"),
        ({"thresholds": {"layout_score": 0.5}}, "no column 'layout_score'; it has no `score`"),
        (
            {"thresholds": {"layout_leakage": 0.5}, "score": ["layout", "style"]},
            "'layout_leakage'; its `score` has layout_score, style_score",
        ),
        (
            {"thresholds": {"layout_score": 1.5}, "score": ["layout"]},
            "thresholds.layout_score: should be less than or equal to 1",
        ),
    ],
)
def test_what_is_kept_and_flagged_needs_its_scores(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_job(GOOD | change)


TWO = """# two stages
kind: generate
manifest: m.parquet
output: out
---
kind: evaluate
images: out
output: scores
"""


def test_a_file_holds_several_jobs_as_yaml_documents_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(TWO)
    jobs = load_jobs(str(path), ["seed=7", "settings.seed=3", "judge=mine", "manifest=[a.csv,b.parquet]"])
    generate, evaluate = (job.model_dump(exclude_unset=True) for job in jobs)
    manifests = ["a.csv", "b.parquet"]  # of both kinds, the other keys of one
    assert generate == {**GOOD, "manifest": manifests, "seed": 7, "settings": {"seed": 3}}
    assert evaluate == {
        "kind": "evaluate",
        "images": "out",
        "output": "scores",
        "judge": "mine",
        "manifest": manifests,
    }
    path.write_text(json.dumps([generate, evaluate]))
    assert load_jobs(str(path)) == jobs
    path.write_text("---\n" + TWO.split("---")[0])
    assert len(load_jobs(str(path))) == 1


@pytest.mark.parametrize(
    ("change", "sets", "words"),
    [
        (("out\n---", "out\ncontrol: cany\n---"), [], ["job.yaml: job 1: ", "control: should be"]),
        (
            ("images: out", "image: out"),
            ["modle=x"],
            ["did you mean 'model'", "job 2: ", "did you mean 'images'"],
        ),
        (("output: scores", "output: ./out/"), [], ["job 2: output: ./out/ is also job 1's"]),
        (("kind: evaluate", "kind: evaluat"), [], ["job 2: kind: 'evaluat'", "did you mean 'evaluate'"]),
        (("scores\n", "scores\n---\n"), [], ["job 3: a job is a mapping", "got NoneType"]),
        (("", ""), ["output=here"], ["has 2 jobs, and each needs its own output"]),
        (("", ""), ["seed"], ["key=value"]),
    ],
)
def test_what_is_wrong_in_any_of_several_jobs_is_told_with_its_number(
    tmp_path: Path, change: tuple[str, str], sets: list[str], words: list[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(TWO.replace(*change) if change[0] else TWO)
    with pytest.raises(ConfigError) as caught:
        load_jobs(str(path), sets)
    for word in words:
        assert word in str(caught.value), caught.value


def test_a_job_for_another_working_directory_has_absolute_paths_and_the_names_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "bundled", "hyper", "fp16"):
        (tmp_path / folder).mkdir()
    values = GOOD | {
        "manifest": ["m.csv", "s3://b/m.csv"],
        "model": {
            "base": "sd15",
            "vae": "mine",
            "controlnet": "o/name",
            "few_steps": "hyper",
            "variant": "fp16",
            "loras": {"hyper": "mine/ink.safetensors"},
        },
    }
    (tmp_path / "mine" / "ink.safetensors").touch()
    told = absolute(check_job(values))
    assert told["manifest"] == [f"{tmp_path}/m.csv", "s3://b/m.csv"]
    assert told["model"] == values["model"] | {
        "vae": f"{tmp_path}/mine",
        "loras": {"hyper": f"{tmp_path}/mine/ink.safetensors"},
    }
    assert told["output"] == f"{tmp_path}/out"
    assert told.keys() == values.keys()
    tuned = absolute(
        check_job({"kind": "finetune", "data": "pictures", "output": "tuned", "model": "bundled"})
    )
    assert (tuned["data"], tuned["output"], tuned["model"]) == (
        f"{tmp_path}/pictures",
        f"{tmp_path}/tuned",
        "bundled",
    )


@given(st.integers(1, 10_000), st.integers(0, 100))
def test_the_share_of_failures_is_of_all_rows(rows: int, percent: int) -> None:
    job = GenerateJob.model_validate(GOOD | {"max_failed": f"{percent}%"})
    assert job.failures_allowed(rows) == rows * percent // 100
    assert GenerateJob.model_validate(GOOD).failures_allowed(rows) == rows
