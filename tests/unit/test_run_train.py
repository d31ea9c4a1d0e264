"""What `ccsr train` decides before anything starts: finished, longer, shorter, or with another dataset."""

from pathlib import Path

import pytest

from infra import ConfigError
from infra.storage import write_bytes
from tests.training_runs import noise_shards, train_config
from training.checkpoint import TrainingState, save_checkpoint
from training.train import _updates_done, run_train


def test_a_finished_run_returns_and_only_more_updates_go_on_from_it(tmp_path: Path) -> None:
    data, output = noise_shards(tmp_path / "set", 4), str(tmp_path / "run")
    config = train_config(data, output, num_updates=3)
    assert _updates_done(config) == (0, 0)
    save_checkpoint(output, TrainingState({"position": 12, "num_updates": 3}, {"weights": {}}), keep=2)
    assert _updates_done(config) == (0, 3), "trained, not yet exported"
    write_bytes(f"{output}/model/ccsr.json", b"{}")
    assert _updates_done(config) == (0, 3), "a model of unknown age"
    write_bytes(f"{output}/trained.json", b'{"num_updates": 3, "position": 12}')
    assert _updates_done(config) == (3, 3)
    assert run_train(config) == f"{output}/model"
    assert _updates_done(train_config(data, output, num_updates=5)) == (3, 3)
    with pytest.raises(ConfigError, match="has done 3 updates, the config ends at 2"):
        run_train(train_config(data, output, num_updates=2))
    other = noise_shards(tmp_path / "other", 5)
    with pytest.raises(ConfigError, match="dataset_ids"):
        run_train(train_config(other, output, num_updates=3))
