"""Where a shard's pictures lie: files, the Parquet's own column, both, or a WebDataset tar.

All are created before the part and none is overwritten: what an earlier attempt left gives the rows its checksums.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from typing import Any

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import part_name
from context_diffusion.core.schema import ID, OUTPUT
from context_diffusion.outputs.output_folder import Output, members, to_tar

Rows = list[dict[str, Any]]
TIMES = ("created_at", "seconds")  # stand in the part alone: what is created must be equal for equal rows


def place(output: Output, job: GenerateJob, shard: int, rows: Rows, pictures: list[bytes | None]) -> None:
    """Stores each row's picture (None: it has none); fills in file_name, sha256 and image. What stands there stays."""
    if job.images_in in ("files", "both"):
        _files(output, job, shard, rows, pictures)
    elif job.images_in == "webdataset":
        _tar(output, job, shard, rows, pictures)
    for row, picture in zip(rows, pictures, strict=True):
        if picture is not None:
            row["sha256"] = hashlib.sha256(picture).hexdigest()
            if job.images_in in ("parquet", "both"):
                row["image"] = {"bytes": picture, "path": row.get("file_name")}


def picture_name(job: GenerateJob, row: dict[str, Any]) -> str:
    """Of a row's picture, in its folder or tar."""
    key = tar_key(row[ID]) if job.images_in == "webdataset" else safe_name(row[ID])
    return f"{key}-{row['index']}.{job.file_format}"


def standing(output: Output, job: GenerateJob, shard: int) -> set[str]:
    """The names of the pictures that an earlier attempt at the shard left."""
    if job.images_in == "webdataset":
        tar = f"{output.root}/webdataset/{part_name(shard)}.tar"
        return {name for name, _ in members(output.storage.read(tar))} if output.storage.exists(tar) else set()
    return set(output.storage.list(f"{output.root}/images/{part_name(shard)}"))


def _files(output: Output, job: GenerateJob, shard: int, rows: Rows, pictures: list[bytes | None]) -> None:
    folder = f"images/{part_name(shard)}"
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        if picture is None:
            continue
        row["file_name"] = f"{folder}/{picture_name(job, row)}"
        uri = f"{output.root}/{row['file_name']}"
        if not output.storage.create(uri, picture):
            # An earlier attempt's picture stands there (made on another kind of device, perhaps): the row is its.
            pictures[number] = output.storage.read(uri)


def _tar(output: Output, job: GenerateJob, shard: int, rows: Rows, pictures: list[bytes | None]) -> None:
    """KEY.png and KEY.json of each picture, one after the other, as the webdataset package reads them."""
    name = f"webdataset/{part_name(shard)}.tar"
    uri, wanted = f"{output.root}/{name}", dict[str, bytes]()
    for row, picture in zip(rows, pictures, strict=True):
        if picture is not None:
            member = picture_name(job, row)
            row["file_name"] = f"{name}/{member}"
            row["sha256"] = hashlib.sha256(picture).hexdigest()
            told = {column: row.get(column) for column in OUTPUT.names if column not in (*TIMES, "image", "file_name")}
            wanted |= {member: picture, f"{member.split('.')[0]}.json": json.dumps(told, sort_keys=True).encode()}
    if not wanted or output.storage.create(uri, to_tar(wanted)):
        return
    earlier = dict(members(output.storage.read(uri)))
    if wanted.keys() - earlier.keys():  # rows that failed then
        output.storage.replace(uri, to_tar(wanted | earlier))
    for number, row in enumerate(rows):
        if pictures[number] is not None:
            member = row["file_name"].rsplit("/", 1)[1]
            pictures[number] = earlier.get(member, pictures[number])


def safe_name(row_id: str) -> str:
    """A file name of an id: letters, digits and -_. stay; what is cut or replaced is told apart by a hash."""
    plain = unicodedata.normalize("NFC", row_id)
    kept = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:80].lstrip(".") or "_"
    if kept == row_id and kept == kept.lower():
        return kept
    return f"{kept}-{_digest(row_id)}"


def tar_key(row_id: str) -> str:
    """The same without dots: in a WebDataset the first dot of a name ends its key."""
    name = safe_name(row_id)
    return f"{name.replace('.', '_')}-{_digest(row_id)}" if "." in name else name


def _digest(row_id: str) -> str:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
