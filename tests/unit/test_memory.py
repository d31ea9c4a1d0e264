"""How much memory a run needs at least, by hand."""

import psutil
import pytest
import torch

from infra import ConfigError
from infra.process.memory import free_memory, to_device
from training.config import ModelConfig, TrainConfig
from training.models import build_model
from training.optimizer import EmaConfig, OptimizerConfig
from training.run.agreement import WorkerContext
from training.run.cost.parameters import parameter_table
from training.run.cost.requirements import check_memory, memory_needed


def config(stage: int = 1, precision: str = "fp32", zero_stage: int = 1) -> TrainConfig:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "o",
        "stage": stage,
        "data": ["d"],
        "num_updates": 1,
        "precision": precision,
    }
    return TrainConfig.model_validate({**values, "runtime": {"zero_stage": zero_stage}})


@pytest.mark.parametrize(
    ("precision", "zero_stage", "per_trained"),
    # weights, gradients, fp32 masters and two moments of a parameter, in bytes, on four workers
    [
        ("fp32", 0, (4, 4, 8)),
        ("fp32", 1, (4, 4, 1 + 2)),
        ("fp32", 2, (4, 1, 1 + 2)),
        ("bf16", 1, (2, 4 + 2, 1 + 2)),
        ("bf16", 2, (2, 1 + 2, 1 + 2)),
    ],
)
def test_bytes_per_parameter(precision: str, zero_stage: int, per_trained: tuple[float, ...]) -> None:
    needed = memory_needed(1000, 0, config(1, precision, zero_stage), 4)
    assert list(needed.values()) == [1000 * number for number in per_trained]
    frozen = memory_needed(0, 1000, config(1, precision, zero_stage), 4)
    assert list(frozen.values()) == [per_trained[0] * 1000, 0, 0]


@pytest.mark.parametrize(("zero_stage", "masters"), [(0, 0), (1, 1)])
def test_moments_in_eight_bits_and_an_average(zero_stage: int, masters: float) -> None:
    """On four workers: a byte a moment, with a float32 scale for 256 of them."""
    settings = config(1, "fp32", zero_stage)
    settings = settings.model_copy(update={"optimizer": OptimizerConfig(kind="adamw8bit"), "ema": EmaConfig()})
    bits, share = 2 * (1 + 4 / 256), 4 if zero_stage else 1
    assert memory_needed(25600, 0, settings, 4)["optimiser"] == 25600 * (masters + (bits + 4) / share)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_cannot_fit_is_refused_with_its_numbers(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    model = build_model(ModelConfig(), 0)
    rows = parameter_table("tiny")
    trained = sum(row.parameters for row in rows if row.stage == stage)
    more = 4 * trained + 12 * trained // 2  # gradients, and half of masters and moments; the weights are there already

    def with_free(number: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        memory = psutil.virtual_memory()._replace(available=2 * number)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        check_memory(model, config(stage), WorkerContext(0, 2, "cpu", {}))

    with_free(more + 100_000)
    with pytest.raises(ConfigError, match=r"0\.00 are free") as caught:
        with_free(1000)
    assert f"needs {more / 2**30:.2f} GiB more on each worker" in caught.value.what
    with pytest.raises(ConfigError):
        with_free(int(more * 0.98))


def test_what_torch_caches_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a validation the card is full of cached blocks, and a run or a picture still fits."""
    figures = {"mem_get_info": (300, 10_000), "memory_reserved": 9_000, "memory_allocated": 2_000}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert free_memory("cuda:0") == 300 + 9_000 - 2_000
    model = build_model(ModelConfig(), 0)
    trained = sum(weight.numel() for weight in model.trained_part(1).parameters())
    every = sum(weight.numel() for network in model.networks.values() for weight in network.parameters())
    needed = sum(memory_needed(trained, every - trained, config(), 1).values())
    card = WorkerContext(0, 1, "cuda:0", {})
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2_000 + needed - 300)
    check_memory(model, config(), card)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2_000 + needed - 301)
    with pytest.raises(ConfigError, match="are free"):
        check_memory(model, config(), card)


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, **how: calls.append((to, how)) or tensor)
    to_device(torch.ones(1), "cuda:0")
    to_device(torch.ones(1), "cpu")
    assert calls == ["pinned", (("cuda:0",), {"non_blocking": True}), (("cpu",), {})]
