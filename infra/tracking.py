"""MLflow: one run per job, found again on a resume; only drivers and rank 0 import this."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.config import Config, Location
from infra.errors import ClusterError, ConfigError, StorageError
from infra.storage import exists, join

RUN_TAG = "ccsr.fingerprint"
PARENT_TAG = "mlflow.parentRunId"
MODEL_TAG = "ccsr.model"


class TrackingConfig(Config):
    """Where results are logged. Without `uri`: MLFLOW_TRACKING_URI, or `mlflow.db` in the working folder."""

    uri: Location | None = None
    experiment: str = "ccsr"
    run_name: str | None = None


def tracking_uri(config: TrackingConfig) -> str:
    """The effective MLflow address; the folder of a sqlite file is made."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the MLflow database cannot be made ({error.strerror})", where=str(folder), todo="set tracking.uri"
            ) from error
        uri = f"sqlite:///{folder / uri.rsplit('/', 1)[-1]}"
    return uri


class Tracker:
    """One MLflow run. All values go through `log_batch`: one request however many metrics."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    @classmethod
    def connect(cls, uri: str, run_id: str) -> "Tracker":
        """A run that another process began."""
        from mlflow.tracking import MlflowClient

        _fail_soon()
        return cls(MlflowClient(uri), run_id)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED; a server that died meanwhile is a warning, not an error."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            print(f"warning: MLflow was not told that its run {status} ({_first_line(error)})", file=sys.stderr)

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


def find_model(place: str | None, config: TrackingConfig) -> str | None:
    """The model directory that `place` names: itself, the `model` folder of a run's output, or that of MLflow's run
    `runs:/ID`. ConfigError for a run that trained none, ClusterError where MLflow does not answer."""
    if place is None:
        return None
    if place.startswith("runs:/"):
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        _fail_soon()
        uri, run_id = tracking_uri(config), place.removeprefix("runs:/")
        try:
            tags = MlflowClient(uri).get_run(run_id).data.tags
        except MlflowException as error:
            raise ClusterError(
                f"MLflow does not know this run ({_first_line(error)})",
                where=f"{uri}: {run_id}",
                todo="check the id and tracking.uri",
            ) from error
        if MODEL_TAG not in tags:
            raise ConfigError("this run trained no model", where=f"{uri}: {run_id}", todo="give a run of ccsr train")
        return tags[MODEL_TAG]
    inside = join(place, "model")
    return inside if not exists(join(place, "ccsr.json")) and exists(join(inside, "ccsr.json")) else place


def _fail_soon() -> None:
    """A dead server is told within seconds; MLflow's own default is to try for many minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def track(config: TrackingConfig, run: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Iterator[Tracker]:
    """The MLflow run of an output folder (its run.json is `run`): continued if it exists, else begun.

    It ends FINISHED, or FAILED if the body raises. Raises ClusterError if the store cannot be reached.
    """
    tracker = open_tracker(config, run, tags)
    try:
        yield tracker
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


def open_tracker(config: TrackingConfig, run: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Tracker:
    """Begin or continue the run with this fingerprint in the experiment."""
    import logging

    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of a sqlite store logs each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    _fail_soon()
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            location = None
            if uri.startswith("sqlite:///"):
                location = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
            experiment_id = client.create_experiment(config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run['fingerprint']}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            return Tracker(client, run_id)
        all_tags = {RUN_TAG: run["fingerprint"], "ccsr.job": run["job"], **(tags or {})}
        stage = f"-stage{run['config']['stage']}" if "stage" in run["config"] else ""
        name = config.run_name or f"{run['job']}{stage}-{run['fingerprint'][:8]}"
        run_id = client.create_run(experiment_id, tags=all_tags, run_name=name).info.run_id
        parameters = [Param(k, str(v)[:500]) for k, v in flatten(run["config"]).items()]
        client.log_batch(run_id, params=parameters[:100])
        client.log_dict(run_id, dict(run), "run.json")
    except MlflowException as error:
        raise ClusterError(
            f"MLflow does not answer ({_first_line(error)})",
            where=uri,
            todo="start the server, or set tracking.uri to a sqlite:/// file",
        ) from error
    return Tracker(client, run_id)


def ping(uri: str) -> str:
    """The version of the MLflow server at an address, or of this machine's MLflow for a database; ClusterError where
    none answers."""
    import mlflow
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    _fail_soon()
    uri = tracking_uri(TrackingConfig(uri=uri))
    try:
        MlflowClient(uri).search_experiments(max_results=1)
        if not uri.startswith(("http://", "https://")):
            return mlflow.__version__
        return requests.get(f"{uri.rstrip('/')}/version", timeout=30).text.strip()
    except (MlflowException, OSError) as error:
        raise ClusterError(
            f"MLflow does not answer ({_first_line(error)})",
            where=uri,
            todo="start the server, check its address, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
