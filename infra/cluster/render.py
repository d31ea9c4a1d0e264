"""`ccsr cluster render`: KubeRay manifests or a Slurm script from one config and the templates beside this file."""

import shlex
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infra.cluster.config import AUTOSCALER, ClusterConfig
from infra.display import templating
from infra.errors import ConfigError
from infra.files.publish import write_bytes
from infra.process.ray_runtime import MAX_CPUS, MAX_GPUS

KINDS = ("kuberay", "slurm")
TEMPLATES = Path(__file__).parent / "templates"
CONFIG_FOLDER, TLS_FOLDER, CA_FOLDER = "/etc/ccsr", "/etc/ccsr-tls", "/etc/ccsr-ca"
METRICS_PORT = 8080
PODS = "ccsr.io/cluster"
"""Label of a cluster's Ray pods, those of its jobs too."""
DASHBOARD = "grafana_dashboard.json"
CLOSED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
# A pod's own certificate: by its address, its cluster's services, and as its own client.
CERTIFICATE = f"""cd {TLS_FOLDER}
openssl req -newkey rsa:2048 -nodes -keyout tls.key -subj /CN=ray -out request.csr
names="IP:$POD_IP,IP:127.0.0.1,DNS:localhost,DNS:*.$NAMESPACE.svc.cluster.local"
openssl x509 -req -in request.csr -CA {CA_FOLDER}/tls.crt -CAkey {CA_FOLDER}/tls.key \
  -set_serial "0x$(openssl rand -hex 16)" -days 365 -extfile <(printf 'subjectAltName=%s\n' "$names") -out tls.crt
cp {CA_FOLDER}/tls.crt ca.crt
"""
TLS_VARIABLES = {
    "RAY_USE_TLS": "1",
    "RAY_TLS_SERVER_CERT": f"{TLS_FOLDER}/tls.crt",
    "RAY_TLS_SERVER_KEY": f"{TLS_FOLDER}/tls.key",
    "RAY_TLS_CA_CERT": f"{TLS_FOLDER}/ca.crt",
}


def render_to(config: ClusterConfig, kind: str, folder: Path) -> list[Path]:
    """Write the files of `render` into `folder`."""
    files = {folder / name: text for name, text in render(config, kind).items()}
    for path, text in files.items():
        write_bytes(str(path), text.encode())
    return list(files)


def render(config: ClusterConfig, kind: str) -> dict[str, str]:
    """File name -> content for a kind of cluster, one of KINDS. ConfigError where the config lacks what it needs."""
    if kind not in KINDS:
        raise ConfigError(f"there is no template for `{kind}`", where="--kind", todo=f"use {' or '.join(KINDS)}")
    if config.cpu_workers is None and config.gpu_workers is None:
        raise ConfigError("the cluster has no workers", where="the config", todo="add cpu_workers or gpu_workers")
    return _slurm(config) if kind == "slurm" else _kuberay(config)


def _slurm(config: ClusterConfig) -> dict[str, str]:
    """The batch script: one component of the job per group of nodes, the head on the first node of the first."""
    if not config.command:
        raise ConfigError(
            "Slurm runs a job, and the config names none", where="command", todo="add command: [train, -c, FILE]"
        )
    text = templating.render(
        TEMPLATES / "slurm.sbatch.j2",
        config=config,
        groups=[group for _, group in config.groups()],
        addresses=_addresses(config, config.mlflow_uri),
    )
    return {f"{config.name}.sbatch": text}


def _kuberay(config: ClusterConfig) -> dict[str, str]:
    """Manifests of a RayCluster, of a RayJob where the config has a command, and of an MLflow server."""
    if config.image is None:
        raise ConfigError("Kubernetes needs an image", where="image", todo="build the Dockerfile, push it, name it")
    groups = [group for _, group in config.groups()]
    words, files = _shipped(config.command)
    mlflow_name = f"{config.name}-mlflow"
    mlflow_uri = config.mlflow_uri or (f"http://{mlflow_name}:5000" if config.mlflow else None)
    queue = config.kubernetes.queue
    values = {
        "config": config,
        "metadata": partial(_metadata, config),
        "queued": partial(_metadata, config, **({"kueue.x-k8s.io/queue-name": queue} if queue else {})),
        "pod_metadata": lambda labels: _metadata(config, None, **labels),
        "namespace_of": lambda name: {"matchLabels": {"kubernetes.io/metadata.name": name}} if name else {},
        "ray_pods": {PODS: config.name},
        "pod_labels": {},
        "closed": CLOSED,
        "autoscaler": {"cpu": f"{AUTOSCALER['cpus']:g}", "memory": f"{AUTOSCALER['memory_gib']:g}Gi"},
        "service_account": config.s3.service_account or config.name,
        "ray_version": version("ray"),
        "ray_options": {"metrics-export-port": str(METRICS_PORT)},
        "metrics_port": METRICS_PORT,
        "grows_to": {
            MAX_GPUS: str(config.most_gpus()),
            MAX_CPUS: str(sum(group.cpus * group.max_nodes for group in groups if not config.labels(group))),
        },
        "env": _env(_addresses(config, mlflow_uri)),
        "s3_env": _env(_addresses(config, None)),
        "tls": None,
        "tls_env": _env(TLS_VARIABLES),
        "tls_folder": TLS_FOLDER,
        "ca_folder": CA_FOLDER,
        "certificate": CERTIFICATE,
        "entrypoint": shlex.join(["ccsr", *words]),
        "files": files,
        "config_folder": CONFIG_FOLDER,
        "mlflow_name": mlflow_name,
    }
    base = ["access", *["mlflow"] * bool(config.mlflow), "raycluster"]
    values["resources"] = [f"{name}.yaml" for name in base]
    names = [*base, *["rayjob"] * bool(config.command), "kustomization"]
    files = {f"{name}.yaml": templating.render(TEMPLATES / f"{name}.yaml.j2", **values) for name in names}
    return files | {DASHBOARD: (TEMPLATES / DASHBOARD).read_text(encoding="utf-8")}


def _metadata(config: ClusterConfig, name: str | None, /, **labels: str) -> dict[str, Any]:
    """An object's metadata; without `name` a pod template's. `labels` come beside the config's and count more."""
    of_all, kubernetes = {"app.kubernetes.io/part-of": config.name}, config.kubernetes
    found: dict[str, Any] = {"labels": of_all | kubernetes.labels | labels}
    if kubernetes.annotations:
        found["annotations"] = kubernetes.annotations
    return found if name is None else {"name": name, "namespace": kubernetes.namespace} | found


def _addresses(config: ClusterConfig, mlflow_uri: str | None) -> dict[str, str]:
    """Environment variables that say where S3 and MLflow are."""
    addresses = {
        "AWS_ENDPOINT_URL": config.s3.endpoint_url,
        "AWS_DEFAULT_REGION": config.s3.region,
        "MLFLOW_TRACKING_URI": mlflow_uri,
    }
    return {name: value for name, value in addresses.items() if value}


def _env(addresses: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in addresses.items()]


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
