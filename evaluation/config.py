"""What `ccsr evaluate` may be asked for."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config, Location
from infra.ray_runtime import RayConfig
from infra.tracking import TrackingConfig
from training.restore import SamplingConfig

MethodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}$")]


class BicubicMethod(Config):
    """The LR enlarged by PIL's bicubic: deterministic, run once."""

    kind: Literal["bicubic"]
    name: MethodName = "bicubic"


class ModelMethod(Config):
    """A model directory and how to sample from it."""

    kind: Literal["model"]
    name: MethodName
    model: Location
    sampling: SamplingConfig = SamplingConfig()


Method = Annotated[BicubicMethod | ModelMethod, Field(discriminator="kind")]


class EvaluateRuntime(Config):
    """How the job runs. Nothing here changes a number but by float rounding: with another `runs_at_once` about 4e-5 of
    a picture's levels move by one."""

    ray: RayConfig = RayConfig()
    num_actors: int = Field(1, ge=1)
    use_gpu: bool = False
    threads_per_actor: int = Field(1, ge=1, description="torch threads of a CPU actor")
    runs_at_once: int = Field(8, ge=1, description="runs of one image in one batch")


class EvaluateConfig(Config):
    """Restore every image of shard sets `num_runs` times by each method; score quality and stability."""

    job: Literal["evaluate"]
    output: Location
    data: Annotated[tuple[Location, ...], Field(min_length=1)]
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    num_runs: int = Field(10, ge=2, description="the paper's N; one run says nothing about stability")
    seed: int = 0
    metrics: Annotated[tuple[Literal["psnr_y", "ssim_y", "niqe"], ...], Field(min_length=1)] = ("psnr_y", "ssim_y")
    crop_border: int = Field(4, ge=0)
    tracking: TrackingConfig = TrackingConfig()
    runtime: EvaluateRuntime = EvaluateRuntime()

    @model_validator(mode="after")
    def _distinct(self) -> "EvaluateConfig":
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names) or {"hr", "lr"} & set(names):
            raise ValueError(f"the methods' names must differ from each other and from hr and lr: {', '.join(names)}")
        return self
