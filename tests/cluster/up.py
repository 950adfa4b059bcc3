"""Two raylets with a dashboard, in a process of their own, until stdin ends. The environment says how tokens are used.

python up.py PORT PORT PORT     of the dashboard and of the two nodes' agents; stdout: {"address": ..., "dashboard": ...}
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    dashboard, *agents = map(int, sys.argv[1:])
    node = {"num_cpus": 2, "object_store_memory": 2**28}
    head = node | {"include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agents[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    other = cluster.add_node(**node, dashboard_agent_listen_port=agents[1])
    told = {"address": cluster.address, "dashboard": f"http://127.0.0.1:{dashboard}"}
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        if line.strip() == "lose a node":
            cluster.remove_node(other, allow_graceful=False)
            print(json.dumps(told), flush=True)
    cluster.shutdown()
