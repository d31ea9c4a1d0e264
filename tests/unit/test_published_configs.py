"""The ready configs hold what the authors published: the numbers of the paper and of both code snapshots."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.config import load_config
from training.config import TrainConfig
from training.models.onestep import ONESTEP_NEGATIVE_PROMPT
from training.objective import VsdConfig
from training.runtime import legal_world_sizes

CONFIGS = Path(__file__).parents[2] / "configs"
RECORDED = Path(__file__).parents[1] / "golden" / "data" / "ccsr" / "v1_stage2_loss.npz"
COMMON = {"crop_px": 512, "degradation": "ccsr", "t_max": 0.6667, "num_workers": 4, "device": "cuda"}
V1_OPTIMISER = {"clip_norm": 0.0, "warmup_updates": 0}
V2_OPTIMISER = {"betas": (0.9, 0.999), "weight_decay": 1e-2, "clip_norm": 1.0, "warmup_updates": 0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "ccsr_v1_stage1": {
        **COMMON | V1_OPTIMISER,
        **{"stage": 1, "family": "v1", "start_from": "hr", "precision": "fp32", "seed": 231},
        **{"learning_rate": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2},
        **{"global_batch_size": 4 * 16 * 3, "micro_batch_size": 16, "num_updates": 25000, "checkpoint_every": 500},
        **{"activation_checkpointing": True},
    },
    "ccsr_v1_stage2": {
        **COMMON | V1_OPTIMISER,
        **{"stage": 2, "family": "v1", "start_from": "hr", "precision": "fp32", "seed": 231},
        **{"num_steps": 45, "t_min": 0.3333},
        **{"learning_rate": 5e-6, "betas": (0.5, 0.9), "weight_decay": 0.0, "discriminator_learning_rate": 5e-6},
        **{"global_batch_size": 4 * 16 * 8, "micro_batch_size": 16, "num_updates": 60, "checkpoint_every": 20},
        **{"reconstruction": "l1", "perceptual": "lpips", "perceptual_start_update": 0, "gan_start_update": 1},
        **{"discriminator": "patch", "discriminator_width": 64},
        **{"gan_weight": 0.5, "adaptive": True, "divide_by_batch": True, "discriminator_start_update": 1},
    },
    "ccsr_v2_stage0": {
        **COMMON | V2_OPTIMISER,
        **{"stage": 0, "family": "v2", "precision": "bf16", "learning_rate": 5e-5},
        **{"global_batch_size": 4 * 4 * 6, "micro_batch_size": 4, "num_updates": 40000},
    },
    "ccsr_v2_stage1": {
        **COMMON | V2_OPTIMISER,
        **{"stage": 1, "family": "v2", "start_from": "hr", "precision": "bf16", "learning_rate": 5e-5, "seed": 0},
        **{"global_batch_size": 4 * 4 * 6, "micro_batch_size": 4, "num_updates": 20000, "checkpoint_every": 500},
    },
    "ccsr_v2_stage2": {
        **COMMON | V2_OPTIMISER,
        **{"stage": 2, "family": "v2", "start_from": "lr", "precision": "bf16", "num_steps": 1, "t_min": 0.5},
        **{"learning_rate": 5e-6, "discriminator_learning_rate": 5e-6},
        **{"global_batch_size": 4 * 2 * 8, "micro_batch_size": 2, "num_updates": 2000},
        **{"reconstruction": "l2", "perceptual": "lpips", "perceptual_start_update": 101, "gan_start_update": 101},
        **{"discriminator": "dino", "gan_weight": 0.05, "adaptive": False, "divide_by_batch": False},
        **{"discriminator_start_update": 0},
    },
    "stablesr_stage1": {
        **COMMON | V1_OPTIMISER,
        **{"stage": 1, "family": "stablesr", "precision": "fp32", "degradation": "stablesr"},
        **{"learning_rate": 5e-5, "betas": (0.9, 0.999), "weight_decay": 1e-2},
        **{"global_batch_size": 8 * 6 * 4, "micro_batch_size": 6},
    },
    "stablesr_stage2": {
        **COMMON | V1_OPTIMISER,
        **{"stage": 2, "family": "stablesr", "precision": "fp32", "degradation": None, "inputs": "latents"},
        **{"learning_rate": 5e-5, "betas": (0.5, 0.9), "weight_decay": 0.0, "discriminator_learning_rate": 5e-5},
        **{"global_batch_size": 4 * 1 * 8, "micro_batch_size": 1},
        **{"reconstruction": "l1", "perceptual": "lpips", "perceptual_start_update": 0, "gan_start_update": 501},
        **{"discriminator": "patch", "discriminator_width": 64, "discriminator_start_update": 501},
        **{"gan_weight": 0.025, "adaptive": False, "divide_by_batch": True},
    },
    "onestep": {
        **{"stage": 1, "family": "onestep", "crop_px": 512, "degradation": "realesrgan", "precision": "bf16"},
        **V2_OPTIMISER | {"learning_rate": 5e-5, "global_batch_size": 4 * 4, "micro_batch_size": 4},
        **{"reconstruction": "l2", "perceptual": "lpips", "perceptual_weight": 2.0, "divide_by_batch": False},
        "vsd": VsdConfig(negative_prompt=ONESTEP_NEGATIVE_PROMPT),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", TrainConfig)
    found: dict[str, Any] = {}
    for part in (config.runtime, config.decoder_loss, config.optimizer, config.model, config):
        found |= dict(part)
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert config.model.preset == "sd21"


def test_v1s_gan_starts_at_the_update_at_which_the_recorded_one_does() -> None:
    loss = load_config(CONFIGS / "ccsr_v1_stage2.yaml", TrainConfig).decoder_loss
    with np.load(RECORDED) as recorded:
        for update in (0, 1):
            assert (recorded[f"gen_gs{update}_disc_factor"] > 0) == (update >= loss.gan_start_update)
            assert (recorded[f"disc_gs{update}_loss"] > 0) == (update >= loss.discriminator_start_update)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_world_sizes_in_the_comment_are_the_legal_ones(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", TrainConfig)
    legal = legal_world_sizes(config.global_batch_size, config.runtime.micro_batch_size)
    others = ", ".join(str(size) for size in legal if size != 4)
    assert f"num_workers: 4             # or {others}\n" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_recipes_for_lsdir_depart_in_average_and_schedule_alone(stage: int) -> None:
    ours, published = (
        load_config(CONFIGS / folder / f"ccsr_v2_stage{stage}.yaml", TrainConfig) for folder in ("lsdir_ffhq", ".")
    )
    places = {name: getattr(published, name) for name in ("output", "data", "init_from")}
    optimizer = ours.optimizer.model_copy(update={"schedule": published.optimizer.schedule})
    assert ours.model_copy(update={**places, "ema": None, "optimizer": optimizer}) == published
    assert ours.ema is not None
    schedule = ours.optimizer.schedule
    assert (schedule.kind, getattr(schedule, "until", None)) == ("cosine", ours.num_updates)


@pytest.mark.parametrize("folder", [".", "lsdir_ffhq"])
def test_each_stage_starts_from_the_one_before(folder: str) -> None:
    chain = ("ccsr_v2_stage0", "ccsr_v2_stage1", "ccsr_v2_stage2")
    configs = [load_config(CONFIGS / folder / f"{name}.yaml", TrainConfig) for name in chain]
    for earlier, later in itertools.pairwise(configs):
        assert later.init_from == f"{earlier.output}/model"
