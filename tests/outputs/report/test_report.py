"""report.html: which rows stand on it, that it stays small, that texts stay texts, that it asks nobody for
anything."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from context_diffusion.core.errors import RowError, StorageError
from context_diffusion.outputs.finalize import verify
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.build import PAGE_BYTES, rebuild, write_report
from context_diffusion.outputs.report.row_sample import BINS, EVEN, EXTREME, FAILED, sample_rows
from context_diffusion.outputs.report.thumbnails import MAX_UNAVAILABLE, ImageReader
from context_diffusion.outputs.report.viewer_cache import ViewerCache
from context_diffusion.storage.filesystem import Storage
from support.report_outputs import ATTACK, data_of, finished, parts, png


def scored(count: int) -> list[dict[str, Any]]:
    """Every tenth row failed, in three codes; scores in no order, some missing."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        failed = number % 10 == 3
        scores = {
            "layout_score": None if number % 7 == 0 else float(rng.random()),
            "style_score": float(rng.normal(0.5, 0.4)),
        }
        code = {"status": "failed", "error_code": f"code_{number % 3}", "error_message": "why"}
        rows.append({"id": f"row-{number}", **(code if failed else scores)})
    return rows


def test_the_sample_is_even_and_has_the_ends_of_each_score_and_some_failures_of_each_code(
    tmp_path: Path,
) -> None:
    rows = scored(3000)
    found = sample_rows(parts(tmp_path, rows, 37), 2700)
    at = {place: rows[place[0] * 37 + place[1]] for place in found.positions}
    made = [number for number, row in enumerate(rows) if "status" not in row]
    even = [made.index(shard * 37 + row) for shard, row in found.even]
    assert len(even) == EVEN
    assert set(np.diff(even)) <= {22, 23}
    for name in ("layout_score", "style_score"):
        order = sorted((row for row in rows if row.get(name) is not None), key=lambda row: row[name])
        ends = {row["id"] for row in (*order[:EXTREME], *order[-EXTREME:])}
        assert ends <= {row["id"] for row in at.values()}
    failed = [row["error_code"] for row in at.values() if "status" in row]
    assert sorted(failed) == sorted(["code_0", "code_1", "code_2"] * FAILED)
    assert len(at) <= EVEN + 4 * EXTREME + 3 * FAILED


def test_histograms_count_all_pictures_not_the_sample(tmp_path: Path) -> None:
    rows = scored(2000)
    for told in sample_rows(parts(tmp_path, rows, 64), 1800).histograms:
        values = np.float32([row[told["name"]] for row in rows if row.get(told["name"]) is not None])
        bins = [0] * BINS
        for value in values:
            bins[min(max(int(value * BINS), 0), BINS - 1)] += 1
        assert told["bins"] == bins
        assert (told["count"], pytest.approx(told["mean"], abs=1e-5)) == (len(values), values.mean())


def test_few_images_all_stand_on_the_page(tmp_path: Path) -> None:
    found = sample_rows(parts(tmp_path, scored(30), 4), 27)
    assert len(found.even) == 27
    assert found.rows == 30


def test_the_page_stays_small_whatever_the_rows_hold(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    from PIL import Image

    path = tmp_path / "noise.webp"
    Image.fromarray(noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path, lossless=True)
    image = {"bytes": path.read_bytes(), "path": None}
    long = {
        "prompt": "\N{PARTY POPPER}" * 10_000,
        "negative_prompt": "<" * 10_000,
        "query": "q" * 4000,
        "context": ["c" * 4000] * 64,
    }
    rows = [{"id": f"row-{number}", "image": image, "file_name": None, **long} for number in range(EVEN)]
    bad = {"status": "failed", "error_message": "\0<&'" * 4000}
    rows += [
        {"id": f"bad-{number}", "error_code": f"code-{number % 18}", **bad, **long}
        for number in range(18 * FAILED)
    ]
    output = parts(tmp_path / "out", rows, 64, image_format="none")
    write_report(
        output,
        {
            "rows": len(rows),
            "ok": EVEN,
            "failed": 144,
            "images": EVEN,
            "codes": {"code-1": 8},
            "output": "out",
        },
    )
    page = Path(output.report).read_bytes()
    data = data_of(page.decode())
    assert len(data["rows"]) == EVEN + 18 * FAILED
    assert 0 < len(data["thumbnails"]) < EVEN, "the room ended within the pictures"
    assert PAGE_BYTES - 2**18 < len(page) < PAGE_BYTES + 2**15 < 10**7


class Scripts(HTMLParser):
    """The page as a browser's parser sees it: tags, and what stands in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        self.scripts += [""] if self.inside else []

    def handle_endtag(self, _tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    @property
    def policy(self) -> dict[str, str]:
        [content] = [attributes["content"] for _, attributes in self.tags if attributes.get("http-equiv")]
        return dict(rule.strip().split(" ", 1) for rule in str(content).split(";"))


def parsed(page: str) -> Scripts:
    seen = Scripts()
    seen.feed(page)
    return seen


def reader(output: Output) -> ImageReader:
    return ImageReader(output, output.read_plan())


def test_what_a_manifest_says_stays_text(tmp_path: Path) -> None:
    output = finished(tmp_path, 12)
    output.storage.replace(
        output.summary,
        json.dumps({"codes": {}, "images_per_second": ATTACK}).encode(),
    )
    rebuild(output)
    page = Path(output.report).read_text()
    assert ATTACK not in page
    seen = parsed(page)
    data, script = seen.scripts
    assert {row["id"] for row in json.loads(data)["rows"]} >= {ATTACK}
    assert ATTACK in {row["prompt"] for row in json.loads(data)["rows"]}
    assert not [
        tag
        for tag, attributes in seen.tags
        if tag in ("svg", "img") or any(name.startswith("on") for name in attributes)
    ]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert seen.policy["script-src"] == f"'sha256-{digest}'"


def test_the_page_names_no_other_place(tmp_path: Path) -> None:
    page = Path(finished(tmp_path, 8).report).read_text()
    rules, named = (
        parsed(page).policy,
        [str(value) for _, attributes in parsed(page).tags for value in attributes.values()],
    )
    assert not [value for value in named if re.search("//|^[a-z]+:(?!,)", value)]
    assert (
        rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    )
    assert rules["img-src"] == "data: 'self' file:"


def test_queries_and_contexts_are_embedded_once_where_the_job_may_read_them(tmp_path: Path) -> None:
    output = finished(tmp_path, 12)
    data = data_of(Path(output.report).read_text())
    rows = {row["id"]: row for row in data["rows"]}
    assert len(rows) == 12
    made = [row for row in rows.values() if row["status"] == "ok"]
    assert all(row["thumbnail"] is not None and row["query"]["thumbnail"] is not None for row in made)
    assert all((tmp_path / "out" / row["full_image"]).is_file() for row in made)
    assert len(data["thumbnails"]) == len(made) + 6, "six files are queries and contexts of all rows"
    assert rows["row-003"]["query"] == {"uri": "gone.png", "thumbnail": None}


def green_in_red(width: int, height: int) -> bytes:
    """A green middle as wide as high, red on both sides of it."""
    pixels = np.full((height, width, 3), (200, 0, 0), np.uint8)
    pixels[:, (width - height) // 2 : (width + height) // 2] = (0, 200, 0)
    Image.fromarray(pixels).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


def picture_of(data: Any, source: dict[str, Any]) -> Image.Image:
    """A card's thumbnail as a browser shows it."""
    return Image.open(io.BytesIO(base64.b64decode(data["thumbnails"][source["thumbnail"]].partition(",")[2])))


def reds(image: Image.Image) -> float:
    """The share of red pixels."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((pixels[:, :, 0] > pixels[:, :, 1] + 60).mean())


@pytest.mark.parametrize(
    ("fit", "size", "has_red"),
    [("crop", (64, 64), False), ("stretch", (64, 64), True), ("keep", (112, 64), True)],
)
def test_a_wide_query_is_shown_as_the_engine_had_it_and_a_context_whole(
    tmp_path: Path, fit: str, size: tuple[int, int], has_red: bool
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wide.png").write_bytes(green_in_red(300, 100))
    wide: dict[int, dict[str, Any]] = {0: {"query": "wide.png"}, 1: {"context": ["wide.png"]}}
    output = finished(tmp_path, 4, wide, fit=fit)
    data = data_of(Path(output.report).read_text())
    rows = {row["id"]: row for row in data["rows"]}
    query, context = (
        picture_of(data, rows["row-000"]["query"]),
        picture_of(data, rows["row-001"]["context"][0]),
    )
    assert (query.size, reds(query) > 0) == (size, has_red)
    assert context.size == (128, 43)
    assert reds(context) > 0.5
    served = Image.open(io.BytesIO(ViewerCache(output).source_thumbnail((0, 0), None) or b""))
    assert (served.size, reds(served)) == (query.size, reds(query))


def test_a_wide_query_that_has_no_picture_is_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wide.png").write_bytes(green_in_red(300, 100))
    output = finished(tmp_path, 4, {0: {"query": "wide.png", "scheduler": "none such"}})
    data = data_of(Path(output.report).read_text())
    [row] = [row for row in data["rows"] if row["id"] == "row-000"]
    assert row["status"] == "failed"
    assert picture_of(data, row["query"]).size == (128, 43)


def test_what_the_job_may_not_read_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "out" / "in").mkdir(parents=True)
    (tmp_path / "out" / "in" / "open.png").write_bytes(png(2))
    pictures = reader(parts(tmp_path / "out", [{"id": "a"}], 1))
    assert pictures.source_thumbnail(str(tmp_path / "out" / "in" / "open.png"))
    assert pictures.source_thumbnail(str(tmp_path / "secret.png")) is None
    assert pictures.source_thumbnail(str(tmp_path / "out" / "in" / ".." / ".." / "secret.png")) is None
    assert pictures.source_thumbnail("http://127.0.0.1/a.png") is None


def test_a_file_name_leads_nowhere_but_to_its_outputs_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    pictures = reader(parts(tmp_path / "out", [{"id": "a"}], 1))
    for name in (
        "../secret.png",
        "images/part-00000/../../../secret.png",
        str(tmp_path / "secret.png"),
        "plan.json",
        "images/part-00000/..",
        "",
    ):
        with pytest.raises(RowError, match="is not an image of this OUTPUT"):
            pictures.output_image({"id": "a", "file_name": name})
    with pytest.raises(RowError, match="is missing from"):
        pictures.output_image({"id": "a", "file_name": "images/part-00000/a-0.png"})
    with pytest.raises(RowError, match="is not an image of this OUTPUT"):
        pictures.output_image({"id": "a", "file_name": None, "image": None})


def test_a_store_that_is_away_is_not_waited_for_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def away(_self: Storage, uri: str, *_: Any) -> bytes:
        asked.append(uri)
        raise StorageError(f"{uri}: away")

    monkeypatch.setattr(Storage, "read_input", away)
    pictures = reader(parts(tmp_path, [{"id": "a"}], 1))
    assert [pictures.source_thumbnail(str(tmp_path / "in" / f"{number}.png")) for number in range(9)] == [
        None
    ] * 9
    assert len(asked) == MAX_UNAVAILABLE


def test_a_rebuilt_report_keeps_what_the_run_knew_and_the_output_whole(tmp_path: Path) -> None:
    output = finished(tmp_path, 8)
    summary = rebuild(output)
    assert summary["images_per_second"] == 2.0
    assert output.read_json(output.summary) == summary
    page = Path(output.report).read_text()
    assert "93 <small>%</small>" in page
    assert verify(output) == []
