"""A checkpoint that an earlier version wrote still loads, and training resumes from it as it did then.

`python -m tests.golden.test_checkpoint_golden` made tests/golden/checkpoint: three updates of the module below, with a
discriminator, by the functions that training calls; then two more, whose weights are in after.json.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from infra import rng_for
from training.config import TrainConfig
from training.data.order import SORTED
from training.run.agreement import WorkerContext
from training.run.checkpoint import complete_checkpoints, load_checkpoint
from training.run.checkpointer import Checkpoints

FOLDER = Path(__file__).parent / "checkpoint"
PLACE = FOLDER / "checkpoints" / "000000000024"
SHA256 = "15bcdf8fad4dd5c5f44b1154ff26206f3f676f41a2d237bc0b88b2c3cd10af4d"


class Run:
    """Both modules start from raw Philox words, so that no version of torch draws other numbers."""

    def __init__(self, output: str) -> None:
        self.module = _seeded(nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3, bias=False)), "generator")
        judge = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 1, 2))
        self.judge = _seeded(judge, "discriminator")
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (self.module, self.judge)]
        values = {
            "job": "train",
            "init_from": "random",
            "output": output,
            "stage": 2,
            "data": ["d"],
            "num_updates": 9,
            "global_batch_size": 8,
        }
        stage = SimpleNamespace(trained=self.module, model=SimpleNamespace(networks={"vae": self.module}))
        engine = SimpleNamespace(module=stage, zero_optimization_stage=lambda: 0)
        context = WorkerContext(0, 1, "cpu", {"dataset_ids": ["0123456789abcdef"], "git_commit": "unknown"})
        config = TrainConfig.model_validate({**values, "runtime": {"micro_batch_size": 8}})
        critic = SimpleNamespace(name="discriminator", module=self.judge, optimizer=self.optimizers[1])
        self.checkpoints = Checkpoints(config, engine, self.optimizers[0], critic, context)

    def update(self, number: int) -> None:
        image = _words((2, 2, 8, 8), "image", number)
        made = self.module(image)
        (made.square().mean() + (self.judge(made) - 1).square().mean()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def weights(self) -> dict[str, list[float]]:
        found = {**self.module.state_dict(prefix="generator."), **self.judge.state_dict(prefix="discriminator.")}
        return {name: tensor.double().flatten().tolist() for name, tensor in found.items()}


def _words(shape: tuple[int, ...], *keys: str | int) -> Tensor:
    """Numbers in [-1, 1)."""
    words = rng_for(1, *keys).bit_generator.random_raw(torch.Size(shape).numel())
    return torch.tensor([int(word >> 40) / 2**23 - 1 for word in words.tolist()]).reshape(shape)


def _seeded(module: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(_words(tuple(parameter.shape), name, key) / 2)
    return module


def test_its_bytes_are_the_committed_ones_and_it_is_complete() -> None:
    assert hashlib.sha256((PLACE / "complete.json").read_bytes()).hexdigest() == SHA256
    assert complete_checkpoints(str(FOLDER)) == [str(PLACE)]
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 100_000
    state = load_checkpoint(str(PLACE))
    facts = {"format": "ccsr-checkpoint-1", "position": 24, "num_updates": 3, "dataset_ids": ["0123456789abcdef"]}
    assert {name: state.facts[name] for name in facts} == facts
    assert sorted(state.tensors) == ["discriminator", "moments", "weights"]
    assert list(state.tensors["weights"]) == ["0.bias", "0.weight", "2.weight"]
    assert len(state.tensors["moments"]) == 2 * 3
    assert state.tensors["discriminator"]["weights.1.num_batches_tracked"] == 3


def test_training_goes_on_from_it() -> None:
    run = Run(str(FOLDER))
    with run.checkpoints as checkpoints:
        assert checkpoints.resume() == 3
        assert checkpoints.order == SORTED, "it names none: it was made before there was another"
        for number in (3, 4):
            run.update(number)
    expected = json.loads((FOLDER / "after.json").read_text())
    found = run.weights()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


def _make() -> None:
    run = Run(str(FOLDER))
    with run.checkpoints as checkpoints:
        for number in range(3):
            run.update(number)
        checkpoints.save(3)
    for number in (3, 4):
        run.update(number)
    (FOLDER / "after.json").write_text(json.dumps(run.weights(), indent=1))
    print(hashlib.sha256((PLACE / "complete.json").read_bytes()).hexdigest())


if __name__ == "__main__":
    _make()
