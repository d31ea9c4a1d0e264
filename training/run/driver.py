"""`ccsr train`: Ray Train workers run the loop; the driver checks first, shows progress and writes the model."""

import tempfile
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from infra.config import parameters
from infra.display.progress import progress
from infra.errors import CcsrError, ConfigError, DataError, StoppedError, line_of
from infra.files.locations import check_output
from infra.files.storage import exists, join, read_json
from infra.mlflow.models import find_model
from infra.mlflow.server import check_tracking, tracking_uri
from infra.mlflow.tracking import Tracker, track
from infra.process.ray_runtime import cpus_here, ray_cluster, user_error
from infra.run import Progress, claim_output, git_commit
from infra.shards.manifest import Manifest
from infra.shards.tars import open_set
from training.config import TrainConfig
from training.data.batches import check_cpus, cpus_of_worker
from training.data.samples import check_crop, check_stored
from training.models import model_id
from training.run.agreement import OtherRankError, WorkerContext, agree, attempt, sigterm_noted
from training.run.checkpoint import complete_checkpoints, position_of
from training.run.continued import continued
from training.run.cost.requirements import step_cost
from training.run.export import RAW, export_run, initial_model, last_checkpoint, write_model
from training.run.launch import environment, lost_error, placement, show_rates
from training.run.monitoring.board import Pulse, Watch, make_board
from training.run.monitoring.mlflow_training import describe_run, has_unsent, keep_unsent, log_models, try_to_log_models
from training.run.monitoring.validation import Validation
from training.run.step.eight_bit import check_optimizer, optimizer_libraries
from training.run.step.stages import build_stage
from training.runtime import legal_world_sizes

LIBRARIES = ("torch", "deepspeed", "diffusers", "numpy", "opencv-python-headless", "pillow")


def run_train(config: TrainConfig, *, log_only: bool = False) -> str:
    """Train one stage and return the URI of its model directory, OUT/model; a finished run returns at once.

    What an earlier run of the same config left is continued, to more updates too. Raises before anything starts where
    the data, the starting model or the output cannot be used; StoppedError after SIGTERM. `log_only`: send a
    finished run's models to MLflow, as a finished run with `tracking.register` does; DataError for an unfinished one.
    """
    config, manifests, inputs, run = claim_run(config)
    model_uri = join(config.output, "model")
    exported, done = updates_done(config)
    tags = {"ccsr.stage": str(config.stage), "ccsr.num_updates": str(config.num_updates)}
    settings = {**parameters(config), "inputs": inputs}
    tracked = partial(track, config.tracking, run, tags, output=config.output, parameters=settings)
    if exported < config.num_updates and log_only:
        raise DataError("this run is not finished", where=config.output, todo="leave --log-only away")
    if exported == config.num_updates:
        if log_only or config.tracking.register or has_unsent(config.output):
            with tracked() as tracker:
                describe_run(tracker, config, manifests)
                log_models(tracker, config)
        return model_uri
    check_tracking(config.tracking)
    facts = {"fingerprint": run["fingerprint"], "config": run["config"], **inputs, "git_commit": git_commit()}
    last = last_checkpoint(config) if done == config.num_updates else None  # None where it is damaged: it is made again
    if last is None:
        check_start(config, manifests)
    num_gpus = config.runtime.workers.min if config.runtime.device == "cuda" else 0
    with (
        ray_cluster(config.runtime.ray, num_gpus=num_gpus) if last is None else nullcontext(),
        tracked() as tracker,
        sigterm_noted() as sigterm,  # after Ray's start, which sets its own handler
    ):
        if last is None:
            fit(config, manifests, facts, tracker, sigterm)
            last = last_checkpoint(config)
        export_run(config, last, model_uri)  # after SIGTERM too: what was finished counts
        try_to_log_models(tracker, config)
    return model_uri


def preview_train(config: TrainConfig) -> Progress:
    """What `run_train` would do; raises what it would before it starts. Nothing is written."""
    config, manifests, *_ = claim_run(config, write=False)
    exported, done = updates_done(config)
    if exported < config.num_updates:
        check_tracking(config.tracking)
        check_start(config, manifests)
    samples = sum(manifest.num_samples for manifest in manifests)
    what = f"stage {config.stage} from {config.init_from or 'random weights'}"
    counted = exported < config.num_updates and config.model.preset != "custom"
    flops = step_cost(config).flops_per_sample * config.global_batch_size * config.num_updates if counted else 0.0
    return Progress(max(exported, done), config.num_updates, "updates", f"{samples:,} samples", what, flops)


def claim_run(
    config: TrainConfig, *, write: bool = True
) -> tuple[TrainConfig, list[Manifest], dict[str, Any], dict[str, Any]]:
    """The config with the places that it names found, what it reads and its identity, and run.json."""
    config = config.model_copy(update={"init_from": find_model(config.init_from, config.tracking)})
    manifests = [open_set(part.path, join(config.output, ".data"), write=write) for part in config.data]
    check_crop(config, manifests)
    validation = config.validation.data if config.validation else ()
    check_output(config.output, [*(part.path for part in config.data), *validation])
    dataset_ids = [manifest.dataset_id for manifest in manifests]
    inputs: dict[str, Any] = {"dataset_ids": dataset_ids, "init_from": model_id(config.init_from)}
    if config.continue_from:
        place, inputs["continue_from"] = continued(config, inputs["init_from"])
        config = config.model_copy(update={"continue_from": place})
    libraries = (*LIBRARIES, *optimizer_libraries(config.optimizer))
    run = claim_output(config.output, config, job="train", inputs=inputs, libraries=libraries, write=write)
    return config, manifests, inputs, run


def updates_done(config: TrainConfig) -> tuple[int, int]:
    """Updates behind the complete models and behind the newest checkpoint. ConfigError where it is past the end."""
    record = join(config.output, "trained.json")
    models = ["model", RAW] if config.runtime.export_raw else ["model"]
    complete = exists(record) and all(exists(join(config.output, name, "ccsr.json")) for name in models)
    exported = read_json(record)["num_updates"] if complete else 0
    positions = [position_of(place) for place in complete_checkpoints(config.output)]
    done = max(positions, default=0) // config.global_batch_size
    if max(exported, done) > config.num_updates:
        raise ConfigError(
            f"this run has done {max(exported, done)} updates, the config ends at {config.num_updates}",
            where=config.output,
            todo="raise num_updates, or give another `output`",
        )
    return exported, done


def check_start(config: TrainConfig, manifests: list[Manifest]) -> None:
    """Fail here rather than in a worker if anything is missing or does not fit."""
    Validation.load(config)
    check_optimizer(config.optimizer)
    model = initial_model(config)
    check_stored(config, manifests, model.encoder_id())
    build_stage(model, config)


def fit(
    config: TrainConfig,
    manifests: list[Manifest],
    facts: dict[str, Any],
    tracker: Tracker,
    sigterm: Callable[[], bool],
) -> None:
    """Train on Ray until the last update. StoppedError where `sigterm` says that this process is to end."""
    runtime = config.runtime
    with tempfile.TemporaryDirectory(prefix="ccsr-train-") as scratch:
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from training.run.elastic import LegalSizes

        class Trainer(TorchTrainer):
            def _register_sigint_handler(self, controller: Any) -> None:
                """Leave Ctrl-C to Python: Ray's own handler ends this process with exit code 1 before anything is
                closed."""

            def _initialize_and_run_controller(self, **parts: Any) -> Any:
                if self.scaling_config.elasticity_enabled:
                    parts["scaling_policy"] = LegalSizes(self.scaling_config, sizes, board, cpus_of_worker(runtime))
                return super()._initialize_and_run_controller(**parts)

        check_cpus(config, {"CPU": cpus_here()})
        describe_run(tracker, config, manifests)
        board = make_board()
        sizes = legal_world_sizes(config.global_batch_size, runtime.micro_batch_size)
        settings = {
            "config": config,
            "manifests": manifests,
            "facts": facts,
            "tracking_uri": tracking_uri(config.tracking),
            "run_id": tracker.run_id,
            "board": board,
        }
        trainer = Trainer(
            train_worker,
            train_loop_config=settings,
            scaling_config=placement(runtime),
            torch_config=TorchConfig(
                backend="nccl" if runtime.device == "cuda" else "gloo", timeout_s=runtime.collective_timeout_seconds
            ),
            run_config=RunConfig(
                name=facts["fingerprint"][:16],
                storage_path=scratch,
                worker_runtime_env={"env_vars": environment(runtime)},
                failure_config=FailureConfig(max_failures=runtime.max_restarts),
            ),
        )
        bar = progress(f"training stage {config.stage}", config.num_updates)
        with bar as advance, Watch(board, advance, sigterm) as watch:
            while _drained(trainer, watch, config, sigterm):
                pass


def _drained(trainer: Any, watch: Watch, config: TrainConfig, sigterm: Callable[[], bool]) -> bool:
    """Train; True where the workers saved and left to start anew: the node of one is being taken away, or there is room
    for more of them. Raises what ended the run.

    Each call is a run of Ray Train's, so that this does not count as one of `runtime.max_restarts`.
    """
    failure: Exception | None = None
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  raised below, if no worker has said why
        failure = error
    user = watch.error() or (user_error(failure) if failure else None)
    if isinstance(user, StoppedError) and not sigterm():
        watch.start_anew()
        return True
    if user:
        raise user from failure
    if failure:
        raise lost_error(failure, config, watch.state.lost) from failure
    return False


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import cv2
    import ray.train
    import torch
    from ray.train.v2._internal.execution.context import get_train_context

    from infra.mlflow.tracking import Tracker
    from infra.process.background import BackgroundTracker
    from infra.process.node import NodeMonitor
    from infra.process.numerics import set_numerics
    from training.run.step.engine import load_deepspeed
    from training.run.worker import train

    config: TrainConfig = settings["config"]
    set_numerics(config.numerics)
    ray_context = ray.train.get_context()
    rank = ray_context.get_world_rank()
    torch.set_num_threads(config.runtime.threads)
    cv2.setNumThreads(1)  # the ingest has its own threads
    deepspeed = load_deepspeed()
    backend = "nccl" if config.runtime.device == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    board = settings["board"]
    if not ray.get(board.begin.remote(rank, ray_context.get_world_size())):
        return
    tracker = None
    if rank == 0:
        logged = Tracker.connect(settings["tracking_uri"], settings["run_id"])
        tracker = BackgroundTracker(logged, warn=board.warn.remote)
    node = None
    if ray_context.get_local_rank() == 0:
        node = NodeMonitor(board.warn.remote)
    drain = get_train_context().preemption_context  # the public function waits for all ranks
    with sigterm_noted() as sigterm, closing(node) if node else nullcontext():
        context = WorkerContext(
            rank=rank,
            world_size=ray_context.get_world_size(),
            device=str(ray.train.torch.get_device()),
            facts=settings["facts"],
            tracker=tracker,
            on_update=(lambda update, note: board.write.remote(update, note + tracker.note)) if tracker else None,
            stop_asked=Pulse(board, rank, lambda: sigterm() or drain.preemption_info is not None),
            warn=board.warn.remote,
            export=lambda weights, uri: write_model(config, weights, uri),
            measured=partial(show_rates, config, rank),
            node=node or dict,
        )
        try:
            model, error = attempt(lambda: initial_model(config))
            agree(context, error)
            train(config, settings["manifests"], model, context)
        except OtherRankError:
            pass
        except CcsrError as error:  # not to be tried again: it is kept on the board, and the worker ends in peace
            ray.get(board.fail.remote(error))
            if not context.agreed:  # the others do not know: Ray ends them
                raise
        except Exception as error:
            ray.get(board.lost.remote(rank, f"{type(error).__name__}: {line_of(error)}"))
            raise
        finally:
            if tracker is not None:
                tracker.close(keep=partial(keep_unsent, config.output))
