"""The training loop over real DeepSpeed engines: the same losses whatever the world size, ZeRO stage or interruption.

`python -m tests.integration.test_training` made tests/golden/losses.
"""

import functools
import json
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import training.run.checkpointer
from infra.errors import ConfigError, ModelError, StoppedError, StorageError
from infra.files.storage import sha256_file
from infra.shards.manifest import Manifest
from tests.small_networks import seeded_lpips, small_dino, smaller_tiny
from tests.training_runs import (
    Losses,
    free_port,
    join_group,
    noise_shards,
    run_workers,
    train_config,
    train_here,
    with_bad_gradient,
)
from training.data.batches import updates
from training.data.order import SORTED
from training.data.samples import SampleReader
from training.models import load_model
from training.models.library import BasicTransformerBlock
from training.run.checkpoint import TrainingState, complete_checkpoints, load_checkpoint
from training.run.export import export_run, initial_model, last_checkpoint
from training.run.step.stages import Stage, build_stage

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
LONG = 30
FEW = 13  # three more than the first checkpoint's
V2_LOSS = {"reconstruction": "l2", "perceptual": "lpips", "discriminator": "dino", "gan_weight": 0.05}
V2_LOSS |= {"adaptive": False, "divide_by_batch": False, "discriminator_learning_rate": 1e-4}
STAGE2: dict[str, dict[str, Any]] = {  # by discriminator
    "patch": {},
    "dino": {
        "model": {"family": "v2"},
        "decoder_loss": V2_LOSS | {"perceptual_start_update": 3, "gan_start_update": 1},
        "start_from": "lr",
        "num_steps": 1,
    },
}
STAGE2_UPDATES = {"patch": 10, "dino": 5}  # on two workers


PRECISIONS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]  # with each ZeRO stage it allows
# Stage 2 under ZeRO 1 alone, and the rest in the long run: its engine is stage 1's.
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"until": 3},
    "constant": {},
    "linear": {"until": 3},
    "multistep": {"at": [1]},
    "wsd": {"decay_from": 1, "until": 3},
}
COMBINATIONS = [(*one, 1, "adamw", schedule) for one, schedule in zip(PRECISIONS, SCHEDULES, strict=True)]
COMBINATIONS += [("fp32", 1, 2), ("bf16", 1, 2)]
SMALL = {"small": True}
EIGHT_BIT = [("bf16", 2, 1, "adamw8bit"), ("fp32", 0, 1, "adamw8bit"), ("fp32", 1, 1, "adamw8bit")]
MORE_COMBINATIONS = [("fp32", 0, 2), ("fp32", 2, 2), ("bf16", 2, 2)]


def combination(
    precision: str, zero_stage: int, stage: int, kind: str = "adamw", schedule: str = "cosine"
) -> dict[str, Any]:
    """With `smaller_tiny`, an average, a schedule and two groups of parameters."""
    runtime = {"zero_stage": zero_stage, "micro_batch_size": 1, "checkpoint_every": 1}
    changes = {"precision": precision, "stage": stage, "global_batch_size": 2, "ema": {"decay": 0.75, "warmup": False}}
    rate = {"learning_rate": 1e-4 if stage == 2 else 1e-3, "schedule": {"kind": schedule, **SCHEDULES[schedule]}}
    changes |= {"optimizer": {"kind": kind, "no_decay": True, **rate}}
    return changes | {"runtime": runtime} | ({"num_steps": 3} if stage == 2 else {})


def named(name: str, how: Sequence[Any]) -> str:
    return "-".join(map(str, (name, *how)))


def one_gradient(precision: str, zero_stage: int) -> dict[str, Any]:
    """Four micro-batches of one sample; so small a step that weights stay what they were. With `smaller_tiny`."""
    runtime = {"zero_stage": zero_stage, "micro_batch_size": 1}
    optimizer = {"learning_rate": 1e-30, "clip_norm": 0}
    return {"precision": precision, "global_batch_size": 4, "optimizer": optimizer, "runtime": runtime}


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr("training.run.step.critics.load_dino", small_dino)
    patch.setattr("training.run.step.stages.load_lpips", seeded_lpips)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        patch.setenv(name, "")  # so that `undo` takes what `join_group` sets away again
    threads = torch.get_num_threads()
    join_group(0, 1, free_port())
    yield
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()
    patch.undo()


@pytest.fixture
def small() -> Iterator[None]:
    with smaller_tiny():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return noise_shards(tmp_path_factory.mktemp("noise") / "set")


def checkpoint_at(output: Path | str, num_updates: int, batch: int = 4) -> TrainingState:
    return load_checkpoint(f"{output}/checkpoints/{batch * num_updates:012d}")


def assert_equal(one: TrainingState, other: TrainingState) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for file, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[file].keys()
        assert all(torch.equal(tensor, other.tensors[file][name]) for name, tensor in tensors.items()), file


@pytest.fixture(scope="module")
def one(process_group: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """30 updates of stage 1 in this process: losses, and the output with checkpoints after 10, 20 and 30."""
    output = tmp_path_factory.mktemp("one") / "run"
    return train_here(train_config(data, output, num_updates=LONG, runtime={"keep_checkpoints": 3})), output


@pytest.fixture(scope="module")
def stage2(process_group: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Stage 2 in this process with a discriminator, with PatchGAN as long as the committed run: (Losses, output)."""

    @functools.cache
    def run(discriminator: str) -> tuple[Losses, Path]:
        losses, output = Losses(), tmp_path_factory.mktemp(discriminator)
        changes = STAGE2[discriminator] | {"runtime": {"keep_checkpoints": 3}}
        num_updates = LONG if discriminator == "patch" else STAGE2_UPDATES[discriminator]
        config = train_config(data, output, stage=2, num_updates=num_updates, **changes)
        train_here(config, losses=losses)
        return losses, output

    return run


class Two:
    """What two gloo workers did, one run after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: list[dict[str, Any]] = []

    def plan(
        self, name: str, data: str, num_updates: int, special: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        changes["runtime"] = {"keep_checkpoints": 3, **changes.get("runtime", {})}
        config = train_config(data, self.folder / name, num_updates=num_updates, **changes)
        run = {"config": config.model_dump(mode="json"), "losses": str(self.folder / f"{name}.losses")}
        self._runs.append(run | (special or {}))

    def plan_resumed(self, data: str, *how: Any) -> None:
        """Two updates of `combination(*how)` in one go as "whole", and in two as "parts"."""
        for name, num_updates in (("whole", 2), ("parts", 1), ("parts", 2)):
            self.plan(named(name, how), data, num_updates, SMALL, **combination(*how))

    def plan_resave(self, name: str, config: Any, special: dict[str, Any] | None = None) -> None:
        run = {"config": config.model_dump(mode="json"), "losses": str(self.folder / f"{name}.losses")}
        self._runs.append(run | {"resave": str(self.folder / name)} | (special or {}))

    def work(self) -> None:
        run_workers(self.folder, self._runs)

    def losses(self, name: str, term: str = "") -> list[float]:
        return [float(line) for line in (self.folder / f"{name}.losses{term}").read_text().split()]

    def outcomes(self, name: str) -> list[list[str]]:
        return [json.loads((self.folder / f"{name}.losses.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two(one: tuple[list[float], Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    two = Two(folder)
    two.plan("zero1", data, FEW, runtime={"zero_stage": 1})
    shutil.copytree(one[1] / "checkpoints" / f"{40:012d}", folder / "grown" / "checkpoints" / f"{40:012d}")
    two.plan("grown", data, FEW)
    short = train_config(data, folder / "stage2", stage=2, num_updates=2)
    train_here(short)
    two.plan_resave("stage2-on-two", short)
    for discriminator, changes in STAGE2.items():
        two.plan(discriminator, data, STAGE2_UPDATES[discriminator], stage=2, **changes)
    two.plan("unequal", data, 2, SMALL | {"seed_by_rank": 1}, stage=2, runtime={"checkpoint_every": 1})
    two.plan("poisoned", data, 6, SMALL | {"poison": 15}, runtime={"checkpoint_every": 1})
    two.plan("bad-gradient", data, 3, SMALL | {"bad_gradient": 1}, runtime={"checkpoint_every": 1})
    damaged = shutil.copytree(data, folder / "damaged-set")
    entry = Manifest.load(data).entries[7]
    with open(damaged / entry.shard, "r+b") as tar:
        tar.seek(entry.offset_bytes + 512)
        tar.write(bytes(64))
    two.plan("damaged", str(damaged), 6, SMALL)
    two.plan("after", data, 1)
    for how in COMBINATIONS:
        two.plan_resumed(data, *how)
    two.plan_resumed(data, *EIGHT_BIT[0])
    eight_bit = train_config(data, folder / "bytes", num_updates=1, **combination(*EIGHT_BIT[0]))
    with smaller_tiny():
        train_here(eight_bit)
    two.plan_resave("bytes-on-two", eight_bit, SMALL)
    for precision, zero_stage in PRECISIONS:
        two.plan(f"gradient-{precision}{zero_stage}", data, 1, SMALL, **one_gradient(precision, zero_stage))
    two.work()
    return two


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_losses_are_those_of_the_committed_run(process_group, data, tmp_path, request, stage):
    if stage == 1:
        losses = request.getfixturevalue("one")[0]
    elif stage == 2:
        losses = request.getfixturevalue("stage2")("patch")[0].values
    else:
        losses = train_here(train_config(data, tmp_path, stage=stage, num_updates=LONG))
    golden = json.loads((GOLDEN / f"stage{stage}.json").read_text())
    assert len(set(golden)) == LONG
    assert_near(losses, golden)


def test_a_checkpoint_of_the_sorted_order_resumes_in_it(process_group, data, tmp_path, monkeypatch):
    """An earlier version's checkpoints name no order. The losses were recorded by that version."""
    golden = json.loads((GOLDEN / "stage1_sorted.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("training.run.checkpointer.FEISTEL", SORTED)
        losses = train_here(train_config(data, tmp_path, num_updates=10))
    place = tmp_path / "checkpoints" / f"{40:012d}"
    facts = json.loads((place / "state.json").read_text())
    assert facts.pop("order") == SORTED
    (place / "state.json").write_text(json.dumps(facts))
    hashes = json.loads((place / "complete.json").read_text()) | {"state.json": sha256_file(place / "state.json")}
    (place / "complete.json").write_text(json.dumps(hashes))
    losses += train_here(train_config(data, tmp_path, num_updates=len(golden)))
    assert losses == pytest.approx(golden, rel=1e-4)
    assert checkpoint_at(tmp_path, len(golden)).facts["order"] == SORTED


def assert_near(losses: list[float], expected: list[float]) -> None:
    assert len(losses) == len(expected) > 0
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-3)


def test_two_workers_train_as_one(one, two):
    assert len(one[0]) == LONG
    assert_near(two.losses("zero1"), one[0][:FEW])


def test_workers_print_no_memory_tables_of_deepspeeds(two):
    """Each comes with a garbage collection."""
    assert "Virtual Memory" not in (two.folder / "worker-0.log").read_text()


@pytest.mark.slow
def test_two_workers_train_as_one_under_other_zero_stages(one, data, tmp_path):
    two = Two(tmp_path)
    for zero_stage in (0, 2):
        two.plan(f"zero{zero_stage}", data, LONG, runtime={"zero_stage": zero_stage})
    two.work()
    for zero_stage in (0, 2):
        assert_near(two.losses(f"zero{zero_stage}"), one[0])


def test_a_run_goes_on_with_more_workers_and_with_fewer(one, two, data, tmp_path):
    assert two.losses("grown") == pytest.approx(one[0][10:FEW], rel=1e-5)
    shutil.copytree(two.folder / "zero1" / "checkpoints" / f"{40:012d}", tmp_path / "checkpoints" / f"{40:012d}")
    shrunk = train_here(train_config(data, tmp_path, num_updates=FEW))
    assert shrunk == pytest.approx(two.losses("zero1")[10:], rel=1e-5)


def test_stage2_comes_back_exactly_on_another_world_size(two):
    saved, again = checkpoint_at(two.folder / "stage2", 2), checkpoint_at(two.folder / "stage2-on-two", 2)
    assert saved.facts == again.facts
    assert_equal(saved, again)


@pytest.mark.parametrize("discriminator", STAGE2)
def test_stage2_trains_on_two_workers_as_on_one(stage2, two, discriminator):
    """Both losses and what a checkpoint holds of the discriminator, whose replicas each checkpoint compares."""
    one, output = stage2(discriminator)
    num_updates = STAGE2_UPDATES[discriminator]
    assert two.outcomes(discriminator) == [["", ""]] * 2
    assert_near(two.losses(discriminator), one.values[:num_updates])
    assert_near(two.losses(discriminator, ".d_loss"), one.d_values[:num_updates])
    places = output, two.folder / discriminator
    alone, shared = (checkpoint_at(run, num_updates).tensors["discriminator"] for run in places)
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def test_replicas_of_the_discriminator_that_differ_end_the_run_before_they_are_saved(two):
    output = str(two.folder / "unequal")
    assert two.outcomes("unequal") == [["OtherRankError", ""], ["ModelError", output]]
    assert len(two.losses("unequal")) == 1
    assert complete_checkpoints(output) == []


def test_a_loss_that_is_not_finite_names_the_samples_and_ends_both_ranks(two):
    """Position 15 is in the second micro-batch of update 3, rank 1's."""
    (kind0, _), (kind1, where) = two.outcomes("poisoned")
    assert (kind0, kind1) == ("OtherRankError", "ModelError")
    assert where.startswith("samples noise-")
    assert where.count("noise-") == 2
    assert len(two.losses("poisoned")) == 3
    assert checkpoint_at(two.folder / "poisoned", 3).facts["num_updates"] == 3


def test_a_damaged_sample_ends_both_ranks_and_the_group_is_still_sound(two, one):
    outcomes = two.outcomes("damaged")
    assert sorted(kind for kind, _ in outcomes) == ["OtherRankError", "UnusableImageError"]
    assert "noise-007" in "".join(where for _, where in outcomes)
    assert two.losses("after") == pytest.approx(one[0][:1], rel=1e-5)


@pytest.mark.parametrize(
    ("how", "world_size"),
    [  # bf16 on two workers; in one process in the long run
        pytest.param(
            how, size, marks=[pytest.mark.slow] if (how[0], size) == ("bf16", 1) else [], id=named("", how)[1:]
        )
        for how in COMBINATIONS
        for size in (1, 2)
    ],
)
def test_resumed_equals_uninterrupted(process_group, small, data, tmp_path, request, how, world_size):
    """Bit by bit, losses, weights, moments, average and discriminator, under each schedule."""
    if world_size == 1:
        assert_resumes_here(data, tmp_path, *how)
    else:
        assert_resumed(request.getfixturevalue("two"), *how)


@pytest.mark.parametrize("how", [EIGHT_BIT[0], *(pytest.param(how, marks=pytest.mark.slow) for how in EIGHT_BIT[1:])])
def test_eight_bit_adamw_resumes_bit_by_bit(process_group, small, data, tmp_path, how):
    """And what it saves is what AdamW saves, near AdamW's: another kind can continue from it."""
    assert_resumes_here(data, tmp_path, *how)

    def plain(name: str, num_updates: int, **changes: Any) -> list[float]:
        changes |= combination(*how[:3])
        return train_here(train_config(data, tmp_path / name, num_updates=num_updates, **changes))

    plain("plain", 1)
    places = [f"{tmp_path}/{name}/checkpoints/{2:012d}" for name in (named("parts", how), "plain")]
    found, expected = (load_checkpoint(place).tensors["moments"] for place in places)
    assert found.keys() == expected.keys()
    assert 0 < relative_error(*map(flat, (found, expected))) < 0.05
    assert plain("continued", 2, continue_from=places[0]) == pytest.approx(plain("plain", 2), rel=1e-3)


def test_eight_bit_adamw_resumes_bit_by_bit_on_two_workers(two, small):
    """On another world size its moments come back too, here as they were: its partitions are of whole blocks."""
    assert_resumed(two, *EIGHT_BIT[0])
    saved, again = (checkpoint_at(two.folder / name, 1, batch=2).tensors for name in ("bytes", "bytes-on-two"))
    assert all(torch.equal(weight, again["weights"][name]) for name, weight in saved["weights"].items())
    assert flat(saved["moments"]).any()
    assert torch.equal(flat(again["moments"]), flat(saved["moments"]))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_continues_another_one_is_that_run(process_group, small, data, tmp_path, stage):
    """Weights, moments, discriminator and position come over; a changed learning rate then acts from there on."""

    def run(name: str, num_updates: int, **changes: Any) -> list[float]:
        return train_here(train_config(data, tmp_path / name, stage=stage, num_updates=num_updates, **changes))

    run("first", 1)
    place = str(tmp_path / "first" / "checkpoints" / f"{4:012d}")
    second = run("first", 2)
    assert run("same", 2, continue_from=place) == second
    assert_equal(checkpoint_at(tmp_path / "same", 2), checkpoint_at(tmp_path / "first", 2))
    slower = {"optimizer": {"learning_rate": 1e-7}}
    assert run("slower", 2, continue_from=place, **slower) == second, "the loss before the update"
    weights = [checkpoint_at(tmp_path / name, 2).tensors["weights"] for name in ("first", "slower")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert run("slower", 3, continue_from="nowhere", **slower)[:1] != second, "a resume takes the run's own checkpoint"


@pytest.mark.slow
def test_resumed_equals_uninterrupted_in_stage2_under_the_other_zero_stages(process_group, small, data, tmp_path):
    two = Two(tmp_path)
    for precision, zero_stage, stage in MORE_COMBINATIONS:
        assert_resumes_here(data, tmp_path / "one", precision, zero_stage, stage)
        two.plan_resumed(data, precision, zero_stage, stage)
    two.work()
    for precision, zero_stage, stage in MORE_COMBINATIONS:
        assert_resumed(two, precision, zero_stage, stage)


def assert_resumes_here(data: str, folder: Path, *how: Any) -> None:
    def run(name: str, num_updates: int) -> list[float]:
        return train_here(train_config(data, folder / named(name, how), num_updates=num_updates, **combination(*how)))

    whole = run("whole", 2)
    assert run("parts", 1) + run("parts", 2) == whole
    assert len(set(whole)) == 2
    assert_same_end(folder, how)


def assert_resumed(two: Two, *how: Any) -> None:
    whole = two.losses(named("whole", how))
    assert two.losses(named("parts", how)) == whole
    assert len(set(whole)) == 2
    assert_same_end(two.folder, how)


def assert_same_end(folder: Path, how: Sequence[Any]) -> None:
    ends = [checkpoint_at(folder / named(name, how), 2, batch=2) for name in ("whole", "parts")]
    assert_equal(*ends)
    before = checkpoint_at(folder / named("parts", how), 1, batch=2).tensors
    for name, average in ends[0].tensors["ema"].items():
        assert torch.equal(before["ema"][name], before["weights"][name])
        assert torch.equal(average, before["ema"][name].lerp(ends[0].tensors["weights"][name], 0.25))
    assert {tensor.dtype for tensor in ends[0].tensors["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("precision", "zero_stage"), PRECISIONS)
def test_gradients_are_accumulated_and_reduced_in_float32(
    process_group, small, data, tmp_path, request, gradients, precision, zero_stage, world_size
):
    """The first moment after one update is a tenth of the gradient. Accumulated in bf16, four micro-batches would
    leave an error of 1e-3. The masters are the model's float32 weights, not what bf16 makes of them."""
    if world_size == 1:
        folder, losses = tmp_path, Losses()
        config = train_config(data, folder, num_updates=1, **one_gradient(precision, zero_stage))
        train_here(config, losses=losses)
        expected = gradients[precision]
        assert losses.reports[0]["loss_max"] == pytest.approx(max(expected.losses), rel=1e-6)
        assert losses.reports[0]["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    else:
        folder = request.getfixturevalue("two").folder / f"gradient-{precision}{zero_stage}"
    saved = checkpoint_at(folder, 1)
    for name, gradient in gradients[precision].mean.items():
        assert relative_error(saved.tensors["moments"][f"exp_avg.{name}"] * 10, gradient) < 2e-6, name
        assert (saved.tensors["weights"][name] - gradients["fp32"].weights[name]).abs().max() < 2e-30, name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-20))


@dataclass
class Gradient:
    """The first update's in plain PyTorch: mean over micro-batches in float64, their losses, the starting weights."""

    mean: dict[str, torch.Tensor]
    losses: list[float]
    weights: dict[str, torch.Tensor]

    def norm(self) -> torch.Tensor:
        return torch.stack([gradient.norm() for gradient in self.mean.values()]).norm()


@pytest.fixture(scope="module")
def gradients(process_group: None, data: str) -> dict[str, Gradient]:
    found = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = train_config(data, "unused", num_updates=1, **one_gradient(precision, 1))
        with smaller_tiny():
            stage = build_stage(initial_model(config), config)
        parameters = dict(stage.trained.named_parameters())
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        stage.model.to("cpu", dtype)
        sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        losses = []
        stream = updates(SampleReader([Manifest.load(data)], config), config, start=0, rank=0, world_size=1)
        for batch in next(stream):
            loss = stage(batch.to("cpu"))["loss"]
            losses.append(float(loss.detach()))
            (loss / 4).backward()
            for name, parameter in parameters.items():
                sums[name] += parameter.grad.double()
                parameter.grad = None
        stream.close()
        found[precision] = Gradient({name: total.float() for name, total in sums.items()}, losses, weights)
    return found


@pytest.mark.parametrize(("precision", "zero_stage"), PRECISIONS)
def test_a_gradient_that_is_not_finite_ends_the_run_with_the_updates_keys(
    process_group, small, data, tmp_path, monkeypatch, precision, zero_stage
):
    monkeypatch.setattr("training.run.worker.build_stage", with_bad_gradient(1))
    config = train_config(data, tmp_path, num_updates=3, **combination(precision, zero_stage, 1))
    with pytest.raises(ModelError, match="not finite at update 1: gradient_norm") as caught:
        train_here(config)
    assert caught.value.where.count("noise-") == 2
    assert complete_checkpoints(str(tmp_path)) == [f"{tmp_path}/checkpoints/{2:012d}"]


def test_a_gradient_that_is_not_finite_is_known_to_all_ranks(two):
    outcomes = two.outcomes("bad-gradient")
    assert [kind for kind, _ in outcomes] == ["ModelError", "ModelError"]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1].count("noise-") == 4
    assert len(two.losses("bad-gradient")) == 1


def test_a_discriminator_that_is_not_finite_ends_the_run(process_group, data, tmp_path, monkeypatch):
    """Its own loss tells, though the generator's does not see it yet."""

    def spoilt(model: Any, config: Any) -> Any:
        stage = build_stage(model, config)
        next(stage.critic.trained.parameters()).data.fill_(float("nan"))
        return stage

    monkeypatch.setattr("training.run.worker.build_stage", spoilt)
    loss = {"gan_start_update": 9, "discriminator_width": 16}
    with pytest.raises(ModelError, match="not finite at update 0: d_loss nan"):
        train_here(train_config(data, tmp_path, stage=2, num_updates=1, num_steps=3, decoder_loss=loss))


def test_v2s_decoder_with_dino_and_lpips_resumes_bit_by_bit(process_group, small, data, tmp_path):
    """The heads' spectral norms are part of the state; LPIPS and GAN come in at the second update."""
    loss = V2_LOSS | {"perceptual_start_update": 1, "gan_start_update": 1}
    changes = STAGE2["dino"] | {"decoder_loss": loss}

    def run(name: str, num_updates: int) -> list[float]:
        return train_here(train_config(data, tmp_path / name, stage=2, num_updates=num_updates, **changes))

    whole = run("whole", 3)
    assert run("parts", 1) + run("parts", 3) == whole
    assert len(set(whole)) == 3
    assert_equal(checkpoint_at(tmp_path / "whole", 3), checkpoint_at(tmp_path / "parts", 3))


@pytest.mark.parametrize(("stage", "zero_stage"), [(1, 2), (2, 1)])
def test_stablesr_resumes_bit_by_bit(process_group, data, tmp_path, stage, zero_stage):
    """The same loop, order and checkpoints; GAN and discriminator come in at the second update."""
    loss = {"adaptive": False, "gan_weight": 0.025, "gan_start_update": 1, "discriminator_start_update": 1}
    loss |= {"discriminator_width": 16, "discriminator_learning_rate": 1e-4}
    runtime = {"zero_stage": zero_stage, "activation_checkpointing": True}
    changes = {"model": {"family": "stablesr"}, "stage": stage}
    changes |= {"decoder_loss": loss, "num_steps": 3} if stage == 2 else {}

    def run(name: str, num_updates: int) -> list[float]:
        return train_here(train_config(data, tmp_path / name, num_updates=num_updates, runtime=runtime, **changes))

    whole = run("whole", 3)
    assert run("parts", 1) + run("parts", 3) == whole
    assert len(set(whole)) == 3
    assert_equal(checkpoint_at(tmp_path / "whole", 3), checkpoint_at(tmp_path / "parts", 3))
    names = checkpoint_at(tmp_path / "whole", 3).tensors["weights"]
    assert {name.split(".")[0] for name in names} == ({"encoder", "sft"} if stage == 1 else {"wrapping"})


@pytest.mark.parametrize(
    ("zero_stage", "critic"),
    [
        (1, "regulariser"),
        pytest.param(0, "discriminator", marks=pytest.mark.slow),
        pytest.param(2, "regulariser", marks=pytest.mark.slow),
    ],
)
def test_onestep_resumes_bit_by_bit(process_group, small, data, tmp_path, zero_stage, critic):
    """Of UNet and VAE, LoRAs and one convolution are stored, and the critic's weights and moments beside them."""
    loss: dict[str, Any] = {"reconstruction": "l2", "perceptual_weight": 2, "divide_by_batch": False}
    vsd = {"learning_rate": 1e-3} if critic == "regulariser" else None
    if vsd is None:
        loss |= {"adaptive": False, "gan_start_update": 0, "discriminator_width": 16}
    runtime = {"zero_stage": zero_stage, "activation_checkpointing": zero_stage == 2}
    changes = {"model": {"family": "onestep"}, "decoder_loss": loss, "vsd": vsd, "ema": {"decay": 0.5}}

    def run(name: str, num_updates: int) -> list[float]:
        losses = Losses()
        train_here(
            train_config(data, tmp_path / name, num_updates=num_updates, runtime=runtime, **changes), 0, 1, losses
        )
        prefix = "regulariser_" if vsd else "d_"
        return [
            report[name] for report in losses.reports for name in ("loss", f"{prefix}loss", f"{prefix}gradient_norm")
        ]

    whole = run("whole", 3)
    assert run("parts", 1) + run("parts", 3) == whole
    assert len(set(whole)) == 9
    last = checkpoint_at(tmp_path / "whole", 3)
    assert_equal(last, checkpoint_at(tmp_path / "parts", 3))
    assert all(".lora_" in name or ".conv_in.base_layer" in name for name in last.tensors["weights"])
    moved = [
        name
        for name, tensor in last.tensors[critic].items()
        if name.startswith("weights.") and ".lora_B." in name and tensor.any()
    ]
    assert bool(moved) == (critic == "regulariser")


@pytest.mark.parametrize(
    ("precision", "stages"), [("fp32", (1, 2, 0)), pytest.param("bf16", (1, 2), marks=pytest.mark.slow)]
)
def test_a_checkpoint_resumes_under_another_zero_stage(process_group, small, data, tmp_path, precision, stages):
    before = stages[0]
    for zero_stage in stages:
        output = tmp_path / f"zero{zero_stage}"
        first = train_config(data, output, num_updates=1, **combination(precision, before, 1))
        second = train_config(data, output, num_updates=2, **combination(precision, zero_stage, 1))
        losses = train_here(first) + train_here(second)
        end = checkpoint_at(output, 2, batch=2)
        if zero_stage == before:
            expected, expected_end = losses, end
        assert losses == pytest.approx(expected, rel=1e-6)
        for name, weight in end.tensors["weights"].items():
            assert relative_error(weight, expected_end.tensors["weights"][name]) < 1e-6, name


def test_a_run_that_is_watched_is_the_same_run(one, data, tmp_path, monkeypatch):
    """Validation and a profile, here of one update, change no bit."""
    monkeypatch.setattr("training.run.monitoring.meter.PROFILED_UPDATES", 1)
    validation = {"data": [data], "every": 2, "num_images": 2, "sampling": {"num_steps": 6}}
    watched = {"validation": validation, "runtime": {"profile": True}}
    assert train_here(train_config(data, tmp_path, num_updates=4, **watched)) == one[0][:4]
    assert checkpoint_at(tmp_path, 4).facts["validation"]["psnr_y"] > 0
    assert (tmp_path / "profile" / "top_ops.txt").stat().st_size > 0


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("fp32", 0), pytest.param("bf16", 1, marks=pytest.mark.slow), ("bf16", 2)]
)
def test_the_average_is_what_is_validated_and_exported(
    process_group, small, data, tmp_path, monkeypatch, precision, zero_stage
):
    """And nothing else of the run changes by it."""
    seen: list[dict[str, torch.Tensor]] = []

    def restored(model: Any, lr: Any, size: tuple[int, int], *_: Any, **__: Any) -> list[np.ndarray]:
        seen.append({name: weight.detach().clone() for name, weight in model.controlnet.named_parameters()})
        return [np.full((*size, 3), 50 * len(seen), np.uint8)] * 2  # the second is nearer to the images' mean, 96

    monkeypatch.setattr("training.run.monitoring.validation.restore_runs", restored)
    changes = combination(precision, zero_stage, 1) | {"validation": {"data": [data], "every": 1, "num_images": 1}}
    plain = train_config(data, tmp_path / "plain", num_updates=2, **changes | {"ema": None})
    config = train_config(data, tmp_path / "run", num_updates=2, **changes)
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"export_raw": True})})
    assert train_here(config) == train_here(plain)
    end, without = (checkpoint_at(tmp_path / name, 2, batch=2).tensors for name in ("run", "plain"))
    assert end.keys() - without.keys() == {"ema"}
    assert all(torch.equal(weight, without["weights"][name]) for name, weight in end["weights"].items())
    assert all(torch.equal(weight, end["ema"][name].to(weight.dtype)) for name, weight in seen[1].items())
    assert any(not torch.equal(weight, seen[1][name]) for name, weight in seen[3].items())

    export_run(config, last_checkpoint(config), str(tmp_path / "run" / "model"))
    for model, weights in {"model": "ema", "best": "ema", "model_raw": "weights"}.items():
        exported = load_model(tmp_path / "run" / model).controlnet.state_dict()
        assert all(torch.equal(tensor, end[weights][name]) for name, tensor in exported.items()), model


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_norms_and_biases_do_not_decay_on_request(process_group, small, data, tmp_path, zero_stage):
    ends = {}
    for no_decay in (False, True):
        optimizer = {"learning_rate": 1e-2, "weight_decay": 0.5, "no_decay": no_decay}
        changes = combination("fp32", zero_stage, 1) | {"optimizer": optimizer}
        train_here(train_config(data, tmp_path / f"{no_decay}", num_updates=1, **changes))
        ends[no_decay] = checkpoint_at(tmp_path / f"{no_decay}", 1, batch=2).tensors["weights"]
    before = {
        name: weight.detach()
        for name, weight in initial_model(train_config(data, tmp_path, num_updates=1)).controlnet.named_parameters()
    }
    for name, weight in ends[True].items():
        decayed = 0 if weight.ndim > 1 else 5e-3 * before[name]
        torch.testing.assert_close(weight - ends[False][name], decayed + torch.zeros_like(weight), msg=name)


SWITCHES = [{"compile": True}, {"channels_last": True}, {"join_passes": True}]


@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(SWITCHES[0], marks=pytest.mark.slow),
        *SWITCHES[1:],
        {name: True for one in SWITCHES for name in one},
    ],
    ids=str,
)
def test_switches_for_speed_change_roundings_alone(one, data, tmp_path, monkeypatch, switches):
    """Of the compiler its graphs and their gradients are tested; the code that it makes of them takes minutes here."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(BasicTransformerBlock, "compile", compiled)
    runtime = {"zero_stage": 2, **switches}
    losses = train_here(train_config(data, tmp_path, num_updates=3, runtime=runtime))
    assert losses == pytest.approx(one[0][:3], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_encodes_ahead_change_nothing(one, stage2, data, tmp_path, monkeypatch, stage):
    order: list[int] = []
    encoded = Stage.encoded

    def noted(self: Stage, batch: Any) -> Any:
        order.extend(batch.positions)
        return encoded(self, batch)

    monkeypatch.setattr(Stage, "encoded", noted)
    config = train_config(data, tmp_path, stage=stage, num_updates=2, runtime={"encode_ahead": True})
    losses = train_here(config)
    assert order == [2, 3, 0, 1, 6, 7, 4, 5], "the second micro-batch before the first one's own, in each update"
    assert losses == (one[0] if stage == 1 else stage2("patch")[0].values)[:2]


def test_fused_adamw_changes_roundings_alone(one, data, tmp_path, monkeypatch):
    """As on a GPU, where it is on."""
    made = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **named: made(*groups, **named | {"fused": True}))
    assert train_here(train_config(data, tmp_path, num_updates=3)) == pytest.approx(one[0][:3], rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("fp32", 1), pytest.param("bf16", 1, marks=pytest.mark.slow), ("bf16", 2)]
)
def test_an_offloaded_optimizer_makes_the_same_run(process_group, small, data, tmp_path, precision, zero_stage):
    """With gradients accumulated over two micro-batches, an average and a resume; not clipped, because the norm is
    summed in another order."""
    changes = combination(precision, zero_stage, 1)
    changes["optimizer"] |= {"clip_norm": 0}
    train_here(train_config(data, tmp_path / "plain", num_updates=2, **changes))
    changes["runtime"] |= {"offload_optimizer": True}
    for num_updates in (1, 2):
        train_here(train_config(data, tmp_path / "offloaded", num_updates=num_updates, **changes))
    assert_equal(*(checkpoint_at(tmp_path / name, 2, batch=2) for name in ("plain", "offloaded")))


def test_fused_adamw_resumes_bit_by_bit(process_group, small, data, tmp_path, monkeypatch):
    """As on a GPU, where it is on."""
    made = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **named: made(*groups, **named | {"fused": True}))
    assert_resumes_here(data, tmp_path, "fp32", 1, 1)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_host_reads_two_rows_of_numbers_an_update(process_group, data, tmp_path, monkeypatch, stage):
    """Whether a rank stops, and what is logged. On a GPU any other read would stop the host until the card is done."""
    read: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *inputs: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            caller = sys._getframe(1).f_code
            ours = re.search("/(training|infra|diffusers)/", caller.co_filename)
            if ours and threading.current_thread() is threading.main_thread():  # ingest threads read values too
                read.append(f"{caller.co_name}: {name}")
            return real(tensor, *inputs, **named)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for num_updates in (1, 3):
        read.clear()
        config = train_config(data, tmp_path / f"{num_updates}", stage=stage, num_updates=num_updates)
        in_loop(config.model_copy(update={"runtime": config.runtime.model_copy(update={"checkpoint_every": 9})}))
        counts.append(Counter(read))
    assert counts[1] - counts[0] == {"agree: tolist": 2, "_update: tolist": 2}


def test_incomplete_and_damaged_checkpoints_are_passed_over(one, data, tmp_path, capsys):
    shutil.copytree(one[1] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / f"{120:012d}" / "complete.json").unlink()
    (tmp_path / "checkpoints" / f"{80:012d}" / "moments.safetensors").write_bytes(b"damaged")
    assert train_here(train_config(data, tmp_path, num_updates=12)) == one[0][10:12]
    assert "moments.safetensors is damaged" in capsys.readouterr().out


def in_loop(config: Any, **context: Any) -> list[float]:
    from training.run.worker import WorkerContext, train

    losses = Losses()
    manifests = [Manifest.load(part.path) for part in config.data]
    train(config, manifests, initial_model(config), WorkerContext(0, 1, "cpu", {}, tracker=losses, **context))
    return losses.values


def test_a_stop_saves_at_the_next_update_and_the_same_call_goes_on(one, data, tmp_path):
    config = train_config(data, tmp_path, num_updates=5, runtime={"profile": True})
    with pytest.raises(StoppedError, match="after 3 of 5 updates") as caught:
        in_loop(config, stop_asked=lambda update: update == 3)
    assert caught.value.exit_code == 143
    assert checkpoint_at(tmp_path, 3).facts["position"] == 12
    assert "conv" in (tmp_path / "profile" / "top_ops.txt").read_text(), "what was profiled up to there"
    shutil.rmtree(tmp_path / "profile")
    (tmp_path / "profile").write_bytes(b"")  # no folder can be made there
    warnings: list[str] = []
    assert in_loop(config, warn=warnings.append) == one[0][3:5]
    assert [warning.split(":")[0] for warning in warnings] == ["the profile was not written"]


def test_a_stop_says_saved_only_where_something_was(process_group, data, tmp_path, monkeypatch):
    """Before the first update, after one whose checkpoint cannot be written, and while the one before still fails."""
    config = train_config(data, tmp_path, num_updates=5, runtime={"checkpoint_every": 1})
    with pytest.raises(StoppedError, match="had done no update: there was nothing to save"):
        in_loop(config, stop_asked=lambda update: True)

    def lost(output: str, state: TrainingState, **options: Any) -> str:
        raise StorageError("the bucket is gone", where=output, todo="look")

    monkeypatch.setattr(training.run.checkpointer, "save_checkpoint", lost)
    for every in (5, 1):
        config = train_config(data, tmp_path, num_updates=5, runtime={"checkpoint_every": every})
        with pytest.raises(StorageError, match="the bucket is gone"):
            in_loop(config, stop_asked=lambda update: update == 1)
    assert complete_checkpoints(str(tmp_path)) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_costs_no_other(one, data, tmp_path, monkeypatch):
    config = train_config(data, tmp_path, num_updates=4, runtime={"checkpoint_every": 1})
    real = training.run.checkpointer.save_checkpoint

    def lost_at_third(output: str, state: TrainingState, **options: Any) -> str:
        if state.facts["num_updates"] == 3:
            raise StorageError("the bucket is gone", where=output, todo="look")
        return real(output, state, **options)

    monkeypatch.setattr(training.run.checkpointer, "save_checkpoint", lost_at_third)
    with pytest.raises(StorageError, match="the bucket is gone"):
        in_loop(config)
    monkeypatch.undo()
    assert [place[-3:] for place in complete_checkpoints(str(tmp_path))] == ["004", "008"]
    assert in_loop(config) == one[0][2:4]


def test_too_little_memory_is_told_with_numbers_before_anything_is_made(data, tmp_path, process_group, monkeypatch):
    free = psutil.virtual_memory()._replace(available=2_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match=r"needs 0\.0\d GiB more on each worker \(weights 0\.02, gradients"):
        in_loop(train_config(data, tmp_path, num_updates=1))


def make_golden() -> None:
    join_group(0, 1, free_port())
    with tempfile.TemporaryDirectory() as folder:
        data = noise_shards(Path(folder) / "set")
        for stage in (0, 1, 2):
            losses = train_here(train_config(data, f"{folder}/{stage}", stage=stage, num_updates=LONG))
            GOLDEN.mkdir(parents=True, exist_ok=True)
            (GOLDEN / f"stage{stage}.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    make_golden()
