"""`ccsr restore`: enlarge photographs with a trained model, every output from a recorded seed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from infra.config import Config, apply_overrides, parse_config
from infra.display.progress import progress
from infra.errors import CcsrError, ConfigError, printable
from infra.files.locations import location, model_location
from infra.files.publish import put_if_absent
from infra.files.storage import exists, join, list_files, read_bytes
from infra.imaging.images import refuse
from infra.imaging.pictures import FORMATS_OF, MAX_SIDE, Picture, PictureFormat, decode_picture, encode_picture
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig
from infra.process.numerics import NumericsConfig, set_numerics
from infra.process.ray_runtime import RayConfig, on_ray
from infra.run import claim_output
from pipelines.restore_plan import (
    Failures,
    RestoreTask,
    check_own,
    failure_of,
    identity,
    output_size,
    pending,
    place_of,
    plan,
    record_source,
)
from training.config import SamplingConfig
from training.models import CcsrModel, fetch_model, model_id
from training.restore.seeded_runs import PreparedImage, check_sampling, prepare_image, restore_batch, rows_at_once_on

SHARED_KEY = "frames"  # the key of all images under `noise: shared`
IMAGES_PER_TASK = 8
BATCH_PIXELS = 16 * 512**2


class RestoreRuntime(Config):
    """How the job runs; with other `rows_at_once` or `threads` than `ccsr evaluate` has, single levels of the pictures
    move by float rounding."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    rows_at_once: int | None = Field(
        None, ge=1, description="(image, run) pairs in a batch; none: 1 on a CPU, by their size on a GPU"
    )
    threads: int = Field(1, ge=1, description="torch threads of a process on CPUs")
    use_ray: bool = False
    num_actors: int = Field(1, ge=1, description="with use_ray")
    ray: RayConfig = RayConfig()

    def unused(self) -> dict[str, str]:
        unused = {"threads": "on a GPU"} if self.device == "cuda" else {}
        return unused if self.use_ray else unused | dict.fromkeys(("num_actors", "ray"), "without use_ray")


class RestoreConfig(Config):
    """What a restoration depends on, besides the images and the model."""

    num_runs: int = Field(1, ge=1)
    seed: int = 0
    scale: float = Field(4, ge=1, le=8)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    format: PictureFormat | Literal["input"] = Field("png", description="of the results; input: each as its source")
    quality: int = Field(95, ge=1, le=100, description="of JPEG and WebP")
    convert: bool = Field(False, description="convert what the results cannot hold: CMYK, alpha in JPEG, 16 bits")
    gps: bool = Field(False, description="keep the position in EXIF")
    side_by_side: bool = Field(False, description="each result beside its enlarged source, in one picture")
    noise: Literal["image", "shared"] = Field(
        "image", description="shared: one noise field for all, the frames of a film"
    )
    sampling: SamplingConfig = SamplingConfig()
    numerics: NumericsConfig = NumericsConfig()
    runtime: RestoreRuntime = RestoreRuntime()

    def unused(self) -> dict[str, str]:
        return {"quality": f"with format: {self.format}"} if self.format in ("png", "tiff") else {}


def restore_config(options: Mapping[str, Any]) -> RestoreConfig:
    """The config that the options of `ccsr restore` make. Raises ConfigError."""
    sampling = {name: options[name] for name in ("t_max", "t_min")}
    if options["fp16"]:
        if options["dtype"] not in ("auto", "float16"):
            raise ConfigError("--fp16 and --dtype differ", where="command line", todo="give one of them")
        options = {**options, "dtype": "float16"}
    sampling |= {"num_steps": options["steps"], "tile": options["tile"] or None, "color_fix": options["color"]}
    if options["format"] is None:  # the suffix of an OUTPUT that is a file
        options = {**options, "format": FORMATS_OF.get(Path(options["output"]).suffix.lower())}
    named = ("seed", "scale", "dtype", "convert", "gps", "side_by_side")
    values = {name: options[name] for name in named} | {
        **{name: options[name] for name in ("format", "quality", "noise") if options[name] is not None},
        "num_runs": options["runs"],
        "sampling": sampling,
        "runtime": {"device": options["device"], "threads": options["threads"], "use_ray": options["ray"]},
    }
    return parse_config(apply_overrides(values, options["set_"] or []), RestoreConfig, where="command line")


def pick_device(runtime: RestoreRuntime) -> Literal["cpu", "cuda"]:
    """The device that `auto` chooses: a GPU where this machine has one.

    ConfigError for `auto` on Ray, whose actors run on other machines than this one, and for a GPU that is not here.
    """
    if runtime.use_ray and runtime.device == "auto":
        raise ConfigError(
            "device auto asks the machine that starts the job, not those that restore",
            where="device, with --ray",
            todo="add --device cuda for one GPU per actor, or --device cpu",
        )
    if runtime.device == "cuda" and not runtime.use_ray and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here", where="device", todo="use --device cpu, or --ray on a cluster with GPUs"
        )
    if runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return runtime.device


def resolved(config: RestoreConfig) -> RestoreConfig:
    """`config` without `auto`; a GPU's dtype is bfloat16, a CPU's float32. ConfigError for float16 on a CPU."""
    device = pick_device(config.runtime)
    if config.dtype == "float16" and device == "cpu":
        raise ConfigError("float16 needs a GPU", where="dtype", todo="use --dtype float32, or --device cuda")
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if config.dtype == "auto" else config.dtype
    runtime = config.runtime.model_copy(update={"device": device})
    return config.model_copy(update={"dtype": dtype, "runtime": runtime})


def restore(source: str, output: str, model_uri: str, config: RestoreConfig) -> int:
    """Restore one file, or all images below a folder or s3:// prefix; returns how many images there are.

    `model_uri`: a model directory, the folder of the run that trained one, or runs:/ID.
    Writes OUT/NAME.png (or the suffix of another `format`), or OUT/runs/NN/NAME.png for several runs, OUT/run.json, and
    per image OUT/records/KEY.json with the size and hash of its file. OUT may be a file if INPUT is one: its suffix is
    then the format, and NAME.png.run.json is beside it. What is there is kept if it was made from the same content. A
    file that cannot be used, or that has changed since, is passed over; PartialResultError names them at the end.
    """
    config = resolved(config)
    source, output = map(location, (source, output))
    model_uri = find_model(model_location(model_uri), TrackingConfig())
    inputs: dict[str, Any] = {"model": model_id(model_uri)}
    check_sampling(model_uri, config.sampling)
    folder, tasks = plan(source, output, config.num_runs, config.format)
    name = "run.json"
    if folder != output:
        inputs["source"] = identity(read_bytes(source))
        name = f"{output.removeprefix(join(folder, ''))}.run.json"
        check_own(output, join(folder, name))
    if config.noise == "shared":
        frame_size = _frame_size(tasks[0].uri)
        tasks = [replace(task, key=SHARED_KEY, frame_size=frame_size) for task in tasks]
    libraries = ("torch", "diffusers", "numpy", "pillow")
    claim_output(folder, config, job="restore", inputs=inputs, libraries=libraries, name=name)
    failures = Failures()
    done = set(list_files(output)) if folder == output else {output} if exists(output) else set()
    images = pending(tasks, folder, config.num_runs, done, failures)
    with progress("restoring", len(tasks), done=len(tasks) - len(images)) as advance:
        for uri, kind, message in restore_pending(images, folder, model_uri, config):
            if kind:
                failures.add(uri, kind, message)
            advance(1, printable(uri.rpartition("/")[2]))
    failures.report(len(tasks), source)
    return len(tasks)


def _frame_size(uri: str) -> tuple[int, int]:
    """(height, width) of the first frame, upright."""
    return decode_picture(read_bytes(uri), where=uri, form="png", convert=True).rgb.shape[:2]


def restore_pending(
    images: list[RestoreTask], output: str, model_uri: str, config: RestoreConfig
) -> Iterator[tuple[str, str, str]]:
    if not images:
        return
    runtime = config.runtime
    if not runtime.use_ray:
        set_numerics(config.numerics)
        yield from Restorer(config, model_uri, output).restore(images)
        return

    def make() -> Callable[[list[RestoreTask]], list[tuple[str, str, str]]]:
        restorer = Restorer(config, model_uri, output)
        return lambda group: list(restorer.restore(group))

    for outcomes in on_ray(
        make,
        [images[first : first + IMAGES_PER_TASK] for first in range(0, len(images), IMAGES_PER_TASK)],
        config=runtime.ray,
        num_actors=runtime.num_actors,
        device=runtime.device,
        numerics=config.numerics,
        output=output,
    ):
        yield from outcomes


class _Row(NamedTuple):
    image: PreparedImage
    run: int
    picture: Picture
    task: RestoreTask


def load(model_uri: str, config: RestoreConfig) -> CcsrModel:
    """The model on its device; on CPUs torch then has `runtime.threads`, as float rounding depends on their number."""
    if config.runtime.device == "cpu":
        torch.set_num_threads(config.runtime.threads)
    return fetch_model(model_uri, config.runtime.device, getattr(torch, config.dtype))


class Restorer:
    """Keeps one model loaded and restores images with it; whoever writes an output first wins, nothing is replaced."""

    def __init__(self, config: RestoreConfig, model_uri: str, output: str) -> None:
        self._config, self._output = config, output
        self._model = load(model_uri, config)

    def restore(self, images: Iterable[RestoreTask]) -> Iterator[tuple[str, str, str]]:
        """Per task of `pending` its (uri, kind of failure, message), both "" where all its runs were written.

        Neighbouring images whose latents have one shape share batches.
        """
        rows: list[_Row] = []
        for task in images:
            try:
                image, picture = self._prepare(task)
            except (CcsrError, MemoryError, RuntimeError) as error:
                yield task.uri, *failure_of(error)
                continue
            for run in task.runs:
                full = len(rows) >= self._rows_at_once(image)
                if rows and (full or rows[0].image.mean.shape != image.mean.shape):
                    yield from self._write(rows)
                    rows = []
                rows.append(_Row(image, run, picture, task))
        yield from self._write(rows)

    def _prepare(self, task: RestoreTask) -> tuple[PreparedImage, Picture]:
        config, uri = self._config, task.uri
        data = read_bytes(uri)
        form = FORMATS_OF[task.suffix.lower()]
        picture = decode_picture(data, where=uri, form=form, convert=config.convert, gps=config.gps)
        sides = picture.rgb.shape[:2]
        if task.frame_size and task.frame_size != sides:
            expected = "{1}x{0}".format(*task.frame_size)
            what = f"{sides[1]}x{sides[0]} px is not the first frame's size, {expected}"
            raise refuse("frame_size", what, uri, todo="bring all frames to one size, or use --noise image")
        height, width = output_size(sides, config.scale, uri)
        if max(height, width * (1 + config.side_by_side)) > MAX_SIDE.get(form, math.inf):
            what = f"{width}x{height} px is more than a {form} holds"
            raise refuse("too_large", what, uri, todo="use --format png or tiff, or a smaller scale")
        image = prepare_image(self._model, picture.rgb, (height, width), config.sampling, key=task.key)
        record_source(task, data)
        return image, picture

    def _rows_at_once(self, image: PreparedImage) -> int:
        runtime, tile = self._config.runtime, self._config.sampling.tile
        sides = image.enlarged.shape[-2:]
        in_networks = math.prod(side if tile is None else min(side, tile) for side in sides)
        fitting = max(1, min(64, BATCH_PIXELS // in_networks, 4 * BATCH_PIXELS // math.prod(sides)))
        return runtime.rows_at_once or rows_at_once_on(runtime.device, fitting)

    def _write(self, rows: list[_Row]) -> Iterator[tuple[str, str, str]]:
        config = self._config
        if not rows:
            return
        pairs = [(row.image, row.run) for row in rows]
        written = 0
        try:
            for row, picture in zip(
                rows, restore_batch(self._model, pairs, config.sampling, seed=config.seed), strict=True
            ):
                form = FORMATS_OF[row.task.suffix.lower()]
                data = encode_picture(picture, row.picture, form, config.quality, side_by_side=config.side_by_side)
                put_if_absent(place_of(self._output, row.task, row.run, config.num_runs), data)
                written += 1
                if row.run == row.task.runs[-1]:
                    yield row.task.uri, "", ""
        except (MemoryError, RuntimeError) as error:
            for uri in dict.fromkeys(row.task.uri for row in rows[written:]):
                yield uri, *failure_of(error)
