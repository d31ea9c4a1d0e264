"""`ccsr restore film.mp4 large.mp4`: a video enlarged frame by frame with one noise field, its audio copied."""

from pathlib import Path

import numpy as np

from infra.display.progress import progress
from infra.errors import ConfigError, DataError
from infra.files.locations import location, model_location
from infra.files.publish import download, publish_if_absent, staging, temporary_folder
from infra.files.storage import exists, join, sha256_file
from infra.imaging.pictures import resized
from infra.imaging.video import VIDEO_SUFFIXES, WRITTEN, convert, probe
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig
from infra.process.numerics import set_numerics
from infra.run import claim_output
from pipelines.restore import SHARED_KEY, RestoreConfig, load, resolved
from pipelines.restore_plan import check_own, output_size
from training.models import model_id
from training.restore.seeded_runs import check_sampling, prepare_image, restore_batch
from training.sampling import SmoothedColorFix


def is_video(uri: str) -> bool:
    """Whether a file's suffix is a video's."""
    return Path(uri).suffix.lower() in VIDEO_SUFFIXES


def restore_video(source: str, output: str, model_uri: str, config: RestoreConfig) -> int:
    """Restore the video file `source` to `output`, a video file too; returns the number of frames.

    All frames draw from one noise (that of `noise: shared`, the posterior's sample included), share one tile grid, and
    AdaIN's gain is smoothed over time (`SmoothedColorFix`). The whole file is the unit: one process restores it in
    order, it appears when complete, and NAME.mp4.run.json is beside it. An output that is there is kept if it was made
    from the same content. ConfigError for options without effect, and errors as of `probe` and `convert`.
    """
    _check(source, output, config)
    config = resolved(config).model_copy(update={"noise": "shared"})
    source, output = map(location, (source, output))
    model_uri = find_model(model_location(model_uri), TrackingConfig())
    check_sampling(model_uri, config.sampling)
    with temporary_folder("video") as scratch:
        file = download(source, scratch)
        info = probe(file, source)
        size = _size(info.size, config, source)
        found = {"num_bytes": file.stat().st_size, "sha256": sha256_file(file)}
        inputs = {"model": model_id(model_uri), "source": found}
        folder, _, name = output.rpartition("/")
        libraries = ("torch", "diffusers", "numpy", "pillow", "av")
        check_own(output, join(folder, f"{name}.run.json"))
        claim_output(folder, config, job="restore", inputs=inputs, libraries=libraries, name=f"{name}.run.json")
        if exists(output):
            return info.num_frames
        set_numerics(config.numerics)
        model = load(model_uri, config)
        fix = SmoothedColorFix()
        with staging(output) as target, progress("restoring", info.num_frames) as advance:

            def change(frame: np.ndarray) -> np.ndarray:
                image = prepare_image(model, frame, size, config.sampling, key=SHARED_KEY)
                (large,) = restore_batch(model, [(image, 0)], config.sampling, seed=config.seed, fix=fix)
                advance()
                if config.side_by_side:
                    large = np.concatenate([resized(frame, size), large], axis=1)
                return large

            written = (size[0], size[1] * (1 + config.side_by_side))
            convert(file, target, WRITTEN[Path(output).suffix.lower()], written, change, info, source)
            publish_if_absent(target, output)
    return info.num_frames


def _check(source: str, output: str, config: RestoreConfig) -> None:
    problems = {
        "INPUT is no video, OUTPUT is one": not is_video(source),
        f"OUTPUT is no {', '.join(WRITTEN)}": Path(output).suffix.lower() not in WRITTEN,
        "OUTPUT is INPUT": location(source) == location(output),
        "several runs need several files": config.num_runs > 1,
        "a video is restored by one process, in order": config.runtime.use_ray,
        "--format, --convert and --gps are of pictures": "format" in config.model_fields_set
        or config.convert
        or config.gps,
        "a video's frames share one noise": "noise" in config.model_fields_set and config.noise == "image",
        "a video's frames are restored one by one": "rows_at_once" in config.runtime.model_fields_set,
    }
    for what, wrong in problems.items():
        if wrong:
            todo = "give a video and NAME.mp4 without these options, or a folder of its frames"
            raise ConfigError(what, where=output, todo=todo)


def _size(sides: tuple[int, int], config: RestoreConfig, where: str) -> tuple[int, int]:
    """(height, width) of the enlarged frames."""
    height, width = output_size(sides, config.scale, where)
    if height % 2 or width % 2:
        raise DataError(f"{width}x{height} px: H.264 holds even sides only", where=where, todo="use another --scale")
    return height, width
