"""How many workers a run with `num_workers: {min, max}` has: the largest legal world size that the cluster can give."""

from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from infra.process.ray_runtime import GPU_KIND, KIND, MAX_CPUS


class LegalSizes(ElasticScalingPolicy):
    """Ray Train's policy, restricted to legal world sizes, to nodes that are here to stay and take such workers, and to
    as many workers as leave `cpus` for each, its ingest's included; below the fewest Ray waits for nodes.

    Where more workers have become possible it lets the running ones save and leave; the driver then starts anew.
    """

    def __init__(self, config: ScalingConfig, sizes: list[int], board: Any, cpus: int = 0) -> None:
        super().__init__(config)
        self._sizes, self._board, self._cpus = sizes, board, cpus

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        draining = ray._private.state.state.get_draining_nodes()  # alive, but no worker starts there
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        for_cpus = [node for node in nodes if node["Labels"].get(KIND) != GPU_KIND]
        here = {node["NodeID"] for node in (nodes if self.scaling_config.use_gpu else for_cpus)}
        staying = {node: resources for node, resources in reserved_resources.items() if node in here}
        possible = super()._count_possible_workers(staying)
        if self._cpus:
            cpus = sum(node["Resources"].get("CPU", 0) for node in for_cpus)
            if self.scaling_config.use_gpu:  # the ingest's alone, which the cluster may add
                cpus = max([cpus, *(float(node["Labels"].get(MAX_CPUS, 0)) for node in nodes)])
            possible = min(possible, int(cpus) // self._cpus)
        return max((size for size in self._sizes if size <= possible), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._board.regroup.remote(f"{decision.num_workers} workers have become possible")
        return NoopDecision()  # where fewer are possible, the workers of a lost or drained node say so themselves
