"""Models in MLflow: what names one, the LoggedModel of a model directory, the registry. No artifact is copied."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, overload

from infra.errors import ConfigError, ModelError
from infra.files.locations import HUB_ID, location
from infra.files.storage import exists, is_s3, join, short_hash
from infra.files.weights import weights_folder
from infra.mlflow.server import TrackingConfig, mlflow_errors, tracking_uri
from infra.mlflow.tracking import Tracker, run_of

MODEL_TAG = "ccsr.model"
"""Of a run, a LoggedModel and a registered version: the model directory, set once that is complete."""
DIGEST_TAG = "ccsr.model_id"
NEWEST = "newest"


@overload
def find_model(uri: str, config: TrackingConfig) -> str: ...
@overload
def find_model(uri: str | None, config: TrackingConfig) -> str | None: ...
def find_model(uri: str | None, config: TrackingConfig) -> str | None:
    """The model directory that `uri` names: itself (`ccsr export` writes one too), the `model` folder of a run's
    output, USER/NAME below the weights folder, that of MLflow's run `runs:/ID`, or a registered one:
    `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/ID` of a LoggedModel.

    ModelError where none is there, ConfigError where none was written, or another one since; ClusterError where MLflow
    does not answer or knows none.
    """
    if uri is None:
        return None
    if uri.startswith("runs:/"):
        return run_tag(uri, MODEL_TAG, config)
    if uri.startswith("models:/"):
        return _registered(uri, config)
    path = location(uri)
    places = [path, join(path, "model")]
    if HUB_ID.fullmatch(uri):
        places.append(join(weights_folder(), uri))
    for found in places:
        if exists(join(found, "ccsr.json")):
            return found
    foreign = any(exists(join(looked_at, "model_index.json")) for looked_at in places)
    raise ModelError(
        "this is a diffusers pipeline of another program" if foreign else "there is no complete model directory here",
        where=f"no ccsr.json in {', '.join(places)}",
        todo="take one that ccsr export wrote, or convert its weights: ccsr convert"
        if foreign
        else "give a model directory, the folder of a finished run, runs:/ID, models:/NAME@ALIAS, or a hub id whose "
        "files are below the weights folder (CCSR_WEIGHTS)",
    )


def run_tag(uri: str, tag: str, config: TrackingConfig) -> str:
    """A tag of MLflow's run `runs:/ID`: its model or its output. Errors as of `find_model`."""
    from mlflow.tracking import MlflowClient

    server, run_id = tracking_uri(config), uri.removeprefix("runs:/")
    with mlflow_errors(f"{server}: {run_id}"):
        tags = MlflowClient(server).get_run(run_id).data.tags
    if tag not in tags:
        raise ConfigError(
            "this run has written no model", where=f"{server}: {run_id}", todo="give a finished run of ccsr train"
        )
    return tags[tag]


def _registered(uri: str, config: TrackingConfig) -> str:
    from mlflow.tracking import MlflowClient

    server, text = tracking_uri(config), uri.removeprefix("models:/")
    name, separator, which = text.partition("@") if "@" in text else text.partition("/")
    with mlflow_errors(f"{server}: {uri}"):
        client = MlflowClient(server)
        if not separator:
            tags = client.get_logged_model(text).tags
        elif "@" in text:
            tags = client.get_model_version_by_alias(name, which).tags
        else:
            tags = client.get_model_version(name, which).tags
    if MODEL_TAG not in tags:
        raise ConfigError(
            "ccsr did not log this model",
            where=f"{server}: {uri}",
            todo="register one: ccsr train -c FILE --register NAME",
        )
    model = tags[MODEL_TAG]
    if exists(join(model, "ccsr.json")) and short_hash(join(model, "ccsr.json")) != tags.get(DIGEST_TAG):
        raise ConfigError(
            "another model is now in the directory that was logged",
            where=f"{uri}: {model}",
            todo="give the directory itself, or register the run again: ccsr train -c FILE --register NAME",
        )
    return model


def logged_model(client: Any, model: str, digest: str) -> Any:
    """The LoggedModel of the model directory `model` with that id (`model_id`), None where its run has none."""
    run = trained_by(client, model)
    if run is None:
        return None
    same = f"source_run_id = '{run.info.run_id}' AND tags.`{DIGEST_TAG}` = '{digest}'"
    return next(iter(client.search_logged_models([run.info.experiment_id], same)), None)


def trained_by(client: Any, model: str) -> Any:
    """The MLflow run whose output holds the model directory `model`, None where this server has none."""
    folder = model.rstrip("/")
    for _ in range(2):  # OUT/model or OUT/best, OUT/exports/POSITION
        folder = folder.rpartition("/")[0]
        run = run_of(client, folder) if folder else None
        if run is not None:
            return run
    return None


def log_model(
    tracker: Tracker,
    model: str,
    *,
    step: int,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    dataset: Sequence[str],
) -> Any:
    """The LoggedModel of a model directory in the output of the tracker's run, with its numbers on `dataset` (its name
    and id, or none); made unless it is there, READY once it has all."""
    from mlflow.entities import LoggedModelOutput

    client, run = tracker.client, tracker.client.get_run(tracker.run_id)
    digest = short_hash(join(model, "ccsr.json"))
    present = logged_model(client, model, digest)
    if present is not None and present.status == "READY":
        return present
    logged = present or client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "-", f"{run.info.run_name}-{step}"),  # which MLflow refuses
        source_run_id=tracker.run_id,
        tags={MODEL_TAG: model, DIGEST_TAG: digest},
        params={name: str(value) for name, value in parameters.items()},
        model_type=f"{parameters['family']} stage {parameters['stage']}",
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:  # MLflow refuses a second one
        client.log_outputs(tracker.run_id, [LoggedModelOutput(logged.model_id, step)])
    tracker.metrics(metrics, step, model=logged.model_id, dataset=dataset)
    return client.finalize_logged_model(logged.model_id, "READY")


def register(tracker: Tracker, logged: Any, target: str) -> None:
    """Make a LoggedModel the newest version of NAME in the registry and give it the alias of `target`, NAME[@ALIAS]."""
    from mlflow.exceptions import MlflowException

    client, (name, _, alias) = tracker.client, target.partition("@")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {MODEL_TAG: logged.tags[MODEL_TAG], DIGEST_TAG: logged.tags[DIGEST_TAG]}
    present = [one for one in client.search_model_versions(f"name = '{name}'") if tags.items() <= one.tags.items()]
    source = tags[MODEL_TAG]
    if client.tracking_uri.startswith("http") and not is_s3(source):  # a server refuses a path on this machine
        source = f"models:/{logged.model_id}"
    about = {"run_id": tracker.run_id, "tags": tags, "model_id": logged.model_id, "await_creation_for": 0}
    version = present[0] if present else client.create_model_version(name, source, **about)
    if not client.tracking_uri.startswith("http"):  # a server links the two itself
        versions = [{"name": name, "version": version.version}]
        client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": json.dumps(versions)})
    for one in {NEWEST, alias or NEWEST}:
        client.set_registered_model_alias(name, one, version.version)
