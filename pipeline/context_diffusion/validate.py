"""What is wrong with a job before anything is paid: plan in memory, some rows loaded for real."""

from __future__ import annotations

from typing import Any

from context_diffusion.config import GenerateJob
from context_diffusion.making import write_sheet
from context_diffusion.manifest import expand, open_file
from context_diffusion.model.source import find_model
from context_diffusion.output import Output
from context_diffusion.plan import part_rows
from context_diffusion.scan import Scan
from context_diffusion.schema import ID
from context_diffusion.stages import LoadImages, ReadShard
from context_diffusion.storage import Storage, normal, parent
from context_diffusion.trial import try_rows


def validate_job(job: GenerateJob, sample: int, pictures: str | None = None, price: float | None = None) -> dict[str, Any]:
    """Scans the whole manifest, loads `sample` rows spread over it, writes a probe to OUTPUT and takes it away. -> rows,
    shards, problems of the sampled rows. pictures: where a sheet of their images goes; with it, and the price of an
    engine's machine and hour, what the job will take.

    Raises JobError for what stops the job, StorageError where OUTPUT cannot be written; bad rows are only told, for a run
    turns them into failed rows.
    """
    storage = Storage(job.storage_options)
    model = find_model(job.model)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scan = Scan(job, files, storage)
    size = part_rows(scan.rows, job.rows_per_part)
    shards = [shard for number in range(len(files)) for shard in scan.cut(number, size, 0)]
    load = LoadImages(job, job.allow or [parent(file.uri) for file in files], model.image_size, model.context_size, storage)
    looked, problems, tables = 0, [], []
    chosen = shards[:: max(1, len(shards) // max(sample, 1))] if sample else []
    for shard in chosen:
        left = sample - looked
        if left <= 0:
            break
        read = ReadShard(job, files[shard.file], shard, scan.passed(), storage)
        table = load(read()[0].slice(0, max(1, min(left, -(-sample // len(chosen))))))
        looked += len(table)
        tables.append(table)
        told = table.select([ID, "error_code", "error_message"]).to_pylist()
        problems += [row for row in told if row["error_code"] is not None]
    output = Output(normal(job.output), storage)
    begun = storage.exists(output.plan)
    once = storage.try_writing(output.root)
    figures: dict[str, Any] = {}
    if pictures:
        lines, figures = try_rows(job, model, tables, scan.rows, price)
        write_sheet(pictures, lines)
        figures |= {"pictures": pictures}
    return {
        "output": output.root,
        "begun": begun,
        "rows": scan.rows,
        "shards": len(shards),
        "sampled": looked,
        "problems": problems,
        "model_revision": model.revision,
        "creates_once": once,
        **figures,
    }
