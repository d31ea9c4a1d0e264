"""The parts of a Ray cluster: one config for KubeRay manifests, an MLflow server and a Slurm script."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config, Location
from infra.files.storage import is_s3
from infra.process.ray_runtime import GPU_KIND, KIND

# Names as Kubernetes takes them: of the cluster (from which longer ones are made), of objects, of labels.
KubernetesName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
ObjectName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
LabelKey = Annotated[
    str,
    Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$", max_length=317),
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
Effect = Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]
SlurmName = Annotated[str, Field(pattern=r"^[\w.,@+-]+$")]  # of a #SBATCH line, which no shell quoting protects


class Taint(Config):
    """A taint of a node; `value` may be empty."""

    key: LabelKey
    value: LabelValue = ""
    effect: Effect


class Toleration(Config):
    """Of a taint. `key`: none tolerates every one; `effect`: none is every effect."""

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Effect | None = None

    @model_validator(mode="after")
    def _meant(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("`value` has no effect with operator: Exists")
        if self.key is None and self.operator == "Equal":
            raise ValueError("a toleration without `key` has operator: Exists")
        return self

    def covers(self, taint: Taint) -> bool:
        key = self.key is None or self.key == taint.key
        value = self.operator == "Exists" or (self.value or "") == taint.value
        return key and value and self.effect in (None, taint.effect)


# The container that KubeRay puts beside the head where the cluster grows.
AUTOSCALER: dict[str, float] = {"cpus": 0.5, "memory_gib": 1}

# Managed clusters taint their GPU nodes so; a toleration that meets no taint does nothing.
GPU_TOLERATION = Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")


class NodeType(Config):
    """What a machine of a group gives to pods (`kubectl describe node`, Allocatable), to check the group against."""

    cpus: float = Field(gt=0)
    memory_gib: float = Field(gt=0)
    gpus: int = Field(0, ge=0)
    taints: tuple[Taint, ...] = ()


class NodeConfig(Config):
    """One node. Ray gets these numbers, and the container or Slurm job is limited to them."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=2)
    object_store_gib: int = Field(1, ge=1, description="of memory_gib; shared memory for batches on their way")
    shm_gib: int | None = Field(None, ge=1, description="Kubernetes: size of /dev/shm; none: object_store_gib + 1")
    disk_gib: int = Field(20, ge=1, description="Kubernetes: size of /tmp, for logs, spilled objects and downloads")
    node_selector: dict[LabelKey, LabelValue] = Field({}, description="e.g. karpenter.sh/capacity-type: spot")
    tolerations: tuple[Toleration, ...] = Field((), description="Kubernetes: e.g. of a spot pool's taint")
    node_type: NodeType | None = Field(None, description="Kubernetes: the machine; what does not fit is refused")

    @model_validator(mode="after")
    def _fits(self) -> "NodeConfig":
        if 2 * self.object_store_gib > self.memory_gib:
            raise ValueError("object_store_gib may be at most half of memory_gib: processes need the rest")
        if not self.object_store_gib <= self.shared_gib <= self.memory_gib:
            raise ValueError("shm_gib is at least object_store_gib, which is in it, and at most memory_gib")
        return self

    @model_validator(mode="after")
    def _schedulable(self) -> "NodeConfig":
        if self.node_type is None:
            return self
        for name in ("cpus", "memory_gib", "gpus"):
            asked, there = getattr(self, name, 0), getattr(self.node_type, name)
            if asked > there:
                raise ValueError(f"{name}: {asked} does not fit node_type, which has {there}: pods stay Pending")
        for taint in self.node_type.taints:
            if taint.effect != "PreferNoSchedule" and not any(one.covers(taint) for one in self.all_tolerations):
                raise ValueError(f"no toleration covers node_type's taint {taint.key}: pods stay Pending")
        return self

    @property
    def all_tolerations(self) -> tuple[Toleration, ...]:
        """Those of the config and, with GPUs, of the taint that managed clusters give GPU nodes."""
        usual = (GPU_TOLERATION,) if getattr(self, "gpus", 0) and GPU_TOLERATION not in self.tolerations else ()
        return (*self.tolerations, *usual)

    @property
    def shared_gib(self) -> int:
        return self.shm_gib or self.object_store_gib + 1

    def ray_options(self, num_cpus: int) -> dict[str, str]:
        """For `ray start`, or KubeRay's rayStartParams."""
        return {"num-cpus": str(num_cpus), "object-store-memory": str(self.object_store_gib * 2**30)}


class WorkersConfig(NodeConfig):
    """A group of equal nodes, `min_nodes` to `max_nodes` on Kubernetes; Slurm starts `max_nodes`."""

    min_nodes: int = Field(0, ge=0)
    max_nodes: int = Field(ge=1)
    gpus: int = Field(0, ge=0, description="per node")
    partition: SlurmName | None = Field(None, description="Slurm")

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersConfig":
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) is above max_nodes ({self.max_nodes})")
        return self


class S3Config(Config):
    """How pods reach S3. Credentials are never written here: name a Secret or a service account that has them."""

    endpoint_url: str | None = None
    region: str = "us-east-1"
    secret: ObjectName | None = Field(None, description="a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    service_account: ObjectName | None = Field(None, description="one with a cloud role instead of keys; none: made")


class MlflowConfig(Config):
    """An MLflow server in the cluster. `database_secret`: a Secret whose `uri` is a Postgres URI; none: sqlite."""

    artifacts: Location
    database_secret: ObjectName | None = None
    disk_gib: int = Field(10, ge=1, description="for sqlite")

    def unused(self) -> dict[str, str]:
        return {"disk_gib": "with database_secret"} if self.database_secret else {}

    @field_validator("artifacts")
    @classmethod
    def _on_s3(cls, artifacts: str) -> str:
        if not is_s3(artifacts):
            raise ValueError("artifacts are on S3, which all pods reach: s3://BUCKET/PATH")
        return artifacts


class KubernetesConfig(Config):
    """What an administrator asks of every object and pod."""

    namespace: Namespace = "default"
    labels: dict[LabelKey, LabelValue] = Field({}, description="of every object and pod")
    annotations: dict[LabelKey, str] = Field({}, description="of every object and pod")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pull_secrets: tuple[ObjectName, ...] = Field((), description="Secrets of the image's registry")
    priority_class: ObjectName | None = None
    queue: ObjectName | None = Field(None, description="Kueue's LocalQueue: starts suspended, at max_nodes")
    active_deadline_seconds: int | None = Field(None, ge=60, description="after which a RayJob is ended")
    tls_secret: ObjectName | None = Field(None, description="a Secret with a CA's tls.crt and tls.key: Ray encrypts")
    operator_namespace: Namespace | None = Field(None, description="KubeRay's, which asks the heads; none: any")
    monitoring_namespace: Namespace | None = Field(None, description="Prometheus': may read metrics; adds a PodMonitor")


class SlurmConfig(Config):
    """What only Slurm needs."""

    account: SlurmName | None = None
    hours: int = Field(24, ge=1)
    setup: tuple[str, ...] = Field((), description="shell lines that put `ccsr` and `ray` on PATH on every node")


class ClusterConfig(Config):
    """A Ray cluster: a head that takes no work (KubeRay), CPU nodes for sharding and degradation, GPU nodes."""

    job: Literal["cluster"]
    name: KubernetesName = "ccsr"
    image: str | None = Field(None, description="built from the Dockerfile; Kubernetes needs it")
    head: NodeConfig = NodeConfig(cpus=4, memory_gib=16)
    cpu_workers: WorkersConfig | None = None
    gpu_workers: WorkersConfig | None = None
    s3: S3Config = S3Config()
    mlflow: MlflowConfig | None = None
    mlflow_uri: str | None = Field(None, description="a server that is there already")
    command: tuple[str, ...] = Field((), description="words after `ccsr`: a RayJob, or what the Slurm script runs")
    kubernetes: KubernetesConfig = KubernetesConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _head_fits_with_its_autoscaler(self) -> "ClusterConfig":
        there = self.head.node_type
        for name, beside in AUTOSCALER.items() if there and not self.kubernetes.queue else ():
            if (asked := getattr(self.head, name) + beside) > getattr(there, name):
                raise ValueError(
                    f"head.{name}: {asked} with the autoscaler's {beside} does not fit node_type, which has "
                    f"{getattr(there, name)}: the head stays Pending"
                )
        return self

    @field_validator("image")
    @classmethod
    def _pinned(cls, image: str | None) -> str | None:
        if image is not None and not re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", image):
            raise ValueError("pin the image by a tag other than latest, or by its digest")
        return image

    @field_validator("gpu_workers")
    @classmethod
    def _with_gpus(cls, workers: WorkersConfig | None) -> WorkersConfig | None:
        if workers is not None and not workers.gpus:
            raise ValueError("say how many `gpus` a node has")
        return workers

    @field_validator("cpu_workers")
    @classmethod
    def _without_gpus(cls, workers: WorkersConfig | None) -> WorkersConfig | None:
        if workers is not None and workers.gpus:
            raise ValueError("nodes with `gpus` are gpu_workers")
        return workers

    def groups(self) -> list[tuple[str, WorkersConfig]]:
        """The groups of workers that there are, by name, GPU nodes first."""
        groups = (("gpu", self.gpu_workers), ("cpu", self.cpu_workers))
        return [(name, group) for name, group in groups if group is not None]

    def most_gpus(self) -> int:
        """GPUs of the largest size that the cluster grows to."""
        return sum(group.gpus * group.max_nodes for _, group in self.groups())

    def secrets(self) -> dict[str, str]:
        """The Secrets that have to exist before the manifests are applied, and what each holds."""
        found: dict[str | None, str] = {
            self.s3.secret: "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
            self.mlflow.database_secret if self.mlflow else None: "uri",
            self.kubernetes.tls_secret: "tls.crt and tls.key of a CA",
        }
        found |= dict.fromkeys(self.kubernetes.pull_secrets, ".dockerconfigjson")
        return {name: keys for name, keys in found.items() if name}

    def labels(self, group: WorkersConfig) -> dict[str, str]:
        """Ray labels of a group's nodes. Work that needs no GPU keeps off GPU nodes where there are others for it."""
        return {KIND: GPU_KIND} if group.gpus and self.cpu_workers else {}
