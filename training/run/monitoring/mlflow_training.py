"""What a training run says of itself in MLflow beside its curves: inputs, links, description; the curves' groups."""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from infra.errors import ClusterError, line_of
from infra.files.publish import write_bytes
from infra.files.storage import exists, join, name_of, read_bytes, read_json, remove
from infra.mlflow.models import MODEL_TAG, log_model, register, trained_by
from infra.mlflow.server import mlflow_errors, tracking_uri
from infra.mlflow.tracking import Tracker, cite, link, run_of
from infra.process.background import BackgroundTracker
from infra.shards.manifest import Manifest
from training.config import TrainConfig
from training.run.checkpoint import best_checkpoint, position_of
from training.run.export import exported_models
from training.run.monitoring.validation import Validation

UNSENT, UNSENT_FILES = "mlflow.unsent.json", "mlflow.unsent"
GROUPS = {
    "speed": {"samples_per_second", "samples_per_second_per_worker", "data_wait_share", "tflops_per_second_per_worker"}
    | {"mfu", "hfu", "validation_seconds", "forward_seconds_max", "forward_seconds_mean", "slowest_rank"},
    "system": {"peak_memory_gib"},
    "optimizer": {"learning_rate", "gradient_norm_spike"} | {f"{p}gradient_norm" for p in ("", "d_", "regulariser_")},
}


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """An update's numbers as GROUP/NAME in lower case, which MLflow shows in sections; a term of the loss is in
    `loss`."""
    groups = {name: group for group, names in GROUPS.items() for name in names}
    return {f"{groups.get(name, 'loss')}/{name.lower()}": value for name, value in values.items()}


def keep_unsent(output: str, points: list[Any], files: list[Any]) -> None:
    """Store points and files that the server never took beside those of earlier starts, for `describe_run` to send."""
    place = join(output, UNSENT)
    kept = _kept(place)
    for _, content, *_ in files:
        write_bytes(join(output, UNSENT_FILES, _digest(content)), content)
    kept = {"points": kept["points"] + points, "files": kept["files"] + _by_digest(files)}
    write_bytes(place, json.dumps(kept).encode())


def has_unsent(output: str) -> bool:
    return exists(join(output, UNSENT))


def _kept(place: str) -> dict[str, list[Any]]:
    kept = read_json(place) if exists(place) else []
    return kept if isinstance(kept, dict) else {"points": kept, "files": []}  # earlier versions: points alone


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _by_digest(files: list[Any]) -> list[list[Any]]:
    return [[name, _digest(content), *step] for name, content, *step in files]


def send_unsent(tracker: Tracker, output: str, seconds: float = 60.0) -> None:
    """Send what is kept, for at most `seconds`; what is not taken this time either stays."""
    place = join(output, UNSENT)
    if not has_unsent(output):
        return
    kept = _kept(place)
    left: dict[str, list[Any]] = {"points": [], "files": []}
    content = {digest: read_bytes(join(output, UNSENT_FILES, digest)) for _, digest, *_ in kept["files"]}
    sender = BackgroundTracker(tracker, warn=partial(print, "warning:", file=sys.stderr))
    sender.again(kept["points"], [[name, content[digest], *step] for name, digest, *step in kept["files"]])
    sender.close(seconds, lambda points, files: left.update(points=points, files=_by_digest(files)))
    if left["points"] or left["files"]:
        write_bytes(place, json.dumps(left).encode())
    else:
        remove(place)
    for digest in content.keys() - {digest for _, digest, *_ in left["files"]}:
        remove(join(output, UNSENT_FILES, digest))


def describe_run(tracker: Tracker, config: TrainConfig, manifests: list[Manifest]) -> None:
    """Log what an earlier start could not send, the datasets, tags that name the runs that this one begins with, and a
    description with links to them."""
    send_unsent(tracker, config.output)
    datasets = [(manifest.uri, manifest.dataset_id, "training") for manifest in manifests]
    validation = Validation.load(config)
    datasets += [(uri, digest, "validation") for uri, digest in (validation.datasets if validation else {}).items()]
    for uri, digest, context in datasets:
        tracker.dataset(name_of(uri), digest, uri, context)
    before = trained_by(tracker.client, config.init_from) if config.init_from else None
    continued = run_of(tracker.client, config.continue_from.rsplit("/", 2)[0]) if config.continue_from else None
    if before:
        tracker.tag(**{"ccsr.init_from_run": before.info.run_id})
    if continued:
        tracker.tag(**{"ccsr.continued_from": continued.info.run_id})
        Tracker(tracker.client, continued.info.run_id).tag(**{"ccsr.continued_by": tracker.run_id})
    start = link(before) if before else f"`{config.init_from or 'random'}`"
    checkpoint = f"Continues {link(continued) if continued else ''} `{config.continue_from}`"
    tracker.note(
        f"Stage {config.stage} of {config.model.family}: {config.num_updates:,} updates of {config.global_batch_size} "
        "samples. The step of every chart is the number of samples seen.",
        f"Starts from {start}",
        checkpoint if config.continue_from else "",
        *(f"{context.capitalize()} data: {cite(tracker.client, uri)} ({digest})" for uri, digest, context in datasets),
        f"Output: `{config.output}`",
    )


def log_models(tracker: Tracker, config: TrainConfig) -> None:
    """A LoggedModel per model directory of a finished run, with the validation's numbers at its step; the best one into
    the registry where the config asks for that. ClusterError where MLflow is away or refuses."""
    with mlflow_errors(tracking_uri(config.tracking)):
        client, models = tracker.client, exported_models(config)
        tracker.tag(**{MODEL_TAG: join(config.output, "model")})
        scores: dict[int, dict[str, float]] = defaultdict(dict)
        for name in client.get_run(tracker.run_id).data.metrics:
            if name.startswith("validation/"):
                for point in client.get_metric_history(tracker.run_id, name):
                    scores[point.step][name] = point.value
        about = config.model.model_dump() | {"stage": config.stage}
        validation = Validation.load(config)
        named = [(name_of(uri), digest) for uri, digest in (validation.datasets if validation else {}).items()]
        held_out = named[0] if len(named) == 1 else ()
        logged = {
            step: log_model(
                tracker, place, step=step, parameters=about | {"step": step}, metrics=scores[step], dataset=held_out
            )
            for step, place in models.items()
        }
        if config.tracking.register:
            best = best_checkpoint(config.output, (), config.best_by)
            register(tracker, logged[position_of(best) if best else max(logged)], config.tracking.register)


def try_to_log_models(tracker: Tracker, config: TrainConfig) -> None:
    """`log_models`; what fails is a warning: the run is complete."""
    try:
        log_models(tracker, config)
    except ClusterError as error:
        print(
            f"warning: the run is complete, but MLflow did not take its models ({line_of(error)}); "
            "to send them later: ccsr train -c FILE --log-only",
            file=sys.stderr,
        )
