"""What `ccsr evaluate` may be asked for."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config, Location
from infra.mlflow_server import TrackingConfig
from infra.process.numerics import NumericsConfig
from infra.ray_runtime import RayConfig
from training.config import SamplingConfig

MethodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}$")]
MetricName = Literal["psnr_y", "ssim_y", "lpips", "dists", "niqe", "musiq", "clipiqa", "fid"]


class FolderSet(Config):
    """A test set in two folders, an HR and an LR image having one name; without `hr` only LR images."""

    lr: Location
    hr: Location | None = None
    scale: int = Field(4, ge=1, le=8, description="enlargement where there is no HR image")


class BicubicMethod(Config):
    """The LR enlarged by PIL's bicubic: deterministic, run once."""

    kind: Literal["bicubic"]
    name: MethodName = "bicubic"


class ModelMethod(Config):
    """A model directory (trained here or converted from published weights) and how to sample from it."""

    kind: Literal["model"]
    name: MethodName
    model: Location
    sampling: SamplingConfig = SamplingConfig()


class OutputsMethod(Config):
    """Outputs that any other method made: `sampleNN/KEY.png` or `runs/NN/KEY.png` below `outputs`, the first
    `num_runs` in order of their names; or `KEY.png` alone for a deterministic method, run once."""

    kind: Literal["outputs"]
    name: MethodName
    outputs: Location


Method = Annotated[BicubicMethod | ModelMethod | OutputsMethod, Field(discriminator="kind")]


class EvaluateRuntime(Config):
    """How the job runs. Nothing here changes a number but by float rounding: with another `rows_at_once` about 4e-5 of
    a picture's levels move by one."""

    ray: RayConfig = RayConfig()
    num_actors: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, description="torch threads of a CPU actor")
    rows_at_once: int = Field(8, ge=1, description="runs of one image in one batch")


class EvaluateConfig(Config):
    """Restore every image of test sets `num_runs` times by each method; score quality and stability."""

    job: Literal["evaluate"]
    output: Location
    data: Annotated[tuple[Location | FolderSet, ...], Field(min_length=1, description="shard sets and folders")]
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    num_runs: int = Field(10, ge=2, description="the paper's N; one run says nothing about stability")
    seed: int = 0
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = ("psnr_y", "ssim_y")
    crop_border: int = Field(4, ge=0)
    numerics: NumericsConfig = NumericsConfig()
    published: str | None = Field(None, description='the paper\'s numbers to stand beside: "Table 1, RealSR"')
    tracking: TrackingConfig = TrackingConfig()
    runtime: EvaluateRuntime = EvaluateRuntime()

    @model_validator(mode="after")
    def _distinct(self) -> "EvaluateConfig":
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names) or {"hr", "lr"} & set(names):
            raise ValueError(f"the methods' names must differ from each other and from hr and lr: {', '.join(names)}")
        if set(self.metrics) == {"fid"}:
            raise ValueError("fid describes a whole set; name a metric of single images beside it")
        return self
