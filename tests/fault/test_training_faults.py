"""Training that loses or freezes a worker, or is asked to end one: the result is the undisturbed run's, or an error."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from infra.shards.manifest import Manifest
from tests.training_runs import noise_shards, run_workers, train_config
from training.run.checkpoint import complete_checkpoints, load_checkpoint

CCSR = str(Path(sys.executable).with_name("ccsr"))
NUM_UPDATES = 30
Undisturbed = tuple[dict[str, dict[str, torch.Tensor]], list[float]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise_shards(tmp_path_factory.mktemp("noise") / "set")


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return nobody_disturbs(tmp_path_factory.mktemp("undisturbed"), data, NUM_UPDATES)


def nobody_disturbs(folder: Path, data: str, num_updates: int) -> Undisturbed:
    """The last checkpoint and the losses of two workers without Ray."""
    config = train_config(data, folder / "run", num_updates=num_updates)
    run_workers(folder, [{"config": config.model_dump(mode="json"), "losses": str(folder / "losses")}])
    losses = [float(line) for line in (folder / "losses").read_text().split()]
    return load_checkpoint(complete_checkpoints(config.output)[-1]).tensors, losses


class Run:
    """`ccsr train` on two workers in a separate folder."""

    def __init__(self, folder: Path, data: str, num_updates: int = NUM_UPDATES, **runtime: object) -> None:
        self.output = str(folder / "run")
        self._database = folder / "mlflow.db"
        self._log = folder / "driver.log"
        self._file = folder / "train.yaml"
        runtime = {"num_workers": 2, "checkpoint_every": 2, "ray": {"num_cpus": 2}, **runtime}
        tracking = {"uri": f"sqlite:///{self._database}"}
        config = train_config(data, self.output, num_updates=num_updates, runtime=runtime, tracking=tracking)
        self._file.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        environment = {**os.environ, "CC": "/bin/false", "COLUMNS": "200"}
        with self._log.open("w") as log:
            driver = subprocess.Popen([CCSR, "train", "-c", str(self._file)], stdout=log, stderr=log, env=environment)
        try:
            yield driver
        finally:
            if driver.poll() is None:
                driver.kill()
            driver.wait()

    def wait_for(self, happened: Callable[[], object], driver: subprocess.Popen[bytes], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert driver.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def printed(self) -> str:
        return self._log.read_text()

    def end(self, driver: subprocess.Popen[bytes]) -> str:
        """What the command printed, once it has ended."""
        driver.wait(timeout=900)
        return self.printed()

    def logged(self) -> tuple[str, list[tuple[int, float]]]:
        """The status of MLflow's one run, and its (update, loss)."""
        client = MlflowClient(f"sqlite:///{self._database}")
        (run,) = client.search_runs([client.get_experiment_by_name("ccsr").experiment_id])
        history = client.get_metric_history(run.info.run_id, "loss/loss")
        return run.info.status, [(point.step // 4, point.value) for point in history]

    def updates_logged(self) -> int:
        """Read beside MLflow: its client would make the database that the driver is about to make."""
        try:
            with sqlite3.connect(f"file:{self._database}?mode=ro", uri=True) as database:
                return database.execute("select count(*) from metrics where key = 'loss/loss'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    def updates_saved(self) -> int:
        places = complete_checkpoints(self.output)
        return int(places[-1].rpartition("/")[2]) // 4 if places else 0


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train: Ray names them, and they are the driver's descendants."""
    processes = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in processes if "RayTrainWorker" in " ".join(process.cmdline())]


def assert_equal(output: str, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    found = load_checkpoint(complete_checkpoints(output)[-1]).tensors
    assert found.keys() == expected.keys()
    for file in found:
        assert all(torch.equal(found[file][name], expected[file][name]) for name in expected[file]), file


@pytest.mark.slow
def test_a_drained_and_a_killed_worker_are_replaced_and_the_run_is_the_undisturbed_one(tmp_path, data, undisturbed):
    """SIGTERM to a worker, as it comes when its node is taken away, is no failure: the one restart is for SIGKILL."""
    run = Run(tmp_path, data, checkpoint_every=5, max_restarts=1)
    with run.started() as driver:
        run.wait_for(lambda: run.updates_saved() >= 5, driver)
        os.kill(workers_of(driver)[1].pid, signal.SIGTERM)
        run.wait_for(lambda: "restart 1" in run.printed(), driver)
        saved = run.updates_saved()
        run.wait_for(lambda: run.updates_saved() > saved, driver)
        victims = workers_of(driver)
        assert len(victims) == 2
        os.kill(victims[1].pid, signal.SIGKILL)
        output = run.end(driver)
    assert driver.returncode == 0, output
    assert "restart 1 from the last checkpoint: a worker's node is being drained" in output
    assert f"saved a checkpoint after {saved} of {NUM_UPDATES} updates" in output
    assert "restart 2 from the last checkpoint" in output
    expected, losses = undisturbed
    assert_equal(run.output, expected)
    status, logged = run.logged()
    assert status == "FINISHED"
    assert {update for update, _ in logged} == set(range(1, NUM_UPDATES + 1))
    assert len(losses) == NUM_UPDATES
    assert all(loss == losses[update - 1] for update, loss in logged), "an update that was done twice gave the same"


@pytest.mark.slow
def test_sigterm_saves_and_ends_and_the_same_command_goes_on(tmp_path, data):
    """Then Ctrl-C, which saves nothing; then nobody disturbs, to an end that is near."""
    run = Run(tmp_path, data, num_updates=1000, checkpoint_every=1000)
    saved = 0
    for stop, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with run.started() as driver:
            run.wait_for(lambda: run.updates_logged() > saved + 1, driver)  # noqa: B023
            os.kill(driver.pid, stop)
            output = run.end(driver)
        assert driver.returncode == code, output
        assert run.logged()[0] == "KILLED"
        assert "restart" not in output
        assert not (tmp_path / "run" / "model").exists()
        saved = saved or run.updates_saved()
        if stop == signal.SIGTERM:
            assert f"saved a checkpoint after {saved} of 1000 updates" in output
    assert 0 < saved == run.updates_saved() < 1000
    end = saved + 2
    run = Run(tmp_path, data, num_updates=end, checkpoint_every=1000)
    with run.started() as driver:
        output = run.end(driver)
    assert driver.returncode == 0, output
    (tmp_path / "undisturbed").mkdir()
    assert_equal(run.output, nobody_disturbs(tmp_path / "undisturbed", data, end)[0])


@pytest.mark.slow
def test_a_frozen_worker_is_named(tmp_path, data):
    run = Run(tmp_path, data, num_updates=1000, max_restarts=0, collective_timeout_seconds=15)
    with run.started() as driver:
        run.wait_for(lambda: run.updates_saved() >= 4, driver)
        frozen = workers_of(driver)[1]
        frozen.suspend()
        try:
            output = run.end(driver)
        finally:
            if frozen.is_running():  # nothing but SIGKILL ends it
                frozen.kill()
    assert driver.returncode == 6, output
    assert re.search(r"rank [01] was silent for \d+ s", output), output
    assert run.updates_saved() >= 4


@pytest.mark.slow
def test_a_users_error_on_one_rank_ends_the_run_without_a_restart(tmp_path, data):
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    entry = Manifest.load(data).entries[7]
    with open(damaged / entry.shard, "r+b") as tar:
        tar.seek(entry.offset_bytes + 512)  # behind the member's tar header
        tar.write(bytes(64))
    run = Run(tmp_path, str(damaged))
    with run.started() as driver:
        output = run.end(driver)
    assert driver.returncode == 3, output
    assert "noise-007" in output
    assert "restart" not in output
