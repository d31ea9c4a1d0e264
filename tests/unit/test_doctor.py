"""`ccsr doctor`: what is well is said, what is not is named with what to do."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cluster import doctor
from infra.cluster.doctor import Line, diagnose
from infra.cluster.server import ClusterFacts
from infra.files.publish import write_bytes
from infra.files.storage import list_files
from pipelines.cli.main import app


def lines_of(name: str, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.name == name]


def test_this_machine_can_do_the_work(tmp_path: Path) -> None:
    lines = diagnose(None, str(tmp_path), f"sqlite:///{tmp_path}/mlflow.db")
    assert {line.name for line in lines} >= {"Python", "versions", "packages", "GPU", "disk", "storage", "MLflow"}
    for name in ("versions", "packages", "storage", "MLflow"):
        assert [line.state for line in lines_of(name, lines)] == ["ok"], name
    assert not list(tmp_path.glob(".writable*"))


def test_every_failing_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 2**62)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.0" if name == "ray" else real(name))
    lines = diagnose("http://127.0.0.1:9", str(tmp_path / "file" / "x"), "http://me:hunter2@127.0.0.1:9")
    failed = [line for line in lines if line.state == "fail"]
    assert [line.name for line in failed] == ["versions", "disk", "storage", "MLflow", "cluster"]
    assert all(line.todo for line in failed)
    assert "ray 2.9.0, wanted <2.61,>=2.60" in failed[0].found
    assert not any("hunter2" in line.found + line.todo for line in lines)
    shown = CliRunner().invoke(app, ["doctor", "--storage", str(tmp_path / "file" / "x")])
    assert shown.exit_code == 1
    assert shown.output.split("fail  storage: ")[1].splitlines()[1].startswith("      to do: ")


def test_storage_is_tried_on_s3(s3: str) -> None:
    assert [line.state for line in lines_of("storage", diagnose(None, s3, None))] == ["ok"]
    assert list_files(s3) == {}


def test_storage_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        assert [line.state for line in lines_of("storage", diagnose(None, str(tmp_path / name), None))] == ["ok"]
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_storage_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(uri: str, data: bytes) -> bool:
        write_bytes(uri, data)
        return True

    monkeypatch.setattr(doctor, "put_if_absent", always)
    (line,) = lines_of("storage", diagnose(None, str(tmp_path), None))
    assert line.state == "fail"
    assert "If-None-Match" in line.todo


def test_another_package_of_our_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "__init__.py").write_text("")
    (tmp_path / "infra").mkdir()  # a folder without __init__.py hides nothing
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (line,) = lines_of("packages", diagnose(None, None, None))
    assert (line.state, str(tmp_path / "evaluation") in line.found) == ("note", True)
    assert str(tmp_path / "infra") not in line.found
    monkeypatch.delitem(sys.modules, "evaluation", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path[:-1]])
    found = lines_of("packages", diagnose(None, None, None))
    assert ("fail", f"remove or rename {tmp_path / 'evaluation' / '__init__.py'}") in [(x.state, x.todo) for x in found]


def test_nodes_are_looked_at_for_placement() -> None:
    def node(ip: str, labels: dict[str, str], **resources: float) -> dict:
        return {"node_ip": ip, "labels": labels, "resources_total": resources}

    gpu = node("10.0.0.2", {"ccsr.io/kind": "gpu"}, CPU=8, GPU=4)
    head = node("10.0.0.1", {"ccsr.io/max-gpus": "16"}, CPU=4)
    sound = list(doctor.check_nodes(ClusterFacts("2.60.0", "3.11.0", [head, gpu])))
    assert sound == [Line("nodes", "ok", "2 nodes, 12 CPUs, 4 GPUs (up to 16)")]
    plain = node("10.0.0.3", {}, CPU=8, GPU=4)
    noted = list(doctor.check_nodes(ClusterFacts("2.60.0", "3.11.0", [head, plain])))[1]
    assert (noted.state, noted.todo) == ("note", "start them with --labels ccsr.io/kind=gpu")
    assert "10.0.0.3" in noted.found
    assert [line.state for line in doctor.check_nodes(ClusterFacts("2.60.0", "3.11.0", [gpu]))] == ["ok", "fail"]
    assert [line.state for line in doctor.check_nodes(ClusterFacts("2.60.0", "3.11.0", [plain]))] == ["ok"]
