"""A real job on a real cluster, as Prometheus sees it: every name that dashboard and alerts ask for, values
that add up."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from context_diffusion.cluster.metrics import METRICS, exported
from support.clusters import TOKEN, Cluster, call, start_cluster, write_job
from support.monitoring import PROMETHEUS, alerts, dashboard, names
from support.output_reader import read_output
from support.processes import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

GPU_ALONE = {exported("gpu_memory_bytes")}
Labels = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def watched() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_metrics_report_interval_ms", "1000")
        yield from start_cluster()


class Scrapes(threading.Thread):
    """Reads the nodes' metrics while a job runs, and finds them, as infra/prometheus/prometheus.yaml has
    Prometheus do it: the last value of each of ours, by name and labels."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        [job] = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
        self.nodes = cluster.dashboard + urlsplit(job["http_sd_configs"][0]["url"]).path
        self.values = dict[tuple[str, str, Labels], float]()
        self.least = dict[str, float]()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(1):
            self.look()

    def look(self) -> None:
        found = json.loads(read(self.nodes, Authorization=f"Bearer {TOKEN}"))
        for node in [target for group in found for target in group["targets"]]:
            with suppress(URLError):  # the autoscaler's port is among them, also where it does not run
                self._take(node, read(f"http://{node}/metrics"))

    def _take(self, node: str, text: str) -> None:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_context_diffusion_"):
                    self.values[node, sample.name, tuple(sorted(sample.labels.items()))] = sample.value
                    self.least[sample.name] = min(sample.value, self.least.get(sample.name, sample.value))

    def counts(self) -> dict[str, dict[str, float]]:
        """What `counted_on_disk` counts too."""
        labels = {"rows": "status", "failed_rows": "code", "attempts": "attempt"}
        names = ("rows", "failed_rows", "images", "shards", "attempts", "written_bytes")
        return {name: self.sums(name, labels.get(name, "output")) for name in names}

    def sums(self, name: str, label: str = "output") -> dict[str, float]:
        """Over all processes."""
        found: defaultdict[str, float] = defaultdict(float)
        for (_, one, labels), value in list(self.values.items()):
            if one == exported(name):
                found[dict(labels)[label]] += value
        return dict(found)


def counted_on_disk(out: Path) -> dict[str, dict[str, float]]:
    """What the counters should say, of an OUTPUT whose shards were each begun once."""
    rows = read_output(out)
    failed = Counter(row["error_code"] for row in rows if row["status"] == "failed")
    ok = {row["id"] for row in rows if row["status"] == "ok"}
    parts = list((out / "data").iterdir())
    files = [*parts, *(out / "images").rglob("*.png")]
    return {
        "rows": {"ok": len(ok), "failed": failed.total()},
        "failed_rows": dict(failed),
        "images": {str(out): len(rows) - failed.total()},
        "shards": {str(out): len(parts)},
        "attempts": {"first": len(parts)},
        "written_bytes": {str(out): sum(path.stat().st_size for path in files)},
    }


def read(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return str(answer.read().decode())


def test_every_name_that_is_asked_for_is_there_and_the_counts_are_the_jobs(
    watched: Cluster, tmp_path: Path
) -> None:
    changes: dict[int, dict[str, Any]] = {
        2: {"scheduler": "magic"},
        5: {"query": "gone.png"},
        14: {"query": "gone.png"},
    }
    job, out = write_job(tmp_path, 16, changes, settings={"num_images": 2}), tmp_path / "out"
    with Scrapes(watched) as seen:
        code, _, log = call(watched, "submit", job, "--wait", "--log-format", "json")
        assert code == 3, log
        expected = counted_on_disk(out)
        deadline = time.monotonic() + PATIENCE_S  # what the processes told last arrives a little later
        while seen.counts() != expected and time.monotonic() < deadline:
            time.sleep(0.5)
    assert seen.counts() == expected
    scraped = {name for _, name, _ in seen.values}
    assert names(dashboard()) | names(alerts()) <= scraped | GPU_ALONE
    assert {exported(name) for name in METRICS} - GPU_ALONE == scraped
    assert set(seen.sums("stage_seconds", "stage")) == {"load", "generate", "write"}
    summary = json.loads((out / "summary.json").read_text())
    used, paid = seen.sums("used_lane_steps")[str(out)], seen.sums("paid_lane_steps")[str(out)]
    assert used / paid == pytest.approx(summary["occupancy"], abs=1e-3)
    assert 0 <= seen.least[exported("rows_left")] <= 16  # a job so short may end before it is told again
    assert {"context", "text"} <= set(seen.sums("cache_misses", "kind"))
    assert set(seen.sums("cache_hits")) == {str(out)}

    events = [json.loads(line) for line in log.splitlines()]
    told = [one for one in events if one.get("job") == str(out)]
    assert {one["id"] for one in told if one["event"] == "row_failed"} == {"row-002", "row-005", "row-014"}
    assert {"submitted", "started", "shard", "progress", "finished"} <= {one["event"] for one in told}
