"""What `ccsr evaluate` may be asked for."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from infra.config import EXTENDABLE, Config, Location, ModelLocation
from infra.mlflow.server import TrackingConfig
from infra.process.numerics import NumericsConfig
from infra.process.ray_runtime import RayConfig
from training.config import SamplingConfig

MethodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}$")]
NAMED_METRICS = ("psnr_y", "ssim_y", "lpips", "dists", "niqe", "niqe_bt601", "musiq", "clipiqa", "fid")
RESERVED = {"hr", "lr", "lr_perturbed"}  # folders of pictures beside the methods'
CONVENTIONS = {"ccsr": 4, "pyiqa": 0}  # px cut from each side before every metric


def _known_metric(name: str) -> str:
    if name not in NAMED_METRICS and (not name.startswith("pyiqa:") or name == "pyiqa:"):
        raise ValueError(f"unknown metric; choose from {', '.join(NAMED_METRICS)}, or any of pyiqa's as pyiqa:NAME")
    return name


Perturbation = Literal["shift", "jpeg", "noise", "brightness"]
MetricName = Annotated[str, AfterValidator(_known_metric)]


class FolderSet(Config):
    """A test set in two folders, an HR and an LR image having one name; without `hr` only LR images."""

    lr: Location
    hr: Location | None = None
    scale: int = Field(4, ge=1, le=8, description="enlargement where there is no HR image")

    def unused_in_fingerprint(self) -> dict[str, str]:
        return {"scale": "with hr, whose size says it"} if self.hr else {}


class NamedSet(Config):
    """A published test set as distributed, below `path`; test_sets.yaml has its layout, number of images and scale."""

    set: str
    path: Location

    @property
    def layout(self) -> dict[str, Any]:
        """`lr` and `hr` (folders below `path`; no `hr`: LR images only), `num_images`, `scale`, `licence`."""
        return published_sets()[self.set]

    @field_validator("set")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in published_sets():
            raise ValueError(f"unknown test set; choose from {', '.join(published_sets())}")
        return name


@cache
def published_sets() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_name("test_sets.yaml").read_text(encoding="utf-8"))


def _kind_of_set(value: Any) -> str:
    if isinstance(value, str):
        return "shards"
    return "named" if isinstance(value, NamedSet) or (isinstance(value, dict) and "set" in value) else "folders"


# By kind, so that an error is about the kind that was meant.
TestSet = Annotated[
    Annotated[Location, Tag("shards")] | Annotated[FolderSet, Tag("folders")] | Annotated[NamedSet, Tag("named")],
    Discriminator(_kind_of_set),
]


class BicubicMethod(Config):
    """The LR enlarged by PIL's bicubic: deterministic, run once."""

    kind: Literal["bicubic"]
    name: MethodName = "bicubic"


class ModelMethod(Config):
    """A model directory (trained here or converted from published weights) and how to sample from it."""

    kind: Literal["model"]
    name: MethodName
    model: ModelLocation
    sampling: SamplingConfig = SamplingConfig()


class GanMethod(Config):
    """A published network of one deterministic pass (BSRGAN, Real-ESRGAN, SwinIR, ...) as spandrel loads it (extra
    `[gan]`): its .pth or .safetensors file."""

    kind: Literal["gan"]
    name: MethodName
    model: Location


class OutputsMethod(Config):
    """Outputs that any other method made: `sampleNN/KEY.png` or `runs/NN/KEY.png` below `outputs`, the first
    `num_runs` in order of their names; or `KEY.png` alone for a deterministic method, run once. For the LR images in
    `images/lr_perturbed/NAME` of a result with `perturbations`: `perturbed/NAME/KEY.png`."""

    kind: Literal["outputs"]
    name: MethodName
    outputs: Location
    pattern: Annotated[str, "location"] = Field("{key}", description='of the file names: "{key}_out" for KEY_out.png')

    @field_validator("pattern")
    @classmethod
    def _has_key(cls, pattern: str) -> str:
        if pattern.count("{key}") != 1 or "/" in pattern:
            raise ValueError("write {key} once, where the image's name is, and no folders")
        return pattern


Method = Annotated[BicubicMethod | ModelMethod | GanMethod | OutputsMethod, Field(discriminator="kind")]


class EvaluateRuntime(Config):
    """How the job runs. Nothing here changes a number but by float rounding: with another `rows_at_once` about 4e-5 of
    a picture's levels move by one."""

    ray: RayConfig = RayConfig()
    num_actors: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, description="torch threads of a CPU actor")
    rows_at_once: int | None = Field(
        None, ge=1, description="runs of one image in one batch; none: 1 on a CPU, 8 on a GPU"
    )

    def unused(self) -> dict[str, str]:
        return {"threads": "on a GPU"} if self.device == "cuda" else {}


class EvaluateConfig(Config):
    """Restore every image of test sets `num_runs` times by each method; score quality and stability."""

    job: Literal["evaluate"]
    output: Location
    data: Annotated[tuple[TestSet, ...], Field(min_length=1)]
    methods: Annotated[tuple[Method, ...], EXTENDABLE, Field(min_length=1)]
    num_runs: int = Field(10, ge=2, description="the paper's N; one run says nothing about stability")
    seed: int = 0
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = ("psnr_y", "ssim_y")
    convention: Literal["ccsr", "pyiqa"] = Field("ccsr", description="px cut from each side: ccsr 4, pyiqa none")
    perturbations: tuple[Perturbation, ...] = Field((), description="tiny changes of the LR images, for P-STD")
    trace: bool = Field(False, description="score x0 at every visited timestep, of models on the first two images")
    numerics: NumericsConfig = NumericsConfig()
    published: str | None = Field(None, description='the paper\'s numbers to show beside: "Table 1, RealSR"')
    tracking: TrackingConfig = TrackingConfig()
    runtime: EvaluateRuntime = EvaluateRuntime()

    @property
    def crop_border(self) -> int:
        return CONVENTIONS[self.convention]

    @model_validator(mode="after")
    def _distinct(self) -> "EvaluateConfig":
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names) or RESERVED & set(names):
            reserved = ", ".join(sorted(RESERVED))
            raise ValueError(f"the methods' names must differ from each other and from {reserved}: {', '.join(names)}")
        for what in ("perturbations", "metrics"):
            if len(set(getattr(self, what))) != len(getattr(self, what)):
                raise ValueError(f"name each of the {what} once")
        if set(self.metrics) == {"fid"}:
            raise ValueError("fid describes a whole set; name a metric of single images beside it")
        return self
