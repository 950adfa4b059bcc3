"""The end of an OUTPUT: what makes it a dataset, its checksums, _SUCCESS last of all; and the check of every byte later."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from context_diffusion.core.records import part_name
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet

THREADS = 16  # requests at once: object stores answer slowly, but many
LEFT_OUT = ("status", "image", "seconds", "created_at")  # of an ImageFolder's metadata
OURS = ("data/", "images/", "webdataset/", "plan/")
SCHEMA = pa.schema([("file_name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
Checksum = tuple[str, int | None, str]  # bytes: null for pictures, whose rows hold their checksum


def close(output: Output) -> None:
    """Writes images/part-*/metadata.parquet, checksums.parquet and then _SUCCESS with the digest of the latter."""
    with ThreadPoolExecutor(THREADS) as threads:
        parts = [row for rows in threads.map(lambda shard: _close_part(output, shard), sorted(output.finished())) for row in rows]
        plan = threads.map(lambda name: _checksum(output, name), _plan_files(output))
        told = [name for name in ("summary.json", "report.html") if output.storage.exists(f"{output.root}/{name}")]
        rows = [*parts, *plan, *(_checksum(output, name) for name in told)]
    columns = zip(*rows, strict=True)
    data = to_parquet(pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))
    output.storage.replace(output.checksums, data)
    output.storage.replace(output.success, _success(data))


def _success(checksums: bytes) -> bytes:
    return hashlib.sha256(checksums).hexdigest().encode() + b"\n"


def _plan_files(output: Output) -> list[str]:
    return ["plan.json", *(f"plan/{name}" for name in sorted(output.storage.list(f"{output.root}/plan")))]


def _checksum(output: Output, name: str) -> Checksum:
    data = output.storage.read(f"{output.root}/{name}")
    return name, len(data), hashlib.sha256(data).hexdigest()


def _close_part(output: Output, shard: int) -> list[Checksum]:
    """The checksums of a part and of what belongs to it."""
    name = f"data/{part_name(shard)}.parquet"
    data = output.storage.read(f"{output.root}/{name}")
    part = pq.read_table(io.BytesIO(data))
    rows: list[Checksum] = [(name, len(data), hashlib.sha256(data).hexdigest())]
    made = part.filter(pc.is_valid(part["file_name"]))
    files, digests = made["file_name"].to_pylist(), made["sha256"].to_pylist()
    if tars := {f"{file.split('.tar/')[0]}.tar" for file in files if ".tar/" in file}:
        return rows + [_checksum(output, tar) for tar in sorted(tars)]
    if files:
        rows += [(file, None, digest) for file, digest in zip(files, digests, strict=True)]
        rows.append(_image_folder(output, shard, made))
    return rows


def _image_folder(output: Output, shard: int, made: pa.Table) -> Checksum:
    """metadata.parquet beside a part's picture files, as `datasets` reads an ImageFolder."""
    name = f"images/{part_name(shard)}/metadata.parquet"
    names = [file.rsplit("/", 1)[1] for file in made["file_name"].to_pylist()]
    left = [column for column in made.column_names if column not in (*LEFT_OUT, "file_name")]
    table = made.select(left).add_column(0, "file_name", pa.array(names, pa.string()))
    data = to_parquet(table.replace_schema_metadata(None))
    output.storage.replace(f"{output.root}/{name}", data)
    return name, len(data), hashlib.sha256(data).hexdigest()


def verify(output: Output) -> list[str]:
    """What is wrong with a finished OUTPUT, a line each; empty where every byte is as it was written."""
    if not output.storage.exists(output.success):
        return [f"{output.success}: missing, the job is not finished"]
    data = output.storage.read(output.checksums)
    if _success(data) != output.storage.read(output.success):
        return [f"{output.checksums}: does not match _SUCCESS"]
    checksums = pq.read_table(io.BytesIO(data)).to_pylist()
    wrong = [*_files(output, {row["file_name"]: row["sha256"] for row in checksums})]
    if not wrong and (rows := output.count().rows) != (planned := output.read_json(output.plan)["rows"]):
        wrong.append(f"{output.root}: {rows} rows in data/, {planned} in the manifest")
    return wrong


def _files(output: Output, expected: dict[str, str]) -> Iterator[str]:
    found = {uri.removeprefix(f"{output.root}/") for uri in output.storage.files(output.root)}
    yield from (f"{output.root}/{name}: missing" for name in sorted(expected.keys() - found))
    strange = [name for name in sorted(found - expected.keys()) if name.startswith(OURS)]
    yield from (f"{output.root}/{name}: not of this job" for name in strange)

    def differs(name: str) -> bool:
        return hashlib.sha256(output.storage.read(f"{output.root}/{name}")).hexdigest() != expected[name]

    with ThreadPoolExecutor(THREADS) as threads:
        for names in _slices(sorted(found & expected.keys())):
            for name, wrong in zip(names, threads.map(differs, names), strict=True):
                if wrong:
                    yield f"{output.root}/{name}: its bytes changed"


def _slices(names: list[str], size: int = 1000) -> Iterable[list[str]]:
    return (names[i : i + size] for i in range(0, len(names), size))
