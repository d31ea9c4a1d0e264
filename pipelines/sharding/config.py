"""What `ccsr shard` may be asked for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from degradation.config import DegradationConfig
from infra.config import LATER, Config, Location, ModelLocation
from infra.mlflow.server import TrackingConfig
from infra.process.numerics import NumericsConfig
from infra.process.ray_runtime import RayConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]


class Described(Config):
    """What the data card says of a source."""

    name: Name
    licence: str | None = Field(None, description="for the data card; default: the dataset's as distributed")


class FolderSource(Described):
    """The image files below a folder or s3:// prefix, in a zip (`X.zip`, `X.zip!FOLDER`), or fitting a pattern with
    `*`, `**`, `?`.

    `dataset`: one of layouts.yaml, which gives its file names and their number. Another number is refused.
    """

    kind: Literal["folder"]
    path: Location
    dataset: str | None = None
    expected_files: int | None = Field(None, ge=1, description="default: the dataset's")
    first: int | None = Field(None, ge=1, description="take the first N in sorted order, after the count was checked")
    caption: Annotated[str | None, LATER] = Field(
        None, description="the suffix (txt) of captions beside the images: NAME.txt"
    )


class PairsSource(Described):
    """HR images and their LR images in two places (each as in a folder source), matched by name; see docs/formats.md.

    The LR images are kept as they are: `degradation` has to be null.
    """

    kind: Literal["pairs"]
    hr: Location
    lr: Location
    scale: int = Field(4, ge=1, le=16, description="HR px per LR px, along one side")
    expected_files: int | None = Field(None, ge=1, description="pairs; another number is refused")


class ShardsSource(Described):
    """The HR images of a finished shard set, to crop or degrade again."""

    kind: Literal["shards"]
    path: Location


class ListSource(Described):
    """The images that a list names: .txt (one path a line), .csv, .json, .jsonl or .parquet with the column `image`.
    Paths are relative to the list, absolute, or s3:// URIs. With `lr`, the column of LR images, rows are pairs."""

    kind: Literal["list"]
    path: Location
    image: str = Field("image", description="the column of (HR) images")
    lr: str | None = Field(None, description="the column of LR images, which are kept; `degradation` has to be null")
    scale: int = Field(4, ge=1, le=16, description="with lr: HR px per LR px, along one side")
    caption: Annotated[str | None, LATER] = Field(None, description="the column of captions")

    def unused_in_fingerprint(self) -> dict[str, str]:
        return {} if self.lr else {"scale": "without lr"}


class WebDatasetSource(Described):
    """The images in WebDataset tars that others made: a tar, a folder of them, or braces (`{000..099}.tar`)."""

    kind: Literal["webdataset"]
    path: Location
    member: str | None = Field(None, description="the image's extension (jpg, hr.png) where samples have several")
    caption: Annotated[str | None, LATER] = Field(None, description="the captions' extension (txt)")


class ParquetSource(Described):
    """The images in a column of parquet files: a file, a folder of them, or braces. The column holds the files' bytes,
    plain or as Hugging Face's {bytes, path}."""

    kind: Literal["parquet"]
    path: Location
    column: str = "image"
    caption: Annotated[str | None, LATER] = Field(None, description="the column of captions, which are text")


class PackageSource(Described):
    """Named files inside an installed Python package: the photographs that come with scikit-image, for one."""

    kind: Literal["package"]
    package: str
    files: Annotated[tuple[str, ...], Field(min_length=1)]


Source = Annotated[
    FolderSource | PairsSource | ListSource | WebDatasetSource | ParquetSource | ShardsSource | PackageSource,
    Field(discriminator="kind"),
]


def brings_lr(source: Source) -> bool:
    """Whether a source's images have their own LR images."""
    return isinstance(source, PairsSource) or (isinstance(source, ListSource) and source.lr is not None)


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


class GridCrop(Config):
    """Overlapping windows as BasicSR's and Real-ESRGAN's extraction of sub-images makes them: every `step_px`, and one
    more at the end where more than `rest_px` would be left over. A file's windows are all in one shard."""

    kind: Literal["grid"]
    size_px: int = Field(480, ge=32)
    step_px: int = Field(240, ge=1)
    rest_px: int = Field(0, ge=0)


Crop = Annotated[WholeCrop | CenterCrop | RandomCrop | GridCrop, Field(discriminator="kind")]


class LatentsNumerics(NumericsConfig):
    """Deterministic unless that is switched off: a shard that is written again has to have the same bytes."""

    deterministic: bool = True


class LatentsConfig(Config):
    """Stored moments of HR and LR by the encoders of a model directory; for StableSR's stage 2 its samples too."""

    model: ModelLocation
    sampled_steps: int = Field(0, ge=0, description="steps from the LR to a stored sample (published: 200); 0: none")
    batch_size: int = Field(8, ge=1, description="images at once; always consecutive ones of a shard")
    numerics: LatentsNumerics = LatentsNumerics()


class ShardRuntime(Config):
    """How the job runs; nothing here changes a byte of the result."""

    ray: RayConfig = RayConfig()
    device: Literal["cpu", "cuda"] = Field("cpu", description="for latents; cuda: one GPU per actor")
    num_actors: int | None = Field(None, ge=1, description="shards written at once; default: one per CPU")
    max_failed_fraction: float = Field(0.0, ge=0, le=1, description="more quarantined samples than this: exit code 1")


class ShardConfig(Config):
    """Image sets -> WebDataset shards. `degradation`: a preset's name, a recipe, or none (left to training).

    `scales`: each image is also taken at these sizes (Lanczos); Real-ESRGAN's are 1, 0.75, 0.5, 1/3 and a short side
    of 400 px.
    """

    job: Literal["shard"]
    output: Location
    seed: int = 0
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    short_side_px: int | None = Field(None, ge=32, description="one more copy of each image, shrunk to this short side")
    sixteen_bit: Annotated[Literal["quarantine", "convert"], LATER] = Field(
        "quarantine", description="images of 16 bits a channel; convert: scaled to 8 and rounded"
    )
    cmyk: Annotated[Literal["quarantine", "convert"], LATER] = Field(
        "quarantine", description="CMYK images; convert: to sRGB by their ICC profile"
    )
    crop: Crop = WholeCrop()
    min_gradient_energy: float = Field(
        0.0, ge=0, description="flatter windows are dropped and counted; about 4 is flat"
    )
    max_blockiness: Annotated[float | None, LATER] = Field(
        None, gt=1, description="more visible JPEG blocks; 1: none, 1.3: clearly"
    )
    min_sharpness: Annotated[float, LATER] = Field(
        0.0, ge=0, description="less blurred; see the histograms of `ccsr verify --stats`"
    )
    min_side_px: Annotated[int, LATER] = Field(
        0, ge=0, description="images with a shorter side are dropped and counted, so is the next"
    )
    max_aspect: Annotated[float | None, LATER] = Field(None, ge=1, description="long side over short side")
    dedupe: Annotated[int | None, LATER] = Field(
        None, ge=0, le=8, description="images that look like an earlier one are left out: pHash, bits that may differ"
    )
    degradation: str | DegradationConfig | None = "ccsr"
    draws: int = Field(1, ge=1, description="degradations of each crop")
    samples_per_shard: int = Field(256, ge=1, description="with a grid: files per shard")
    latents: LatentsConfig | None = None
    tracking: TrackingConfig | None = Field(None, description="log the set as a run of MLflow; none: not logged")
    runtime: ShardRuntime = ShardRuntime()

    def unused_in_fingerprint(self) -> dict[str, str]:
        """Draws differ in their degradation, and in the latents that a model samples of them."""
        drawn = self.degradation is not None or (self.latents is not None and self.latents.sampled_steps)
        return {} if drawn else {"draws": "without a degradation: the copies would be equal"}

    @model_validator(mode="after")
    def _on_a_gpu(self) -> Self:
        if self.runtime.device == "cuda" and self.latents is None:
            raise ValueError("`runtime.device` has no effect without latents: leave it out")
        return self

    @property
    def converted(self) -> list[str]:
        """The kinds of images that are converted instead of quarantined."""
        return [kind for kind in ("sixteen_bit", "cmyk") if getattr(self, kind) == "convert"]
