"""MLflow: one run per output, found again on a resume; only drivers, rank 0 and the node monitor `import mlflow`."""

import getpass
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import CcsrError, StoppedError, StorageError, line_of
from infra.files.publish import write_bytes
from infra.files.storage import exists, join, read_json
from infra.mlflow.names import flatten, image_key, run_name
from infra.mlflow.server import (
    TrackingConfig,
    deleted_experiment,
    fail_soon,
    mlflow_errors,
    refused_for_good,
    tracking_uri,
)
from infra.run import MLFLOW_FILE, git_commit

EVALUATION_TAG = "ccsr.evaluation"
NOTE_TAG = "mlflow.note.content"
METHOD_TAG = "ccsr.method"
ERROR_TAG = "ccsr.error"
CHANGED_TAG = "ccsr.changed"
INHERITED = "mlflow.user", "mlflow.source.", "ccsr.git_commit"
MAX_PARAMETERS = 100  # in one request: MLflow's limit
MAX_TAG = 5000  # characters of a value: a database's limit in MLflow


class Tracker:
    """One MLflow run. All values go through `log_batch`: one request however many metrics."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._note = ""

    @classmethod
    def connect(cls, uri: str, run_id: str) -> "Tracker":
        """A run that another process began."""
        from mlflow.tracking import MlflowClient

        fail_soon()
        return cls(MlflowClient(uri), run_id)

    def end(self, status: str, error: str = "", seconds: float = 30.0) -> None:
        """Close the run as FINISHED, FAILED or KILLED, with the error that ended it, trying for `seconds`; a server
        that died meanwhile is a warning, not an error."""
        from mlflow.exceptions import MlflowException

        deadline = time.monotonic() + seconds
        while True:
            try:
                self.client.set_terminated(self.run_id, status)
                if error:
                    note = f"{self._note}\n\n**{status}**\n\n```text\n{error}\n```".lstrip()
                    self.tag(**{ERROR_TAG: error, NOTE_TAG: note})
                return
            except MlflowException as refused:
                if refused_for_good(refused) or time.monotonic() > deadline:
                    words = line_of(refused)
                    print(f"warning: MLflow does not know that its run is {status} ({words})", file=sys.stderr)
                    return
            time.sleep(1)

    def describe(self, parameters: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Log parameters. MLflow keeps the `known` ones; what a resume has changed of them is a tag."""
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        values = {name: str(value) for name, value in flatten(parameters).items()}
        long = [name for name, value in values.items() if len(value) > MAX_PARAM_VAL_LENGTH and name not in known]
        if long:
            print(
                f"note: MLflow holds {MAX_PARAM_VAL_LENGTH} characters of a parameter, {', '.join(long)} is cut there; "
                "the whole config is the run's artifact run.json",
                file=sys.stderr,
            )
        values = {name: value[:MAX_PARAM_VAL_LENGTH] for name, value in values.items()}
        changed = [f"{name}: {known[name]} -> {new}" for name, new in values.items() if known.get(name, new) != new]
        if changed:
            self.tag(**{CHANGED_TAG: "; ".join(changed)})
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(new), MAX_PARAMETERS):
            self.client.log_batch(self.run_id, params=new[first : first + MAX_PARAMETERS])

    def metrics(
        self, values: Mapping[str, float], step: int = 0, *, model: str | None = None, dataset: Sequence[str] = ()
    ) -> None:
        """Log metrics of the run; with `model` also of the LoggedModel with that id, on `dataset`: its name and id."""
        now = int(time.time() * 1000)
        self.send([(name, float(value), now, step, model, *dataset) for name, value in values.items()])

    def send(self, points: Sequence[tuple[Any, ...]]) -> None:
        """Metrics as (name, value, milliseconds since 1970, step, ...), at most 1000 (MLflow's limit)."""
        from mlflow.entities import Metric

        self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Log what was read: `digest` is the dataset id, `context` "training", "validation" or "evaluation"."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, "ccsr_shards", json.dumps({"uri": source}))
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def note(self, *lines: str) -> None:
        """The run's description: a Markdown paragraph per line."""
        self._note = "\n\n".join(line for line in lines if line)
        self.tag(**{NOTE_TAG: self._note})

    def tag(self, **tags: str) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(name, value[:MAX_TAG]) for name, value in tags.items()])

    def image(self, key: str, png: bytes, step: int = 0) -> None:
        """Log a picture for MLflow's image grid, a row per `key`."""
        import PIL.Image

        self.client.log_image(self.run_id, PIL.Image.open(io.BytesIO(png)), key=image_key(key), step=step)

    def without_images(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have no complete picture: MLflow would keep a second one beside the first."""
        names = [item.path for item in self.client.list_artifacts(self.run_id, "images")]
        there = {name.removeprefix("images/").partition("+")[0] for name in names if name.endswith(".webp")}
        return [key for key in keys if image_key(key).replace("/", "~") not in there]

    def table(self, place: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table as the artifact `place`, in place of the one there."""
        if any(item.path == place for item in self.client.list_artifacts(self.run_id)):  # log_table would append
            self.file(place, json.dumps({"columns": columns, "data": rows}).encode())
        else:
            self.client.log_table(self.run_id, dict(zip(columns, zip(*rows, strict=True), strict=True)), place)

    def child(self, method: str, tags: Mapping[str, str], parameters: Mapping[str, Any]) -> "Tracker":
        """The run of a method of this evaluation, made unless it is there. Not nested: MLflow's charts hide those."""
        parent = self.client.get_run(self.run_id)
        experiment, name = parent.info.experiment_id, f"{parent.info.run_name}/{method}"
        own = {EVALUATION_TAG: self.run_id, METHOD_TAG: method, **tags}
        own |= {name: value for name, value in parent.data.tags.items() if name.startswith(INHERITED)}
        below = f"tags.`{EVALUATION_TAG}` = '{self.run_id}' AND tags.`{METHOD_TAG}` = '{method}'"
        found = self.client.search_runs([experiment], below, max_results=1)
        if not found:
            found = [self.client.create_run(experiment, run_name=name, tags=own)]
        child = Tracker(self.client, found[0].info.run_id)
        child.tag(**own)
        child.describe(parameters, found[0].data.params)
        return child

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload one file, or a folder's content."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(self.run_id, str(path), folder or None)

    def file(self, place: str, content: bytes) -> None:
        """Upload bytes as the artifact `place`."""
        folder, _, name = place.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="ccsr-artifact-") as scratch:
            (Path(scratch) / name).write_bytes(content)
            self.artifact(Path(scratch) / name, folder)


def run_of(client: Any, output: str) -> Any:
    """The MLflow run of an output folder, None where this server has none: the one that its mlflow.json names, unless
    that came with a copy of another folder."""
    from mlflow.exceptions import MlflowException

    place = join(output, MLFLOW_FILE)
    record = read_json(place) if exists(place) else {}
    if record.get("output") != output:
        return None
    try:
        run = client.get_run(record["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def link(run: Any, artifact: str = "") -> str:
    """A run's name in a description, which leads to its page; or an artifact's."""
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"[{artifact}]({page}/artifacts/{artifact})" if artifact else f"[{run.info.run_name}]({page})"


def cite(client: Any, uri: str) -> str:
    """A folder in a description, with the run that made it where this server has it."""
    try:
        run = run_of(client, uri)
    except StorageError:  # S3's answer to a missing file where listing is not allowed
        run = None
    return f"{link(run)}, `{uri}`" if run else f"`{uri}`"


@contextmanager
def track(
    config: TrackingConfig,
    run: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    *,
    output: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Iterator[Tracker]:
    """The MLflow run of the folder `output`, whose run.json is `run`: continued if there is one, else begun; without
    `output` a new one. `parameters`: run.json's config unless given.

    It ends FINISHED; KILLED where the block is stopped (StoppedError, Ctrl-C, SIGTERM); FAILED, with the error, where
    it raises anything else. Raises ClusterError where MLflow cannot be reached or refuses, in the block too.
    """
    import logging

    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # the first use of a sqlite store logs each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(config)
    with mlflow_errors(uri):
        client = MlflowClient(uri)
        found = run_of(client, output) if output else None
        all_tags = {**_identity_tags(run), **(tags or {}), **({"ccsr.output": output} if output else {})}
        if found:
            client.update_run(found.info.run_id, status="RUNNING")
            if ERROR_TAG in found.data.tags:
                client.delete_tag(found.info.run_id, ERROR_TAG)
            Tracker(client, found.info.run_id).tag(**all_tags)
        else:
            name = config.run_name or run_name(run, output)
            found = client.create_run(_experiment(client, config.experiment, uri), tags=all_tags, run_name=name)
            if output:
                record = {"output": output, "run_id": found.info.run_id, "experiment": config.experiment}
                write_bytes(join(output, MLFLOW_FILE), json.dumps(record, indent=1).encode())
        tracker, status, words = Tracker(client, found.info.run_id), "FAILED", ""
        try:
            tracker.describe(run["config"] if parameters is None else parameters, found.data.params)
            if not found.data.params:
                client.log_dict(found.info.run_id, dict(run), "run.json")
            yield tracker
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, StoppedError) as error:
            status, words = "KILLED", str(error) if isinstance(error, StoppedError) else ""
            raise
        except BaseException as error:
            words = str(error) if isinstance(error, CcsrError) else f"{type(error).__name__}: {line_of(error)}"
            raise
        finally:
            tracker.end(status, words)


def _identity_tags(run: Mapping[str, Any]) -> dict[str, str]:
    commit = git_commit()
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an account for its user id
        user = "unknown"
    return {
        "ccsr.job": run["job"],
        "ccsr.fingerprint": run["fingerprint"],
        "ccsr.git_commit": commit,
        "mlflow.user": user,
        "mlflow.source.name": f"ccsr {run['job']}",
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
    }


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, which is made if there is none. ClusterError for a deleted one."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        location = None
        if uri.startswith("sqlite:///"):
            location = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the page opens with runs, not with traces
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job has made it meanwhile
            if found is None or found.lifecycle_stage == "deleted":
                number = found.experiment_id if found else "ID"
                raise deleted_experiment(name, number, uri, f" ({line_of(error)})") from error
    return found.experiment_id
