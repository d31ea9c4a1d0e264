"""Kubernetes manifests: KubeRay's RayCluster and RayJob, and an MLflow server beside them."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from infra.cluster import ClusterConfig, MlflowConfig, NodeConfig, WorkersConfig
from infra.errors import ConfigError
from infra.ray_runtime import MAX_CPUS, MAX_GPUS

CONFIG_FOLDER = "/etc/ccsr"


def manifests(config: ClusterConfig) -> dict[str, str]:
    """File name -> YAML. ConfigError for a config without image, or a job's file that cannot be read."""
    if config.image is None:
        raise ConfigError("Kubernetes needs an image", where="image", todo="build the Dockerfile, push it, name it")
    files = {"raycluster.yaml": _documents(_resource("RayCluster", config.name, _cluster(config, [])))}
    if config.command:
        files["rayjob.yaml"] = _documents(*_ray_job(config))
    if config.mlflow:
        files["mlflow.yaml"] = _documents(*_mlflow(config, config.mlflow))
    return files


class _Dumper(yaml.SafeDumper):
    """Writes values that stand in several places out in each, and text of several lines as lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _documents(*documents: Mapping[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def _resource(kind: str, name: str, spec: Mapping[str, Any], version: str = "ray.io/v1") -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": name}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}


def _cluster(config: ClusterConfig, volumes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A RayClusterSpec (KubeRay 1.6). KubeRay starts Ray; the token goes from its Secret to every container."""
    groups = [
        {
            "groupName": name,
            "minReplicas": group.min_nodes,
            "maxReplicas": group.max_nodes,
            "replicas": group.min_nodes,
            "labels": config.labels(group),
            "rayStartParams": group.ray_options(group.cpus),
            "template": _pod(config, group, "ray-worker", volumes),
        }
        for name, group in config.groups()
    ]
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": 300, "version": "v2"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "labels": _most(config),
            "rayStartParams": config.head.ray_options(0),
            "template": _pod(config, config.head, "ray-head", volumes),
        },
        "workerGroupSpecs": groups,
    }


def _most(config: ClusterConfig) -> dict[str, str]:
    """How far the cluster grows: what a job asks the head before it waits for nodes."""
    groups = [group for _, group in config.groups()]
    gpus = sum(group.gpus * group.max_nodes for group in groups)
    cpus = sum(group.cpus * group.max_nodes for group in groups if not config.labels(group))
    return {MAX_GPUS: str(gpus), MAX_CPUS: str(cpus)}


def _pod(config: ClusterConfig, node: NodeConfig, name: str, volumes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    amounts = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi"}
    spec: dict[str, Any] = {}
    if isinstance(node, WorkersConfig):
        if node.gpus:
            amounts["nvidia.com/gpu"] = str(node.gpus)
        # A spot node is given about two minutes or less; what a worker has not saved by then is done again.
        spec = {
            "terminationGracePeriodSeconds": 60,
            "nodeSelector": node.node_selector,
            "tolerations": node.tolerations,
        }
        spec = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items() if value}
    container = _container(config, name, amounts)
    if volumes:
        container["volumeMounts"] = [{"name": volume["name"], "mountPath": CONFIG_FOLDER} for volume in volumes]
        spec["volumes"] = list(volumes)
    return _pod_template(config, container, spec)


def _container(config: ClusterConfig, name: str, amounts: Mapping[str, str]) -> dict[str, Any]:
    places = {
        "AWS_ENDPOINT_URL": config.s3.endpoint_url,
        "AWS_DEFAULT_REGION": config.s3.region,
        "MLFLOW_TRACKING_URI": config.mlflow_uri or (f"http://{_mlflow_name(config)}:5000" if config.mlflow else None),
    }
    container: dict[str, Any] = {
        "name": name,
        "image": config.image,
        "env": [{"name": key, "value": value} for key, value in places.items() if value],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if config.s3.secret:
        container["envFrom"] = [{"secretRef": {"name": config.s3.secret}}]
    return container


def _pod_template(config: ClusterConfig, container: dict[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    account = {"serviceAccountName": config.s3.service_account} if config.s3.service_account else {}
    user = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    return {"spec": {**account, "securityContext": user, "containers": [container], **spec}}


def _ray_job(config: ClusterConfig) -> list[dict[str, Any]]:
    """The job's YAML files as a ConfigMap, and a cluster of its own that runs the job and is deleted after it."""
    words, files = _shipped(config.command)
    name = f"{config.name}-job"
    volumes = [{"name": "configs", "configMap": {"name": name}}] if files else []
    job = {
        "entrypoint": shlex.join(["ccsr", *words]),
        # Each retry is a new cluster: after a lost head the job goes on from what is complete on S3.
        "backoffLimit": 3,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(config, volumes),
    }
    configs = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files}] if files else []
    return [*configs, _resource("RayJob", name, job)]


def _shipped(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words with each `-c FILE` under CONFIG_FOLDER, and those files' text by name."""
    shipped, files = list(words), dict[str, str]()
    for index in range(1, len(words)):
        if words[index - 1] in ("-c", "--config"):
            path = Path(words[index])
            try:
                files[path.name] = path.read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"the job's config cannot be read ({error.strerror})", where=str(path), todo="correct `command`"
                ) from error
            shipped[index] = f"{CONFIG_FOLDER}/{path.name}"
    return shipped, files


def _mlflow_name(config: ClusterConfig) -> str:
    return f"{config.name}-mlflow"


def _mlflow(config: ClusterConfig, mlflow: MlflowConfig) -> list[dict[str, Any]]:
    """A Deployment and its Service inside the cluster; with sqlite also a disk."""
    name = _mlflow_name(config)
    container = _container(config, "mlflow", {"cpu": "1", "memory": "4Gi"})
    container["env"] = [entry for entry in container["env"] if entry["name"] != "MLFLOW_TRACKING_URI"]
    hosts = ",".join([f"{name}:5000", f"{name}.*:5000", "localhost:*", "127.0.0.1:*"])
    container |= {
        "command": [
            *("mlflow", "server", "--host=0.0.0.0", "--port=5000", f"--allowed-hosts={hosts}"),
            f"--artifacts-destination={mlflow.artifacts}",
        ],
        "ports": [{"containerPort": 5000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 5000}},
    }
    spec: dict[str, Any] = {}
    documents = []
    if mlflow.database_secret:
        secret = {"secretKeyRef": {"name": mlflow.database_secret, "key": "uri"}}
        container["env"].append({"name": "MLFLOW_BACKEND_STORE_URI", "valueFrom": secret})
    else:
        container["env"].append({"name": "MLFLOW_BACKEND_STORE_URI", "value": "sqlite:////data/mlflow.db"})
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": name}}]
        disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{mlflow.disk_gib}Gi"}}}
        documents.append(_resource("PersistentVolumeClaim", name, disk, "v1"))
    app = {"app": name}
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # sqlite has one writer
        "selector": {"matchLabels": app},
        "template": {"metadata": {"labels": app}, **_pod_template(config, container, spec)},
    }
    documents.append(_resource("Deployment", name, deployment, "apps/v1"))
    documents.append(_resource("Service", name, {"selector": app, "ports": [{"port": 5000}]}, "v1"))
    return documents
