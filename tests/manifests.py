"""The rendered manifests of several configs, for tests."""

from pathlib import Path
from typing import Any

import yaml

from infra.cluster.config import ClusterConfig
from infra.cluster.render import render
from infra.config import parse_config

REPOSITORY = Path(__file__).parents[1]
CRDS = next((at / "shared" / "crds" for at in REPOSITORY.parents if (at / "shared" / "crds").is_dir()), None)
ALL = {
    "namespace": "research",
    "labels": {"team": "sr", "example.com/cost-centre": "42"},
    "annotations": {"example.com/owner": "a: b"},
    "pull_policy": "Always",
    "pull_secrets": ["registry"],
    "priority_class": "batch-high",
    "active_deadline_seconds": 86400,
    "tls_secret": "ray-ca",
    "operator_namespace": "kuberay",
    "monitoring_namespace": "monitoring",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "example": {},
    "all": {
        "kubernetes": ALL,
        "s3": {"secret": "keys", "service_account": "robot", "endpoint_url": "http://minio:9000"},
        "gpu_workers": {"min_nodes": 2, "max_nodes": 4, "cpus": 32, "memory_gib": 256, "gpus": 8},
    },
    "queue": {"kubernetes": {"queue": "gpu-queue"}, "mlflow": {"artifacts": "s3://b/m"}},
    "no CPU nodes": {"cpu_workers": None, "mlflow": None},
}


def documents(config: ClusterConfig) -> dict[str, dict[str, Any]]:
    """Everything that is rendered for Kubernetes, by kind and name."""
    files = [text for name, text in render(config, "kuberay").items() if name.endswith(".yaml")]
    found = [document for text in files for document in yaml.load_all(text, yaml.CSafeLoader)]
    return {f"{one['kind']}/{one.get('metadata', one).get('name', '')}": one for one in found}


def example(**changes: Any) -> ClusterConfig:
    values = yaml.safe_load((REPOSITORY / "configs" / "cluster.yaml").read_text())
    values["command"] = ["train", "-c", str(REPOSITORY / "configs" / "ccsr_v2_stage1.yaml"), "--set", "seed=a b"]
    return parse_config(values | changes, ClusterConfig, where="test")


def pods(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod template."""

    def inside(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            return [pod for item in value for pod in inside(item)]
        if not isinstance(value, dict):
            return []
        here = [value] if "containers" in value.get("spec", {}) else []
        return [*here, *(pod for item in value.values() for pod in inside(item))]

    return [pod for document in found.values() for pod in inside(document)]
