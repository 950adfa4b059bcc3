"""The dashboard and the alerts: only metrics that there are, queries that Prometheus takes, alerts that ring
when they should.

What a real scrape holds is looked at in tests/cluster/test_metrics.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from context_diffusion.cluster.metrics import METRICS, exported
from support.monitoring import ALERTS, DASHBOARD, PROMETHEUS, alerts, dashboard, names

KNOWN = {exported(name) for name in METRICS}
promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool: it is in Debian's package prometheus"
)


def test_each_metric_is_on_the_dashboard_and_no_other() -> None:
    assert names(dashboard()) == KNOWN
    assert names(alerts()) <= KNOWN


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text())
    [source] = [one["name"] for one in board["templating"]["list"] if one["type"] == "datasource"]
    panels = board["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{source}}}"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all('{output=~"$output"}' in query for title, query in dashboard().items() if title != "output")


@promtool
def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    queries = {
        title: query.replace("$__rate_interval", "5m")
        for title, query in dashboard().items()
        if title != "output"
    }
    rules = [{"record": f"panel_{number}", "expr": query} for number, query in enumerate(queries.values())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for path in (tmp_path / "panels.yaml", ALERTS):
        done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    """With the token's file in place of a cluster's."""
    (tmp_path / "token").touch()
    text = PROMETHEUS.read_text()
    token = yaml.safe_load(text)["scrape_configs"][0]["http_sd_configs"][0]["authorization"][
        "credentials_file"
    ]
    (tmp_path / "prometheus.yaml").write_text(text.replace(token, str(tmp_path / "token")))
    shutil.copy(ALERTS, tmp_path)
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "4 rules found" in done.stdout


@promtool
def test_alerts_ring_for_runs_that_fail_stand_still_or_waste_lanes_and_for_no_other(tmp_path: Path) -> None:
    path = tmp_path / "test.yaml"
    path.write_text(Path(__file__).with_name("alerts_test.yaml").read_text().replace("ALERTS", str(ALERTS)))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
