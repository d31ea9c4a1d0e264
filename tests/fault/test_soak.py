"""Shard, train and evaluate again and again while a saboteur hurts the cluster: every result is an undisturbed run's.

Ten minutes, or CCSR_SOAK_MINUTES (`benchmarks/soak.py`); prints a table of the faults survived.
"""

import os
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cluster_nodes import Nodes
from saboteur import KINDS, Saboteur
from shard_jobs import ShardJob, require_undisturbed, wait
from test_cluster_nodes import (
    NUM_UPDATES,
    Job,
    evaluate_config,
    logged_losses,
    mlflow_server,
    on_head,
    require_equal,
    uploaded,
)
from test_cluster_nodes import nodes as nodes  # the fixture

from evaluation.job import run_evaluate
from infra.files.publish import download_folder
from infra.files.storage import join, read_bytes
from tests.training_runs import noise_shards, train_config

# What a disturbed command may end with: storage, or the cluster. The same command then resumes.
PASSING = (5, 6)
SEED = 20261130


def again_until_done(saboteur: Saboteur, run: Callable[[], tuple[int, str]]) -> int:
    """How often the command was run before it succeeded; fails on an exit code that no fault explains."""
    for attempt in range(20):
        with saboteur.runs():
            code, printed = run()
        if code == 0:
            return attempt
        assert code in PASSING, printed
    raise AssertionError(printed)


@pytest.mark.slow
def test_results_are_an_undisturbed_runs_whatever_happens(
    photos: Path, whole: str, s3: str, nodes: Nodes, tmp_path: Path
) -> None:
    minutes = float(os.environ.get("CCSR_SOAK_MINUTES", "10"))
    source, local = uploaded(photos, join(s3, "photos")), noise_shards(tmp_path / "test", 12, 64)
    tested = noise_shards(join(s3, "test"), 12, 64)
    deadline, rounds, repeats = time.monotonic() + 60 * minutes, 0, 0
    with mlflow_server(nodes, tmp_path) as tracking:
        saboteur = Saboteur(nodes, nodes.s3, SEED)
        saboteur.start()
        while time.monotonic() < deadline or not rounds:
            data, run, result = (join(s3, f"{rounds}/{name}") for name in ("set", "run", "result"))
            shard = ShardJob(photos, data, nodes.ray_address, num_actors=2, source=source, **on_head(nodes))
            repeats += again_until_done(saboteur, lambda: wait(shard.start()))  # noqa: B023
            require_undisturbed(data, whole)

            runtime = {"num_workers": {"min": 1, "max": 2}, "checkpoint_every": 2, "max_restarts": 5}
            changes = {"runtime": runtime | {"collective_timeout_seconds": 60}, "tracking": {"uri": tracking}}
            config = train_config(data, run, num_updates=NUM_UPDATES, **changes)
            repeats += again_until_done(saboteur, Job.of(nodes, "train", config, tmp_path))
            require_equal(run, logged_losses(tracking), whole, tmp_path, NUM_UPDATES, rel=1e-6)  # of 1 or 2 ranks

            asked = evaluate_config(tested, join(run, "model"), result, tracking)
            repeats += again_until_done(saboteur, Job.of(nodes, "evaluate", asked, tmp_path))
            model = str(download_folder(join(run, "model"), tmp_path / f"model-{rounds}"))
            alone = evaluate_config(local, model, str(tmp_path / f"result-{rounds}"), f"sqlite:///{tmp_path}/alone.db")
            undisturbed = run_evaluate(alone).folder
            for name in ("results.parquet", "images.parquet"):
                here, there = (pq.read_table(BytesIO(read_bytes(join(p, name)))) for p in (undisturbed, result))
                assert here.equals(there), name
            rounds += 1
        saboteur.stop()
    lines = [f"| {kind} | {saboteur.counts[kind]} |" for kind in KINDS]
    print("\n".join([f"{rounds} rounds, {repeats} commands run again", "| fault | survived |", "|---|---|", *lines]))
    assert all(saboteur.counts[kind] for kind in KINDS)
