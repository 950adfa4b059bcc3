"""Stores a shard's images: as files, in the part's `image` column, both, or in a WebDataset tar.

Images are stored before the part and are never overwritten. An image left by an earlier attempt determines
its row's checksum.
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
# Columns that are not in the JSON of a tar: equal rows must give equal files, so it has no times.
PART_ONLY = ("created_at", "seconds", "image", "file_name")


def store_images(
    output: Output, job: GenerateJob, shard: int, rows: Rows, images: list[bytes | None]
) -> None:
    """Store each row's image (None: the row has none). Fills in file_name, sha256 and image of the rows.

    Images that an earlier attempt stored are kept, and replace those in `images`.
    """
    if job.images_in in ("files", "both"):
        _store_files(output, job, shard, rows, images)
    elif job.images_in == "webdataset":
        _store_tar(output, job, shard, rows, images)
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            row["sha256"] = hashlib.sha256(image).hexdigest()
            if job.images_in in ("parquet", "both"):
                row["image"] = {"bytes": image, "path": row.get("file_name")}


def image_name(job: GenerateJob, row: dict[str, Any]) -> str:
    """Return the name of a row's image in its folder or tar."""
    key = tar_key(row[ID]) if job.images_in == "webdataset" else safe_name(row[ID])
    return f"{key}-{row['index']}.{job.file_format}"


def existing_images(output: Output, job: GenerateJob, shard: int) -> set[str]:
    """Return the names of the files that an earlier attempt at the shard stored."""
    if job.images_in == "webdataset":
        tar = f"{output.root}/webdataset/{part_name(shard)}.tar"
        return (
            {name for name, _ in members(output.storage.read(tar))} if output.storage.exists(tar) else set()
        )
    return set(output.storage.list(f"{output.root}/images/{part_name(shard)}"))


def _store_files(
    output: Output, job: GenerateJob, shard: int, rows: Rows, images: list[bytes | None]
) -> None:
    folder = f"images/{part_name(shard)}"
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        if image is None:
            continue
        row["file_name"] = f"{folder}/{image_name(job, row)}"
        uri = f"{output.root}/{row['file_name']}"
        if not output.storage.create(uri, image):
            # An earlier attempt stored it, perhaps from another kind of device: the row describes that image.
            images[number] = output.storage.read(uri)


def _store_tar(output: Output, job: GenerateJob, shard: int, rows: Rows, images: list[bytes | None]) -> None:
    """Store KEY.png and KEY.json of each image, one after the other, as the webdataset package reads them."""
    name = f"webdataset/{part_name(shard)}.tar"
    uri = f"{output.root}/{name}"
    files: dict[str, bytes] = {}
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            member = image_name(job, row)
            row["file_name"] = f"{name}/{member}"
            row["sha256"] = hashlib.sha256(image).hexdigest()
            fields = {column: row.get(column) for column in OUTPUT.names if column not in PART_ONLY}
            files[member] = image
            files[f"{member.split('.')[0]}.json"] = json.dumps(fields, sort_keys=True).encode()
    if not files or output.storage.create(uri, to_tar(files)):
        return
    stored = dict(members(output.storage.read(uri)))
    if files.keys() - stored.keys():  # rows that failed in the earlier attempt
        output.storage.replace(uri, to_tar(files | stored))
    for number, row in enumerate(rows):
        if images[number] is not None:
            member = row["file_name"].rsplit("/", 1)[1]
            images[number] = stored.get(member, images[number])


def safe_name(row_id: str) -> str:
    """Convert an id to a file name of letters, digits and -_. (a changed name gets a hash of the id)."""
    plain = unicodedata.normalize("NFC", row_id)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:80].lstrip(".") or "_"
    if name == row_id and name == name.lower():
        return name
    return f"{name}-{_digest(row_id)}"


def tar_key(row_id: str) -> str:
    """Convert an id to a name without dots: in a WebDataset the first dot of a name ends its key."""
    name = safe_name(row_id)
    return f"{name.replace('.', '_')}-{_digest(row_id)}" if "." in name else name


def _digest(row_id: str) -> str:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
