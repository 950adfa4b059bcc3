"""The viewer without a browser: questions answered as plain Python answers them, pictures by their row's
place alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow.parquet as pq
import pytest

from context_diffusion.core.errors import JobError
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.query import RowQuery
from context_diffusion.outputs.report.row_index import RowIndex
from context_diffusion.outputs.report.row_sample import BINS, sample_rows
from context_diffusion.storage.parquet_files import to_parquet
from support.report_outputs import ATTACK, ODD_ID, finished, parts, png, served


def mixed(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row = {
            "id": f"Row-{number:04d}",
            "prompt": ["a Misty forest", None, "50% off; DROP TABLE data"][number % 3],
        }
        score = None if number % 5 == 0 else float(np.float32(rng.random()))
        made = {"layout_score": score, "seconds": float(number % 13)}
        failed = {"status": "failed", "error_code": f"code_{number % 2}", "error_message": f"why {number}"}
        rows.append(row | (failed if number % 11 == 0 else made))
    return rows


@pytest.fixture
def index(tmp_path: Path) -> Any:
    made = RowIndex(parts(tmp_path / "out", mixed(400), 23))
    yield made
    made.close()


def told(index: RowIndex, **asked: Any) -> list[str]:
    """The ids of all pages."""
    ids: list[str] = []
    while True:
        total, places = index.find(RowQuery(**{"limit": 50, **asked, "offset": len(ids)}))
        ids += [f"Row-{part * 23 + number:04d}" for part, number in places]
        if len(ids) >= total:
            assert len(ids) == total
            return ids


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, lambda row: True),
        ({"text": "mISTY"}, lambda row: row["prompt"] == "a Misty forest"),
        ({"text": "row-012"}, lambda row: row["id"].startswith("Row-012")),
        ({"text": "why 33"}, lambda row: "why 33" in row.get("error_message", "")),
        ({"text": "%"}, lambda row: "%" in (row["prompt"] or "")),
        ({"text": "' or 1=1 --"}, lambda row: False),
        ({"text": "; DROP TABLE data"}, lambda row: "DROP" in (row["prompt"] or "")),
        ({"status": "failed"}, lambda row: "error_code" in row),
        ({"code": "code_1"}, lambda row: row.get("error_code") == "code_1"),
        ({"code": "code_1' or 'a'='a"}, lambda row: False),
        (
            {"score": "layout_score", "low": 0.25, "high": 0.5},
            lambda row: 0.25 <= (row.get("layout_score") or -1) < 0.5,
        ),
        ({"score": "layout_score"}, lambda row: row.get("layout_score") is not None),
        (
            {"status": "ok", "text": "forest"},
            lambda row: "error_code" not in row and row["prompt"] == "a Misty forest",
        ),
    ],
)
def test_pages_of_a_question_hold_each_row_that_matches_once(
    index: RowIndex, asked: dict[str, Any], expected: Any
) -> None:
    failed_first = sorted(mixed(400), key=lambda row: "error_code" not in row)
    assert told(index, **asked) == [row["id"] for row in failed_first if expected(row)]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_sorted_by_a_score_those_without_come_last(index: RowIndex, order: str) -> None:
    rows = {row["id"]: row.get("layout_score") for row in mixed(400)}
    values = [rows[name] for name in told(index, sort="layout_score", order=order)]
    there = [value for value in values if value is not None]
    assert values == sorted(there, reverse=order == "desc") + [None] * (len(values) - len(there))


@pytest.mark.parametrize(
    "wrong",
    [{"sort": "id; drop table data"}, {"sort": "image"}, {"order": "asc, (select 1)"},
     {"score": "1=1 or layout_score"},
     {"limit": 10_000}, {"offset": -1}],
)  # fmt: skip
def test_names_that_are_not_known_never_become_sql(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected one of|expected 1 to 200|expected 0 or more"):
        RowQuery(**wrong)


def test_figures_and_histograms_are_those_of_the_report(index: RowIndex) -> None:
    counts, told = index.output.count(), index.counts() | {"codes": index.codes()}
    assert {key: told[key] for key in ("rows", "ok", "failed", "images", "codes")} == {
        key: value for key, value in vars(counts).items() if key not in ("flagged", "unsafe", "unknown_words")
    }
    [ours], [theirs] = list(index.histograms()), sample_rows(index.output, counts.images).histograms
    assert len(ours["bins"]) == BINS
    assert ours == {**theirs, "mean": pytest.approx(theirs["mean"])}
    assert index.reasons()["code_0"][0] == ("Row-0000", "why 0")


def test_parts_that_come_later_are_found_and_nothing_stays_on_the_disk(tmp_path: Path) -> None:
    output = parts(tmp_path / "out", mixed(46), 23)
    index = RowIndex(output)
    folder = Path(index._folder.name)
    first = pq.read_table(output.part(0))
    output.storage.create(output.part(2), to_parquet(first.slice(0, 5)))
    assert index.counts()["entries"] == 46
    index.refresh()
    index.refresh()
    assert index.counts()["entries"] == 51
    assert folder.exists()
    index.close()
    assert not folder.exists()


def get(url: str, **headers: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.headers["content-type"] or "", answer.read()
    except urllib.error.HTTPError as error:
        return error.code, "", error.read()


def rows_of(url: str, **asked: Any) -> list[dict[str, Any]]:
    return json.loads(get(f"{url}rows?{urlencode(asked)}")[2])["rows"]


@pytest.mark.parametrize("form", ["files", "parquet", "webdataset", "both"])
def test_pictures_come_from_wherever_the_job_put_them(tmp_path: Path, form: str) -> None:
    output = finished(tmp_path, 12, output_format=form)
    digests = {row["id"]: row["sha256"] for _, part in output.read_parts() for row in part.to_pylist()}
    with served(output) as url:
        shown = rows_of(url, limit=100)
        assert len(shown) == 12
        for row in shown:
            if row["status"] == "failed":
                assert row["thumbnail"] is row["full_image"] is None
                continue
            status, kind, data = get(url + row["full_image"])
            assert (status, kind, hashlib.sha256(data).hexdigest()) == (200, "image/png", digests[row["id"]])
            for name in (
                row["thumbnail"],
                row["query"]["thumbnail"],
                *(context["thumbnail"] for context in row["context"]),
            ):
                status, kind, data = get(url + name)
                assert (status, kind, data[8:12]) == (200, "image/webp", b"WEBP")


def test_a_row_is_found_by_its_id_whatever_signs_it_holds(tmp_path: Path) -> None:
    with served(finished(tmp_path, 8)) as url:
        for row_id in (ATTACK, ODD_ID, "row-003"):
            found = json.loads(get(f"{url}row?{urlencode({'id': row_id, 'index': 0})}")[2])["row"]
            assert found["id"] == row_id
        for wrong in (
            {"id": "row-003", "index": 7},
            {"id": "nobody", "index": 0},
            {"id": "row-003", "index": "x"},
            {},
        ):
            assert json.loads(get(f"{url}row?{urlencode(wrong)}")[2]) == {"row": None}


def test_only_pictures_of_rows_and_only_for_this_host(tmp_path: Path) -> None:
    output = finished(tmp_path, 8)
    part = pq.read_table(output.part(0))
    (tmp_path / "secret.png").write_bytes(png(1))
    names = ["../secret.png", "plan.json", *part["file_name"].to_pylist()[2:]]
    output.storage.replace(output.part(0), to_parquet(part.set_column(5, "file_name", [names])))
    assert part.column_names[5] == "file_name"
    with served(output) as url:
        for path in ("image/0/0/full", "image/0/0/output", "image/0/1/full", "image/0/2/99", "image/0/2/x"):
            assert get(url + path) == (204, "", b""), path
        for path in (
            "image/0/99/output",
            "image/9/0/output",
            "image/..%2f..%2fsecret.png",
            "../secret.png",
            "plan.json",
            "data",
        ):
            assert get(url + path)[0] == 404, path
        for query in ("sort=id%3Bdrop", "limit=x", "nonsense=1", "low=x"):
            assert get(f"{url}rows?{query}")[0] == 400, query
        assert get(url)[0] == 200
        assert get(url, Host="elsewhere.example")[0] == 400


def test_an_output_in_an_object_store(tmp_path: Path, s3: str) -> None:
    local = finished(tmp_path, 8)
    for path in (path for path in Path(local.root).rglob("*") if path.is_file()):
        local.storage.replace(f"{s3}/out/{path.relative_to(local.root)}", path.read_bytes())
    with served(Output(f"{s3}/out", local.storage)) as url:
        shown = rows_of(url, status="ok", sort="layout_score", order="desc")
        assert len(shown) == 5
        assert get(url + shown[0]["full_image"])[:2] == (200, "image/png")
        assert get(url + shown[0]["query"]["thumbnail"])[:2] == (200, "image/webp")


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    output = finished(tmp_path, 8)
    command = [sys.executable, "-m", "context_diffusion", "view", output.root, "--port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "NO_COLOR": "1"}
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr
        url = next(line for line in process.stderr if "Ctrl-C" in line).split()[0]
        assert b"Context Diffusion" in get(url)[2]
        taken = subprocess.run(
            [*command[:-1], url.split(":")[-1].strip("/")], capture_output=True, text=True, env=environment
        )
        assert taken.returncode == 2
        assert "choose another" in taken.stderr
    finally:
        process.send_signal(signal.SIGTERM)
    last = json.loads(process.communicate(timeout=30)[0].splitlines()[-1])
    assert (process.returncode, last) == (0, {"output": output.root, "url": url, "exit": 0})
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from context_diffusion.cli.output_commands import view

    loaded = (
        "context_diffusion.outputs.report.viewer",
        "context_diffusion.outputs.report.row_index",
        "starlette",
    )
    for missing in ("duckdb", "uvicorn", "starlette"):
        for name in [name for name in sys.modules if name.startswith(loaded)]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as patched:
            for name in [name for name in sys.modules if name.startswith(loaded)]:
                patched.delitem(sys.modules, name)
            patched.setitem(sys.modules, missing, None)  # what import makes of a package that is not there
            with pytest.raises(
                JobError, match=rf"view needs {missing}.*pip install 'context-diffusion\[view\]'"
            ):
                view(str(tmp_path))
