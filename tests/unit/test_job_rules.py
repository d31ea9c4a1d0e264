"""What `ccsr submit` decides before and after a cluster is asked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import typer
import yaml
from ray.job_submission import JobDetails, JobStatus
from typer.testing import CliRunner

from infra import ClusterError, ConfigError
from infra.cluster import jobs
from infra.cluster.jobs import Need, exit_code, refuse_passwords, ship_configs, start_once, submission_identity, submit
from infra.cluster.server import ClusterFacts, job_server, same_release
from infra.errors import without_passwords
from infra.files.storage import list_files
from infra.process.ray_runtime import GpuCount, RayConfig, check_gpus, count_gpus, cpu_work
from pipelines.cli.main import app
from pipelines.cli.needs import needs_of, preview_command, with_option
from tests.training_runs import noise_shards, train_config

CCSR = typer.main.get_command(app)
CONFIGS = Path(__file__).parents[2] / "configs"
ON_S3 = ("--set", "output=s3://b/out")


def ended(status: str, code: int | None) -> SimpleNamespace:
    return SimpleNamespace(status=status, driver_exit_code=code, submission_id="job-1")


def logged(text: str) -> SimpleNamespace:
    """A client whose job has this log."""
    return SimpleNamespace(get_job_logs=lambda job: text)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 6),  # its node was lost, or its environment could not be made
        ("STOPPED", None, 143),
    ],
)
def test_a_job_ends_with_its_drivers_exit_code(status: str, code: int | None, expected: int) -> None:
    assert exit_code(logged("3 samples\n"), ended(status, code)) == expected


def test_a_job_that_was_stopped_after_its_work_was_done_succeeded() -> None:
    assert exit_code(logged("model: /out/model\nccsr ended with exit code 0\n"), ended("STOPPED", None)) == 0
    assert exit_code(logged("stopped\nccsr ended with exit code 143\n"), ended("STOPPED", None)) == 143


def test_a_running_jobs_status_has_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "training stage 1: 120/1000 (0.5/s, 0:29:20 left) loss 0.1, 48.0 samples/s"
    log = f"training stage 1: 110/1000\n{line}\nwarning: slow\n"
    info = JobDetails(
        type="SUBMISSION",
        job_id=None,
        submission_id="job-1",
        driver_info=None,
        status=JobStatus.RUNNING,
        entrypoint="exec python -m pipelines.cli.main train -c a.yaml",
        start_time=1,
    )
    client = SimpleNamespace(get_job_info=lambda job: info, get_job_logs=lambda job: log)
    monkeypatch.setattr("infra.cluster.server.connect", lambda address: client)
    printed = CliRunner().invoke(app, ["jobs", "status", "job-1"]).output
    assert printed.splitlines()[:3] == ["job-1 RUNNING", "command: ccsr train -c a.yaml", line]


def test_the_same_job_is_the_same_arguments_config_and_code(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    arguments = ["shard", "-c", "a.yaml"]
    first = submission_identity(arguments, tmp_path, None, False)
    assert first == submission_identity(list(arguments), tmp_path, None, False)
    others = {
        submission_identity([*arguments, "--set", "draws=2"], tmp_path, None, False),
        submission_identity(arguments, tmp_path, None, True),
        submission_identity(arguments, tmp_path, "mine", False),
    }
    (tmp_path / "a.yaml").write_text("seed: 2\n")
    others.add(submission_identity(arguments, tmp_path, None, False))
    assert len(others - {first}) == 4
    assert submission_identity(["train"], tmp_path, "mine", True) == submission_identity(
        arguments, tmp_path, "mine", False
    )


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], "name-1"),
        (["name-1 FAILED", "name-2 FAILED"], "name-3"),
        (["name-2 FAILED"], "name-3"),  # the first was deleted
        (["name-10 STOPPED", "name-9 FAILED", "other-11 FAILED", "name-x FAILED", "name-1-2 FAILED"], "name-11"),
        (["name-3 RUNNING", "name-1 FAILED"], "name-3"),
        (["name-2 SUCCEEDED", "name-1 FAILED"], None),
    ],
)
def test_a_new_attempt_takes_the_number_after_the_newest(known: list[str], expected: str) -> None:
    class Server:
        def list_jobs(self) -> list[JobDetails]:
            rows = map(str.split, known)
            return [JobDetails(type="SUBMISSION", submission_id=n, status=s, entrypoint="") for n, s in rows]

        def get_job_logs(self, job: str) -> str:
            return ""

        def submit_job(self, submission_id: str) -> str:
            assert submission_id not in {name.split()[0] for name in known}
            return submission_id

    assert start_once(Server(), "name", print) == expected


@pytest.mark.parametrize("option", [["-c", "{}"], ["--config", "{}"], ["--config={}"], ["-c{}"]])
def test_the_config_travels_under_its_name_alone(tmp_path: Path, option: list[str]) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "ship").mkdir()
    source = tmp_path / "here" / "mine.yaml"
    source.write_text("x: 1\n")
    shipped = ship_configs(["shard", *(part.format(source) for part in option), *ON_S3], tmp_path / "ship")
    assert shipped == ["shard", *(part.format("mine.yaml") for part in option), *ON_S3]
    assert (tmp_path / "ship" / "mine.yaml").read_text() == "x: 1\n"
    with pytest.raises(ConfigError, match="no such config"):
        ship_configs(["shard", "-c", str(tmp_path / "absent.yaml")], tmp_path / "ship")


def test_a_password_is_neither_sent_nor_printed() -> None:
    refuse_passwords(["uri: http://mlflow:5000", "s3://bucket/a@b:c", "postgresql://host/db"])
    with pytest.raises(ConfigError) as caught:
        refuse_passwords(["fine", "tracking: {uri: 'https://me:hunter2@mlflow:5000'}"])
    assert "mlflow:5000" in str(caught.value)
    assert "hunter2" not in repr(caught.value)
    shown = str(ClusterError("no answer from http://me:hunter2@x/y", where="http://:hunter2@x", todo="wait"))
    assert shown.splitlines()[:2] == ["no answer from http://***@x/y", "  where: http://***@x"]
    assert without_passwords("http://host:80/a@b") == "http://host:80/a@b"


def test_gpus_are_counted_with_those_that_may_come() -> None:
    nodes = [({"CPU": 4.0}, {}), ({"GPU": 2.0}, {"ccsr.io/kind": "gpu"}), ({"GPU": 2.0}, {})]
    assert count_gpus(nodes) == GpuCount(4, 4)
    growing = count_gpus([({"CPU": 1.0}, {"ccsr.io/max-gpus": "8"}), *nodes])
    assert growing == GpuCount(4, 8)
    check_gpus(8, growing, "there")
    with pytest.raises(ClusterError, match="needs 9 GPUs, the cluster has 4, 8 once it has grown"):
        check_gpus(9, growing, "there")
    with pytest.raises(ClusterError) as caught:
        check_gpus(5, count_gpus(nodes), "there")
    assert caught.value.what == "this job needs 5 GPUs, the cluster has 4"


def test_work_without_gpus_asks_for_other_nodes_and_its_memory() -> None:
    assert cpu_work(RayConfig()) == {"label_selector": {"ccsr.io/kind": "!gpu"}}
    assert cpu_work(RayConfig(task_memory_bytes=5))["memory"] == 5


def test_the_address_is_the_one_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert job_server("head:8265/") == "http://head:8265"
    assert job_server(None) == "http://other:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://mine")
    assert job_server(None) == "https://mine"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.delenv("RAY_ADDRESS")
    assert job_server(None) == "http://127.0.0.1:8265"
    assert same_release("2.60.0", "2.60.1")
    assert not same_release("2.60.0", "2.61.0")


@pytest.mark.usefixtures("bucket")  # needs_of looks for an output
def test_what_a_command_needs_is_read_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    published = str(CONFIGS / "ccsr_v2_stage1.yaml")
    assert needs_of(CCSR, ["train", "-c", published, *ON_S3]) == Need(4, ("s3://b/out",))
    on_cpu = ["train", "--config", published, "--set", "runtime.device=cpu", *ON_S3]
    assert needs_of(CCSR, on_cpu) == Need(0, ("s3://b/out",))
    sharding = ["shard", "-c", str(CONFIGS / "demo" / "shard_train.yaml"), *ON_S3]
    assert needs_of(CCSR, sharding) == Need(0, ("s3://b/out",))
    restoring = ["restore", "s3://b/in", "/shared/out", "--model", "m", "--ray", "--device", "cuda"]
    assert needs_of(CCSR, [*restoring, "--set", "runtime.num_actors=3"]) == Need(3, ("/shared/out",))
    by_overrides = [*restoring[:5], "--set", "runtime.use_ray=true", "--set", "runtime.device=cuda"]
    assert needs_of(CCSR, by_overrides) == Need(1, ("/shared/out",))
    assert needs_of(CCSR, ["verify", "s3://b/x"]) == Need()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "is lost" in needs_of(CCSR, ["train", "-c", published, *ON_S3]).notes[0]


@pytest.mark.usefixtures("bucket")
def test_what_would_fail_there_is_told_here() -> None:
    published = str(CONFIGS / "ccsr_v2_stage1.yaml")
    with pytest.raises(ConfigError, match="relative output"):
        needs_of(CCSR, ["train", "-c", published])
    with pytest.raises(ConfigError, match="unknown key"):
        needs_of(CCSR, ["train", "-c", published, *ON_S3, "--set", "lerning_rate=1"])
    render = ["cluster", "render", "-c", str(CONFIGS / "cluster.yaml"), "--kind", "slurm"]
    assert needs_of(CCSR, render) == Need()
    with pytest.raises(ConfigError, match="`ccsr cluster` cannot be submitted"):
        submit(None, render, print)
    misspelt = CliRunner().invoke(app, ["submit", "--", "train", "-c", published, "--sett", "a=b"])
    assert misspelt.exit_code == 2
    assert "--sett" in misspelt.output


def test_a_submits_dry_run_asks_the_cluster_and_sends_nothing(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = SimpleNamespace(get_address=lambda: "http://head:8265", list_jobs=list)
    monkeypatch.setattr(jobs, "connect", lambda address: client)
    monkeypatch.setattr(jobs, "cluster_facts", lambda client: ClusterFacts(ray.__version__, "3.11", []))
    path = tmp_path / "run.yaml"
    config = train_config(noise_shards(tmp_path / "set", 4), s3, num_updates=2)
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json", exclude_defaults=True), "init_from": "random"}))
    words = with_option(["train", str(path), "--set", "seed=1"], CCSR)
    assert words == ["train", "-c", str(path), "--set", "seed=1"]
    said: list[str] = []
    submit(None, words, said.append, need=needs_of(CCSR, words), dry_run=True)
    (line,) = said
    assert line.startswith("dry run: `ccsr train -c run.yaml --set seed=1` on http://head:8265, 0 GPUs; ccsr-train-")
    assert line.endswith("-1 would be new\n")
    preview_command(CCSR, words, "http://head:8265")
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 of 2 updates runs on http://head:8265" in shown
    path.write_text(path.read_text().replace(str(tmp_path / "set"), str(tmp_path / "only_there")))
    preview_command(CCSR, words, "http://head:8265")
    assert "seen from this machine, there is no complete shard set" in " ".join(capsys.readouterr().out.split())
    assert list_files(s3) == {}
