"""`ccsr estimate` of a training config: counted without weights what a real step counts, and arithmetic by hand."""

import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from infra import ConfigError
from pipelines.cli.main import app
from pipelines.estimate.training import Assumed, TrainEstimate, estimate_training, fit_table, train_tables
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.models import build_model
from training.restore.seeded_runs import decode_images, prepare_image, sample_rows
from training.run.cost.requirements import (
    StepCost,
    empty_batch,
    ingest_seconds,
    memory_needed,
    restore_flops,
    step_cost,
)
from training.run.monitoring.meter import flop_counter
from training.run.step.stages import build_stage

CONFIGS = Path(__file__).parents[2] / "configs"


def config(stage: int = 1, **changes: Any) -> TrainConfig:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "o",
        "stage": stage,
        "data": ["d"],
        "num_updates": 1000,
        "crop_px": 32,
    }
    runtime = {"micro_batch_size": 4, **changes.pop("runtime", {})}
    if stage == 2:
        values |= {"num_steps": 6, "decoder_loss": {"perceptual": "none", "discriminator_width": 4}}
    return TrainConfig.model_validate({**values, **changes, "runtime": runtime})


def counted(settings: TrainConfig) -> StepCost:
    """`step_cost`, once for equal settings."""
    return _counted(settings.model_dump_json())


@functools.cache
def _counted(settings: str) -> StepCost:
    return step_cost(TrainConfig.model_validate_json(settings))


ONESTEP = {"model": {"family": "onestep"}, "decoder_loss": {"divide_by_batch": False}, "vsd": {}}


@pytest.mark.parametrize(
    ("stage", "changes"), [(0, {}), (1, {}), (2, {}), (1, ONESTEP)], ids=["stage0", "stage1", "stage2", "onestep"]
)
def test_the_count_is_that_of_a_real_step(stage: int, changes: dict[str, Any]) -> None:
    """With the step of a discriminator or a regulariser, and the memory of its weights, gradients and moments."""
    settings = config(stage, **changes)
    stage_module = build_stage(build_model(settings.model, 0), settings)
    critic = stage_module.critic
    batch, trained, judges = empty_batch(settings), list(stage_module.trained.parameters()), []
    with flop_counter() as counter:
        loss = stage_module(batch, update=1000)["loss"]
        if critic is not None:
            judges = list(critic.trained.parameters())
            critic.loss().backward()
        loss.backward()
    cost = counted(settings)
    assert cost.flops_per_sample * 4 == counter.get_total_flops() > 0
    assert cost.num_trained == sum(weight.numel() for weight in trained)
    assert all(weight.grad is not None for weight in judges)
    assert cost.critic_bytes == sum(4 * weight.nbytes for weight in judges)
    assert bool(judges) == (stage == 2 or bool(changes))
    assert torch.get_default_dtype() == torch.float32


def test_the_critic_is_part_of_what_a_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.cost.requirements.step_cost", counted)
    settings = config(2)
    cost, (one,) = counted(settings), estimate_training(settings, Assumed(), [])
    assert one.gpu_bytes["critic"] == cost.critic_bytes > 0
    assert sum(one.gpu_bytes.values()) / 2**30 == pytest.approx(fit_table(settings, cost).rows[0][1].value)


@pytest.mark.parametrize(
    ("family", "sampling"),
    [("v1", {}), ("v2", {"num_steps": 15, "guidance": 5.5, "negative_prompt": ""}), ("stablesr", {"num_steps": 4})],
)
def test_the_count_of_a_restoration_is_that_of_a_real_one(
    family: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tiny = (
        SamplingConfig.model_validate({"tile": None, **sampling}),
        ModelConfig(preset="tiny", family=family),
    )
    model = build_model(tiny, 0)
    lr = np.zeros((16, 16, 3), np.uint8)
    monkeypatch.setattr("training.run.cost.requirements.COUNTED_PX", 64)
    with flop_counter() as counter, torch.no_grad():  # under inference_mode a counter sees nothing
        image = inspect.unwrap(prepare_image)(model, lr, (64, 64), settings, key="k")
        list(decode_images(model, sample_rows(model, [(image, 0)], settings, 0), [image], settings))
    assert restore_flops(tiny, settings, 64**2) == counter.get_total_flops() > 0
    assert restore_flops(tiny, settings, 128**2) == counter.get_total_flops() * 4


def test_precision_and_checkpointing_show_in_the_memory() -> None:
    plain, half = counted(config()), step_cost(config(precision="bf16"))
    assert half.flops_per_sample == plain.flops_per_sample
    assert 0.4 < half.activation_bytes / plain.activation_bytes < 0.7
    again = step_cost(config(runtime={"activation_checkpointing": True}))
    assert again.activation_bytes < 0.5 * plain.activation_bytes
    assert again.flops_per_sample > plain.flops_per_sample


def test_hours_and_cost_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.cost.requirements.step_cost", lambda config: StepCost(100, 50, 4e12, 400))
    monkeypatch.setattr("training.run.cost.requirements.ingest_seconds", lambda config: 0.02)
    settings = config(global_batch_size=96, precision="bf16", runtime={"num_workers": 4})
    estimates = estimate_training(settings, Assumed("A100", mfu=0.5, price=2.0), [8, 32, 5])
    assert [(one.num_gpus, one.micro_batch_size, one.accumulation) for one in estimates] == [
        (4, 4, 6),
        (8, 4, 3),
        (32, 3, 1),  # five GPUs cannot share 96 samples
    ]
    eight: TrainEstimate = estimates[1]
    assert eight.samples_per_second == pytest.approx(8 * 0.5 * 312e12 / 4e12)
    assert eight.gpu_hours == pytest.approx(1000 * 96 / (0.5 * 312e12 / 4e12) / 3600)
    assert eight.cost == pytest.approx(2 * eight.gpu_hours)
    assert eight.hours == pytest.approx(eight.gpu_hours / 8)
    assert eight.ingest_cores == pytest.approx(0.02 * 39)
    assert eight.gpu_bytes == memory_needed(100, 50, settings, 8) | {"activations": 400}
    assert estimates[2].gpu_bytes["activations"] == 300
    assert eight.exchanged_bytes == 2 * 7 * 400 // 8
    assert eight.checkpoint_bytes == 1200
    last_stage = config(2, global_batch_size=96, runtime={"num_workers": 4})
    assert [one.num_gpus for one in estimate_training(last_stage, Assumed(), [8, 32])] == [4, 8]
    with pytest.raises(ConfigError, match="'Z9'"):
        estimate_training(settings, Assumed("Z9"), [])


def test_what_fits_a_card_is_what_the_bytes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """1e9 trained and as many frozen parameters in bf16: 4 GB of weights, 6 of gradients, 12 of optimiser; a sample
    keeps 8 GB, with checkpointing 2; a checkpoint of 8-bit moments takes 8 between two updates."""

    def cost(config: TrainConfig) -> StepCost:
        return StepCost(10**9, 10**9, 1.0, 4 * 10**9 * (2 if config.runtime.activation_checkpointing else 8))

    monkeypatch.setattr("training.run.cost.requirements.step_cost", cost)
    rows = [[one.value for one in row] for row in fit_table(config(precision="bf16")).rows]
    fits = [[None, 2, 4], [None, 2, 4], [1, 3, 4], [None, 4, 4], [None, 4, 4], [4, 4, 4]]
    assert [row[2:] for row in rows] == fits
    bits = 2 * (1 + 4 / 256) - 8  # of two moments, in bytes a parameter
    expected = [gb * 1e9 / 2**30 for gb in (54, 54 + bits, 42, 30, 30 + bits, 18)]
    assert [row[1] for row in rows] == pytest.approx(expected)
    averaged = fit_table(config(precision="bf16", ema={})).rows
    assert averaged[0][1].value - rows[0][1] == pytest.approx(4e9 / 2**30)
    assert averaged[5][1].value == rows[5][1]


def test_a_harder_recipe_takes_more_of_a_core() -> None:
    light, heavy = (ingest_seconds(config(crop_px=128, degradation=name)) for name in ("bicubic", "realesrgan"))
    assert 0 < light < heavy


def test_the_command_prints_a_column_for_each_number_of_gpus() -> None:
    demo = str(CONFIGS / "demo" / "train_stage1.yaml")
    command = ["estimate", "-c", demo, "--gpus", "1", "--gpus", "3"]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*command, "--card", "H100"])
    assert shown.exit_code == 0, shown.output
    assert "2 GPUs" in shown.output
    assert "1 GPUs" in shown.output
    assert "3 GPUs" not in shown.output  # cannot share the global batch
    assert "assumed, not measured: H100 at 40%" in shown.output
    assert "offload_optimizer" in shown.output
    assert "adamw8bit" in shown.output


def test_a_config_for_cpus_is_estimated_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.cost.requirements.step_cost", lambda config: StepCost(100, 50, 4e12, 400))
    monkeypatch.setattr("training.run.cost.requirements.measured_flops", lambda threads: 1e10 * threads)
    settings = config(global_batch_size=96, runtime={"threads": 2, "num_workers": 4})
    assumed = Assumed.for_runtime(settings.runtime)
    (one,) = estimate_training(settings, assumed, [])
    assert one.samples_per_second == pytest.approx(4 * 2e10 / 4e12)
    answer = train_tables(settings, assumed, [one])[0]
    assert "CPUs as fast as this one, 2 threads a process" in answer.notes[0]
    rows = {row[0].value: row[-1].value for row in answer.rows}
    assert rows["worker time"] == "worker-hours"
    assert "cost" not in rows
    assert Assumed.for_runtime(settings.runtime, "A100").card == "A100"
    assert Assumed.for_runtime(config(runtime={"device": "cuda"}).runtime).threads == 0
