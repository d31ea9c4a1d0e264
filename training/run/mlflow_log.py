"""What a training run says of itself in MLflow beside its curves: inputs, links, description; the curves' groups."""

from collections.abc import Mapping

from infra.manifest import Manifest
from infra.mlflow_models import trained_by
from infra.tracking import Tracker, link, run_of
from training.config import TrainConfig
from training.run.validation import Validation

GROUPS = {
    "speed": {"samples_per_second", "samples_per_second_per_worker", "data_wait_share", "tflops_per_second_per_worker"}
    | {"mfu", "hfu", "validation_seconds"},
    "system": {"peak_memory_gib"},
    "optimizer": {"learning_rate", "gradient_norm", "d_gradient_norm"},
}


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """An update's numbers as GROUP/NAME, which MLflow shows in sections; a term of the loss is in `loss`."""
    groups = {name: group for group, names in GROUPS.items() for name in names}
    return {f"{groups.get(name, 'loss')}/{name}": value for name, value in values.items()}


def describe_run(tracker: Tracker, config: TrainConfig, manifests: list[Manifest]) -> None:
    """Log the datasets, tags that name the runs that this one begins with, and a description with links to them."""
    datasets = [(manifest.uri, manifest.dataset_id, "training") for manifest in manifests]
    validation = Validation.load(config)
    datasets += [(uri, digest, "validation") for uri, digest in (validation.datasets if validation else {}).items()]
    for uri, digest, context in datasets:
        tracker.dataset(uri.rstrip("/").rpartition("/")[2], digest, uri, context)
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
        *(f"{context.capitalize()} data: `{uri}` ({digest})" for uri, digest, context in datasets),
        f"Output: `{config.output}`",
    )
