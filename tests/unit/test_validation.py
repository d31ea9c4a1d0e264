"""Validation during training: which images, what is measured and shown, and that training does not notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra import DataError, ModelError
from infra.config import parse_config, result_part
from infra.imaging.images import decode_image
from infra.imaging.pictures import resized
from infra.imaging.pixels import l_std, l_std_equal_sharpness, psnr_y
from infra.shards.shard import read_sample
from tests.small_networks import seeded_lpips
from tests.unit.photos import make_shard_set, save_photos, shard_config
from training.config import ModelConfig, SamplingConfig, TrainConfig
from training.models import CcsrModel, build_model
from training.restore.seeded_runs import restore_runs
from training.run.agreement import WorkerContext
from training.run.monitoring.validation import PERCEPTUAL, Perceptual, Validation, perceptual_metrics


class Log:
    """Takes the place of rank 0's MLflow run."""

    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []
        self.files: dict[str, bytes] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.points.append((values, step))

    def image(self, key: str, png: bytes, step: int) -> None:
        self.files[key] = png


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five 64 px pairs in three shards."""
    place = tmp_path_factory.mktemp("validation")
    save_photos(place / "photos", [(64, 64)] * 5)
    make_shard_set(shard_config(place / "photos", place / "set", degradation="ccsr", samples_per_shard=2))
    return place / "set"


@pytest.fixture(scope="module")
def model() -> CcsrModel:
    return build_model(ModelConfig(), seed=3)


def config(held_out: Path, stage: int = 1, **validation: Any) -> TrainConfig:
    """By default stage 1 with a short chain."""
    values = {
        "job": "train",
        "init_from": "random",
        "output": "out",
        "stage": stage,
        "data": ["data"],
        "num_updates": 7,
    }
    validation = {"data": [str(held_out)], "every": 3, "num_images": 3} | validation
    if stage == 1:
        validation = {"sampling": {"num_steps": 6, "t_min": 0.5}} | validation
    values |= {"validation": validation} | ({"num_steps": 6, "t_min": 0.5} if stage == 2 else {})
    return parse_config(values, TrainConfig, where="test")


def test_scores_and_pictures_are_those_of_the_restored_runs(held_out: Path, model: CcsrModel) -> None:
    log = Log()
    validation = Validation.load(config(held_out))
    scores = validation(model, WorkerContext(0, 1, "cpu", {}, tracker=log), 24)
    entries = validation_entries(validation)
    assert [entry.key for entry in entries] == ["set-00-000-0", "set-01-000-0", "set-03-000-0"]  # spread evenly
    psnrs, stds, equal = [], [], []
    for entry in entries:
        members = read_sample(str(held_out), entry)
        lr, hr = (decode_image(members[name], where=name) for name in ("lr.png", "hr.png"))
        sampling = SamplingConfig(num_steps=6, t_min=0.5)
        runs = list(restore_runs(model, lr, (64, 64), sampling, seed=0, key=entry.key, runs=range(2)))
        assert not np.array_equal(*runs)
        psnrs.append(np.mean([psnr_y(run, hr) for run in runs]))
        stds.append(l_std(runs))
        equal.append(l_std_equal_sharpness(runs, resized(lr, (64, 64))))
        names = ("lr", "run_0", "run_1", "hr", "l_std")
        logged = [decode_image(log.files[f"validation/{entry.key}/{name}"], where=name) for name in names]
        assert np.array_equal(np.hstack(logged[:4]), np.hstack([resized(lr, (64, 64)), *runs, hr]))
        assert logged[4].shape == hr.shape
        assert len(np.unique(logged[4].reshape(-1, 3), axis=0)) > 9, "a stability map"
    assert len(log.files) == 3 * 5
    expected = {"psnr_y": np.mean(psnrs), "l_std": np.mean(stds), "l_std_equal_sharpness": np.mean(equal)}
    assert scores == {name: value for name, value in expected.items() if np.isfinite(value)}
    assert log.points == [({f"validation/{name}": score for name, score in scores.items()}, 24)]


def test_lpips_is_measured_where_its_weights_are_and_can_choose_the_best(
    held_out: Path, model: CcsrModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    perceptual_metrics.cache_clear()
    with pytest.raises(ModelError):
        Validation.load(config(held_out, best_by="lpips"))
    monkeypatch.setitem(PERCEPTUAL, "lpips", Perceptual(seeded_lpips, frozenset(), -1.0))
    validation = Validation.load(config(held_out, best_by="lpips", num_images=1))
    scores = validation(model, WorkerContext(0, 1, "cpu", {}), 24)
    perceptual_metrics.cache_clear()
    assert scores["lpips"] > 0
    assert "dists" not in scores


def validation_entries(validation: Validation) -> list:
    return [entry for _, entry in validation.images]


def test_training_does_not_notice(held_out: Path, model: CcsrModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.controlnet.state_dict().items()}
    model.controlnet.requires_grad_(True).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    alone = WorkerContext(0, 1, "cpu", {})
    first = Validation.load(config(held_out))(model, alone, 0)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.controlnet.state_dict().items())
    assert all(parameter.grad is None for parameter in model.controlnet.parameters())
    assert model.controlnet.training
    x = torch.ones(1, 4, 8, 8)
    model.denoiser(x)(x, torch.tensor([5])).sum().backward()  # no inference tensor was left in the networks
    assert Validation.load(config(held_out))(model, alone, 0) == first


def test_is_due_every_so_many_updates_and_at_the_end(held_out: Path) -> None:
    validation = Validation.load(config(held_out))
    assert [update for update in range(1, 8) if validation.due(update)] == [3, 6, 7]


def test_restores_as_the_stage_is_meant_to_unless_told_otherwise(held_out: Path) -> None:
    by_stage = [Validation.load(config(held_out, stage, sampling=None)).sampling for stage in (0, 1, 2)]
    assert [sampling.sampler for sampling in by_stage] == ["uniform", "ccsr", "ccsr"]
    assert [(sampling.num_steps, sampling.t_min) for sampling in by_stage[1:]] == [(45, 0.3333), (6, 0.5)]
    told = Validation.load(config(held_out, sampling={"num_steps": 15, "color_fix": "none"}))
    assert (told.sampling.num_steps, told.sampling.color_fix) == (15, "none")


def test_only_looks_on_so_it_stays_out_of_the_fingerprint(held_out: Path) -> None:
    watched = config(held_out)
    assert result_part(watched) == result_part(watched.model_copy(update={"validation": None}))
    assert Validation.load(watched.model_copy(update={"validation": None})) is None


def test_shards_without_lr_images_are_refused(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", [(64, 64)])
    make_shard_set(shard_config(tmp_path / "photos", tmp_path / "set", degradation=None))
    with pytest.raises(DataError, match="no LR images"):
        Validation.load(config(tmp_path / "set"))
