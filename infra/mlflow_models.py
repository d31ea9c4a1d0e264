"""Models in MLflow: what `init_from`, `model` and `--model` may name."""

from typing import Any, overload

from infra.errors import ConfigError
from infra.mlflow_server import TrackingConfig, mlflow_errors, tracking_uri
from infra.storage import exists, join
from infra.tracking import run_of

MODEL_TAG = "ccsr.model"
"""Of a run: the model directory that it has written, set once that is complete."""
DIGEST_TAG = "ccsr.model_id"


@overload
def find_model(place: str, config: TrackingConfig) -> str: ...
@overload
def find_model(place: str | None, config: TrackingConfig) -> str | None: ...
def find_model(place: str | None, config: TrackingConfig) -> str | None:
    """The model directory that `place` names: itself, the `model` folder of a run's output, or that of MLflow's run
    `runs:/ID`. ConfigError for a run that has written none, ClusterError where MLflow does not answer."""
    if place is None:
        return None
    if place.startswith("runs:/"):
        return run_tag(place, MODEL_TAG, config)
    inside = join(place, "model")
    return inside if not exists(join(place, "ccsr.json")) and exists(join(inside, "ccsr.json")) else place


def run_tag(place: str, tag: str, config: TrackingConfig) -> str:
    """A tag of MLflow's run `runs:/ID`: its model or its output. Errors as of `find_model`."""
    from mlflow.tracking import MlflowClient

    uri, run_id = tracking_uri(config), place.removeprefix("runs:/")
    with mlflow_errors(f"{uri}: {run_id}"):
        tags = MlflowClient(uri).get_run(run_id).data.tags
    if tag not in tags:
        raise ConfigError(
            "this run has written no model", where=f"{uri}: {run_id}", todo="give a finished run of ccsr train"
        )
    return tags[tag]


def logged_model(client: Any, model: str, digest: str) -> Any:
    """The LoggedModel of the model directory `model` with that id (`model_id`), None where its run has none."""
    run = trained_by(client, model)
    outputs = run.outputs.model_outputs if run and run.outputs else []
    logged = (client.get_logged_model(output.model_id) for output in outputs)
    return next((one for one in logged if one.tags.get(DIGEST_TAG) == digest), None)


def trained_by(client: Any, model: str) -> Any:
    """The MLflow run whose output holds the model directory `model`, None where this server has none."""
    folder = model.rstrip("/")
    for _ in range(2):  # OUT/model or OUT/best, OUT/exports/POSITION
        folder = folder.rpartition("/")[0]
        run = run_of(client, folder) if folder else None
        if run is not None:
            return run
    return None
