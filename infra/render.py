"""`ccsr cluster render`: what starts a Ray cluster, written from its config."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from infra.cluster import ClusterConfig, WorkersConfig
from infra.errors import ConfigError
from infra.kuberay import manifests
from infra.storage import write_bytes

KINDS = ("kuberay", "slurm")
TEMPLATE = Path(__file__).parent / "templates" / "slurm.sbatch"


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
    if kind == "slurm":
        return {f"{config.name}.sbatch": _slurm(config)}
    return manifests(config)


def _slurm(config: ClusterConfig) -> str:
    """The batch script: one component of the job per group of nodes, the head on the first node of the first."""
    if not config.command:
        raise ConfigError(
            "Slurm runs a job, and the config names none", where="command", todo="add command: [train, -c, FILE]"
        )
    places = {
        "AWS_ENDPOINT_URL": config.s3.endpoint_url,
        "AWS_DEFAULT_REGION": config.s3.region,
        "MLFLOW_TRACKING_URI": config.mlflow_uri,
    }
    groups = [group for _, group in config.groups()]
    values = {
        "options": "\n#SBATCH hetjob\n".join("\n".join(_sbatch(config, group)) for group in groups),
        "setup": "\n".join([*config.slurm.setup, *(f"export {k}={shlex.quote(v)}" for k, v in places.items() if v)]),
        "num_nodes": str(sum(group.max_nodes for group in groups)),
        "head_options": _ray_options(config, groups[0]),
        "workers": "\n".join(_workers(config, number, groups) for number in range(len(groups))),
        "command": shlex.join(["ccsr", *config.command]),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], text)


def _sbatch(config: ClusterConfig, group: WorkersConfig) -> list[str]:
    options = {
        "job-name": config.name,
        "account": config.slurm.account,
        "partition": group.partition,
        "nodes": group.max_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": group.cpus,
        "mem": f"{group.memory_gib}G",
        "gpus-per-node": group.gpus or None,
        "time": f"{config.slurm.hours}:00:00",
        "signal": "B:TERM@300",
    }
    return [*(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None), "#SBATCH --requeue"]


def _ray_options(config: ClusterConfig, group: WorkersConfig) -> str:
    options = [f"--{key}={value}" for key, value in group.ray_options(group.cpus).items()]
    labels = [f"--labels={key}={value}" for key, value in config.labels(group).items()]
    return " ".join([*options, f"--num-gpus={group.gpus}", *labels])


def _workers(config: ClusterConfig, number: int, groups: Sequence[WorkersConfig]) -> str:
    """The line that starts Ray on the nodes of one component of the job, but for the head's node."""
    group = groups[number]
    num_nodes = group.max_nodes - (number == 0)
    if num_nodes == 0:
        return "# the head is the only node of its kind"
    component = f"--het-group={number} " if len(groups) > 1 else ""
    head = '--exclude="$SLURMD_NODENAME" ' if number == 0 else ""
    start = f'until ray start --address="$RAY_ADDRESS" {_ray_options(config, group)} --block; do sleep 5; done'
    return f"srun {component}--nodes={num_nodes} --ntasks={num_nodes} {head}bash -c '{start}' &"
