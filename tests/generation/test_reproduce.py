"""A picture made again: identical bit for bit, or what differs, or why it cannot be made. Real flow, tiny
model."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from context_diffusion.core.errors import JobError, ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.engine.service import EngineService
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.image_origin import find_origin
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.reproduce import Reproduction, reproduce, writer
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.generate import generate
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.generation.stages.write_shard import WriteShard
from context_diffusion.inputs.decode import decode_image
from context_diffusion.inputs.manifest_files import _last_group
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.encode import encode_image, read_metadata
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values, write_manifest
from support.tiny import picture
from support.user_images import write_base

STORAGE = Storage(deadline_s=1)
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.1, "num_images": 2}


def run(folder: Path, model: str, count: int = 2, **more: Any) -> list[Path]:
    """The flow in this process, by a real engine. -> the pictures."""
    manifest = folder / "in" / "manifest.parquet"
    if not manifest.exists():
        write_manifest(folder / "in", count)
    values = job_values(str(manifest), folder / "out", model=model, settings=SETTINGS, **more)
    job = GenerateJob.model_validate(values)
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    job = plan.job
    service = EngineService(ContextDiffusion.from_pretrained(model, "cpu").engine(job.cluster.chunk))
    engine = GuardedEngine(service, Ledger())
    load = LoadImages.for_job(job, plan.model, plan.allow, STORAGE)
    write = WriteShard(job, output, f"{plan.model.name}@{plan.model.revision}", str(folder / "in"))
    for shard in read_shards(output, 0):
        [table] = ReadShard(RowRules.of_job(job), plan.files[0], shard, plan.passed, STORAGE)()
        write(generate(load(table), engine, job))
    return sorted((folder / "out" / "images").rglob("*.*"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    return run(tmp_path_factory.mktemp("made"), base)[0].parents[3]


@pytest.fixture
def made(_made: Path, tmp_path: Path) -> Iterator[Path]:
    """OUTPUT and its inputs, as they were made; what a test changes is put back."""
    before = {path: path.read_bytes() for path in _made.rglob("*") if path.is_file()}
    yield _made
    for path, data in before.items():
        path.write_bytes(data)


def pictures(made: Path) -> list[Path]:
    return sorted((made / "out" / "images").rglob("*.png"))


def again(
    path: Path, allow: list[str] | None = None, model: str | None = None, base: Path | None = None
) -> Reproduction:
    return reproduce(find_origin(str(path)), allow or [], model, base and str(base))


def retold(path: Path, **changes: Any) -> bytes:
    """The picture with other metadata."""
    data = path.read_bytes()
    told = json.loads(read_metadata(data)["context_diffusion"]) | changes
    told = {key: value for key, value in told.items() if value is not None}
    return encode_image(
        np.asarray(Image.open(io.BytesIO(data))), "png", {"context_diffusion": json.dumps(told)}
    )


def test_each_picture_of_an_output_is_made_again_bit_for_bit(made: Path, tmp_path: Path) -> None:
    paths = pictures(made)
    assert len(paths) == 4
    for number, path in enumerate(paths):
        found = again(path)
        assert (found.identical, found.differs) == (True, [])
        writer(str(tmp_path / f"{number}.png"))(found)
        assert (tmp_path / f"{number}.png").read_bytes() == path.read_bytes()
    assert paths[0].read_bytes() != paths[1].read_bytes()


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_picture_is_made_again_in_the_chunk_of_its_job(
    tmp_path: Path, base: str, chunk: int | None
) -> None:
    """One row fills less than that, and its bits belong to the chunk's size."""
    paths = run(tmp_path, base, 1, cluster={"chunk": chunk})
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [(row["chunk"], row["compiled"]) for row in rows] == [(chunk or 2, False)] * 2
    assert rows[0]["lanes"] < 3
    for path in paths:
        found = again(path)
        assert (found.identical, found.differs) == (True, [])
        told = json.loads(found.texts["context_diffusion"])
        assert (told["chunk"], told["compiled"]) == (chunk or 2, False)


def test_a_chunk_that_this_machine_lacks_is_told(made: Path) -> None:
    path = pictures(made)[0]
    path.write_bytes(retold(path, chunk=32, compiled=True))
    [chunk, compiled, *pixels] = again(path).differs
    assert chunk.startswith("chunk: 32 then, ")
    assert compiled == "compiled: True then, False now"
    assert all(line.startswith("pixels: ") for line in pixels)
    path.write_bytes(retold(path, chunk=None, compiled=None, device=None))  # of an earlier version
    assert not [line for line in again(path).differs if not line.startswith("pixels: ")]


def test_a_picture_alone_says_enough_where_the_user_lets_it_read(
    made: Path, tmp_path: Path, base: str
) -> None:
    alone = tmp_path / "copy.png"
    alone.write_bytes(pictures(made)[2].read_bytes())
    with pytest.raises(JobError, match="--model"):
        again(alone)
    with pytest.raises(JobError, match=r"missing_file.*--base"):
        again(alone, model=base)
    assert again(alone, None, base, made / "in").identical
    assert again(alone, [str(made / "in")], base, made / "in").identical
    with pytest.raises(JobError, match=r"forbidden_uri.*--allow"):
        again(alone, [str(tmp_path)], base, made / "in")
    beside = made / "in" / "copy.png"
    shutil.move(alone, beside)
    assert again(beside, model=base).identical
    beside.unlink()


def sources(path: Path) -> list[str]:
    told = json.loads(read_metadata(path.read_bytes())["context_diffusion"])
    return [told["query"], *told["context"]]


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_published_picture_names_no_folder_of_the_machine_that_made_it(
    tmp_path: Path, base: str, form: str
) -> None:
    """Local sources are told relative to the manifest, also those that lie elsewhere; URIs stay."""
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(picture(7)).save(tmp_path / "elsewhere" / "inline", "PNG")
    changes = {
        "query": str(tmp_path / "in" / "picture-3.png"),
        "context": [f"file://{tmp_path}/elsewhere/inline", "picture-1.png"],
    }
    write_manifest(tmp_path / "in", 2, {0: changes})
    shutil.copy(tmp_path / "elsewhere" / "inline", tmp_path / "in" / "inline")
    write_manifest(tmp_path / "in", 2, {0: changes, 1: {"query": "inline"}})
    paths = run(tmp_path, base, image_format=form, allow=[str(tmp_path)])
    assert sources(paths[0]) == ["picture-3.png", "../elsewhere/inline", "picture-1.png"]
    assert sources(paths[2])[0] == "./inline", "not one whose bytes lay in the manifest"
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [rows[0]["query"], *rows[0]["context"]] == sources(paths[0])
    for number in (0, 2):
        data = paths[number].read_bytes()
        assert str(tmp_path / "in").encode() not in data
        assert again(paths[number]).identical
    shutil.move(tmp_path / "in", tmp_path / "moved")
    with pytest.raises(JobError, match="missing_file"):
        again(paths[2])
    assert again(paths[2], base=tmp_path / "moved").identical


def test_what_an_earlier_version_told_in_full_is_found(made: Path) -> None:
    path = pictures(made)[0]
    whole = [str(made / "in" / name) for name in sources(path)]
    path.write_bytes(retold(path, query=whole[0], context=whole[1:]))
    assert again(path).identical


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_other_formats_are_made_again_too(tmp_path: Path, base: str, form: str) -> None:
    path = run(tmp_path, base, 1, image_format=form)[1]
    assert path.suffix == f".{form}"
    assert again(path).identical


def test_without_metadata_the_row_of_output_says_it(tmp_path: Path, base: str) -> None:
    path = run(tmp_path, base, 1, metadata=False)[1]
    assert read_metadata(path.read_bytes()) == {}
    assert b"trainedAlgorithmicMedia" not in path.read_bytes()
    assert find_origin(str(path)).metadata["guidance_scale"] == 1.1  # which the Parquet row holds as float32
    found = again(path)
    assert (found.identical, found.texts) == (True, {})
    (alone := tmp_path / "copy.png").write_bytes(path.read_bytes())
    with pytest.raises(JobError, match="metadata: false"):
        find_origin(str(alone))


def test_pictures_that_lie_in_the_manifest_are_read_there(tmp_path: Path, base: str) -> None:
    manifest = Path(write_manifest(tmp_path / "in", 2))
    rows = pq.read_table(manifest).to_pylist()
    for row in rows:
        row["query"] = {"bytes": (tmp_path / "in" / row["query"]).read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    path = run(tmp_path, base)[2]
    assert json.loads(read_metadata(path.read_bytes())["context_diffusion"])["query"] == "inline"
    assert again(path).identical
    pq.write_table(pa.Table.from_pylist([{**row, "id": f"new-{row['id']}"} for row in rows]), manifest)
    _last_group.clear()  # of this process
    with pytest.raises(JobError, match="has no row 'row-001' any more"):
        again(path)


def test_a_changed_source_is_named(made: Path) -> None:
    path = pictures(made)[0]
    name = find_origin(str(path)).metadata["context"][0]
    source = made / "in" / name
    Image.fromarray(picture(99)).save(source)
    found = again(path)
    assert not found.identical
    assert found.differs[0] == f"context: its pixels changed: {name}"
    assert found.differs[1].startswith("pixels: ")
    source.unlink()
    with pytest.raises(JobError, match=f"missing_file: {source} does not exist"):
        again(path)


def test_other_versions_device_and_pixels_are_told(made: Path) -> None:
    path = pictures(made)[0]
    path.write_bytes(retold(path, versions={"torch": "1.0"}, device="cuda"))
    found = again(path)
    assert found.identical
    assert found.differs[0] == "device: cuda then, cpu now"
    assert found.differs[1].startswith("torch: 1.0 then, ")
    pixels = decode_image(path.read_bytes(), find_origin(str(path)).planned.limits).copy()  # type: ignore[union-attr]
    pixels[0, 0, 0] ^= 3
    path.write_bytes(encode_image(pixels, "png", read_metadata(path.read_bytes())))
    found = again(path)
    assert not found.identical
    assert found.differs[-1].startswith("pixels: 0.02% differ, by at most ")


def test_other_weights_are_told(tmp_path: Path, base: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(base, copy)
    path = run(tmp_path, str(copy), 1)[0]
    index = copy / "model_index.json"
    index.write_text(index.read_text() + "\n")  # other bytes, another revision; the same pictures
    found = again(path)
    assert found.identical
    assert found.differs[0].startswith(f"model: {copy}@")
    shutil.rmtree(copy)
    with pytest.raises(ModelError, match="not found: expected a folder"):
        again(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": None}, "has no seed"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, got '-1'"),
        ({"control": "magic"}, "control"),
        ({"query": 7}, "query: Input should be a valid string, got '7'"),
        ({"context": "picture-1.png"}, "context: Input should be a valid list"),
        ({"versions": ["torch"]}, "versions"),
        ({"fit": "squeeze"}, "fit"),
        ({"chunk": "all"}, "chunk: Input should be a valid integer, got 'all'"),
        ({"compiled": 7}, "compiled"),
        ({"model": "../../elsewhere@0"}, "--model '../../elsewhere'"),
        ({"query": "/etc/hostname"}, "forbidden_uri"),
        ({"query": "http://169.254.169.254/latest"}, "forbidden_uri"),
    ],
)
def test_what_a_strange_picture_says_is_not_trusted(
    made: Path, tmp_path: Path, base: str, changes: dict[str, Any], words: str
) -> None:
    strange = tmp_path / "strange.png"
    strange.write_bytes(retold(pictures(made)[0], **changes))
    with pytest.raises(JobError, match=words):
        again(strange, [str(made / "in")], None if "model" in changes else base, made / "in")


def test_what_is_no_picture_of_ours_is_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        find_origin(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(JobError, match="not one of JPEG, PNG"):
        find_origin(str(tmp_path / "text.png"))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("context_diffusion", "{")
    for name, texts in {"plain.png": None, "broken.png": chunks}.items():
        Image.fromarray(picture(1)).save(tmp_path / name, pnginfo=texts)
        with pytest.raises(JobError, match="the image has no metadata of its generation"):
            find_origin(str(tmp_path / name))
    path = pictures(made)[0]
    path.write_bytes(pictures(made)[3].read_bytes())
    with pytest.raises(JobError, match="but its OUTPUT names"):
        find_origin(str(path))
    for output, words in ((path, "exists already"), (tmp_path / "picture.gif", "ends in .png, .webp")):
        with pytest.raises(JobError, match=words):
            writer(str(output))
