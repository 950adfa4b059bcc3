"""The Ray Data flow with a fake engine at scale: rows per second, lost rows, the driver's memory and its cost
per shard, Ray's object store, and the time to find finished parts.

python tests/benchmarks/scale.py [--rows 100000] [--rows-per-part 128] [--cpus 2] [--done 0]

--done: so many parts are made before, by the same stages without Ray: what a driver costs that goes on with a
large OUTPUT is then seen in minutes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.stages.generate import generate
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support import fakes
from support.manifests import job_values
from support.processes import ended, start
from support.tiny import picture

PICTURES = 20


def write_input(folder: Path, rows: int) -> str:
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    table = {
        "id": [f"{n:08d}" for n in range(rows)],
        "query": [f"{n % PICTURES}.png" for n in range(rows)],
        "context": [[f"{(n + 1) % PICTURES}.png"] for n in range(rows)],
    }
    pq.write_table(pa.table(table), folder / "manifest.parquet", row_group_size=10_000)
    return str(folder / "manifest.parquet")


class Watch:
    """Of a driver, twice a second: its memory as its parts come, its CPU seconds, the pages of Ray's object
    store."""

    def __init__(self, pid: int, data: Path) -> None:
        self.driver, self.data = psutil.Process(pid), data
        self.memory: list[tuple[int, int]] = []  # parts, MiB
        self.cpu, self.store = 0.0, 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                self.memory.append(
                    (
                        len(os.listdir(self.data)) if self.data.exists() else 0,
                        self.driver.memory_info().rss >> 20,
                    )
                )
                times = self.driver.cpu_times()
                self.cpu = times.user + times.system
                for child in self.driver.children(recursive=True):
                    status = Path(
                        f"/proc/{child.pid}/status"
                    ).read_text()  # pages of shared memory are the object store's
                    self.store = max(self.store, int(status.split("RssShmem:")[1].split()[0]) >> 10)
            except (psutil.Error, OSError, IndexError):
                if not self.driver.is_running():
                    return
            time.sleep(0.5)

    def at(self, parts: int) -> int:
        """MiB of the driver when so many parts stood."""
        return next((memory for there, memory in self.memory if there >= parts), self.memory[-1][1])


def drive(job: dict[str, Any]) -> tuple[dict[str, Any], Watch]:
    process = start(job, "quick")
    watch = Watch(process.pid, Path(job["output"]) / "data")
    return ended(process), watch


class Alone(fakes.FakeEngine):
    def generate_shard(self, shard: int, rows: list[list[Request]]) -> list[Result | Failure]:
        return self.generate([request for requests in rows for request in requests])


def make_parts(values: dict[str, Any], begin: int, end: int) -> None:
    """These parts of a job's output."""
    job = GenerateJob.model_validate(values)
    output, engine = Output(job.output, Storage()), Alone()
    plan = open_plan(job, output, output.storage)
    reads, load, write = build_stages(plan, output, set(), frozenset())
    for read in reads[begin:end]:
        [table] = read()
        write(generate(load(table), engine, job))


def make_first(values: dict[str, Any], count: int, cpus: int) -> None:
    """The first parts, by so many processes."""
    make_parts(values, 0, 1)  # with the plan, once
    with ProcessPoolExecutor(cpus) as pool:
        begins = range(1, count, 1000)
        list(pool.map(partial(make_parts, values), begins, [min(begin + 1000, count) for begin in begins]))


def main(folder: Path, rows: int, rows_per_part: int, cpus: int, done: int) -> None:
    out = folder / "out"
    values = job_values(
        write_input(folder / "in", rows), out, rows_per_part=rows_per_part, cluster={"num_cpus": cpus}
    )
    if done:
        started = time.perf_counter()
        make_first(values, done, cpus)
        print(f"{done} parts made before in {time.perf_counter() - started:.0f} s", flush=True)
    started = time.perf_counter()
    told, watch = drive(values)
    seconds = time.perf_counter() - started
    assert told.get("exit") == 0, told
    parts = sorted((out / "data").glob("*.parquet"))
    ids = [row for part in parts for row in pq.read_table(part, columns=["id"])["id"].to_pylist()]
    new = len(parts) - done
    print(
        f"{rows} rows in {len(parts)} parts, {done} of them made before, on {cpus} CPUs: {seconds:.0f} s, "
        f"{(rows - done * rows_per_part) / seconds:.1f} rows/s with Ray's start; "
        f"lost {rows - len(set(ids))}, doubled {len(ids) - len(set(ids))}; driver "
        f"{watch.cpu / new * 1e3:.1f} ms of CPU a part, "
        f"{watch.at(done + new // 10)} MiB at a tenth of the parts, {watch.at(len(parts))} MiB at the end; "
        f"object store {watch.store} MiB at most",
        flush=True,
    )
    (out / "_SUCCESS").unlink()
    job, started = GenerateJob.model_validate(values), time.perf_counter()
    output = Output(job.output, Storage())
    open_plan(job, output, output.storage)
    done, counts = output.finished(), output.count()
    found = time.perf_counter() - started
    assert (len(done), counts.rows) == (len(parts), rows)
    started = time.perf_counter()
    told, _ = drive(values)
    assert told["exit"] == 0, told
    print(
        f"resumed: {rows} done rows found in {found:.1f} s, closed again in "
        f"{time.perf_counter() - started:.1f} s"
    )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--rows-per-part", type=int, default=128)
    arguments.add_argument("--cpus", type=int, default=2)
    arguments.add_argument("--done", type=int, default=0, help="parts that stand there before")
    given = arguments.parse_args()
    if given.done * given.rows_per_part >= given.rows:
        arguments.error(f"--done {given.done}: leave some of the {given.rows} rows for the driver")
    with tempfile.TemporaryDirectory() as made:
        main(Path(made), given.rows, given.rows_per_part, given.cpus, given.done)
