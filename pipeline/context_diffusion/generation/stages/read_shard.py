"""The first stage: read a shard's rows from its manifest file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import (
    ID,
)
from context_diffusion.core.uris import parent
from context_diffusion.inputs.manifest_files import ManifestFile, read_parquet, read_text, rows_of
from context_diffusion.inputs.rows import RowRules, read_table
from context_diffusion.models.resolution.defaults import refusal
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage


def row_rules(job: GenerateJob, model: ResolvedModel) -> RowRules:
    """Return what a job and its model say about rows. job: with its model's defaults filled in."""
    defaults = model.defaults
    refuses = partial(refusal, defaults, len(job.control_kinds))
    return replace(RowRules.of_job(job), refusal=refuses, context_slots=defaults.context_slots)


@dataclass(frozen=True)
class ReadShard:
    """One read task: the rows of one shard as one table. (Ray Data would merge a task of several shards into
    one block.)"""

    rules: RowRules
    file: ManifestFile
    shard: Shard
    passed: pa.Schema
    storage: Storage
    # --retry-failed: read only the rows that failed in this OUTPUT's part of the shard
    redo: Output | None = None

    def __call__(self) -> list[pa.Table]:
        source = None
        if self.file.format == "parquet":
            source = read_parquet(self.file, self.shard, self.storage)
            names = self.rules.names
            known = [name for name in source.column_names if name in names.values()]
            # a derived id hashes the whole row
            rows = rows_of(source.select(known) if names[ID] in known else source)
        else:
            rows = read_text(self.file, self.shard, self.storage)
        part = self.redo.read_part(self.shard.number, [ID, "status"]) if self.redo else None
        ids = list(dict.fromkeys(part[ID].to_pylist())) if part is not None else None
        table = read_table(
            rows, self.shard.number, self.rules, parent(self.file.uri), self.passed, source, ids
        )
        if part is not None:
            failed = part.filter(pc.equal(part["status"], "failed"))[ID].combine_chunks()
            table = table.filter(pc.is_in(table[ID], failed))
        # empty: another run has written the shard, or Ray retries a finished read
        return [table] if len(table) else []
