"""Values that nobody expected: each is what it means, or its own row's failure, and never ends the rest of a
job."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

import context_diffusion
from context_diffusion.core.errors import ErrorCode, ManifestError, OutputConflictError, RowError, classify
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Limits
from context_diffusion.core.settings import Settings
from context_diffusion.core.uris import normal
from context_diffusion.generation.plan import Plan, open_plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.generation.validate import validate_job
from context_diffusion.inputs.decode import decode_image
from context_diffusion.inputs.from_folders import Pairing, write_manifest
from context_diffusion.inputs.manifest_files import expand, open_file, rows_of
from context_diffusion.inputs.manifest_scan import column_warnings
from context_diffusion.inputs.rows import RowRules, row_id
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.finished_output import make
from support.manifests import job_values
from support.manifests import write_manifest as make_manifest

STORAGE = Storage(deadline_s=1)


def planned(folder: Path, name: str, **more: Any) -> tuple[Plan, list[dict[str, Any]]]:
    """-> the plan, and the rows as the flow reads them."""
    job = GenerateJob.model_validate(job_values(str(folder / name), folder / f"out-{name}", **more))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    rows: list[dict[str, Any]] = []
    for number in range(len(plan.files)):
        for shard in read_shards(output, number):
            [table] = ReadShard(RowRules.of_job(plan.job), plan.files[number], shard, plan.passed, STORAGE)()
            rows += rows_of(table)
    return plan, rows


# A. One unexpected value


def test_a_seed_whose_images_would_pass_the_largest_is_its_rows_failure(tmp_path: Path) -> None:
    lines = [{"query": "a.png", "context": "a.png", "id": "far", "seed": 2**63 - 1, "num_images": 2}]
    lines.append(lines[0] | {"id": "last", "num_images": 1})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, rows = planned(tmp_path, "m.jsonl")
    assert [row["error_code"] for row in rows] == ["invalid_setting", None]
    assert "image 1 of num_images" in rows[0]["error_message"]


def test_a_protocol_whose_package_is_missing_is_its_rows_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uri: str, **_: Any) -> Any:
        raise ImportError("Install gcsfs\nto access \x1b[31mGCS\x1b[0m")

    monkeypatch.setattr("context_diffusion.storage.filesystem.url_to_fs", missing)
    with pytest.raises(RowError) as caught:
        STORAGE.read_input("gs://bucket/a.png", 1000)
    assert caught.value.code == ErrorCode.UNREADABLE_FILE
    assert "pip install 'context-diffusion[gcs]'" in caught.value.message
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message


def test_a_protocol_in_capitals_is_the_same(s3: str) -> None:
    STORAGE.create(f"{s3}/a", b"bytes")
    assert STORAGE.read_input(f"{s3}/a".replace("s3:", "S3:"), 1000) == b"bytes"
    assert normal("GS://Bucket/Key/") == "gs://Bucket/Key"


def test_an_error_is_one_line_without_colours() -> None:
    told = classify(TimeoutError("\x1b[36mray::task\x1b[39m\n" + "  Traceback\n" * 500))["error"]
    assert "\n" not in told
    assert "\x1b" not in told
    assert len(told) <= 1000


def test_columns_that_we_do_not_know_are_copied_whatever_their_type(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8, dtype=np.int32).reshape(2, 2, 2))
    late = pa.array([300_000_000_000_000, None], pa.timestamp("ms"))
    columns: dict[str, Any] = {
        "query": ["a.png"] * 2,
        "context": [["a.png"]] * 2,
        "tensor": tensors,
        "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8())),
        "day": pa.array([20000, None], pa.date32()),
        "late": late,
        "deep": pa.array([[300_000_000_000_000], None], pa.list_(pa.timestamp("ms"))),
        "raw": pa.array([b"\xff", None]),
        "short": pa.array([1, 2], pa.int16()),
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    plan, rows = planned(tmp_path, "m.parquet")
    assert len({row["id"] for row in rows}) == 2, "derived ids, of values that Python has none for too"
    [read] = [
        ReadShard(RowRules.of_job(plan.job), plan.files[0], shard, plan.passed, STORAGE)()[0]
        for shard in read_shards(Output(plan.job.output, STORAGE), 0)
    ]
    assert read["passed:late"].combine_chunks().equals(late)
    assert read["passed:tensor"].to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [read[f"passed:{name}"].type for name in ("flag", "day", "raw", "short")] == [
        pa.int8(), pa.date32(), pa.binary(), pa.int16()]  # fmt: skip


def test_types_that_differ_over_files_are_widened_or_refused_with_both_names(tmp_path: Path) -> None:
    def write(name: str, **columns: Any) -> None:
        (tmp_path / "m.parquet").mkdir(exist_ok=True)
        table = {"id": [name], "query": ["a.png"], "context": [["a.png"]], **columns}
        pq.write_table(pa.table(table), tmp_path / "m.parquet" / f"{name}.parquet")

    write("a", n=pa.array([None], pa.null()), m=pa.array([1], pa.int32()), raw=pa.array([b"\xff"]))
    write("b", n=pa.array([5], pa.int64()), m=pa.array([2**40], pa.int64()), raw=pa.array([None], pa.null()))
    _, rows = planned(tmp_path, "m.parquet")
    assert [row["passed:n"] for row in rows] == [None, 5]
    assert [row["passed:m"] for row in rows] == [1, 2**40]
    assert [row["passed:raw"] for row in rows] == [b"\xff", None]
    write("c", n=pa.array(["text"]))
    expanded = GenerateJob.model_validate(job_values(str(tmp_path / "m.parquet"), tmp_path / "other"))
    with pytest.raises(ManifestError, match=r"'n' is int64 in .*\.parquet and string in .*c\.parquet"):
        open_plan(expanded, Output(expanded.output, STORAGE), STORAGE)


# B. Settings that silently do nothing


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("steps", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("guidance", "guidance_scale"),
        ("Sampler", "scheduler"),
        ("guidence_scale", "guidance_scale"),
        ("negativ_prompt", "negative_prompt"),
        ("likes", None),
        ("photographer", None),
        ("url", None),
    ],
)
def test_a_column_that_was_probably_meant_as_ours_is_told(name: str, ours: str | None) -> None:
    told = column_warnings([name])
    assert bool(told) is bool(ours)
    assert not ours or (repr(ours) in told[0] and f"{{{ours}: {name}}}" in told[0])


def test_validate_tells_what_a_run_would_end_with(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "in", 8, {1: {"query": "gone.png"}})
    job = GenerateJob.model_validate(job_values(manifest, tmp_path / "out"))
    assert validate_job(job, 8)["exit"] == 3
    assert validate_job(job, 1)["exit"] == 0, "the first row is good"
    assert validate_job(job.model_copy(update={"max_failed": 0}), 8)["exit"] == 4
    open_plan(job, Output(job.output, STORAGE), STORAGE)
    assert validate_job(job, 8)["exit"] == 3
    with pytest.raises(OutputConflictError, match="seed: 0 planned, 7 now"):
        validate_job(job.model_copy(update={"seed": 7}), 8)


def test_validate_warns_of_columns_that_do_nothing(tmp_path: Path) -> None:
    line = {"query": "a.png", "context": "a.png", "steps": 3}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    job = GenerateJob.model_validate(job_values(str(tmp_path / "m.jsonl"), tmp_path / "out"))
    [warning] = validate_job(job, 0)["warnings"]
    assert "num_inference_steps" in warning


def test_folders_that_name_columns_are_read_as_columns(tmp_path: Path) -> None:
    row = {"query": "a.png", "context": "a.png"}
    for steps, form in ((3, "jsonl"), (4, "csv"), (5, "parquet")):
        folder = tmp_path / "rows" / f"num_inference_steps={steps}" / "day=2026-11-29" / "prompt=a%20cat"
        folder.mkdir(parents=True)
        if form == "jsonl":
            (folder / "a.jsonl").write_text(json.dumps(row))
        elif form == "csv":
            (folder / "a.csv").write_text("query,context\na.png,a.png\n")
        else:
            pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    _, rows = planned(tmp_path, "rows")
    assert sorted(json.loads(row["settings"])["num_inference_steps"] for row in rows) == [3, 4, 5]
    assert {row["prompt"] for row in rows} == {"a cat"}
    assert {row["passed:day"] for row in rows} == {"2026-11-29"}
    assert len({row["id"] for row in rows}) == 3


def test_a_duplicate_id_names_both_rows_and_files(tmp_path: Path) -> None:
    line = {"query": "a.png", "context": "a.png"}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.jsonl").write_text("\n".join(json.dumps(line | {"id": name}) for name in "xyz"))
    (tmp_path / "m" / "b.jsonl").write_text("\n".join(json.dumps(line | {"id": name}) for name in "uyvw"))
    with pytest.raises(ManifestError, match=r"'y': row 2 of .*a\.jsonl and row 2 of .*b\.jsonl"):
        planned(tmp_path, "m")


# C. Missing values and types


def test_nan_is_null(tmp_path: Path) -> None:
    line = (
        '{"query": "a.png", "context": "a.png", "prompt": NaN, "id": NaN, "seed": NaN, "score": NaN, "n": %d}'
    )
    (tmp_path / "m.jsonl").write_text("\n".join(line % n for n in range(2)))
    _, rows = planned(tmp_path, "m.jsonl")
    assert [row["prompt"] for row in rows] == [None, None]
    assert all(row["id"].startswith("row-") for row in rows)
    assert [row["error_code"] for row in rows] == [None, None]
    nan = float("nan")
    assert row_id({"id": nan, "n": 1}, {"id": "id"}) == row_id({"id": None, "n": 1}, {"id": "id"})
    table = pa.table(
        {"query": ["a.png"], "context": [["a.png"]], "seed": [nan], "guidance_scale": [nan], "steps": [nan]}
    )
    pq.write_table(table, tmp_path / "m.parquet")
    plan, [row] = planned(tmp_path, "m.parquet")
    assert row["error_code"] is None
    assert json.loads(row["settings"])["guidance_scale"] == 1.5
    assert plan.rows == 1


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "null", " nan "])
def test_nan_is_null_in_the_text_of_a_csv_too(tmp_path: Path, nothing: str) -> None:
    """pandas writes it so where `na_rep` says so."""
    (tmp_path / "m.csv").write_text(
        f"query,context,guidance_scale,seed,context_weights,width\na.png,a.png,{','.join([nothing] * 4)}\n"
    )
    _, [row] = planned(tmp_path, "m.csv")
    assert (row["error_code"], row["error_message"]) == (None, None)
    used = json.loads(row["settings"])
    assert (used["guidance_scale"], used["context_weights"], used["width"]) == (1.5, None, None)
    assert used["seed"] is not None


def test_a_nullable_key_may_be_missing_in_the_first_row(tmp_path: Path) -> None:
    lines = [
        {"query": "a.png", "context": "a.png"},
        {"query": "a.png", "context": "a.png", "words": "a cat", "name": "x"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, rows = planned(tmp_path, "m.jsonl", columns={"prompt": "words", "id": "name"})
    assert [row["prompt"] for row in rows] == [None, "a cat"]
    assert rows[1]["id"] == "x"


def test_settings_in_the_output_are_the_numbers_given(tmp_path: Path) -> None:
    make(
        tmp_path,
        1,
        settings={"context_scale": 0.7, "guidance_scale": 1.1, "controlnet_conditioning_scale": 0.3},
    )
    [part] = [pq.read_table(path) for path in (tmp_path / "out" / "data").iterdir()]
    [row] = part.to_pylist()
    assert (row["context_scale"], row["guidance_scale"], row["controlnet_conditioning_scale"]) == (
        0.7,
        1.1,
        [0.3],
    )


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("query,context,prompt,prompt\na.png,a.png,x,y\n")
    with pytest.raises(ManifestError, match="names prompt more than once"):
        open_file(str(tmp_path / "m.csv"), STORAGE)


# D. Which files a manifest is


def test_a_path_that_exists_is_that_path(tmp_path: Path) -> None:
    for name in ("set [1]", "set 1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}")
    assert expand([str(tmp_path / "set [1]" / "rows.jsonl")], STORAGE) == [
        str(tmp_path / "set [1]" / "rows.jsonl")
    ]
    assert expand([str(tmp_path / "set [1]")], STORAGE) == [str(tmp_path / "set [1]" / "rows.jsonl")]
    assert expand([str(tmp_path / "set*" / "*.jsonl")], STORAGE) == sorted(
        str(p) for p in tmp_path.glob("*/rows.jsonl")
    )


def test_what_programs_leave_in_a_folder_is_no_manifest(tmp_path: Path) -> None:
    kept = ["a.jsonl", "_x=1/b.jsonl", "deep/c.csv", "e_f/d.parquet"]
    left = [
        ".ipynb_checkpoints/a.jsonl",
        "._a.jsonl",
        "_temporary/0/b.parquet",
        "_delta_log/0.jsonl",
        "__MACOSX/a.csv",
        ".git/a.csv",
        "out/data/part-00000.parquet",
    ]
    for name in [*kept, *left, "out/plan.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert {Path(uri).relative_to(tmp_path).as_posix() for uri in expand([str(tmp_path)], STORAGE)} == set(
        kept
    )
    queries = tmp_path / "queries"
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png"):
        (queries / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(queries / name)
    told = write_manifest(Pairing(str(queries), str(queries), "zip"), str(tmp_path / "rows.csv"))
    assert told["rows"] == 1


# E. Images as a viewer shows them


def adobe_rgb() -> bytes:
    """A matrix profile with Adobe RGB's primaries and gamma (its specification of 1998, adapted to D50),
    written by hand."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
    text = b"A wide space"
    tags = {
        b"desc": b"desc\0\0\0\0"
        + struct.pack(">I", len(text) + 1)
        + text
        + b"\0" * (1 + 4 + 4 + 2 + 1 + 67 + 3),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        b"rTRC": gamma,
        b"gTRC": gamma,
        b"bTRC": gamma,
    }
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    head = (
        struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
        + b"\0" * 12
        + b"acsp"
    )
    head += b"\0" * 28 + number(0.9642) + number(1.0) + number(0.8249)
    return head + b"\0" * (128 - len(head)) + table + body


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_colour_profile_is_turned_into_srgb(form: str) -> None:
    for profile, expected in (
        (adobe_rgb(), (233, 35, 35)),
        (b"broken", (200, 40, 40)),
        (None, (200, 40, 40)),
    ):
        file = io.BytesIO()
        options = (
            {"quality": 100, "subsampling": 0}
            if form == "JPEG"
            else {"lossless": True}
            if form == "WEBP"
            else {}
        )
        Image.new("RGB", (16, 16), (200, 40, 40)).save(file, form, icc_profile=profile, **options)
        pixels = decode_image(file.getvalue(), Limits())
        assert np.abs(pixels.astype(int) - expected).max() <= 3, (form, profile and profile[:6])


def test_a_colour_profile_keeps_what_is_transparent_transparent() -> None:
    file = io.BytesIO()
    image = Image.new("RGBA", (16, 16), (200, 40, 40, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    image.save(file, "PNG", icc_profile=adobe_rgb())
    pixels = decode_image(file.getvalue(), Limits())
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 12].astype(int) - (233, 35, 35)).max() <= 2


def test_a_png_is_read_whatever_its_texts_are() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    info, huge, file = PngImagePlugin.PngInfo(), io.BytesIO(), io.BytesIO()
    info.add_text("workflow", "a" * 3_000_000, zip=True)
    image.save(huge, "PNG", pnginfo=info)
    assert np.array_equal(decode_image(huge.getvalue(), Limits()), np.asarray(image))
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "hello")
    image.save(file, "PNG", pnginfo=info, icc_profile=adobe_rgb())
    for word in (b"hello", b"iCCP"):
        damaged = bytearray(file.getvalue())
        damaged[damaged.index(word) + 5] ^= 1
        assert decode_image(bytes(damaged), Limits()).shape == (32, 32, 3)


# I. Small ones


def test_the_version_and_the_help_are_told() -> None:
    command = [sys.executable, "-m", "context_diffusion"]
    told = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (told.returncode, told.stdout.strip()) == (0, context_diffusion.__version__)
    assert subprocess.run([*command, "run", "-h"], capture_output=True).returncode == 0


def test_a_seed_at_the_end_is_a_seed() -> None:
    assert Settings(seed=2**63 - 1).seed == 2**63 - 1
