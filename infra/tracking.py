"""MLflow: one run per job, found again on a resume; only drivers and rank 0 import this."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from infra.errors import ConfigError, StoppedError, line_of
from infra.mlflow_server import (
    TrackingConfig,
    deleted_experiment,
    fail_soon,
    mlflow_errors,
    refused_for_good,
    tracking_uri,
)
from infra.storage import exists, join

RUN_TAG = "ccsr.fingerprint"
PARENT_TAG = "mlflow.parentRunId"
MODEL_TAG = "ccsr.model"
MAX_PARAMETERS = 100  # in one request: MLflow's limit


class Tracker:
    """One MLflow run. All values go through `log_batch`: one request however many metrics."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    @classmethod
    def connect(cls, uri: str, run_id: str) -> "Tracker":
        """A run that another process began."""
        from mlflow.tracking import MlflowClient

        fail_soon()
        return cls(MlflowClient(uri), run_id)

    def end(self, status: str, seconds: float = 30.0) -> None:
        """Close the run as FINISHED, FAILED or KILLED, trying for `seconds`; a server that died meanwhile is a warning,
        not an error."""
        from mlflow.exceptions import MlflowException

        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._client.set_terminated(self.run_id, status)
            except MlflowException as error:
                if refused_for_good(error) or time.monotonic() > deadline:
                    print(f"warning: MLflow does not know that its run is {status} ({line_of(error)})", file=sys.stderr)
                    return None
            time.sleep(1)

    def describe(self, run: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Log run.json and the config's parameters, leaving out the `known` ones."""
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        values = {name: str(value) for name, value in flatten(run["config"]).items() if name not in known}
        long = [name for name, value in values.items() if len(value) > MAX_PARAM_VAL_LENGTH]
        if long:
            print(
                f"note: MLflow holds {MAX_PARAM_VAL_LENGTH} characters of a parameter, {', '.join(long)} is cut there; "
                "the whole config is the run's artifact run.json",
                file=sys.stderr,
            )
        parameters = [Param(name, value[:MAX_PARAM_VAL_LENGTH]) for name, value in values.items()]
        for first in range(0, len(parameters), MAX_PARAMETERS):
            self._client.log_batch(self.run_id, params=parameters[first : first + MAX_PARAMETERS])
        if parameters:
            self._client.log_dict(self.run_id, dict(run), "run.json")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.send([(name, float(value), int(time.time() * 1000), step) for name, value in values.items()])

    def send(self, points: list[tuple[str, float, int, int]]) -> None:
        """Metrics as (name, value, milliseconds since 1970, step), at most 1000 (MLflow's limit)."""
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Log what was read: `digest` is the dataset id, `context` "training" or "validation"."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, "ccsr_shards", json.dumps({"uri": source}))
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def parent(self, fingerprint: str) -> None:
        """Put this run under the one with that fingerprint, if MLflow knows it."""
        run_id = find_run(self._client, fingerprint)
        if run_id:
            self.tag(**{PARENT_TAG: run_id})

    def continued(self, fingerprint: str) -> None:
        """Link this run and the one with that fingerprint, whose checkpoint it began with; both ways if MLflow knows
        that one."""
        before = find_run(self._client, fingerprint)
        self.tag(**{"ccsr.continued_from": before or fingerprint})
        if before:
            self._client.set_tag(before, "ccsr.continued_by", self.run_id)

    def tag(self, **tags: str) -> None:
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload one file, or a folder's content."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder or None)

    def file(self, place: str, content: bytes) -> None:
        """Upload bytes as the artifact `place`."""
        folder, _, name = place.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="ccsr-artifact-") as scratch:
            (Path(scratch) / name).write_bytes(content)
            self.artifact(Path(scratch) / name, folder)


def find_run(client: Any, fingerprint: str) -> str | None:
    """The id of the MLflow run with this fingerprint in any experiment, if there is one."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{fingerprint}'", max_results=1)
    return found[0].info.run_id if found else None


@overload
def find_model(place: str, config: TrackingConfig) -> str: ...
@overload
def find_model(place: str | None, config: TrackingConfig) -> str | None: ...
def find_model(place: str | None, config: TrackingConfig) -> str | None:
    """The model directory that `place` names: itself, the `model` folder of a run's output, or that of MLflow's run
    `runs:/ID`. ConfigError for a run that trained none, ClusterError where MLflow does not answer."""
    if place is None:
        return None
    if place.startswith("runs:/"):
        from mlflow.tracking import MlflowClient

        uri, run_id = tracking_uri(config), place.removeprefix("runs:/")
        with mlflow_errors(f"{uri}: {run_id}"):
            tags = MlflowClient(uri).get_run(run_id).data.tags
        if MODEL_TAG not in tags:
            raise ConfigError("this run trained no model", where=f"{uri}: {run_id}", todo="give a run of ccsr train")
        return tags[MODEL_TAG]
    inside = join(place, "model")
    return inside if not exists(join(place, "ccsr.json")) and exists(join(inside, "ccsr.json")) else place


@contextmanager
def track(config: TrackingConfig, run: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Iterator[Tracker]:
    """The MLflow run of an output folder (its run.json is `run`): continued if it exists, else begun.

    It ends FINISHED; KILLED where the block is stopped (StoppedError, Ctrl-C, SIGTERM); FAILED where it raises anything
    else. Raises ClusterError where MLflow cannot be reached or refuses, in the block too.
    """
    import logging

    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of a sqlite store logs each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    with mlflow_errors(uri):
        client = MlflowClient(uri)
        experiment_id = _experiment(client, config.experiment, uri)
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['fingerprint']}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        else:
            all_tags = {RUN_TAG: run["fingerprint"], "ccsr.job": run["job"], **(tags or {})}
            stage = f"-stage{run['config']['stage']}" if "stage" in run["config"] else ""
            name = config.run_name or f"{run['job']}{stage}-{run['fingerprint'][:8]}"
            found = [client.create_run(experiment_id, tags=all_tags, run_name=name)]
        tracker, status = Tracker(client, found[0].info.run_id), "FAILED"
        try:
            tracker.describe(run, found[0].data.params)
            yield tracker
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, StoppedError):
            status = "KILLED"
            raise
        finally:
            tracker.end(status)


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, which is made if there is none. ClusterError for a deleted one."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        location = None
        if uri.startswith("sqlite:///"):
            location = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job has made it meanwhile
            if found is None or found.lifecycle_stage == "deleted":
                number = found.experiment_id if found else "ID"
                raise deleted_experiment(name, number, uri, f" ({line_of(error)})") from error
    return found.experiment_id


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
