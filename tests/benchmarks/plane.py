"""CPU time to load and write a row: this flow against a plain Ray Data pipeline of the same rows. No model in
either.

A row: a 1024 px JPEG as query, three contexts of 512 px out of 40, a 512 px PNG out, contexts at 224 px for
the engine, which gives the query back. CPU seconds are those of every process (Ray's too), and a row's are
the slope between a short and a long run, so that starts cost nothing.

python tests/benchmarks/plane.py [--rows 100 400]
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Request, Result
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.plan import open_plan
from context_diffusion.inputs.context_images import SquareCrop
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values

SIDE, CONTEXT, FILES = 512, 224, 40


def write_input(folder: Path, rows: int) -> Path:
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    photographs = [
        Image.fromarray(data.astronaut()),
        Image.fromarray(data.coffee()),
        Image.fromarray(data.rocket()),
    ]
    for number in range(FILES):
        image = photographs[number % 3].rotate(number)
        image.resize((1024, 1024), Image.Resampling.BICUBIC).save(folder / f"q{number}.jpg", quality=90)
        image.resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"c{number}.jpg", quality=90)
    table = {
        "id": [f"{n:06d}" for n in range(rows)],
        "query": [f"q{n % FILES}.jpg" for n in range(rows)],
        "context": [[f"c{(n * 7 + k) % FILES}.jpg" for k in range(3)] for n in range(rows)],
    }
    pq.write_table(pa.table(table), folder / f"{rows}.parquet")
    return folder / f"{rows}.parquet"


class Echo:
    """An engine at the seam: the query is the picture."""

    def generate(self, requests: list[Request]) -> list[Result]:
        return [Result(request.query, 0.0, 1, "cpu") for request in requests]


def echo(*_: Any) -> Echo:
    return Echo()


def ours(manifest: Path, out: Path) -> None:
    from context_diffusion.cluster import dataflow
    from context_diffusion.cluster.ray_session import ray_session

    settings = {"width": SIDE, "height": SIDE}
    job = GenerateJob.model_validate(job_values(str(manifest), out, settings=settings, control="disabled"))
    storage = Storage()
    output = Output(str(out), storage)
    plan = open_plan(job, output, storage)
    plan = replace(plan, model=replace(plan.model, contexts=SquareCrop(CONTEXT)))  # as a large model's
    reads, load, write = build_stages(plan, output, set(), frozenset())
    with ray_session(2, None):
        for _ in dataflow.run_flow(job, reads, load, write, echo, lambda _: None):  # type: ignore[arg-type]
            pass


def plain(manifest: Path, out: Path) -> None:
    """As a good user of Ray Data writes it: a task a row for the pictures, an actor with batches, Parquet at
    the end."""
    import ray

    folder, images = manifest.parent, out / "images"
    images.mkdir(parents=True)

    def pixels(name: str, side: int) -> Any:
        return np.asarray(
            Image.open(folder / name).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        )

    def load(row: dict[str, Any]) -> dict[str, Any]:
        contexts = np.stack([pixels(name, CONTEXT) for name in row["context"]])
        return row | {"query_pixels": pixels(row["query"], SIDE), "context_pixels": contexts}

    class Engine:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"id": batch["id"], "query": batch["query"], "pixels": batch["query_pixels"]}

    def save(row: dict[str, Any]) -> dict[str, Any]:
        sink = io.BytesIO()
        Image.fromarray(row.pop("pixels")).save(sink, "PNG")
        (images / f"{row['id']}.png").write_bytes(sink.getvalue())
        return row | {"file_name": f"images/{row['id']}.png"}

    ray.init(num_cpus=2, object_store_memory=2**29, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(str(manifest), override_num_blocks=8).map(load, num_cpus=0.5)
    made = rows.map_batches(Engine, batch_size=64, concurrency=1, num_cpus=0.5).map(save, num_cpus=0.5)
    made.write_parquet(str(out / "data"))
    ray.shutdown()


class Meter:
    """CPU seconds of this process and of all that it started, looked at five times a second."""

    def __enter__(self) -> Meter:
        self._own, self._seen, self._stop = time.process_time(), dict[int, float](), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    spent = process.cpu_times()
                    self._seen[process.pid] = spent.user + spent.system
                except psutil.Error:
                    continue

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.process_time() - self._own + sum(self._seen.values())


def measure(run: Callable[[Path, Path], None], folder: Path, name: str, counts: list[int]) -> float:
    """-> CPU milliseconds a row."""
    spent, started = [], time.perf_counter()
    for count in counts:
        with Meter() as meter:
            run(write_input(folder / "in", count), folder / f"{name}-{count}")
        assert len(list((folder / f"{name}-{count}").rglob("*.png"))) == count
        spent.append(meter.seconds)
    slope = (spent[1] - spent[0]) / (counts[1] - counts[0]) * 1e3
    shown = ", ".join(f"{s:.1f} s for {c}" for s, c in zip(spent, counts, strict=True))
    print(f"{name}: {shown}; {slope:.1f} ms of CPU a row ({time.perf_counter() - started:.0f} s)", flush=True)
    return slope


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), sys.path[0]])  # for Ray's workers
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, nargs=2, default=[100, 400])
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_input(folder / "in", 1)
        slow, quick = (
            measure(run, folder, name, given.rows) for run, name in ((plain, "plain"), (ours, "ours"))
        )
        print(f"ours / plain: {quick / slow:.2f}")
