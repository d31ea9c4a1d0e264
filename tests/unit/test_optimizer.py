"""Learning-rate schedules: torch's own where it has them, the same whatever `num_updates` is, and refused where 0."""

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from infra import ConfigError
from infra.config import parse_config
from training.config import TrainConfig
from training.optimizer import EmaConfig, OptimizerConfig

TORCH: list[tuple[dict[str, Any], Any]] = [
    ({"kind": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1)),
    ({"kind": "linear", "until": 20}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20)),
    ({"kind": "cosine", "until": 20, "lowest": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.02)),
    ({"kind": "multistep", "at": [5, 9], "gamma": 0.1}, lambda o: lr_scheduler.MultiStepLR(o, [5, 9], gamma=0.1)),
    (
        {"kind": "wsd", "decay_from": 8, "until": 20, "lowest": 0.5},
        lambda o: lr_scheduler.LambdaLR(o, lambda update: 1 - 0.5 * max(update - 8, 0) / 12),
    ),
]


@pytest.mark.parametrize(("schedule", "scheduler"), TORCH, ids=[case[0]["kind"] for case in TORCH])
def test_schedules_are_torchs(schedule, scheduler):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    reference = scheduler(optimizer)
    config = OptimizerConfig.model_validate({"learning_rate": 0.2, "schedule": schedule})
    for update in range(20):
        assert config.rate_at(update) == pytest.approx(reference.get_last_lr()[0], abs=1e-12), update
        optimizer.step()
        reference.step()
    warm = config.model_copy(update={"warmup_updates": 4})
    assert [warm.rate_at(u) / config.rate_at(u) for u in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert config.rate_at(1000) == config.rate_at(20), "a longer run keeps the last rate"


def train(num_updates: int, **schedule: Any) -> TrainConfig:
    values = {"job": "train", "init_from": "random", "output": "o", "stage": 1, "data": ["d"]}
    values |= {"num_updates": num_updates, "optimizer": {"schedule": schedule}}
    return parse_config(values, TrainConfig, where="test")


def test_passes_are_joined_where_there_are_two():
    values = {"job": "train", "init_from": "random", "output": "o", "data": ["d"], "num_updates": 1}
    values |= {"runtime": {"join_passes": True}}
    parse_config(values | {"stage": 1}, TrainConfig, where="test")
    for other in ({"stage": 0}, {"stage": 2}, {"stage": 1, "model": {"family": "stablesr"}}):
        with pytest.raises(ConfigError, match="join_passes"):
            parse_config(values | other, TrainConfig, where="test")


def test_encodes_are_made_ahead_where_there_are_any():
    values = {"job": "train", "init_from": "random", "output": "o", "data": ["d"], "num_updates": 1}
    values |= {"runtime": {"encode_ahead": True}}
    for stage in (0, 1, 2):
        parse_config(values | {"stage": stage}, TrainConfig, where="test")
    onestep = {"model": {"family": "onestep"}, "vsd": {}}
    for other in ({"stage": 1, "inputs": "latents"}, {"stage": 1, **onestep}):
        with pytest.raises(ConfigError, match="encode_ahead"):
            parse_config(values | other, TrainConfig, where="test")


def test_a_schedule_that_cannot_be_meant_is_refused():
    train(20, kind="cosine", until=20)
    with pytest.raises(ConfigError, match="is 0 before the last of 21 updates") as caught:
        train(21, kind="cosine", until=20)
    assert caught.value.todo == "write `until: 21`, or a `lowest` above 0"
    train(21, kind="cosine", until=20, lowest=0.1)
    with pytest.raises(ConfigError, match="decay_from"):
        train(9, kind="wsd", decay_from=5, until=5)
    with pytest.raises(ConfigError, match="cosine"):
        train(9, kind="cosin", until=9)
    with pytest.raises(ConfigError, match="unknown key `untill`"):
        train(9, kind="cosine", until=9, untill=9)


def test_the_average_forgets_its_start_while_it_is_short():
    assert [EmaConfig().decay_at(update) for update in (0, 8, 10**6)] == [0.1, 0.5, 0.999]
    assert EmaConfig(warmup=False).decay_at(0) == 0.999
