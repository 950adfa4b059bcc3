"""The queries of infra/grafana and infra/prometheus, and the metrics that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD, ALERTS = INFRA / "grafana" / "dashboard.json", INFRA / "prometheus" / "alerts.yaml"
PROMETHEUS = INFRA / "prometheus" / "prometheus.yaml"


def dashboard() -> dict[str, str]:
    """Panel -> query; the variable `output` is one, too."""
    board = json.loads(DASHBOARD.read_text())
    variables = {one["name"]: one["query"] for one in board["templating"]["list"] if one["type"] == "query"}
    return {
        panel["title"]: target["expr"] for panel in board["panels"] for target in panel["targets"]
    } | variables


def alerts() -> dict[str, str]:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule["expr"] for rule in rules}


def names(queries: dict[str, str]) -> set[str]:
    return {name for query in queries.values() for name in re.findall(r"\bray_\w+", query)}
