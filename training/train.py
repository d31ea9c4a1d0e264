"""`ccsr train`: Ray Train workers run the loop; the driver checks first, shows progress and writes the model."""

import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, ModelError
from infra.manifest import Manifest
from infra.progress import progress
from infra.ray_runtime import lost_worker, ray_cluster, user_error
from infra.run import claim_output
from infra.storage import download_folder, exists, join, read_bytes, upload_folder
from infra.tracking import open_tracker, tracking_uri
from training.checkpoint import check_tensors, complete_checkpoints, load_checkpoint
from training.config import TrainConfig
from training.models import CcsrModel, build_model, load_model, save_model
from training.steps import build_stage

LIBRARIES = ("torch", "deepspeed", "diffusers", "numpy", "opencv-python-headless", "pillow")


def run_train(config: TrainConfig) -> str:
    """Train one stage and return the URI of its model directory, OUT/model; a finished run returns at once.

    What an earlier run of the same config left is continued. Raises before anything starts where the data, the
    starting model or the output cannot be used.
    """
    manifests = [Manifest.load(uri) for uri in config.data]
    _check_crop(config, manifests)
    model_uri = join(config.output, "model")
    inputs = {"dataset_ids": [manifest.dataset_id for manifest in manifests], "init_from": model_id(config.init_from)}
    run = claim_output(config.output, config, job="train", inputs=inputs, libraries=LIBRARIES)
    if exists(join(model_uri, "ccsr.json")):
        return model_uri
    facts = {"fingerprint": run["fingerprint"], **inputs, "git_commit": git_commit()}
    build_stage(initial_model(config), config)  # what does not fit or is missing is told here, not by a worker
    _fit(config, manifests, run, facts)
    _export(config, model_uri)
    return model_uri


def _check_crop(config: TrainConfig, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if config.crop_px % (manifest.facts["scale"] or 1):
            raise ConfigError(
                f"crop_px = {config.crop_px} is no multiple of these shards' scale, {manifest.facts['scale']}",
                where=manifest.uri,
                todo="choose a multiple of it",
            )


def model_id(uri: str | None) -> str:
    """Identifies a model directory by its content (the hash of its ccsr.json); "random" for none."""
    if not uri:
        return "random"
    place = join(uri, "ccsr.json")
    if not exists(place):
        raise ModelError(
            "there is no complete model directory here (ccsr.json is missing)",
            where=uri,
            todo="give the `model` folder of a finished training run",
        )
    return hashlib.sha256(read_bytes(place)).hexdigest()[:16]


def initial_model(config: TrainConfig) -> CcsrModel:
    """The fp32 model that training starts from. ModelError if the directory's networks are not the config's."""
    if not config.init_from:
        return build_model(config.model, config.seed)
    with tempfile.TemporaryDirectory(prefix="ccsr-model-") as folder:
        model = load_model(download_folder(config.init_from, Path(folder)))
    if model.config != config.model:
        raise ModelError(
            f"the model there is {model.config.model_dump()}, the config asks for {config.model.model_dump()}",
            where=config.init_from,
            todo="set `model` to what the directory holds, or start from another one",
        )
    return model


def _fit(config: TrainConfig, manifests: list[Manifest], run: dict[str, Any], facts: dict[str, Any]) -> None:
    runtime = config.runtime
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    with ray_cluster(runtime.ray), tempfile.TemporaryDirectory(prefix="ccsr-train-") as scratch:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        tags = {"ccsr.stage": str(config.stage), "git.commit": facts["git_commit"]}
        tracker = open_tracker(config.tracking, run, tags)
        board = _board_class().remote()
        settings = {
            "config": config,
            "manifests": manifests,
            "facts": facts,
            "tracking_uri": tracking_uri(config.tracking),
            "run_id": tracker.run_id,
            "board": board,
        }
        environment = {"OMP_NUM_THREADS": str(runtime.threads_per_worker)}
        environment |= {name: os.environ[name] for name in ("CCSR_WEIGHTS",) if name in os.environ}
        if not runtime.use_gpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        trainer = TorchTrainer(
            _worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=runtime.num_workers, use_gpu=runtime.use_gpu),
            torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
            run_config=RunConfig(
                name=run["fingerprint"][:16], storage_path=scratch, worker_runtime_env={"env_vars": environment}
            ),
        )
        bar = progress(f"training stage {config.stage}", config.num_updates)
        try:
            with bar as advance, _Watch(lambda: ray.get(board.read.remote()), advance):
                trainer.fit()
        except KeyboardInterrupt:
            tracker.end("KILLED")
            raise
        except Exception as error:
            tracker.end("FAILED")
            raise user_error(error) or lost_worker(error, config.output) from error
        tracker.end("FINISHED")


def _board_class() -> Any:
    """An actor on which rank 0 writes its progress and from which the driver reads it."""
    import ray

    class Board:
        def __init__(self) -> None:
            self.update, self.note = 0, ""

        def write(self, update: int, note: str) -> None:
            self.update, self.note = update, note

        def read(self) -> tuple[int, str]:
            return self.update, self.note

    return ray.remote(num_cpus=0)(Board)


class _Watch:
    """While the block runs, a thread advances the bar to what the board says."""

    def __init__(self, read: Callable[[], tuple[int, str]], advance: Callable[[int, str], None]) -> None:
        self._read, self._advance, self._shown = read, advance, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if error[0] is None:
            self._show()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self) -> None:
        update, note = self._read()
        if update > self._shown:
            self._advance(update - self._shown, note)
            self._shown = update


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import cv2
    import deepspeed
    import ray.train
    import torch

    from infra.tracking import Tracker
    from training.loop import WorkerContext, skip_compiled_collectives, train

    config: TrainConfig = settings["config"]
    ray_context = ray.train.get_context()
    rank = ray_context.get_world_rank()
    torch.set_num_threads(config.runtime.threads_per_worker)
    cv2.setNumThreads(1)  # the ingest has threads of its own
    skip_compiled_collectives()
    backend = "nccl" if config.runtime.use_gpu else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    board = settings["board"]
    context = WorkerContext(
        rank=rank,
        world_size=ray_context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        facts=settings["facts"],
        tracker=Tracker.connect(settings["tracking_uri"], settings["run_id"]) if rank == 0 else None,
        on_update=(lambda update, note: board.write.remote(update, note)) if rank == 0 else None,
    )
    train(config, settings["manifests"], initial_model(config), context)


def _export(config: TrainConfig, model_uri: str) -> None:
    """OUT/model: the starting model with the last checkpoint's weights in place of the trained part."""
    model = initial_model(config)
    trained = build_stage(model, config).trained
    place = complete_checkpoints(config.output)[-1]
    weights = load_checkpoint(place).tensors["weights"]
    check_tensors(place, weights, trained)
    trained.load_state_dict(weights, strict=False)  # parameters were checked; there may be buffers besides
    with tempfile.TemporaryDirectory(prefix="ccsr-model-") as folder:
        local = Path(folder) / "model"
        save_model(model, local)
        upload_folder(local, model_uri, last="ccsr.json")


def git_commit() -> str:
    """The commit of the code, or "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
