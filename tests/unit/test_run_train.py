"""What `ccsr train` decides before anything starts: finished, longer, shorter, or with another dataset."""

import os
import shutil
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

import infra.run
from infra import ConfigError, ModelError
from infra.config import result_part
from infra.files.publish import write_bytes
from infra.mlflow.server import TrackingConfig
from infra.mlflow.tracking import track
from infra.run import PACKAGES, claim_output
from tests.training_runs import noise_shards, train_config
from training.models import model_id
from training.run import driver as train
from training.run.checkpoint import TrainingState, advice, complete_checkpoints, save_checkpoint
from training.run.continued import find_checkpoint
from training.run.driver import claim_run, run_train, updates_done
from training.run.monitoring.mlflow_training import describe_run


def test_stage_2_does_not_resume_with_another_micro_batch(tmp_path: Path) -> None:
    def claim(stage: int, micro_batch_size: int, num_workers: int = 1) -> None:
        runtime = {"micro_batch_size": micro_batch_size, "num_workers": num_workers}
        config = train_config("set", tmp_path / str(stage), stage=stage, num_updates=3, runtime=runtime)
        claim_output(config.output, config, job="train", inputs={}, libraries=())

    for stage in (0, 1, 2):
        claim(stage, 2)
        write_bytes(str(tmp_path / str(stage) / "checkpoints" / "000000000002" / "state.json"), b"{}")
        claim(stage, 2, num_workers=2)
    claim(0, 1)
    claim(1, 1)
    with pytest.raises(ConfigError, match=r"config\.runtime\.micro_batch_size: 2 -> 1\n"):
        claim(2, 1)


def test_a_finished_run_returns_and_only_more_updates_go_on_from_it(tmp_path: Path) -> None:
    data, output = noise_shards(tmp_path / "set", 4), str(tmp_path / "run")
    config = train_config(data, output, num_updates=3)
    assert updates_done(config) == (0, 0)
    save_checkpoint(output, TrainingState({"position": 12, "num_updates": 3}, {"weights": {}}), keep=2)
    assert updates_done(config) == (0, 3), "trained, not yet exported"
    write_bytes(f"{output}/model/ccsr.json", b"{}")
    assert updates_done(config) == (0, 3), "a model of unknown age"
    write_bytes(f"{output}/trained.json", b'{"num_updates": 3, "position": 12}')
    assert updates_done(config) == (3, 3)
    raw = {"ema": {}, "runtime": {"export_raw": True}}
    assert updates_done(train_config(data, output, num_updates=3, **raw)) == (0, 3), "one of its models is missing"
    assert run_train(config) == f"{output}/model"
    assert updates_done(train_config(data, output, num_updates=5)) == (3, 3)
    with pytest.raises(ConfigError, match="has done 3 updates, the config ends at 2"):
        run_train(train_config(data, output, num_updates=2))
    other = noise_shards(tmp_path / "other", 5)
    with pytest.raises(ConfigError, match="dataset_ids"):
        run_train(train_config(other, output, num_updates=3))


def test_a_finished_run_whose_last_checkpoint_is_damaged_resumes_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(noise_shards(tmp_path / "set", 4), tmp_path / "run", num_updates=3)
    for update in (2, 3):
        state = TrainingState({"position": update * 4, "num_updates": update}, {"weights": {}})
        place = save_checkpoint(config.output, state, keep=2)
    Path(place, "state.json").write_bytes(b"damaged")

    def fit(*_: object) -> None:
        save_checkpoint(config.output, state, keep=2)

    exported: list[object] = []
    monkeypatch.setattr(train, "check_start", lambda *_: None)
    monkeypatch.setattr(train, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "export_run", lambda config, last, uri: exported.append(last.place))
    run_train(config)
    assert exported == [place]


@pytest.mark.parametrize(("fault", "status"), [("damaged", "FAILED"), ("sigterm", "FINISHED")])
def test_a_run_ends_with_its_model(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, fault: str, status: str
) -> None:
    """All updates are done: SIGTERM while the model is written ends nothing, one that cannot be written fails."""
    tracking = {"uri": database}
    config = train_config(noise_shards(tmp_path / "set", 4), tmp_path / "run", num_updates=3, tracking=tracking)
    save_checkpoint(config.output, TrainingState({"position": 12, "num_updates": 3}, {"weights": {}}), keep=2)
    if fault == "sigterm":
        monkeypatch.setattr(train, "export_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        run_train(config)
    else:
        with pytest.raises(ModelError):
            run_train(config)
    client = MlflowClient(tracking["uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
    assert run.info.status == status


def test_the_commit_is_that_of_the_code_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our code in its own repository, changed there, and installed inside another project's."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    installed = theirs / ".venv" / "site-packages"

    def git(place: Path, *arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=place, check=True, capture_output=True, text=True).stdout.strip()

    def told(place: Path) -> str:
        monkeypatch.setattr(infra.run, "ROOT", place)
        return infra.run.git_commit()

    for place in (ours, installed):
        for package in PACKAGES:
            (place / package).mkdir(parents=True)
            (place / package / "__init__.py").write_text("")
    (theirs / ".gitignore").write_text(".venv\n")
    commits = {}
    for repository in (ours, theirs):
        git(repository, "init", "--quiet")
        git(repository, "add", ".")
        git(repository, "commit", "--quiet", "--message", "all")
        commits[repository] = git(repository, "rev-parse", "HEAD")
    assert told(ours) == commits[ours]
    assert told(installed) == "unknown"
    (ours / "notes.txt").write_text("not code")
    assert told(ours) == commits[ours]
    (ours / "infra" / "new.py").write_text("")
    assert told(ours) == f"{commits[ours]}-dirty"
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))  # as in a hook
    assert told(ours) == f"{commits[ours]}-dirty"
    monkeypatch.setenv("PATH", "")
    assert told(ours) == "unknown"
    monkeypatch.setenv("CCSR_GIT_COMMIT", "abc-dirty")  # a submitted job's
    assert told(ours) == "abc-dirty"


def test_a_checkpoint_to_continue_from_is_named_by_its_run_and_position(tmp_path: Path, database: str) -> None:
    data, tracking = noise_shards(tmp_path / "set", 4), TrackingConfig(uri=database)
    before = train_config(data, tmp_path / "before", num_updates=3)
    facts = {"config": result_part(before), "init_from": model_id(None), "fingerprint": "f" * 64}
    with pytest.raises(ModelError, match="no complete checkpoint") as missing:
        find_checkpoint(before.output, tracking)
    assert missing.value.todo == "check its folder"
    for update in (1, 2):
        save_checkpoint(
            before.output, TrainingState({"position": 4 * update, "num_updates": update, **facts}, {}), keep=2
        )
    places = complete_checkpoints(before.output)
    assert find_checkpoint(before.output, tracking) == places[1]
    assert find_checkpoint(f"{before.output}@4", tracking) == places[0]
    with pytest.raises(ModelError, match="at position 12") as missing:
        find_checkpoint(f"{before.output}@12", tracking)
    assert "one of: 4, 8" in missing.value.todo
    run = {"fingerprint": "f" * 64, "job": "train", "config": {"stage": 1}}
    with track(tracking, run, output=before.output) as first:
        pass
    assert find_checkpoint(f"runs:/{first.run_id}@8", tracking) == places[1], "before it has a model, too"
    later = train_config(data, tmp_path / "later", num_updates=3, continue_from=places[1])
    with track(tracking, run, output=later.output) as second:
        describe_run(second, later, [])
    client = MlflowClient(tracking.uri)
    continued = client.get_run(second.run_id).data.tags
    assert continued["ccsr.continued_from"] == first.run_id
    assert f"Continues [before-stage1](#/experiments/1/runs/{first.run_id})" in continued["mlflow.note.content"]
    assert client.get_run(first.run_id).data.tags["ccsr.continued_by"] == second.run_id

    def claimed(**changes: Any) -> dict[str, Any]:
        after = {"num_updates": 3, "continue_from": f"{before.output}@8", "tracking": {"uri": tracking.uri}, **changes}
        return claim_run(train_config(data, tmp_path / "after", **after))[3]

    run = claimed(optimizer={"learning_rate": 1e-5})
    assert run["inputs"]["continue_from"] | {"checkpoint": ""} == {
        "fingerprint": "f" * 64,
        "position": 8,
        "checkpoint": "",
    }
    assert claimed(optimizer={"learning_rate": 1e-5}, continue_from=before.output) == run
    own = str(tmp_path / "after")
    save_checkpoint(own, TrainingState({"position": 12, "num_updates": 3, **facts}, {}), keep=2)
    shutil.move(before.output, tmp_path / "moved")
    assert claimed(optimizer={"learning_rate": 1e-5}) == run, "a resume does not need the other run"
    shutil.move(tmp_path / "moved", before.output)
    for changes, what in (
        ({"stage": 2}, "`stage` is 2, was 1"),
        ({"model": {"family": "v2"}}, "`model` is"),
        ({"global_batch_size": 6}, "no multiple of global_batch_size, 6"),
        ({"num_updates": 2}, "it has done 2 updates, num_updates is 2"),
    ):
        with pytest.raises(ConfigError, match=what):
            claimed(**changes)


def test_the_advice_after_a_divergence_is_one_that_is_taken(tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    assert "no checkpoint yet" in advice(output)
    save_checkpoint(output, TrainingState({"position": 4, "num_updates": 1}, {}), keep=2)
    bad = {"weights": {"w": torch.tensor([float("nan")])}}
    with pytest.raises(ModelError, match="not finite") as caught:
        save_checkpoint(output, TrainingState({"position": 8, "num_updates": 2}, bad), keep=2)
    assert caught.value.todo == advice(output)
    assert f"continue_from: {output}" in caught.value.todo
