"""What `ccsr train` decides before anything starts: finished, longer, shorter, or with another dataset."""

from pathlib import Path

import pytest

from infra import ConfigError
from infra.run import claim_output
from infra.storage import write_bytes
from tests.training_runs import noise_shards, train_config
from training.checkpoint import TrainingState, save_checkpoint
from training.train import _updates_done, run_train


def test_stage_2_does_not_resume_with_another_micro_batch(tmp_path: Path) -> None:
    def claim(stage: int, micro_batch_size: int, num_workers: int = 1) -> None:
        runtime = {"micro_batch_size": micro_batch_size, "num_workers": num_workers}
        config = train_config("set", tmp_path / str(stage), stage=stage, num_updates=3, runtime=runtime)
        claim_output(config.output, config, job="train", inputs={}, libraries=())

    for stage in (0, 1, 2):
        claim(stage, 2)
        claim(stage, 2, num_workers=2)
    claim(0, 1)
    claim(1, 1)
    with pytest.raises(ConfigError, match=r"config\.runtime\.micro_batch_size: 2 -> 1\n"):
        claim(2, 1)


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
