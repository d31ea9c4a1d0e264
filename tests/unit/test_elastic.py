"""As many workers as the cluster can give, in legal numbers, on nodes that stay."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from training.data.batches import cpus_of_worker
from training.run.elastic import LegalSizes
from training.runtime import TrainRuntime

NODES = {name: {"CPU": 2.0} for name in "abc"}


def node(name: str, **facts: Any) -> dict[str, Any]:
    return {"NodeID": name, "Alive": True, "Labels": {}, "Resources": NODES[name], **facts}


@pytest.mark.parametrize(
    ("draining", "dead", "possible"), [((), (), 4), (("a",), (), 4), (("a",), ("b",), 2), (("a", "b"), ("c",), 0)]
)
def test_the_largest_legal_size_of_the_nodes_that_stay(
    monkeypatch: pytest.MonkeyPatch, draining: tuple[str, ...], dead: tuple[str, ...], possible: int
) -> None:
    """Six, four, two or no CPUs for a run whose legal sizes are 1, 2 and 4."""
    monkeypatch.setattr(ray, "nodes", lambda: [node(name, Alive=name not in dead) for name in NODES])
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: dict.fromkeys(draining, 0))
    config = ScalingConfig(num_workers=(1, 6), resources_per_worker={"CPU": 1})
    asked: list[str] = []
    board: Any = SimpleNamespace(regroup=SimpleNamespace(remote=asked.append))
    policy = LegalSizes(config, [1, 2, 4, 8], board)
    assert policy._count_possible_workers(NODES) == possible

    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: NODES)
    policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=2, start_time=float("-inf")), None)
    assert asked == (["4 workers have become possible"] if possible == 4 else [])


@pytest.mark.parametrize(("ingest_cpus", "possible"), [(0, 4), (1, 2), (2, 1), (7, 0)])
def test_workers_leave_cpus_for_their_ingest(monkeypatch: pytest.MonkeyPatch, ingest_cpus: int, possible: int) -> None:
    """Two nodes of two CPUs, and one for GPU work, where neither a CPU worker nor its ingest runs."""
    labels = {"c": {"ccsr.io/kind": "gpu"}}
    monkeypatch.setattr(ray, "nodes", lambda: [node(name, Labels=labels.get(name, {})) for name in NODES])
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
    runtime = TrainRuntime.model_validate({"num_workers": {"min": 1, "max": 6}, "ingest_cpus": ingest_cpus})
    config = ScalingConfig(num_workers=(1, 6), resources_per_worker={"CPU": 1})
    policy = LegalSizes(config, [1, 2, 4, 6, 8], None, cpus_of_worker(runtime))
    assert policy._count_possible_workers(NODES) == possible


@pytest.mark.parametrize(("draining", "dead", "fewest"), [(("a",), (), 1), ((), ("a",), 2)])
def test_a_node_that_leaves_takes_its_ingests_cpus(
    monkeypatch: pytest.MonkeyPatch, draining: tuple[str, ...], dead: tuple[str, ...], fewest: int
) -> None:
    """Two workers on the two CPUs that stay would wait forever for samples; with two as the fewest Ray waits."""
    nodes = {name: NODES[name] for name in ("a", "b")}
    monkeypatch.setattr(ray, "nodes", lambda: [node(name, Alive=name not in dead) for name in nodes])
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: dict.fromkeys(draining, 0))
    runtime = TrainRuntime.model_validate({"num_workers": {"min": fewest, "max": 4}, "ingest_cpus": 1})
    config = ScalingConfig(num_workers=(fewest, 4), resources_per_worker={"CPU": 1})
    policy = LegalSizes(config, [size for size in (1, 2, 4) if size >= fewest], None, cpus_of_worker(runtime))
    assert policy._count_possible_workers(nodes) == (1 if fewest == 1 else 0)
