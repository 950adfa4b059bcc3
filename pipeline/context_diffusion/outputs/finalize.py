"""Finishes an OUTPUT: writes its metadata files, its checksums and then _SUCCESS; and verifies them later."""

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

THREADS = 16  # concurrent requests: object stores have a high latency
OMITTED_COLUMNS = ("status", "image", "seconds", "created_at")  # columns that an ImageFolder's metadata omits
CHECKED = ("data/", "images/", "webdataset/", "plan/")  # folders that may hold files of this job only
SCHEMA = pa.schema([("file_name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
Checksum = tuple[str, int | None, str]  # file name, bytes (None for images), SHA-256


def close(output: Output) -> None:
    """Write images/part-*/metadata.parquet, checksums.parquet, and _SUCCESS with the digest of the latter."""
    with ThreadPoolExecutor(THREADS) as threads:
        by_part = threads.map(lambda shard: _close_part(output, shard), sorted(output.finished()))
        rows = [row for part_rows in by_part for row in part_rows]
        rows += threads.map(lambda name: _checksum(output, name), _plan_files(output))
        for name in ("summary.json", "report.html"):
            if output.storage.exists(f"{output.root}/{name}"):
                rows.append(_checksum(output, name))
    columns = [
        pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)
    ]
    data = to_parquet(pa.table(columns, schema=SCHEMA))
    output.storage.replace(output.checksums, data)
    output.storage.replace(output.success, _success(data))


def _success(checksums: bytes) -> bytes:
    return hashlib.sha256(checksums).hexdigest().encode() + b"\n"


def _plan_files(output: Output) -> list[str]:
    return ["plan.json", *(f"plan/{name}" for name in sorted(output.storage.list(f"{output.root}/plan")))]


def _checksum(output: Output, name: str) -> Checksum:
    return _checksum_of(name, output.storage.read(f"{output.root}/{name}"))


def _checksum_of(name: str, data: bytes) -> Checksum:
    return name, len(data), hashlib.sha256(data).hexdigest()


def _close_part(output: Output, shard: int) -> list[Checksum]:
    """Return the checksums of a part and of its images, and write the metadata of its image folder."""
    name = f"data/{part_name(shard)}.parquet"
    data = output.storage.read(f"{output.root}/{name}")
    part = pq.read_table(io.BytesIO(data))
    checksums: list[Checksum] = [_checksum_of(name, data)]
    stored = part.filter(pc.is_valid(part["file_name"]))
    files = stored["file_name"].to_pylist()
    tars = {f"{file.split('.tar/')[0]}.tar" for file in files if ".tar/" in file}
    if tars:
        return checksums + [_checksum(output, tar) for tar in sorted(tars)]
    if files:
        digests = stored["sha256"].to_pylist()
        checksums += [(file, None, digest) for file, digest in zip(files, digests, strict=True)]
        checksums.append(_write_image_folder(output, shard, stored))
    return checksums


def _write_image_folder(output: Output, shard: int, stored: pa.Table) -> Checksum:
    """Write metadata.parquet beside a part's image files, as `datasets` reads an ImageFolder."""
    name = f"images/{part_name(shard)}/metadata.parquet"
    file_names = [file.rsplit("/", 1)[1] for file in stored["file_name"].to_pylist()]
    columns = [column for column in stored.column_names if column not in (*OMITTED_COLUMNS, "file_name")]
    table = stored.select(columns).add_column(0, "file_name", pa.array(file_names, pa.string()))
    data = to_parquet(table.replace_schema_metadata(None))
    output.storage.replace(f"{output.root}/{name}", data)
    return _checksum_of(name, data)


def verify(output: Output) -> list[str]:
    """Return one line for each error in a finished OUTPUT; an empty list if no byte has changed."""
    if not output.storage.exists(output.success):
        return [f"{output.success}: missing, the job is not finished"]
    data = output.storage.read(output.checksums)
    if _success(data) != output.storage.read(output.success):
        return [f"{output.checksums}: does not match _SUCCESS"]
    checksums = pq.read_table(io.BytesIO(data)).to_pylist()
    errors = list(_file_errors(output, {row["file_name"]: row["sha256"] for row in checksums}))
    if errors:
        return errors
    rows = output.count().rows
    planned = output.read_json(output.plan)["rows"]
    return [] if rows == planned else [f"{output.root}: {rows} rows in data/, {planned} in the manifest"]


def _file_errors(output: Output, digests: dict[str, str]) -> Iterator[str]:
    """Yield a line for each file that is missing, unexpected or changed."""
    present = {uri.removeprefix(f"{output.root}/") for uri in output.storage.files(output.root)}
    yield from (f"{output.root}/{name}: missing" for name in sorted(digests.keys() - present))
    unexpected = [name for name in sorted(present - digests.keys()) if name.startswith(CHECKED)]
    yield from (f"{output.root}/{name}: does not belong to this job" for name in unexpected)

    def is_changed(name: str) -> bool:
        return hashlib.sha256(output.storage.read(f"{output.root}/{name}")).hexdigest() != digests[name]

    with ThreadPoolExecutor(THREADS) as threads:
        for names in _slices(sorted(present & digests.keys())):
            for name, changed in zip(names, threads.map(is_changed, names), strict=True):
                if changed:
                    yield f"{output.root}/{name}: its content changed"


def _slices(names: list[str], size: int = 1000) -> Iterable[list[str]]:
    return (names[i : i + size] for i in range(0, len(names), size))
