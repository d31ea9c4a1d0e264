"""What `ccsr shard` may be asked for."""

from typing import Annotated, Literal

from pydantic import Field

from degradation import DegradationConfig
from infra.config import Config, Location
from infra.ray_runtime import RayConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]


class FolderSource(Config):
    """Every image file below a folder or s3:// prefix."""

    kind: Literal["folder"]
    name: Name
    path: Location


class PackageSource(Config):
    """Named files inside an installed Python package: the photographs that come with scikit-image, for one."""

    kind: Literal["package"]
    name: Name
    package: str
    files: Annotated[tuple[str, ...], Field(min_length=1)]


Source = Annotated[FolderSource | PackageSource, Field(discriminator="kind")]


class WholeCrop(Config):
    """The image, cut at right and bottom to multiples of the scale."""

    kind: Literal["whole"] = "whole"


class CenterCrop(Config):
    """The published CCSR crop: halve by box while the short side is at least twice `size_px`, shrink it to `size_px`
    by bicubic, cut the centre."""

    kind: Literal["center"]
    size_px: int = Field(512, ge=32)


class RandomCrop(Config):
    """`num_per_image` windows at random places of the image at its own size."""

    kind: Literal["random"]
    size_px: int = Field(512, ge=32)
    num_per_image: int = Field(1, ge=1)


Crop = Annotated[WholeCrop | CenterCrop | RandomCrop, Field(discriminator="kind")]


class ShardRuntime(Config):
    """How the job runs; nothing here changes a byte of the result."""

    ray: RayConfig = RayConfig()
    num_workers: int | None = Field(None, ge=1, description="shards written at once; default: one per CPU")
    max_failed_fraction: float = Field(0.0, ge=0, le=1, description="more quarantined samples than this: exit code 1")


class ShardConfig(Config):
    """Image sets -> WebDataset shards. `degradation`: a preset's name, a recipe, or none (left to training)."""

    job: Literal["shard"]
    output: Location
    seed: int = 0
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    crop: Crop = WholeCrop()
    degradation: str | DegradationConfig | None = "ccsr"
    draws: int = Field(1, ge=1, description="degradations of each crop")
    samples_per_shard: int = Field(256, ge=1)
    runtime: ShardRuntime = ShardRuntime()
