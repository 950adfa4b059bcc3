"""Manifests of two folders: which pictures meet, that the flow reads what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from context_diffusion.core.errors import ContextDiffusionError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.inputs.context_images import SquareCrop
from context_diffusion.inputs.from_folders import Pairing, write_manifest
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values, write_pictures

STORAGE = Storage(deadline_s=1)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """3 queries, one in a sub-folder; 6 contexts; 2 styles of 3 and 2 pictures; 2 prompts and an empty
    line."""
    write_pictures(tmp_path / "queries", 2)
    write_pictures(tmp_path / "queries" / "a", 1)
    write_pictures(tmp_path / "contexts", 6)
    write_pictures(tmp_path / "styles" / "ink", 3)
    write_pictures(tmp_path / "styles" / "oil", 2)
    (tmp_path / "queries" / "notes.txt").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("ocean\n\nforest\n")
    return tmp_path


def made(
    folder: Path, pair: Any, contexts: str = "contexts", out: str = "rows.jsonl", **more: Any
) -> list[dict[str, Any]]:
    if "prompts" in more:
        more["prompts"] = str(folder / more["prompts"])
    pairing = Pairing(str(folder / "queries"), str(folder / contexts), pair, **more)
    told = write_manifest(pairing, str(folder / out))
    rows = (
        [json.loads(line) for line in (folder / out).read_text().splitlines()]
        if out.endswith("jsonl")
        else []
    )
    assert told == {"manifest": str(folder / out), "rows": len(rows) or told["rows"], "allow": []}
    return rows


def read(folder: Path, out: str) -> list[dict[str, Any]]:
    """The manifest's rows as the flow reads and loads them."""
    job = GenerateJob.model_validate(job_values(str(folder / out), folder / f"output-{out}"))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    job = plan.job
    tables = [
        ReadShard(RowRules.of_job(job), plan.files[0], shard, plan.passed, STORAGE)()[0]
        for shard in read_shards(output, 0)
    ]
    return LoadImages(job.fit, job.control_kinds, job.limits, [str(folder)], 64, SquareCrop(64), STORAGE)(
        pa.concat_tables(tables)
    ).to_pylist()


def test_all_is_each_with_each(folders: Path) -> None:
    rows = made(folders, "all", prompts="prompts.txt")
    assert len({(row["query"], row["context"][0], row["prompt"]) for row in rows}) == len(rows) == 3 * 6 * 3
    assert rows[0] == {
        "id": "000000-picture-0",
        "query": "queries/a/picture-0.png",
        "context": ["contexts/picture-0.png"],
        "prompt": "ocean",
    }
    assert [row["prompt"] for row in rows[:3]] == ["ocean", None, "forest"]


def test_zip_goes_one_by_one(folders: Path) -> None:
    rows = made(folders, "zip", contexts_per_row=2, prompts="prompts.txt")
    assert [(row["query"][-13:-4], [name[-5] for name in row["context"]], row["prompt"]) for row in rows] == [
        ("picture-0", ["0", "1"], "ocean"),
        ("picture-0", ["2", "3"], None),
        ("picture-1", ["4", "5"], "forest"),
    ]


def test_random_draws_without_repetition_and_the_same_again(folders: Path) -> None:
    first = made(folders, "random", contexts_per_row=4, seed=7)
    assert made(folders, "random", contexts_per_row=4, seed=7, out="again.jsonl") == first
    assert made(folders, "random", contexts_per_row=4, seed=8, out="other.jsonl") != first
    assert [len(set(row["context"])) for row in first] == [4, 4, 4]
    assert [len(row["context"]) for row in made(folders, "random", out="one.jsonl")] == [1, 1, 1]


def test_a_sub_folder_is_a_style(folders: Path) -> None:
    rows = made(folders, "all", "styles")
    assert [[Path(name).parent.name for name in row["context"]] for row in rows] == [
        ["ink"] * 3,
        ["oil"] * 2,
    ] * 3
    for row in made(folders, "random", "styles", contexts_per_row=2, out="drawn.jsonl"):
        assert len({Path(name).parent for name in row["context"]}) == 1
        assert len(set(row["context"])) == 2


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_each_format_is_read_by_the_flow(folders: Path, ending: str) -> None:
    made(folders, "all", "styles", out=f"rows.{ending}", prompts="prompts.txt")
    rows = read(folders, f"rows.{ending}")
    assert [row["error_message"] for row in rows] == [None] * 18
    assert [len(row["context_images"]) for row in rows[:6]] == [3, 3, 3, 2, 2, 2]
    assert [row["prompt"] for row in rows[:3]] == ["ocean", None, "forest"]


def test_pictures_elsewhere_are_named_whole_and_must_be_allowed(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    told = write_manifest(
        Pairing(str(folders / "queries"), str(folders / "styles"), "all"), str(tmp_path / "lists" / "r.csv")
    )
    assert told["allow"] == [str(folders / "queries"), str(folders / "styles")]
    assert str(folders / "queries" / "a" / "picture-0.png") in (tmp_path / "lists" / "r.csv").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"queries": "nowhere"}, "--queries .*nowhere: the folder does not exist"),
        ({"contexts": "empty"}, r"--contexts .*empty: the folder has no images \(\.png"),
        ({"contexts": "prompts.txt"}, "the folder does not exist"),
        ({"contexts": "mixed"}, r"mixed has images \(.*\) and sub-folders \(ink\)"),
        ({"pair": "zip"}, "each; queries: 3, contexts: 6$"),
        (
            {"pair": "zip", "contexts_per_row": 3, "prompts": "prompts.txt"},
            "queries: 3, contexts: 2, prompts: 3",
        ),
        ({"contexts_per_row": 4}, "the 6 images .* cannot be divided into groups of 4"),
        ({"contexts_per_row": 7}, "has only 6"),
        ({"contexts": "styles", "contexts_per_row": 3, "pair": "random"}, "styles/oil has only 2"),
        ({"prompts": "nowhere.txt"}, "--prompts .*nowhere.txt"),
        ({"prompts": "none.txt"}, "is empty"),
        ({"out": "rows.txt"}, r"ends in one of \.parquet, \.jsonl"),
        ({"out": "prompts.jsonl"}, "exists already"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    folders: Path, more: dict[str, Any], words: str
) -> None:
    (folders / "empty").mkdir()
    (folders / "none.txt").touch()
    (folders / "prompts.jsonl").touch()
    write_pictures(folders / "mixed" / "ink", 1)
    write_pictures(folders / "mixed", 1)
    chosen = {"queries": "queries", "contexts": "contexts", "pair": "all", "out": "rows.jsonl", **more}
    for name in {"queries", "contexts", "prompts"} & chosen.keys():
        chosen[name] = str(folders / chosen[name])
    out = folders / chosen.pop("out")
    with pytest.raises(ContextDiffusionError, match=words):
        write_manifest(Pairing(**chosen), str(out))
    assert not out.exists() or out.stat().st_size == 0


def test_folders_of_a_bucket_make_a_manifest_there(s3: str, folders: Path) -> None:
    for path in (*(folders / "queries").rglob("*.png"), *(folders / "styles").rglob("*.png")):
        STORAGE.create(f"{s3}/in/{path.relative_to(folders)}", path.read_bytes())
    told = write_manifest(Pairing(f"{s3}/in/queries", f"{s3}/in/styles/", "all"), f"{s3}/in/rows.jsonl")
    assert (told["rows"], told["allow"]) == (6, [])
    first = json.loads(STORAGE.read(told["manifest"]).splitlines()[0])
    assert (first["query"], first["context"][0]) == ("queries/a/picture-0.png", "styles/ink/picture-0.png")
