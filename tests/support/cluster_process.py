"""Nodes with a dashboard, in a process of their own, until stdin ends. The environment says how tokens are
used.

python up.py PORT PORT...     of the dashboard and of the first nodes' agents; stdout: {"address": ...,
"dashboard": ...} stdin: a line of JSON adds a node of those ray.init-like values; any other line is the id of
a node that dies at once. Each is answered by a line: the node's id."""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    dashboard, *agents = map(int, sys.argv[1:])
    node = {"num_cpus": 2, "object_store_memory": 2**28}
    head = node | {
        "include_dashboard": True,
        "dashboard_port": dashboard,
        "dashboard_agent_listen_port": agents[0],
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    added = [cluster.add_node(**node, dashboard_agent_listen_port=port) for port in agents[1:]]
    told = {"address": cluster.address, "dashboard": f"http://127.0.0.1:{dashboard}"}
    print(json.dumps(told | {"nodes": [one.node_id for one in added]}), flush=True)
    for line in sys.stdin:
        if line.startswith("{"):
            added.append(cluster.add_node(**node | json.loads(line)))
            print(added[-1].node_id, flush=True)
        else:
            cluster.remove_node(
                next(one for one in added if one.node_id == line.strip()), allow_graceful=False
            )
            print(line.strip(), flush=True)
    cluster.shutdown()
