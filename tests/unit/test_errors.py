"""Errors on their way to the user: none is lost because another one carries no message."""

import pickle
import re
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from infra import ClusterError, DataError, ModelError
from infra.cluster.jobs import refuse_passwords, start_once
from infra.cluster.server import cluster_facts, connect
from infra.errors import CcsrError, line_of
from infra.imaging.images import UnusableImageError
from infra.mlflow.server import mlflow_errors
from infra.process.ray_runtime import RayConfig, lost_worker, ray_cluster, user_error
from pipelines.restore_plan import ChangedSourceError
from training.models.directory import read_checkpoint
from training.run.checkpoint import DamagedError

ROOT = Path(__file__).parents[2]


def test_a_line_of_an_error_is_never_empty() -> None:
    assert line_of(ValueError()) == "ValueError"
    assert line_of(ValueError("\n \n")) == "ValueError"
    assert line_of(ValueError("\nfirst\nlast\n")) == "first"
    assert line_of(ValueError("\nfirst\nlast\n"), -1) == "last"
    assert len(line_of(ValueError("x" * 1000))) == 300


def test_every_error_comes_home_from_another_process_as_it_was() -> None:
    kinds = {*CcsrError.__subclasses__(), UnusableImageError, ChangedSourceError, DamagedError}
    floors = ("infra", "degradation", "training", "evaluation", "pipelines")
    texts = [path.read_text() for floor in floors for path in (ROOT / floor).rglob("*.py")]
    bases = "|".join(kind.__name__ for kind in (CcsrError, *kinds))
    assert {name for text in texts for name in re.findall(rf"class (\w+)\((?:{bases})\)", text)} == {
        kind.__name__ for kind in kinds
    }
    usual = [kind("what", where="where", todo="todo") for kind in kinds - {ChangedSourceError}]
    for error in (*usual, ChangedSourceError("where")):
        error.items, error.note = ("item",), "more"
        home = pickle.loads(pickle.dumps(error))
        assert (type(home), str(home), vars(home)) == (type(error), str(error), vars(error))


class Silent:
    """A client of a job server whose every call fails without a message."""

    def get_address(self) -> str:
        return "http://there"

    def __getattr__(self, name: str) -> object:
        raise RuntimeError


@pytest.mark.parametrize("message", [(), ("",), ("\n",)])
def test_an_error_without_a_message_is_told_by_its_kind(
    message: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(*message)

    def mlflow_fails() -> None:
        from mlflow.exceptions import MlflowException

        with mlflow_errors("there"):
            raise MlflowException(*(message or ("",)))

    (tmp_path / "broken.pth").write_bytes(b"x")
    monkeypatch.setattr("torch.load", fail)
    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient.__init__", fail)
    for kind, call in (
        (ModelError, lambda: read_checkpoint(tmp_path / "broken.pth")),
        (ClusterError, ray_cluster(RayConfig()).__enter__),
        (ClusterError, lambda: connect("http://there")),
        (ClusterError, lambda: cluster_facts(Silent())),
        (ClusterError, lambda: start_once(Silent(), "ccsr-train-0", print)),
        (ClusterError, mlflow_fails),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert "RuntimeError" in caught.value.what or "MlflowException" in caught.value.what
    assert "ValueError" in lost_worker(ValueError(*message), "out").what
    with pytest.raises(Exception, match="a password"):
        refuse_passwords(["https://me:hunter2@"])


def test_a_tasks_error_is_found_in_what_ray_raises_for_it() -> None:
    """Ray's class is also the error's, but its text is the worker's."""

    def from_ray(cause: Exception) -> Exception:
        return RayTaskError("work", "Traceback ...", cause, "worker", 1, "::1").as_instanceof_cause()

    error = DataError("a part is damaged", where="000000.tar", todo="copy it again")
    assert isinstance(from_ray(error), DataError)
    assert str(from_ray(error)) != str(error)
    assert user_error(from_ray(error)) is error
    assert user_error(from_ray(from_ray(error))) is error
    assert user_error(from_ray(ValueError())) is None
