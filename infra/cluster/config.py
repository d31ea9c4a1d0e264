"""What a Ray cluster is made of: one config for KubeRay manifests, an MLflow server and a Slurm script."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config, Location
from infra.ray_runtime import GPU_KIND, KIND
from infra.storage import is_s3

KubernetesName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
SlurmName = Annotated[str, Field(pattern=r"^[\w.,@+-]+$")]  # of a #SBATCH line, which no shell quoting protects


class NodeConfig(Config):
    """One node. Ray gets these numbers, and the container or Slurm job is limited to them."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=2)
    object_store_gib: int = Field(1, ge=1, description="of memory_gib; shared memory for batches on their way")

    @model_validator(mode="after")
    def _fits(self) -> "NodeConfig":
        if 2 * self.object_store_gib > self.memory_gib:
            raise ValueError("object_store_gib may be at most half of memory_gib: processes need the rest")
        return self

    def ray_options(self, num_cpus: int) -> dict[str, str]:
        """For `ray start`, or KubeRay's rayStartParams."""
        return {"num-cpus": str(num_cpus), "object-store-memory": str(self.object_store_gib * 2**30)}


class WorkersConfig(NodeConfig):
    """A group of equal nodes, `min_nodes` to `max_nodes` on Kubernetes; Slurm starts `max_nodes`."""

    min_nodes: int = Field(0, ge=0)
    max_nodes: int = Field(ge=1)
    gpus: int = Field(0, ge=0, description="per node")
    node_selector: dict[str, str] = Field({}, description="Kubernetes: e.g. karpenter.sh/capacity-type: spot")
    tolerations: tuple[dict[str, str], ...] = Field((), description="Kubernetes: e.g. of a spot pool's taint")
    partition: SlurmName | None = Field(None, description="Slurm")


class S3Config(Config):
    """How pods reach S3. Credentials are never written here: name a Secret or a service account that has them."""

    endpoint_url: str | None = None
    region: str = "us-east-1"
    secret: str | None = Field(None, description="a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    service_account: str | None = Field(None, description="a service account with a cloud role instead of keys")


class MlflowConfig(Config):
    """An MLflow server in the cluster. `database_secret`: a Secret whose `uri` is a Postgres URI; none: sqlite."""

    artifacts: Location
    database_secret: str | None = None
    disk_gib: int = Field(10, ge=1, description="for sqlite")

    @field_validator("artifacts")
    @classmethod
    def _on_s3(cls, artifacts: str) -> str:
        if not is_s3(artifacts):
            raise ValueError("artifacts are on S3, which all pods reach: s3://BUCKET/PATH")
        return artifacts


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
    slurm: SlurmConfig = SlurmConfig()

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

    def labels(self, group: WorkersConfig) -> dict[str, str]:
        """Ray labels of a group's nodes. Work that needs no GPU keeps off GPU nodes where there are others for it."""
        return {KIND: GPU_KIND} if group.gpus and self.cpu_workers else {}
