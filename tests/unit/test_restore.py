"""Restoring: run r's picture is a function of (model, LR, seed, key, r), whatever is computed beside it."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from photos import photo
from pydantic import ValidationError

from training.models import CcsrModel, ModelConfig, build_model
from training.restore import SamplingConfig, restore_runs

FAST = SamplingConfig(num_steps=4)


@pytest.fixture(scope="module", params=["v1", "v2"])
def model(request: pytest.FixtureRequest) -> CcsrModel:
    """A tiny model whose ControlNet has an effect: no weight of it is zero."""
    model = build_model(ModelConfig(family=request.param), seed=3)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.controlnet.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def restored(
    model: CcsrModel,
    runs: Sequence[int],
    *,
    size: tuple[int, int] = (32, 48),
    config: SamplingConfig = FAST,
    **changes: Any,
) -> list[np.ndarray]:
    lr = photo(size[0] // 4, size[1] // 4)
    return list(restore_runs(model, lr, size, config, **{"seed": 0, "key": "image", "runs": runs, **changes}))


def test_a_runs_picture_does_not_depend_on_the_other_runs(model: CcsrModel) -> None:
    """In float64, whose rounding is far below a grey level: what remains is which noise goes where."""
    exact = copy.deepcopy(model).to(dtype=torch.float64)
    reference = restored(exact, range(4), runs_at_once=1)
    for runs_at_once in (3, 8):
        for one, other in zip(reference, restored(exact, range(4), runs_at_once=runs_at_once), strict=True):
            assert (one == other).all()
    (alone,) = restored(exact, [3])
    assert (alone == reference[3]).all()
    last, first = restored(exact, [2, 0])
    assert (last == reference[2]).all()
    assert (first == reference[0]).all()


def test_in_float32_other_batches_move_single_levels_of_few_pixels(model: CcsrModel) -> None:
    """Matrix kernels add up in another order for another batch size: about 1e-6 in eps, 4e-5 of the levels by one."""
    reference = np.stack(restored(model, range(6), runs_at_once=1)).astype(int)
    assert (np.stack(restored(model, range(6), runs_at_once=1)) == reference).all()
    for runs_at_once in (2, 6):
        difference = np.abs(np.stack(restored(model, range(6), runs_at_once=runs_at_once)) - reference)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_runs_seeds_and_keys_give_other_pictures(model: CcsrModel) -> None:
    pictures = [
        *restored(model, range(3)),
        *restored(model, [0], seed=1),
        *restored(model, [0], key="other image"),
        *restored(model, [0], config=SamplingConfig(num_steps=4, sampler="uniform")),
        *restored(model, [0], config=SamplingConfig(num_steps=4, color_fix="none")),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_global_generator_is_neither_used_nor_moved(model: CcsrModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    (one,) = restored(model, [0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert (restored(model, [0])[0] == one).all()


@pytest.mark.parametrize("size", [(36, 52), (33, 47), (9, 70), (40, 40)])
@pytest.mark.parametrize("sampler", ["ccsr", "uniform"])
def test_any_size_comes_back_as_asked(model: CcsrModel, size: tuple[int, int], sampler: Any) -> None:
    lr = photo(max(2, size[0] // 4), max(2, size[1] // 4))
    config = SamplingConfig(num_steps=3, sampler=sampler)
    for image in restore_runs(model, lr, size, config, seed=0, key="x", runs=range(2)):
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8


def test_padding_leaves_a_picture_that_needs_none_alone(model: CcsrModel) -> None:
    """Colour is matched within the picture, not within its padding: a flat LR stays flat in its mean."""
    lr = np.full((9, 13, 3), (200, 90, 30), np.uint8)
    (image,) = restore_runs(model, lr, (36, 52), FAST, seed=0, key="x", runs=[0])
    assert np.abs(image.reshape(-1, 3).mean(0) - (200, 90, 30)).max() < 2


def test_no_runs_give_no_pictures(model: CcsrModel) -> None:
    assert restored(model, []) == []


def test_the_truncation_must_be_ordered() -> None:
    with pytest.raises(ValidationError, match="t_min"):
        SamplingConfig(t_max=0.3, t_min=0.3)
